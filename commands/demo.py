"""`s4v demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..terminal import print_lines
from .front import Json, run_command, say


def demo(
    out: Annotated[Path, typer.Option(help="Folder for videos, store, runs and report.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(help="Train each kind this often, for error bars.")] = 1,
    full: Annotated[bool, typer.Option("--full", help="Pixels only, tokens only and zero-shot, too.")] = False,
    as_json: Json = False,
) -> None:
    """Try the whole pipeline on generated videos, without any download; writes a report."""
    with run_command("demo", as_json) as result:
        from ..demo.pipeline import run_demo
        from ..train.allocator import keep_freed_memory

        keep_freed_memory()
        figures = run_demo(out, say, seeds=seeds, full=full)
        result.update(figures)
        if not as_json:
            for name, method in figures["methods"].items():
                by_seed = method["top1_by_seed"]
                print_lines(f"{name:13} {sum(by_seed) / len(by_seed):.1%}")
            print_lines(f"{'chance':13} {figures['chance']:.1%}", f"report: {figures['report']}")
