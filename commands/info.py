"""`s4v info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..terminal import print_lines
from .front import Json, run_command, say


def info(store: Annotated[Path, typer.Argument(help="The store.")], as_json: Json = False) -> None:
    """Say what a store holds."""
    with run_command("info", as_json) as result:
        from ..store.info import describe_poor_layers, describe_store, render_info
        from ..store.reader import open_store

        facts = describe_store(open_store(store))
        result.update(facts)
        if not as_json:
            print_lines(*render_info(facts))
            if (warning := describe_poor_layers(facts)) is not None:
                say(warning)
