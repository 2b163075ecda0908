"""`s4v scan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..extract.config import ExtractConfig
from ..extract.datasets import default_paths
from ..progress import show_progress
from ..terminal import print_lines
from ._extraction import DATA_FIELDS, DECODING_FIELDS, spellings_of
from ._options import Options, takes_options
from .front import EXIT_ENVIRONMENT, EXIT_STRICT, LOADING, Json, Strict, run_command

_FIELDS = ("dataset", *DATA_FIELDS, *DECODING_FIELDS)


@takes_options(ExtractConfig, only=_FIELDS, spellings=spellings_of(*_FIELDS))
def scan(
    options: Options,
    out: Annotated[Path | None, typer.Option(help="Table of all videos. [scan-DATASET.parquet]")] = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Decode what an extraction would decode, and say of each file what its row would say."""
    with run_command("scan", as_json) as result:
        values = options.parse()
        values["root"], _ = default_paths(values["dataset"], values["root"], None)
        with show_progress("scan", LOADING) as report:
            config = ExtractConfig(model="none", out=Path(), **values)
            from ..extract.scan import render_scan, scan_dataset

            path = out or Path(f"scan-{config.root.resolve().name}.parquet")
            summary = scan_dataset(config, path, report)
        result.update(summary)
        if not as_json:
            print_lines(*render_scan(summary, path))
    if summary["pending"]:
        raise typer.Exit(EXIT_ENVIRONMENT)
    if strict and summary["failed"]:
        raise typer.Exit(EXIT_STRICT)
