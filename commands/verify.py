"""`s4v verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..progress import show_progress
from ..terminal import print_lines
from .front import EXIT_DAMAGE, EXIT_STRICT, Json, run_command, say


def verify(
    store: Annotated[Path, typer.Argument(help="The store.")],
    sources: Annotated[
        bool, typer.Option("--sources", help="Compare rows with the videos they were made of, by their bytes.")
    ] = False,
    root: Annotated[Path | None, typer.Option(help="Where those videos lie. [where they lay at extraction]")] = None,
    record: Annotated[
        bool, typer.Option("--record", help="With --sources: note what lies there for rows that know no source.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 when a video was replaced.")] = False,
    as_json: Json = False,
) -> None:
    """Read a whole store back against its checksums and its manifest; exits with 4 when damage is found."""
    changed: list[str] = []
    with run_command("verify", as_json) as result:
        if not sources and (record or root is not None):
            raise ConfigError("--root and --record are for --sources: add it, or leave them out")
        with show_progress("verify", "checking the hashes") as report:
            from ..store.info import describe_rows, describe_unfinished, try_count_rows
            from ..store.reader import open_store
            from ..store.verify import render_damage, verify_store

            opened = open_store(store)
            damage = verify_store(opened, report)
            counts = try_count_rows(opened)
            rows = None if counts is None else describe_rows(counts.rows, counts.files)
            lines = render_damage(store, damage, rows)
            if sources:
                from ..extract.changed_rows import render_sources, verify_sources

                facts = verify_sources(opened, root, report, with_record=record)
                changed = facts["changed"]
                result.update(sources=facts)
                lines += render_sources(store, facts)
        result.update(store=str(store), damage=[asdict(one) for one in damage])
        if counts is not None:
            result.update(videos=counts.rows, files=counts.files)
        if not as_json:
            print_lines(*lines)
        if counts is not None and (lack := describe_unfinished(store, counts.rows)) is not None:
            say(lack)
    if damage:
        raise typer.Exit(EXIT_DAMAGE)
    if strict and changed:
        raise typer.Exit(EXIT_STRICT)
