"""`s4v world`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..demo.long_videos import write_long_world
from ..demo.world import ANNOTATIONS_NAME, MOMENTS_NAME, WorldConfig, write_world
from ..errors import ConfigError
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
_NUM_LONG = {"num_train": 400, "num_val": 100, "num_novel": 0}
"""Long videos where nobody says how many."""
_NUM_QUERIES = 4


@takes_options(WorldConfig, spellings=_SPELLINGS)
def world(
    options: Options,
    out: Annotated[Path, typer.Option(help="Folder for videos and annotations.")],
    is_long: Annotated[
        bool,
        typer.Option(
            "--long",
            help="Videos of a minute with several events, and queries with windows; 400 of training and 100 held out "
            "where --train, --val and --novel do not say.",
        ),
    ] = False,
    num_queries: Annotated[
        int | None, typer.Option("--queries", help=f"Of each long video ({_NUM_QUERIES}).", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the small world that the demo runs on: generated videos, labels and captions."""
    with run_command("world", as_json) as result:
        fields = options.parse()
        if is_long:
            fields |= {name: count for name, count in _NUM_LONG.items() if not options.is_typed(name)}
        elif num_queries is not None:
            raise ConfigError("--queries is for long videos: add --long, or leave it out")
        config = WorldConfig(**fields)
        with show_progress("world", "writing videos") as report:
            if is_long:
                videos = write_long_world(out, config, _NUM_QUERIES if num_queries is None else num_queries, report)
            else:
                videos = write_world(out, config, report)
        result.update(out=str(out), videos=videos)
        if not as_json:
            print_lines(
                f"{out}: {', '.join(f'{count} {split}' for split, count in videos.items())}",
                f"read them with: s4v extract --model tiny-clip --dataset table --root {out} "
                + (
                    f"--annotations {out / MOMENTS_NAME} --sampling fps:2 --resize 224"
                    if is_long
                    else f"--annotations {out / ANNOTATIONS_NAME} --column label=shape_motion --resize 224"
                ),
            )
