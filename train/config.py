"""What `s4v train` can be told, checked before any work starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from ..errors import ConfigError
from .choices import Inputs, Negatives, OptimizerName, Precision, Similarity, TrainedViews, Undecayed

_NETWORK_OPTIONS: dict[str, tuple[Any, ...]] = {
    "side_width": (None,),
    "inputs": ("all",),
    "interaction": (None, "mean"),
}
"""Options of networks that have a name of their own here, with the values that ask for nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that decides what a run learns."""

    features: Path
    """The store."""
    out: Path
    """The run's folder. [runs/STORE-HEAD, runs/STORE-retrieval]

    It must not exist, but to resume.
    """
    task: str = "recognition"
    """recognition (of classes) or retrieval (by captions)."""
    interaction: Similarity | None = None
    """Retrieval: compare means (mean), or words with frames, weighted (wti). [preset, or mean]

    The reference's is wti.
    """
    head: str = "side4video"
    """side4video; tds-clip; attentive or linear probe (linear is blind to order)."""
    preset: str = "auto"
    """The paper's size and recipe: auto, none, or such as b16-light-ssv2, e14-k400.

    Names are those of train/paper/presets.py; `auto` goes by the store's backbone and data set. What is given wins.
    """
    negatives: Negatives = "step"
    """Retrieval: tell a video from the captions of its step, or from all.

    Captions of the same video or wording are left out; with `reference` those of a step count as wrong, as they do
    there.
    """
    init: Path | None = None
    """A run whose side network to begin with.

    Of either task; None begins with random weights.
    """
    layers: tuple[int, ...] | None = None
    """Backbone blocks to use: 1,3,5. [preset, or all]

    All that the store holds.
    """
    side_width: int | None = None
    """Width of the side network. [the paper's]

    S; None takes the preset's, else the paper's for the store's backbone.
    """
    inputs: Inputs = "all"
    """What the side network sees: all, tokens, pixels.

    `tokens` leaves out its pixel stem, `pixels` makes every token zero.
    """
    frames: int | None = None
    """Frames of a clip. [8; retrieval 12; auto: or fewer]

    T; None takes those of a preset that was named; else these, fewer where rows hold fewer.
    """
    epochs: int | None = None
    """Passes over the training videos (or captions). [preset, or 30; retrieval 5]"""
    batch_size: int | None = None
    """Clips in a step of each process. [preset, or 32; retrieval 128 in all]

    None takes the whole step of a preset that was named, and shares it out among processes and `accumulate`; so with
    the 128 of retrieval, where a text's negatives are its batch's other videos, of all processes.
    """
    norm_clips: int | None = None
    """Clips that a batch norm counts together. [preset, or all of a batch]

    A group larger than a process's batch is one of several processes. None without a preset counts the batch of all
    processes.
    """
    views_per_video: int | None = None
    """Views of a video side by side in a step. [preset where rows hold them, or 1]

    Different ones; None takes the preset's where all training rows hold as many.
    """
    train_views: TrainedViews = "all"
    """Views of a row that clips are taken of: all, centre, augmented (without the centre).

    A clip takes one of them at random. Validation and evaluation do not depend on it.
    """
    min_video_frames: int | None = None
    """Leave out training videos with fewer frames. [preset, or 0]

    Of the video itself, as the store records it. The reference does so of Kinetics-400, with 8.
    """
    learning_rate: float | None = None
    """[preset, or the network's own]

    Of AdamW, after the warm-up. Of a side network it is the reference's: 1e-3 for B, else 1e-4; for retrieval 1e-4.
    The linear probe's is 3e-3, the attentive probe's 1e-3.
    """
    warmup_epochs: float | None = None
    """The rate rises over these. [preset, or 4; retrieval a tenth]

    From 0, then falls as a cosine to 0; at most half of all epochs are used.
    """
    weight_decay: float | None = None
    """[preset, or 0.15; retrieval 0.2]

    On what --undecayed does not spare.
    """
    undecayed: Undecayed | None = None
    """What decay spares: nothing, biases, vectors (biases, norms). [preset, or nothing; retrieval biases]

    As the reference has it.
    """
    optimizer: OptimizerName | None = None
    """adamw, or uncorrected-adam, the reference's of retrieval. [preset, or adamw; retrieval the reference's]

    Without bias correction; it cuts each tensor's gradient to norm 1, and its first step has a rate of 0.
    """
    label_smoothing: float | None = None
    """In the cross-entropy. [preset, or 0.1]"""
    checkpoint_activations: bool = False
    """Less memory, a third more time.

    Each layer of the side network is computed again in the backward pass.
    """
    with_compile: bool = False
    """torch.compile the head."""
    precision: Precision | None = None
    """fp32, fp16, bf16. [bf16 where a GPU has it]

    Mixed precision of the step and of validation; None takes bf16, or fp16, on a GPU that has it, and fp32 elsewhere.
    The run records what it came to.
    """
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    seed: int = 0
    """Of weights, order and frames.

    The order of clips, and the frames that they take.
    """
    order_seed: int | None = None
    """Of order and frames alone. [--seed]

    Heads that are trained in one read share it, and differ in the seed of their weights.
    """
    window: int | None = None
    """Mix clips of so many shards at a time. [all; with --cache an eighth, 8 or more]

    For disks that read in long runs. The order follows from seed, epoch and window, which the run records.
    """
    cache: Path | None = None
    """Keep shards in this folder as they are read.

    For a store on a slow disk; the folder is on a fast one, and serves several processes and runs.
    """
    cache_size: int | None = None
    """The most bytes that --cache holds: 200GB. [half of what is free there]"""
    max_bad: int = 0
    """Train on where clips of up to so many videos cannot be read.

    The next clip of the order stands in for each.
    """
    hold_out: float | None = None
    """Validate on this share of the training videos, train on the rest.

    Drawn from each class alike, by `order_seed`; the validation split is not looked at. None validates on that.
    """
    accumulate: int = 1
    """Batches in one step of the optimiser.

    They share the step of a preset that was named; each has as many clips as `batch_size` says, where that is given.
    """
    clip_norm: float | None = None
    """Cut the gradient's norm down to this. [not at all; retrieval 1]

    The reference cuts it in retrieval alone.
    """
    validate_every: int = 1
    """Epochs between validations.

    The last epoch is always validated.
    """
    patience: int | None = None
    """Stop after so many epochs without a better one.

    None trains them all.
    """
    resume: bool = False
    """Go on with the run in --out where it was killed.

    If one was begun there.
    """
    checkpoint_minutes: float = 5.0
    """Minutes between the states to resume from.

    The end of each epoch leaves one beside.
    """
    log_every: int | None = None
    """Steps between lines about loss, speed and memory. [by the clock: 10 s]

    They go to steps.jsonl, TensorBoard and wandb.
    """
    wandb: str | None = None
    """Log to this Weights & Biases project too."""
    train_split: str = "train"
    """Split to learn from."""
    val_split: str = "val"
    """Split to validate on after each epoch."""
    set: tuple[str, ...] = ()
    """An option of the network that has no name here: NAME=VALUE. Repeatable.

    Of retrieval decorrelation=0.001, normalises_frames=true, trains_end=false, trains_logit_scale=false.
    """

    def __post_init__(self) -> None:
        at_least_one = {
            "--frames": self.frames,
            "--epochs": self.epochs,
            "--batch-size": self.batch_size,
            "--norm-clips": self.norm_clips,
            "--log-every": self.log_every,
            "--views-per-video": self.views_per_video,
            "--side-width": self.side_width,
            "--accumulate": self.accumulate,
            "--patience": self.patience,
            "--window": self.window,
            "--validate-every": self.validate_every,
        }
        for option, count in at_least_one.items():
            if count is not None and count < 1:
                raise ConfigError(f"{option} must be at least 1; found {count}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"--learning-rate must be a number above 0; found {self.learning_rate:g}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ConfigError(f"--clip-norm must be a number above 0; found {self.clip_norm:g}")
        not_negative = {
            "--warmup-epochs": self.warmup_epochs,
            "--weight-decay": self.weight_decay,
            "--checkpoint-minutes": self.checkpoint_minutes,
            "--min-video-frames": self.min_video_frames,
            "--max-bad": self.max_bad,
        }
        for option, value in not_negative.items():
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{option} must be a number from 0 up; found {value:g}")
        _check_choice("--inputs", self.inputs, Inputs)
        _check_choice("--negatives", self.negatives, Negatives)
        _check_choice("--train-views", self.train_views, TrainedViews)
        optional: dict[str, tuple[str | None, Any]] = {
            "--interaction": (self.interaction, Similarity),
            "--optimizer": (self.optimizer, OptimizerName),
            "--undecayed": (self.undecayed, Undecayed),
            "--precision": (self.precision, Precision),
        }
        for option, (word, choices) in optional.items():
            if word is not None:
                _check_choice(option, word, choices)
        if unclear := [one for one in self.set if "=" not in one]:
            raise ConfigError(f"--set takes name=value; found {unclear[0]!r}")
        if self.cache_size is not None and self.cache is None:
            raise ConfigError("--cache-size has no effect without --cache: name the folder, or leave it out")
        self._check_network_and_task()
        if self.hold_out is not None and not 0 < self.hold_out <= 0.5:
            raise ConfigError(f"--hold-out must be a share above 0, at most 0.5; found {self.hold_out:g}")
        if self.label_smoothing is not None and not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"--label-smoothing must lie in [0, 1); found {self.label_smoothing:g}")

    @property
    def seed_of_order(self) -> int:
        """Of the order of clips, their frames, and what is held out."""
        return self.seed if self.order_seed is None else self.order_seed

    @property
    def stem(self) -> str:
        """What a run is named after where it has no name: its network, or a task that is not the usual one."""
        usual = type(self).__dataclass_fields__["task"].default
        return self.head if self.task == usual else self.task

    @property
    def network_options(self) -> dict[str, Any]:
        """Options of networks that have a name of their own here."""
        return {name: getattr(self, name) for name in (*_NETWORK_OPTIONS, "frames")}

    def _check_network_and_task(self) -> None:
        """Refuse what has no effect, and a network that does not serve the task."""
        from .networks import NETWORKS, find_network  # torch takes a second, which `--help` need not wait for
        from .networks.contract import name_all
        from .tasks import find_task

        task, kind = find_task(self.task), find_network(self.head)
        if self.task not in kind.tasks:
            serving = name_all(one for one in NETWORKS.values() if self.task in one.tasks)
            raise ConfigError(f"--task {self.task} trains {serving}; found --head {self.head}")
        task.check(self)
        own = {one.name for one in fields(kind.options)}
        idle = [name for name, none in _NETWORK_OPTIONS.items() if getattr(self, name) not in none and name not in own]
        if idle:
            flags = [f"--{name.replace('_', '-')}" for name in idle]
            verb, them = ("has", "it") if len(idle) == 1 else ("have", "them")
            heeding = name_all(one for one in NETWORKS.values() if set(idle) <= {f.name for f in fields(one.options)})
            raise ConfigError(
                f"{' and '.join(flags)} {verb} no effect on --head {self.head}: leave {them} out, or train --head "
                f"{heeding}"
            )
        if self.init is not None and not kind.can_begin_with_a_run:
            raise ConfigError(f"--init has no effect on --head {self.head}: leave it out")
        if self.checkpoint_activations and not kind.can_checkpoint_activations:
            raise ConfigError(f"--checkpoint-activations has no effect on --head {self.head}: leave it out")


def _check_choice(option: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ConfigError(f"{option} takes {', '.join(get_args(choices))}; found {value!r}")
