"""`s4v world`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..demo.world import ANNOTATIONS_NAME, WorldConfig, write_world
from ..progress import show_progress
from ..terminal import print_lines
from ._options import Options, Spelling, takes_options
from .front import Json, run_command

_SPELLINGS = {
    "num_train": Spelling(option="train"),
    "num_val": Spelling(option="val"),
    "num_novel": Spelling(option="novel"),
    "num_pebbles": Spelling(option="pebbles"),
    "shake_px": Spelling(option="shake"),
}


@takes_options(WorldConfig, spellings=_SPELLINGS)
def world(
    options: Options,
    out: Annotated[Path, typer.Option(help="Folder for videos and annotations.")],
    as_json: Json = False,
) -> None:
    """Write the small world that the demo runs on: generated videos, labels and captions."""
    with run_command("world", as_json) as result:
        config = WorldConfig(**options.parse())
        with show_progress("world", "writing videos") as report:
            videos = write_world(out, config, report)
        result.update(out=str(out), videos=videos)
        if not as_json:
            print_lines(
                f"{out}: {', '.join(f'{count} {split}' for split, count in videos.items())}",
                f"read them with: s4v extract --model tiny-clip --dataset table --root {out} "
                f"--annotations {out / ANNOTATIONS_NAME} --column label=shape_motion --resize 224",
            )
