"""How a network is trained: optimiser, learning rate, loss, from a configuration that `resolve_preset` filled in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from .choices import OptimizerName, Undecayed
from .uncorrected_adam import UncorrectedAdam

if TYPE_CHECKING:
    from .config import TrainConfig


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how fast a network is trained, and on what in each step."""

    epochs: int
    learning_rate: float
    warmup_epochs: float = 4.0
    weight_decay: float = 0.15
    label_smoothing: float | None = 0.1
    batch_size: int = 32
    """Clips in a step of one process, where no preset was named."""
    clip_norm: float | None = None
    frames: int = 8
    """T of the released configurations; the paper tests with 8 and 16."""
    views_per_video: int = 1
    warmup_share: float | None = None
    """Of all epochs, instead of `warmup_epochs`."""
    is_batch_of_all: bool = False
    """Whether `batch_size` counts the clips of all processes and accumulated batches, which share them out."""
    step_clips: int | None = None
    """Clips in a step of all processes and accumulated batches, for which the rate was chosen; None is no such
    number."""
    norm_clips: int | None = None
    """Clips that a batch norm counts together: in the reference one GPU's. None is all of a batch."""
    optimizer: OptimizerName = "adamw"
    undecayed: Undecayed = "nothing"
    """What weight decay spares."""
    min_video_frames: int = 0
    """Frames of a video, of which training leaves out those with fewer; 0 leaves out none."""

    def describe(self, epochs: int | None) -> dict[str, Any]:
        """Values of the options of the same names; `epochs` are those that were asked for.

        How clips are shared out among processes is `train/batches.py`'s to say.
        """
        skipped = ("warmup_share", "is_batch_of_all", "batch_size", "step_clips", "norm_clips")
        values = {name: getattr(self, name) for name in self.__slots__ if name not in skipped}
        if self.warmup_share is not None:
            values["warmup_epochs"] = self.warmup_share * (epochs or self.epochs)
        return values


@dataclass(frozen=True)
class Preset:
    """A network and a recipe of a paper, beside one backbone, for one data set; options that are given win over it."""

    name: str
    task: str
    dataset: str
    family: str
    """Of the backbone: which of the reference's side blocks stand beside it."""
    width: int
    depth: int
    patch_px: int
    layers: tuple[int, ...]
    recipe: Recipe
    sizes: Mapping[str, Any] = field(default_factory=dict)
    """Options of the network, by name."""

    def is_beside(self, family: str, width: int, depth: int, patch_px: int) -> bool:
        """Whether its backbone is of these sizes."""
        return (family, width, depth, patch_px) == (self.family, self.width, self.depth, self.patch_px)


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that are trained at a share of the rate."""

    parameters: tuple[nn.Parameter, ...]
    rate_share: float = 1.0
    highest: float = math.inf
    """What is above it after a step is set to it."""
    decays: bool = True
    """Whether weight decay is for them, where their kind is not spared anyway."""


Schedule = Callable[[float, float, float], float]
"""The share of the full rate at a fractional epoch, given the epochs of the warm-up and all epochs."""


def cosine_after_warmup(epoch: float, warmup: float, epochs: float) -> float:
    """Linear from 0, then a cosine to 0 that begins where the warm-up ends."""
    return epoch / warmup if epoch < warmup else _cosine((epoch - warmup) / (epochs - warmup))


def cosine_under_warmup(epoch: float, warmup: float, epochs: float) -> float:
    """Linear from 0, then a cosine to 0 that begins with the first step: the warm-up cuts off its start."""
    return epoch / warmup if epoch < warmup else _cosine(epoch / epochs)


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True, slots=True)
class Optimisation:
    """Moments and schedule: what a task, or a network for it, has settled and no option changes."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: Schedule = cosine_after_warmup


@dataclass(frozen=True, slots=True)
class OptimizerKind:
    """What `--optimizer NAME` steps with."""

    build: Callable[..., torch.optim.Optimizer]
    """From groups of parameters, `lr`, `betas` and `eps`."""
    rate_place: float
    """Where in a step its rate is read off the schedule: 0 its start, 1 its end."""
    can_fuse: bool = False
    """Whether it has a step of one pass over memory for a CPU, with `fused`."""


OPTIMIZERS: Mapping[OptimizerName, OptimizerKind] = {
    # At its end, the last step of a run would have a rate of zero; at its start, the first one.
    "adamw": OptimizerKind(torch.optim.AdamW, 0.5, can_fuse=True),
    "uncorrected-adam": OptimizerKind(UncorrectedAdam, 0.0),
}
"""By the name that `--optimizer` takes."""


def reference_learning_rate(backbone_width: int) -> float:
    """The rate that the reference trains recognition with: 1e-3 beside B (width 768), 1e-4 beside L and E."""
    return 1e-3 if backbone_width <= 768 else 1e-4


def make_optimizer(
    groups: Sequence[ParameterGroup],
    config: TrainConfig,
    optimisation: Optimisation,
    biases: Iterable[nn.Parameter] = (),
    *,
    is_fused: bool = False,
) -> torch.optim.Optimizer:
    """The optimiser that a configuration names, over groups of parameters.

    Args:
        groups: What is trained; a group's share of the rate is its `rate_share`.
        config: Resolved: rate, decay and what it spares, optimiser.
        optimisation: Moments.
        biases: Which parameters are biases, as `find_biases` gives them.
        is_fused: Whether a step may go over memory once, as on a CPU. torch's own steps on a GPU are fast enough, and
            fused ones meet gradient scalers otherwise.
    """
    assert config.learning_rate is not None and config.weight_decay is not None
    assert config.optimizer is not None and config.undecayed is not None
    of_bias = {id(parameter) for parameter in biases}
    is_spared: Callable[[nn.Parameter], bool] = {
        "nothing": lambda parameter: False,
        "biases": lambda parameter: id(parameter) in of_bias,
        "vectors": lambda parameter: parameter.ndim < 2,
    }[config.undecayed]
    sorted_out: dict[tuple[float, float, float], list[nn.Parameter]] = {}
    for group in groups:
        for parameter in group.parameters:
            decay = 0.0 if is_spared(parameter) or not group.decays else config.weight_decay
            sorted_out.setdefault((group.rate_share, decay, group.highest), []).append(parameter)
    kind = OPTIMIZERS[config.optimizer]
    optimizer = kind.build(
        [
            {"params": chosen, "rate_share": share, "weight_decay": decay, "highest": highest}
            for (share, decay, highest), chosen in sorted(sorted_out.items(), key=lambda group: group[0])
        ],
        lr=config.learning_rate,
        betas=optimisation.betas,
        eps=optimisation.eps,
        **({"fused": True} if is_fused and kind.can_fuse else {}),
    )
    if any(group.highest < math.inf for group in groups):
        optimizer.register_step_post_hook(_cut_down)
    return optimizer


@torch.no_grad()
def _cut_down(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Set what a step has moved above its group's `highest` to that."""
    for group in optimizer.param_groups:
        if group["highest"] < math.inf:
            for parameter in group["params"]:
                parameter.clamp_(max=group["highest"])


def find_biases(network: nn.Module) -> list[nn.Parameter]:
    """Parameters that are named `bias`."""
    return [parameter for name, parameter in network.named_parameters() if name.rpartition(".")[2] == "bias"]


def set_learning_rate(groups: Iterable[dict[str, Any]], rate: float) -> None:
    """Give every one of an optimiser's groups of parameters its share of a rate."""
    for group in groups:
        group["lr"] = rate * group.get("rate_share", 1.0)


def learning_rate_at(epoch: float, config: TrainConfig, schedule: Schedule = cosine_after_warmup) -> float:
    """The learning rate at a fractional epoch.

    The warm-up takes at most half of all epochs, so that a short run reaches its rate.
    """
    assert config.learning_rate is not None and config.epochs is not None and config.warmup_epochs is not None
    return config.learning_rate * schedule(epoch, min(config.warmup_epochs, config.epochs / 2), config.epochs)


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    """Cross-entropy with label smoothing, averaged over clips: (B, classes), (B,) -> ()."""
    assert config.label_smoothing is not None
    return F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
