"""Evaluation: softmax over classes for each clip, averaged over a video's clips, then accuracy."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..errors import ConfigError, EnvironmentFailedError, StoreMismatchError, StoreNotFoundError
from ..store._files import write_json
from ..store.manifest import write_table
from ..store.reader import StoreReader, open_store
from .clips import (
    ClipLoader,
    LabelledRows,
    codec_for,
    find_labelled_rows,
    plan_evaluation,
    resolve_clip_frames,
)
from .run import Run, load_checkpoint, open_run, require_matching_store

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of the videos of one split."""

    rows: np.ndarray
    """(n,) rows of the store."""
    labels: np.ndarray
    """(n,)."""
    probabilities: np.ndarray
    """(n, classes) float32, averaged over clips."""
    loss: float
    """Mean negative log-likelihood of the averaged probabilities."""

    @property
    def predictions(self) -> np.ndarray:
        """(n,) the likeliest label of each video; of equal ones the first."""
        return self.probabilities.argmax(axis=1)

    def top(self, k: int) -> float:
        """Share of videos whose label is among the k likeliest; ties count against us."""
        own = np.take_along_axis(self.probabilities, self.labels[:, None], axis=1)
        not_below = (~(self.probabilities < own)).sum(axis=1)  # itself among them
        return float((not_below <= k).mean())

    def confusion(self) -> np.ndarray:
        """(classes, classes) counts: rows are labels, columns predictions."""
        size = self.probabilities.shape[1]
        return np.bincount(self.labels * size + self.predictions, minlength=size * size).reshape(size, size)


@torch.inference_mode()
def evaluate_head(
    head: torch.nn.Module,
    store: StoreReader,
    data: LabelledRows,
    *,
    layers: tuple[int, ...],
    num_frames: int,
    batch_size: int,
    device: torch.device,
    num_clips: int | None = None,
    is_backwards: bool = False,
) -> Evaluation:
    """Score videos with a head that sits on `device`; it is put into evaluation mode for the time.

    Args:
        head: One of `train.heads`.
        store: Where the tokens are.
        data: Which videos.
        layers: Backbone blocks that the head reads.
        num_frames: T.
        batch_size: Clips in a batch.
        device: Where the head is.
        num_clips: Clips of a video; None takes those that the store recorded.
        is_backwards: Show the head every clip from its last frame to its first.

    Raises:
        EnvironmentFailedError: If a score is not finite.
    """
    was_training = head.training
    head.eval()
    arrays: tuple[str, ...] = head.arrays  # type: ignore[assignment]
    plans, owner = plan_evaluation(data, num_frames=num_frames, batch_size=batch_size, num_clips=num_clips)
    if is_backwards:
        plans = [replace(plan, places=plan.places[:, ::-1]) for plan in plans]
    codec = codec_for(store, layers, device) if "patches" in arrays else None
    loader = ClipLoader(store, arrays=arrays, layers=layers, device=device)
    scores = [
        head(batch.pixels, batch.patches, batch.cls, codec).float().softmax(dim=-1).cpu().numpy()
        for batch in loader.load(plans)
    ]
    head.train(was_training)
    clip_scores = np.concatenate(scores)
    if not np.isfinite(clip_scores).all():
        raise EnvironmentFailedError("the head's scores are not finite: its weights or its input hold NaN or infinity")
    sums = np.zeros((len(data), clip_scores.shape[1]), dtype=np.float64)
    np.add.at(sums, owner, clip_scores)
    probabilities = (sums / np.bincount(owner, minlength=len(data))[:, None]).astype(np.float32)
    own = np.take_along_axis(probabilities, data.labels[:, None], axis=1)
    loss = float(-np.log(np.maximum(own, np.finfo(np.float32).tiny)).mean())
    return Evaluation(data.rows, data.labels, probabilities, loss)


def evaluate_run(
    run_path: str | Path,
    *,
    features: str | Path | None = None,
    split: str = "val",
    num_clips: int | None = None,
    checkpoint: str = "best",
    is_backwards: bool = False,
    device: torch.device | None = None,
    with_page: bool = False,
    report: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Evaluate a run on a split of a store, and leave the figures and all predictions in the run's folder.

    Args:
        run_path: The run's folder.
        features: A store; None takes the one that the run was trained on.
        split: Which videos.
        num_clips: Clips of a video; None takes those that the store recorded.
        checkpoint: `best` or `last`.
        is_backwards: Play every clip backwards; files are named eval_SPLIT_backwards and so on.
        device: Where to compute; None takes the CPU.
        with_page: Write results_SPLIT.html too.
        report: Told about progress.

    Returns:
        top1, top5 (when there are more than 5 classes), mean_class_accuracy, calibration_error, loss, videos,
        per_class, confusion, and more.

    Raises:
        StoreMismatchError: If the store does not fit the run, or the split has no good, labelled video.
        ConfigError: If the run is of retrieval, or was imported without a store and none is named.
    """
    if open_run(run_path).head.task == "retrieval":
        raise ConfigError(
            f"{run_path} is a retrieval run: it embeds frames and knows no classes; "
            "s4v.train.retrieval.evaluate_retrieval_run evaluates it"
        )
    run, store = open_run_and_store(run_path, features)
    if not run.classes:
        _log.warning(
            "%s names no classes: taken in the order in which %s lists them. `s4v import --features` keeps them.",
            run.path,
            store.path,
        )
        run = replace(run, classes=store.classes.names)
    data = _relabel(find_labelled_rows(store, split), store, run)
    if not len(data):
        splits = ", ".join(sorted(set(store.input_columns()["split"].to_pylist())))
        raise StoreMismatchError(f"{store.path} has no good, labelled video in split {split!r}; it has {splits}")
    resolve_clip_frames(run.frames, data.num_cached_frames, store)
    fewest = int(data.num_cached_frames.min())
    if num_clips is not None and num_clips * run.frames > fewest:
        raise StoreMismatchError(
            f"{num_clips} clips of {run.frames} frames were asked for, rows of {store.path} hold as few as {fewest} "
            f"frames: at most --clips {fewest // run.frames}"
        )
    device = device or torch.device("cpu")
    report("evaluating", 0, len(data))
    head = load_checkpoint(run, checkpoint).to(device)
    result = evaluate_head(
        head,
        store,
        data,
        layers=run.head.layers,
        num_frames=run.frames,
        batch_size=run.config["batch_size"],
        device=device,
        num_clips=num_clips,
        is_backwards=is_backwards,
    )
    confusion = result.confusion()
    per_class = describe_classes(result, run.classes)
    figures = {
        "run": str(run.path),
        "store": str(store.path),
        "split": split,
        "is_backwards": is_backwards,
        "checkpoint": checkpoint,
        "videos": len(data),
        "clips_per_video": num_clips if num_clips is not None else "as recorded",
        **accuracy_figures(result),
        "mean_class_accuracy": sum(one["accuracy"] for one in per_class) / len(per_class),
        "calibration_error": find_calibration_error(result),
        "loss": result.loss,
        "per_class": per_class,
        "classes": list(run.classes),
        "confusion": confusion.tolist(),
    }
    name = f"{split}_backwards" if is_backwards else split
    write_json(run.path / f"eval_{name}.json", figures)
    write_table(run.path / f"predictions_{name}.parquet", _prediction_table(result, store, run))
    if with_page:
        from .results import write_results  # matplotlib takes a second

        write_results(run, store, result, figures, name)
    return figures


def open_run_and_store(run_path: str | Path, features: str | Path | None) -> tuple[Run, StoreReader]:
    """A run and a store that fits it: the one named, or the one that it was trained on.

    Raises:
        ConfigError: If the run was imported without a store and none is named.
        StoreNotFoundError: If there is no such store.
        StoreMismatchError: If they do not fit.
    """
    run = open_run(run_path)
    if features is None and run.source["store"] is None:
        raise ConfigError(f"{run.path} was imported without a store: name the one to evaluate on with --features")
    try:
        store = open_store(features if features is not None else run.source["store"])
    except StoreNotFoundError as error:
        if features is not None:
            raise
        raise StoreNotFoundError(f"the run's own store has gone: {error} Name where it is now: --features.") from error
    require_matching_store(run, store)
    return run, store


def find_device(name: str) -> torch.device:
    """`auto` takes a CUDA GPU where there is one, else the CPU; other names are torch's.

    Raises:
        ConfigError: If there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name} is not available here ({reason}). Use --device auto.") from error


def accuracy_figures(result: Evaluation) -> dict[str, float]:
    """top1, and top5 where there are more than 5 classes."""
    figures = {"top1": result.top(1)}
    if result.probabilities.shape[1] > 5:
        figures["top5"] = result.top(5)
    return figures


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Answers of about the same probability."""

    count: int
    confidence: float
    """Their mean probability."""
    accuracy: float
    """The share of them that is right."""


def find_calibration(result: Evaluation, num_bins: int = 15) -> list[CalibrationBin]:
    """Answers in bins of equal width by the probability that they were given with; empty ones left out."""
    confidence = result.probabilities.max(axis=1).astype(np.float64)
    right = result.predictions == result.labels
    places = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    chosen = (places == place for place in np.unique(places))
    return [CalibrationBin(int(c.sum()), float(confidence[c].mean()), float(right[c].mean())) for c in chosen]


def find_calibration_error(result: Evaluation) -> float:
    """How far, on average over answers, a bin's accuracy is from its confidence.

    Source:
        Expected calibration error: Guo et al., https://arxiv.org/abs/1706.04599, 15 bins.
    """
    bins = find_calibration(result)
    return sum(one.count * abs(one.confidence - one.accuracy) for one in bins) / len(result.labels)


def describe_classes(result: Evaluation, names: Sequence[str]) -> list[dict[str, Any]]:
    """Of each class that has a video: class, videos, accuracy (recall), precision (None where it was never said)."""
    counts = result.confusion()
    said = counts.sum(axis=0)
    return [
        {
            "class": names[place],
            "videos": int(own.sum()),
            "accuracy": float(own[place] / own.sum()),
            "precision": float(own[place] / said[place]) if said[place] else None,
        }
        for place, own in enumerate(counts)
        if own.sum()
    ]


def find_interval(share: float, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of so many.

    Source:
        Wilson, 1927, https://doi.org/10.1080/01621459.1927.10502953
    """
    if not total:
        return 0.0, 1.0
    z = 1.96
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    reach = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def _relabel(data: LabelledRows, store: StoreReader, run: Run) -> LabelledRows:
    """Labels in the run's class order: a class is its name, wherever a store lists it."""
    if store.classes.names == run.classes or not len(data):
        return data
    place = np.asarray([run.classes.index(name) for name in store.classes.names])
    return replace(data, labels=place[data.labels])


def _prediction_table(result: Evaluation, store: StoreReader, run: Run) -> pa.Table:
    ids = store.read_manifest(["video_id"])["video_id"].take(result.rows)
    names = np.asarray(run.classes)
    return pa.table(
        {
            "video_id": ids,
            "class_name": names[result.labels],
            "predicted": names[result.predictions],
            "probability": result.probabilities.max(axis=1),
            "is_correct": result.predictions == result.labels,
        }
    )
