"""`s4v eval`: a run on a split of a store, by its task."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from .run_folder import Run, open_run, open_store_of_run
from .scorer import ALONE, Team
from .tasks import find_task
from .tasks.contract import EvaluationOptions, TextOptions

_log = logging.getLogger(__name__)

_OWN_CLASSES = TextOptions()


def evaluate_run(
    run_path: str | Path,
    *,
    features: str | Path | None = None,
    split: str | None = None,
    num_clips: int | None = None,
    checkpoint: str = "best",
    is_backwards: bool = False,
    with_dual_softmax: bool = False,
    device: torch.device | None = None,
    with_page: bool = False,
    report: Callable[[str, int, int], None] = lambda *_: None,
    team: Team = ALONE,
    of_texts: TextOptions = _OWN_CLASSES,
) -> dict[str, Any]:
    """Evaluate a run on a split of a store, and leave the figures and all predictions in the run's folder.

    Args:
        run_path: The run's folder.
        features: A store; None takes the one that the run was trained on.
        split: Which videos; None takes `val` or, where it has nothing to evaluate, the first split of the store that
            has and that the run was not trained on.
        num_clips: Clips of a video, of recognition; None takes those that the store recorded.
        checkpoint: `best` or `last`.
        is_backwards: Play every clip backwards; files are named eval_SPLIT_backwards and so on.
        with_dual_softmax: Of retrieval: add figures of scores that look at all queries of the split at once.
        device: Where to compute; None takes the CPU.
        with_page: Write results_SPLIT.html too, of recognition.
        report: Told about progress.
        team: Processes that share the clips; the first one writes.
        of_texts: Of a network that classifies by text: other classes, and an average with the frozen backbone. Files of
            such an evaluation are named after it.

    Returns:
        What the task's `evaluate_run` returns: see train/tasks.

    Raises:
        StoreMismatchError: If the store does not fit the run, or the split has nothing to evaluate.
        ConfigError: If an option has no effect on the run's task, or it was imported without a store and none is named.
        EnvironmentFailedError: If a score is not finite, or the device is too small.
    """
    if num_clips is not None and num_clips < 1:
        raise ConfigError(f"--clips must be at least 1; found {num_clips}")
    run = open_run(run_path)
    task = find_task(run.shape.task)
    split = split or _choose_split(run, features)
    options = EvaluationOptions(
        features=features,
        split=split,
        num_clips=num_clips,
        checkpoint=checkpoint,
        is_backwards=is_backwards,
        of_texts=of_texts,
        with_dual_softmax=with_dual_softmax,
        device=device,
        with_page=with_page,
        report=report,
        team=team,
    )
    task.check_evaluation(options)
    return task.evaluate_run(run, options)


def _choose_split(run: Run, features: str | Path | None) -> str:
    """The split that is evaluated where nobody names one; another one than usual is told."""
    usual = EvaluationOptions().split
    store, task = open_store_of_run(run, features), find_task(run.shape.task)
    if len(task.find_rows(store, usual)):
        return usual
    splits = set(store.read_manifest(["split"])["split"].to_pylist()) - {run.config.get("train_split", "train"), usual}
    # `test` before others: it is what papers report.
    for split in sorted(splits, key=lambda split: (split != "test", split)):
        if len(task.find_rows(store, split)):
            _log.warning("%s has nothing to evaluate in split %s: evaluating %s (--split)", store.path, usual, split)
            return split
    return usual
