"""Recognition: clips to class scores, averaged over a video's clips."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from ...errors import EnvironmentFailedError, StoreMismatchError
from ...files import write_json
from ...store.manifest import read_table, write_table
from ...store.reader import StoreReader
from ..clips import (
    DEFAULT_CLIP_FRAMES,
    ClipBatch,
    ClipPlan,
    LabelledRows,
    find_clip_lengths,
    find_labelled_rows,
    plan_evaluation,
    require_long_clips,
    resolve_clip_frames,
    take_validation_clips,
    warn_of_thinned_clips,
)
from ..networks import find_network
from ..networks.contract import Network, Outputs, TextNetwork
from ..paired import Answers
from ..recipe import Recipe, classification_loss, reference_learning_rate
from ..run_folder import Run, open_store_of_run
from ..scorer import Scorer, explain_full_device
from .class_choice import choose_classes, score_frozen
from .contract import EvaluationOptions, Gather, Task, refuse, require_rows, require_split
from .recognition_metrics import Evaluation, accuracy_figures, describe_classes, find_calibration_error

if TYPE_CHECKING:
    from ..config import TrainConfig

_log = logging.getLogger(__name__)

_MOST_NAMED = 5


class Recognition(Task):
    """Clips to class scores."""

    name = "recognition"
    figure = "val_top1"
    shown_figures = ("top1", "top5")
    default_frames = DEFAULT_CLIP_FRAMES

    def __init__(self, config: TrainConfig, store: StoreReader) -> None:
        super().__init__(config, store)
        self.training, validation = self.divide_rows(by_class=True)
        self.validation = take_validation_clips(validation)
        require_rows(store, self.training, config, labels="labels", kind="labelled")
        if len(set(self.training.labels.tolist())) < 2:
            raise StoreMismatchError(
                f"the good training videos of {store.path} are all of one class: a classifier needs two or more"
            )
        _warn_of_unseen_classes(store, self.training, self.validation)

    @classmethod
    def fits(cls, store: StoreReader) -> bool:
        """It has classes."""
        return bool(store.classes.names)

    @classmethod
    def find_recipe(cls, backbone_width: int) -> Recipe:
        """30 epochs at the reference's rate."""
        return Recipe(30, reference_learning_rate(backbone_width))

    @classmethod
    def describe_outputs(cls, store: StoreReader) -> Outputs:
        """A score for each of the store's classes."""
        return Outputs(cls.name, num_classes=len(store.classes.names))

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """Texts play no part."""
        refuse(
            config.interaction not in (None, "mean") or config.negatives != "step",
            "--interaction and --negatives have no effect on --task recognition: leave them out",
        )

    def compute_loss(self, network: Network, output: torch.Tensor, batch: ClipBatch, gather: Gather) -> torch.Tensor:
        """Cross-entropy of logits (B, classes)."""
        return classification_loss(output, batch.labels, self.config)

    def validate(self, scorer: Scorer) -> dict[str, float]:
        """Loss and accuracy."""
        result = evaluate_classes(scorer, self.validation)
        return {"val_loss": result.loss, **{f"val_{k}": v for k, v in accuracy_figures(result).items()}}

    @classmethod
    def check_evaluation(cls, options: EvaluationOptions) -> None:
        """No query looks for anything."""
        refuse(options.with_dual_softmax, "--dual-softmax has no effect on a recognition run: leave it out")

    @classmethod
    def evaluate_run(cls, run: Run, options: EvaluationOptions) -> dict[str, Any]:
        """Evaluate a run on a split of a store, and leave the figures and all predictions in the run's folder.

        Returns:
            top1, top5 (when there are more than 5 classes), mean_class_accuracy, calibration_error, loss, videos,
            per_class, confusion, and more.

        Raises:
            StoreMismatchError: If the store does not fit the run, its clips are shorter than the run's, or the split
                has no good, labelled video.
        """
        store = open_store_of_run(run, options.features)
        choice = choose_classes(run, store, options)
        run = _with_classes(replace(run, classes=choice.names), store)
        data = _find_rows(run, store, options)
        options.report("evaluating", 0, len(data))
        with explain_full_device("evaluate with --device cpu"):
            scorer = Scorer.of_run(
                run,
                store,
                checkpoint=options.checkpoint,
                device=options.device,
                is_backwards=options.is_backwards,
                team=options.team,
                lengths=find_clip_lengths(data) if options.num_clips is None else data.num_cached_frames,
            )
            _check_clips(data, scorer, options)
            if isinstance(scorer.network, TextNetwork) and choice.embedding is not None:
                scorer.network.take_class_texts(choice.embedding)
            result = evaluate_classes(
                scorer, data, num_clips=options.num_clips, with_zero_shot=options.of_texts.with_zero_shot
            )
        per_class = describe_classes(result, run.classes)
        figures = {
            "run": str(run.path),
            "store": str(store.path),
            "split": options.split,
            "is_backwards": options.is_backwards,
            "checkpoint": options.checkpoint,
            "videos": len(data),
            "clips_per_video": options.num_clips if options.num_clips is not None else "as recorded",
            **accuracy_figures(result),
            "mean_class_accuracy": sum(one["accuracy"] for one in per_class) / len(per_class),
            "calibration_error": find_calibration_error(result),
            "loss": result.loss,
            "per_class": per_class,
            "classes": list(run.classes),
            "confusion": result.confusion().tolist(),
        }
        name = options.file_stem + choice.file_end
        if find_network(run.shape.name).classifies_by_text:
            figures |= {
                "class_source": choice.source,
                "is_zero_shot_average": options.of_texts.with_zero_shot,
                "files": name,
            }
        if not options.team.is_first:
            return figures
        write_json(run.path / f"eval_{name}.json", figures)
        write_table(run.path / f"predictions_{name}.parquet", _prediction_table(result, store, run))
        if options.with_page:
            from .recognition_page import write_results  # matplotlib takes a second

            write_results(run, store, result, figures, name)
        return figures

    @classmethod
    def read_answers(cls, run: Path, name: str) -> Answers:
        """Of every video."""
        table = read_table(run / f"predictions_{name}.parquet")
        return Answers("top1", tuple(table["video_id"].to_pylist()), table["is_correct"].to_numpy().astype(np.float64))

    @classmethod
    def render(cls, run: Path, figures: Mapping[str, Any]) -> list[str]:
        """Accuracy in a line, and where the page is."""
        is_backwards, split = figures["is_backwards"], figures["split"]
        order = ", played backwards and compared with their labels forwards" if is_backwards else ""
        name = figures.get("files", split + "_backwards" * is_backwards)
        if (source := figures.get("class_source", "run")) != "run":
            order += ", classes of the store" if source == "store" else f", classes of {source}"
        order += ", averaged with zero-shot" * figures.get("is_zero_shot_average", False)
        return [
            f"{run}, {figures['checkpoint']} checkpoint, {figures['videos']} videos of {split}{order}: "
            f"{cls.describe_shares(figures)}",
            f"results: {run / ('results_' + name + '.html')}",
        ]


def evaluate_classes(
    scorer: Scorer, data: LabelledRows, *, num_clips: int | None = None, with_zero_shot: bool = False
) -> Evaluation:
    """Score videos: softmax over classes for each clip, averaged over a video's clips.

    Args:
        scorer: With a network that scores classes.
        data: Which videos.
        num_clips: Clips of a video; None takes those that the store recorded.
        with_zero_shot: Average each clip's logits with those of the frozen backbone, of a network that has texts.

    Raises:
        EnvironmentFailedError: If a score is not finite.
        StoreMismatchError: If a recorded clip holds fewer than T frames.
    """
    if num_clips is None:
        require_long_clips(data, scorer.num_frames, scorer.store)
    plans, owner = plan_evaluation(
        data, num_frames=scorer.num_frames, batch_size=scorer.batch_size, num_clips=num_clips
    )
    if with_zero_shot:
        clip_scores = _average_with_zero_shot(scorer, plans)
    else:
        clip_scores = scorer.run(plans, partial(torch.softmax, dim=-1))
    if not np.isfinite(clip_scores).all():
        raise EnvironmentFailedError("the head's scores are not finite: its weights or its input hold NaN or infinity")
    sums = np.zeros((len(data), clip_scores.shape[1]), dtype=np.float64)
    np.add.at(sums, owner, clip_scores)
    probabilities = (sums / np.bincount(owner, minlength=len(data))[:, None]).astype(np.float32)
    own = np.take_along_axis(probabilities, data.labels[:, None], axis=1)
    loss = float(-np.log(np.maximum(own, np.finfo(np.float32).tiny)).mean())
    return Evaluation(data.rows, data.labels, probabilities, loss)


def _average_with_zero_shot(scorer: Scorer, plans: list[ClipPlan]) -> np.ndarray:
    """(clips, classes) softmax of half the network's logits and half the frozen backbone's."""
    network = scorer.network
    assert isinstance(network, TextNetwork)
    logits = scorer.run(plans)
    read = [network.reverse_plan(plan) for plan in plans] if scorer.is_backwards else plans
    mean = 0.5 * logits + 0.5 * score_frozen(network, scorer.store, read)
    return torch.from_numpy(mean).softmax(dim=-1).numpy()


def _with_classes(run: Run, store: StoreReader) -> Run:
    """Its classes, or, of an imported run that names none, the store's."""
    if run.classes:
        return run
    _log.warning(
        "%s names no classes: taken in the order in which %s lists them. `s4v import --features` keeps them.",
        run.path,
        store.path,
    )
    return replace(run, classes=store.classes.names)


def _find_rows(run: Run, store: StoreReader, options: EvaluationOptions) -> LabelledRows:
    """The videos to evaluate."""
    data = _relabel(find_labelled_rows(store, options.split), store, run)
    require_split(store, data, options.split, "labelled")
    return data


def _check_clips(data: LabelledRows, scorer: Scorer, options: EvaluationOptions) -> None:
    """Refuse clips that are not there."""
    store, num_frames = scorer.store, scorer.num_frames
    resolve_clip_frames(num_frames, data.num_cached_frames, store)
    fewest, num_clips = int(data.num_cached_frames.min()), options.num_clips
    if num_clips is not None and num_clips * num_frames > fewest:
        raise StoreMismatchError(
            f"{num_clips} clips of {num_frames} frames were asked for, rows of {store.path} hold as few as {fewest} "
            f"frames: at most --clips {fewest // num_frames}"
        )
    if num_clips is None:
        warn_of_thinned_clips(data, num_frames, store)


def _warn_of_unseen_classes(store: StoreReader, training: LabelledRows, validation: LabelledRows) -> None:
    """Classes are the store's: one whose training videos are missing or broken is never learnt, and still counted."""
    names = store.classes.names
    unseen = sorted(set(range(len(names))) - set(training.labels.tolist()))
    if not unseen:
        return
    shown = ", ".join(repr(names[label]) for label in unseen[:_MOST_NAMED])
    _log.warning(
        "%d of %d classes have no good training video and cannot be learnt: %s%s. %d validation videos are of them.",
        len(unseen),
        len(names),
        shown,
        ", ..." if len(unseen) > _MOST_NAMED else "",
        int(np.isin(validation.labels, unseen).sum()),
    )


def _relabel(data: LabelledRows, store: StoreReader, run: Run) -> LabelledRows:
    """Labels in the run's class order: a class is its name, wherever a store lists it."""
    if store.classes.names == run.classes or not len(data):
        return data
    place_of = {name: place for place, name in enumerate(run.classes)}
    place = np.asarray([place_of.get(name, -1) for name in store.classes.names])
    labels = place[data.labels]
    if missing := sorted({store.classes.names[label] for label in data.labels[labels < 0]}):
        raise StoreMismatchError(
            f"videos of {store.path} are of classes that were not named: {', '.join(map(repr, missing[:_MOST_NAMED]))}"
            f"{', ...' if len(missing) > _MOST_NAMED else ''}. Add {'it' if len(missing) == 1 else 'them'} to the file "
            "(--classes), or evaluate another split."
        )
    return replace(data, labels=labels)


def _prediction_table(result: Evaluation, store: StoreReader, run: Run) -> pa.Table:
    ids = store.read_manifest(["video_id"])["video_id"].take(result.rows)
    names, answers = np.asarray(run.classes), result.predictions
    return pa.table(
        {
            "video_id": ids,
            "class_name": names[result.labels],
            "predicted": names[answers],
            "probability": np.take_along_axis(result.probabilities, answers[:, None], axis=1)[:, 0],
            "is_correct": answers == result.labels,
            "probabilities": pa.FixedSizeListArray.from_arrays(result.probabilities.ravel(), len(names)),
        }
    )
