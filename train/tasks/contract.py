"""What a task is to the rest of s4v: whose clips, which loss, which figure, and how a run of it is evaluated and told.

A new task is one file here, and a line in the table. docs/extending.md has an example.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ...errors import ConfigError, StoreMismatchError
from ...store.reader import StoreReader
from ..clips import (
    ClipBatch,
    ClipPlan,
    LabelledRows,
    find_labelled_rows,
    hold_out_rows,
    leave_out_short_videos,
    plan_training_epoch,
    take_trained_views,
)
from ..networks.contract import Network, Outputs
from ..order import ShardWindow
from ..paired import Answers
from ..recipe import Optimisation, Recipe
from ..run_folder import Run
from ..scorer import ALONE, Scorer, Team

if TYPE_CHECKING:
    from ..config import TrainConfig

Gather = Callable[[torch.Tensor], torch.Tensor]
"""(B, ...) of this process to (B of all processes, ...), gradients included; of one process the same."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What `s4v eval` can be told of a network that classifies by text."""

    classes: Path | None = None
    """A file with a class name a line; None takes the run's classes or, where it has others, the store's."""
    with_zero_shot: bool = False
    """Average its logits with those of the frozen backbone, half each."""


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """What `s4v eval` can be told."""

    features: Path | str | None = None
    """A store; None takes the one that the run was trained on."""
    split: str = "val"
    """Which videos."""
    num_clips: int | None = None
    """Clips of a video, of recognition; None takes those that the store recorded."""
    checkpoint: str = "best"
    """`best` or `last`."""
    is_backwards: bool = False
    """Play every clip backwards; files are named eval_SPLIT_backwards and so on."""
    of_texts: TextOptions = TextOptions()
    """Of a network that classifies by text."""
    with_dual_softmax: bool = False
    """Of retrieval: add figures of scores that look at all queries of the split at once."""
    device: torch.device | None = None
    """Where to compute; None takes the CPU."""
    with_page: bool = False
    """Write a results page too, where the task has one."""
    report: Callable[[str, int, int], None] = lambda *_: None
    """Told about progress."""
    team: Team = ALONE
    """Processes that share the clips: each gets all figures, and the first one writes."""

    @property
    def file_stem(self) -> str:
        """What files of this evaluation are named after: the split, whether it was played backwards, and an average."""
        return f"{self.split}{'_backwards' * self.is_backwards}{'_zero-shot-average' * self.of_texts.with_zero_shot}"


class Task(ABC):
    """One kind of training, on one store."""

    name: ClassVar[str]
    figure: ClassVar[str]
    """Of a validation: the higher, the better."""
    shown_figures: ClassVar[tuple[str, ...]]
    """Shares that a line about a run tells."""
    default_frames: ClassVar[int]
    """T, where rows hold as many and nobody said otherwise."""
    reads_first_clips: ClassVar[bool] = False
    """Whether a validation looks at the first evaluation clip of a video alone."""
    embeds_frames: ClassVar[bool] = False
    """Whether its networks embed frames beside texts, so that videos can be searched with them."""
    optimisation: ClassVar[Optimisation] = Optimisation()
    of_old_runs: ClassVar[Mapping[str, Any]] = {
        "optimizer": "adamw",
        "undecayed": "nothing",
        "interaction": "mean",
        "min_video_frames": 0,
    }
    """By option: what runs did that are older than it."""
    training: LabelledRows
    num_left_out: int = 0
    """Good training videos that are too short for the recipe."""
    validation: LabelledRows
    """Each with the clips and views that a validation looks at, which may be fewer than an evaluation's."""

    def __init__(self, config: TrainConfig, store: StoreReader) -> None:
        self.config = config
        """As given at first; `begin_heads` replaces it by what it came to."""
        self._store = store

    @classmethod
    def fits(cls, store: StoreReader) -> bool:
        """Whether a store looks as if it were made for this task: then it is taken where nobody names one."""
        return False

    @classmethod
    def find_rows(cls, store: StoreReader, split: str) -> LabelledRows:
        """The rows of a split that a run of this task can be evaluated on, with all their clips; none is no error."""
        return find_labelled_rows(store, split)

    @classmethod
    @abstractmethod
    def find_recipe(cls, backbone_width: int) -> Recipe:
        """How its networks are trained where no preset and no network says otherwise."""

    @classmethod
    @abstractmethod
    def describe_outputs(cls, store: StoreReader) -> Outputs:
        """What it wants to come out of a network."""

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """Refuse options that do not go together on this task.

        Raises:
            ConfigError: With what to leave out or to take.
        """

    @classmethod
    def leave_out(cls, config: TrainConfig) -> frozenset[str]:
        """Options of a preset that do not go together with what was given. By default none."""
        return frozenset()

    def check_step(self, num_clips: int) -> None:
        """Refuse a step of so few clips that it teaches nothing.

        Args:
            num_clips: Of all processes, as they were asked for.

        Raises:
            ConfigError: With what to do.
        """

    def plan_epoch(self, epoch: int, *, num_frames: int, rank: int = 0, num_ranks: int = 1) -> list[ClipPlan]:
        """The batches of one epoch, of one process: a pure function of rows, seed, epoch and window."""
        config = self.config
        assert config.batch_size is not None
        return plan_training_epoch(
            self.training,
            num_frames=num_frames,
            batch_size=config.batch_size,
            views_per_video=config.views_per_video or 1,
            seed=config.seed_of_order,
            epoch=epoch,
            rank=rank,
            num_ranks=num_ranks,
            window=None if config.window is None else ShardWindow(config.window, self._store.layout.rows_per_shard),
        )

    def divide_rows(self, *, by_class: bool) -> tuple[LabelledRows, LabelledRows]:
        """Those to train on and those to validate on: two splits, or two parts of the training split.

        Args:
            by_class: Whether every class gives its share of what is held out.
        """
        config, store = self.config, self._store
        every_row = self.find_rows(store, config.train_split)
        training = leave_out_short_videos(every_row, store, config.min_video_frames or 0)
        self.num_left_out = len(np.unique(every_row.rows)) - len(np.unique(training.rows))
        training = take_trained_views(training, config.train_views, store, config.train_split)
        if config.hold_out is None or not len(training):
            return training, self.find_rows(store, config.val_split)
        return hold_out_rows(training, store, config.hold_out, seed=config.seed_of_order, by_class=by_class)

    def begin(self, network: Network) -> None:
        """Called once before the first step, with the network as it will be trained. By default nothing."""

    @abstractmethod
    def compute_loss(self, network: Any, output: Any, batch: ClipBatch, gather: Gather) -> torch.Tensor:
        """The loss (), of what the network said of a batch."""

    @abstractmethod
    def validate(self, scorer: Scorer) -> dict[str, float]:
        """Figures of the validation videos, `val_...`; every process of the team takes part, and gets all of them.

        Raises:
            EnvironmentFailedError: If a score is not finite.
        """

    @classmethod
    def check_evaluation(cls, options: EvaluationOptions) -> None:
        """Refuse options of an evaluation that have no effect on this task.

        Raises:
            ConfigError: With what to leave out.
        """

    @classmethod
    @abstractmethod
    def evaluate_run(cls, run: Run, options: EvaluationOptions) -> dict[str, Any]:
        """Evaluate a run on a split of a store, and leave figures and predictions in the run's folder.

        Raises:
            StoreMismatchError: If the store does not fit the run, or the split has nothing to evaluate.
            ConfigError: If the run was imported without a store and none is named.
            EnvironmentFailedError: If a score is not finite, or the device is too small.
        """

    @classmethod
    def read_answers(cls, run: Path, name: str) -> Answers | None:
        """Which answers of a run were right, as `evaluate_run` left them; None of a task without such.

        Args:
            run: The run's folder.
            name: `EvaluationOptions.file_stem`.
        """
        return None

    @classmethod
    def describe_shares(cls, metrics: Mapping[str, Any]) -> str:
        """Its shares among metrics, `val_` before them or not: `val_top1 85.0%, val_top5 98.1%`; "" of none."""
        names = [name for name in metrics if name.removeprefix("val_") in cls.shown_figures]
        return ", ".join(f"{name} {metrics[name]:.1%}" for name in names)

    @classmethod
    @abstractmethod
    def render(cls, run: Path, figures: Mapping[str, Any]) -> list[str]:
        """What `evaluate_run` found, in lines."""


def require_rows(store: StoreReader, training: LabelledRows, config: TrainConfig, *, labels: str, kind: str) -> None:
    """Refuse a store without training videos or without the validation split, and warn of an unfinished one.

    Args:
        store: The store.
        training: What was found there.
        config: Whose splits.
        labels: What training videos must have, such as `labels`.
        kind: Those that have it, such as `labelled`.
    """
    table = store.read_manifest(["split", "status", "label"])
    counts = table.group_by(["split", "status"]).aggregate([("label", "count"), ("status", "count")]).to_pylist()
    by_label = kind == "labelled"
    described = ", ".join(
        f"{c['split']}: {c['label_count'] if by_label else c['status_count']} {'labelled ' * by_label}{c['status']}"
        for c in counts
    )
    splits = set(table["split"].to_pylist())
    if not len(training):
        raise StoreMismatchError(
            f"{store.path} has no good, {kind} video in split {config.train_split!r}. It has {described}. "
            f"Name another --train-split, or extract a data set with {labels}."
        )
    if config.val_split not in splits and config.val_split != type(config).__dataclass_fields__["val_split"].default:
        raise StoreMismatchError(
            f"{store.path} has no split {config.val_split!r} (--val-split); it has {', '.join(sorted(splits))}"
        )
    if any(c["status"] == "pending" for c in counts):
        _log.warning("%s is not finished: %s. Training on what is there.", store.path, described)


def require_split(store: StoreReader, rows: LabelledRows, split: str, kind: str) -> None:
    """Refuse a split in which there is nothing to evaluate.

    Raises:
        StoreMismatchError: With the splits that there are.
    """
    if not len(rows):
        splits = ", ".join(sorted(set(store.input_columns()["split"].to_pylist())))
        raise StoreMismatchError(f"{store.path} has no good, {kind} video in split {split!r}; it has {splits}")


def refuse(condition: bool, message: str) -> None:
    """Raise a ConfigError with a message where a condition holds."""
    if condition:
        raise ConfigError(message)
