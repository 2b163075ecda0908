"""`s4v eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..terminal import print_lines
from ._options import is_typed
from .front import Device, Json, run_command


def evaluate(
    context: typer.Context,
    run: Annotated[Path | None, typer.Option(help="The run. [the newest in runs/]")] = None,
    features: Annotated[Path | None, typer.Option(help="The store. [the run's own]")] = None,
    split: Annotated[str, typer.Option(help="Which videos.")] = "val",
    clips: Annotated[int | None, typer.Option(help="Clips of a video, of recognition. [as the store recorded]")] = None,
    dual_softmax: Annotated[
        bool, typer.Option("--dual-softmax", help="Retrieval: also with scores that look at all queries at once.")
    ] = False,
    checkpoint: Annotated[str, typer.Option(help="best (chosen on the validation split) or last.")] = "best",
    backwards: Annotated[
        bool, typer.Option("--backwards", help="Play every clip backwards: what is order worth?")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Evaluate a run on a split; figures and predictions are left in the run's folder."""
    with run_command("eval", as_json) as result:
        from ..train.run_folder import find_newest_run, open_run

        path = run or find_newest_run()
        from ..device import find_device
        from ..train.evaluate import evaluate_run
        from ..train.tasks import find_task

        figures = evaluate_run(
            path,
            features=features,
            split=split if is_typed(context, "split") else None,
            num_clips=clips,
            checkpoint=checkpoint,
            is_backwards=backwards,
            with_dual_softmax=dual_softmax,
            device=find_device(device),
            with_page=True,
        )
        result.update(figures)
        if not as_json:
            print_lines(*find_task(open_run(path).shape.task).render(path, figures))
