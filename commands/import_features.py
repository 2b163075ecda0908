"""`s4v import-features`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..extract.config import ExtractConfig
from ..extract.datasets import default_paths
from ..progress import show_progress
from ..terminal import print_lines
from ._extraction import DATA_FIELDS, spellings_of
from ._options import Options, takes_options
from .front import LOADING, Json, run_command

_FIELDS = (
    *("model", "dataset", "out", *DATA_FIELDS, "splits", "layers", "dtype", "channels", "sampling"),
    *("text_layers", "text_words", "weights", "device", "calibration_videos", "seed", "overwrite"),
)


@takes_options(ExtractConfig, only=_FIELDS, spellings=spellings_of(*_FIELDS))
def import_features(
    options: Options,
    folder: Annotated[Path, typer.Argument(help="Holds clip_b32_vid_k4 and clip_b32_txt_k4, unpacked.")],
    as_json: Json = False,
) -> None:
    """Make a store of the features that R2-Tuning's authors released; run again to continue."""
    with run_command("import-features", as_json) as result:
        values = options.parse()
        values["root"], values["out"] = default_paths(values["dataset"], values["root"], values["out"])
        values["with_pixels"] = False
        if not options.is_typed("layers"):
            values["layers"] = "last4"
        values["text_layers"], values["text_words"] = values["text_layers"] or "last4", values["text_words"] or 77
        with show_progress("import-features", LOADING) as report:
            from ..extract.released_features import import_features as importing
            from ..store.info import describe_rows, render_reasons

            summary = importing(ExtractConfig(**values), folder, report)
        result.update(store=str(summary.store), videos=summary.videos, failed=summary.failed)
        if not as_json:
            lines = render_reasons(summary.failed, f"s4v info {summary.store}")
            print_lines(f"{summary.store}: {describe_rows(summary.videos, summary.files)}", *lines)
