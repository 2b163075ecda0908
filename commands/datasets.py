"""`s4v datasets`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..terminal import print_lines
from .front import Json, run_command


def datasets(
    name: Annotated[str | None, typer.Argument(help="One data set. [a list of all]")] = None,
    root: Annotated[Path | None, typer.Option(help="Check this folder against what is known.")] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="A table, a list, or the folder of the annotation files. [below the root]")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="split1 to split3, 1k-A-9k, ...: see s4v datasets. [the data set's first]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what is known of each data set, or what of one is in a folder and what is missing."""
    with run_command("datasets", as_json) as result:
        from ..extract.datasets import FACTS, check_dataset_name, check_folder
        from ..extract.datasets.report import render_check, render_facts

        if name is None:
            result.update(datasets=[asdict(facts) for facts in FACTS.values()])
            if not as_json:
                for facts in FACTS.values():
                    print_lines(f"{facts.name:8} {facts.title:24} {', '.join(facts.protocols)}".rstrip())
            return
        check_dataset_name(name)
        if root is not None:
            result.update(check_folder(name, root, annotations=annotations, protocol=protocol))
        elif name in FACTS:
            result.update(asdict(FACTS[name]))
        else:
            raise ConfigError(f"{name} is no public data set: s4v datasets knows {', '.join(FACTS)}")
        if not as_json:
            print_lines(*(render_facts(result) if root is None else render_check(result)))
