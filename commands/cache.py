"""`s4v cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..files import describe_bytes
from ..terminal import print_lines
from .front import Json, run_command


def cache(
    folder: Annotated[Path, typer.Argument(help="What --cache named.", metavar="DIR")],
    clear: Annotated[bool, typer.Option("--clear", help="Remove all copies.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a cache of shards holds, or clear it; trainings that read through it go on."""
    with run_command("cache", as_json) as result:
        from ..store.shard_cache import clear_cache, describe_cache, render_cache

        removed = clear_cache(folder) if clear else None
        facts = describe_cache(folder)
        result.update(facts, removed_bytes=removed)
        if not as_json:
            print_lines(*([] if removed is None else [f"{describe_bytes(removed)} removed"]), *render_cache(facts))
