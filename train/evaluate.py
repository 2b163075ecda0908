"""Evaluation: softmax over classes for each clip, averaged over a video's clips, then accuracy."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from ..errors import ConfigError, EnvironmentFailedError, StoreMismatchError, StoreNotFoundError
from ..files import write_json
from ..store.manifest import write_table
from ..store.reader import StoreReader, open_store
from .clips import (
    ClipLoader,
    ClipPlan,
    LabelledRows,
    codec_for,
    find_labelled_rows,
    plan_evaluation,
    resolve_clip_frames,
)
from .run_folder import Run, load_checkpoint, open_run, require_matching_store

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Team:
    """The processes that share an evaluation, and how each of them computes."""

    rank: int = 0
    """Of this one."""
    size: int = 1
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    """The precision of the pass: what the head was trained in."""

    def take(self, plans: Sequence[ClipPlan]) -> list[ClipPlan]:
        """This process's share of the batches; they are as large as those of one process, so scores are the same."""
        return list(plans[self.rank :: self.size])

    def gather(self, parts: list[np.ndarray]) -> list[np.ndarray]:
        """What every process made of its share, as all of them see it: in the order of the batches."""
        if self.size == 1:
            return parts
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, parts)
        return [found[place % self.size][place // self.size] for place in range(sum(map(len, found)))]


ALONE = Team()


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
def run_head(
    head: torch.nn.Module,
    store: StoreReader,
    plans: Sequence[ClipPlan],
    *,
    layers: tuple[int, ...],
    device: torch.device,
    is_backwards: bool = False,
    team: Team = ALONE,
    finish: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float,
) -> np.ndarray:
    """What a head says of planned clips, in their order; it is put into evaluation mode for the time.

    Args:
        head: It sits on `device`.
        store: Where the tokens are.
        plans: Batches of clips.
        layers: Backbone blocks that the head reads.
        device: Where the head is.
        is_backwards: Show it every clip from its last frame to its first.
        team: Who shares the batches; every process gets the result of all.
        finish: What becomes of the output of a batch, on the device.
    """
    was_training = head.training
    head.eval()
    arrays: tuple[str, ...] = head.arrays  # type: ignore[assignment]
    if is_backwards:
        plans = [replace(plan, places=plan.places[:, ::-1]) for plan in plans]
    codec = codec_for(store, layers, device) if "patches" in arrays else None
    loader = ClipLoader(store, arrays=arrays, layers=layers, device=device)
    parts = []
    for batch in loader.load(team.take(plans)):
        with team.autocast():
            output = head(batch.pixels, batch.patches, batch.cls, codec)
        parts.append(finish(output.float()).cpu().numpy())
    head.train(was_training)
    return np.concatenate(team.gather(parts))


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
    team: Team = ALONE,
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
        team: Who shares the clips, and in which precision; every process gets the whole result.

    Raises:
        EnvironmentFailedError: If a score is not finite.
        StoreMismatchError: If a recorded clip holds fewer than T frames.
    """
    if num_clips is None:
        require_long_clips(data, num_frames, store)
    plans, owner = plan_evaluation(data, num_frames=num_frames, batch_size=batch_size, num_clips=num_clips)
    clip_scores = run_head(
        head,
        store,
        plans,
        layers=layers,
        device=device,
        is_backwards=is_backwards,
        team=team,
        finish=partial(torch.softmax, dim=-1),
    )
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
        StoreMismatchError: If the store does not fit the run, its clips are shorter than the run's, or the split has no
            good, labelled video.
        ConfigError: If the run is of retrieval, or was imported without a store and none is named.
        EnvironmentFailedError: If a score is not finite, or the device is too small.
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
    if num_clips is None:
        warn_of_thinned_clips(data, run.frames, store)
    device = device or torch.device("cpu")
    report("evaluating", 0, len(data))
    with explain_full_device("evaluate with --device cpu"):
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
            team=Team(autocast=autocast_as_trained(run, device)),
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
        from .tasks.recognition_page import write_results  # matplotlib takes a second

        write_results(run, store, result, figures, name)
    return figures


def find_clip_lengths(data: LabelledRows, *, only_first: bool = False) -> np.ndarray:
    """Frames of each recorded evaluation clip, or of each row's first."""
    clips = (row[:1] if only_first else row for row in data.eval_clips)
    return np.asarray([len(clip) for row in clips for clip in row], dtype=np.int64)


def require_long_clips(data: LabelledRows, num_frames: int, store: StoreReader, *, only_first: bool = False) -> None:
    """Refuse recorded evaluation clips that are shorter than a head's: frames would be shown twice.

    Raises:
        StoreMismatchError: With both numbers.
    """
    fewest = int(find_clip_lengths(data, only_first=only_first).min(initial=num_frames))
    if fewest < num_frames:
        raise StoreMismatchError(
            f"the run's clips have {num_frames} frames, evaluation clips of {store.path} as few as {fewest}. Use "
            f"--frames {fewest} in training (or --clips in evaluation, which spreads clips over all cached frames), or "
            f"extract clips of {num_frames} frames."
        )


def warn_of_thinned_clips(data: LabelledRows, num_frames: int, store: StoreReader, *, only_first: bool = False) -> None:
    """Say that clips sampled as the reference samples them are not its clips once frames are left out."""
    sampling = store.attributes["sampling"]
    most = int(find_clip_lengths(data, only_first=only_first).max(initial=0))
    if str(sampling).startswith("reference-") and most > num_frames:
        _log.warning(
            "evaluation clips of %s are %d frames by %s; the %d that are taken of them are not the reference's clip of "
            "that length. For its figures extract clips of %d frames, or train on %d.",
            store.path,
            most,
            sampling,
            num_frames,
            num_frames,
            most,
        )


def autocast_as_trained(run: Run, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """The mixed precision that a run was trained in, where the device has it: float16 a CUDA GPU alone."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.config.get("precision") or "fp32")
    if dtype is None or (dtype == torch.float16 and device.type != "cuda"):
        return nullcontext
    return partial(torch.autocast, device.type, dtype)


@contextmanager
def explain_full_device(advice: str) -> Iterator[None]:
    """Turn torch's error about memory into ours.

    Raises:
        EnvironmentFailedError: If the device's memory does not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EnvironmentFailedError(
            f"the device's memory does not suffice ({str(error).splitlines()[0]}): {advice}."
        ) from error


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
