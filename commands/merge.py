"""`s4v merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..progress import show_progress
from ..terminal import print_lines
from .front import Json, run_command, say


def merge(
    stores: Annotated[list[Path], typer.Argument(help="Stores that were made with --part from one skeleton.")],
    out: Annotated[Path, typer.Option(help="The store to write.")],
    as_json: Json = False,
) -> None:
    """Join the parts that machines made of one store."""
    with run_command("merge", as_json) as result:
        with show_progress("merge", "checking the stores") as report:
            from ..store.info import count_rows, describe_rows, describe_unfinished
            from ..store.merge import merge_stores
            from ..store.reader import open_store

            merge_stores(stores, out, report)
            counts = count_rows(open_store(out))
        result.update(store=str(out), videos=counts.rows, files=counts.files)
        if not as_json:
            print_lines(f"{out}: {describe_rows(counts.rows, counts.files)}")
            if (lack := describe_unfinished(out, counts.rows)) is not None:
                say(lack)
