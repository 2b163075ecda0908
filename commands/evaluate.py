"""`s4v eval`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..terminal import print_lines
from ._options import is_typed
from .front import Device, Json, hush_all_but_first, run_command


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
    classes: Annotated[
        Path | None,
        typer.Option(help="A file with a class a line, of a head that classifies by text. [the run's, or the store's]"),
    ] = None,
    zero_shot_average: Annotated[
        bool, typer.Option("--zero-shot-average", help="Of such a head: average its logits with the frozen backbone's.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Evaluate a run on a split; figures and predictions are left in the run's folder.

    Under torchrun the processes share the clips.
    """
    is_first = hush_all_but_first()
    with run_command("eval", as_json and is_first) as result:
        from ..train.run_folder import find_newest_run, open_run

        path = run or find_newest_run()
        from ..device import find_device
        from ..train.evaluate import evaluate_run
        from ..train.scorer import join_team
        from ..train.tasks import find_task
        from ..train.tasks.contract import TextOptions

        with join_team() as team:
            figures = evaluate_run(
                path,
                features=features,
                split=split if is_typed(context, "split") else None,
                num_clips=clips,
                checkpoint=checkpoint,
                is_backwards=backwards,
                of_texts=TextOptions(classes=classes, with_zero_shot=zero_shot_average),
                with_dual_softmax=dual_softmax,
                device=find_device(device, own_gpu=int(os.environ["LOCAL_RANK"]) if team.size > 1 else None),
                with_page=True,
                team=team,
            )
        result.update(figures)
        if is_first and not as_json:
            print_lines(*find_task(open_run(path).shape.task).render(path, figures))
