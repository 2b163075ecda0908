"""`s4v import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..terminal import print_lines
from ._options import parse_numbers
from .front import Json, run_command


def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="A released checkpoint of Side4Video, TDS-CLIP or DiST.")],
    out: Annotated[Path, typer.Option(help="The run's folder.")],
    layers: Annotated[str | None, typer.Option(help="Backbone blocks it reads: 1,3,5. [as the file tells]")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a clip. [as the file tells, else 8]")] = None,
    features: Annotated[Path | None, typer.Option(help="A store of its backbone, to check it against.")] = None,
    classes: Annotated[Path | None, typer.Option(help="Names of its classes, one a line. [the store's]")] = None,
    as_json: Json = False,
) -> None:
    """Make a run from a checkpoint that the paper's authors released."""
    with run_command("import", as_json) as result:
        layer_numbers = parse_numbers("--layers", layers)
        from ..train.paper import import_checkpoint as importing
        from ..train.paper.checkpoint_file import describe_unused

        summary = importing.import_checkpoint(
            checkpoint, out, layers=layer_numbers, frames=frames, features=features, classes=classes
        )
        result.update(summary)
        if not as_json:
            network, variant, checked = (
                summary["network"],
                summary["variant"],
                ", ".join(summary["checked"]) or "nothing: no --features",
            )
            print_lines(
                f"{out}: {network}, {variant['task']} beside {variant['family'].upper()}, layers {summary['layers']}",
                f"checked against the store: {checked}",
                f"not used: {describe_unused(summary['unused'])}",
            )
