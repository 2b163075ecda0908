"""The linear probe: what the backbone's own class tokens say of a clip, without order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from ...errors import ConfigError
from ...store.codecs.contract import Codec
from ...store.needs import StoreNeeds
from ...store.reader import StoreReader
from ..recipe import Recipe
from .contract import Network, NetworkKind, NetworkShape, NetworkStack, Outputs
from .norms import BatchNorm
from .parts import Classifier

if TYPE_CHECKING:
    from ..clips import ClipBatch


class RunningNorm(nn.Module):
    """Brings channels to mean 0 and variance 1 by the statistics of all clips of all batches so far.

    A batch's own statistics are noise, which is as good as a penalty of unknown size: of 32 clips a channel's spread is
    known to an eighth. These come to rest, and the classifier with them. Tokens are frozen, so no gradient is lost.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (B, D), in float32."""
        x = x.float()
        if self.training:
            self._count(x)
        return (x - self.running_mean) * (self.running_var + self.eps).rsqrt()

    @torch.no_grad()
    def _count(self, x: torch.Tensor) -> None:
        """Add a batch, of all processes that train together: each has as many clips."""
        moments = torch.stack([x.mean(0), x.var(0, correction=0)])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            parts = [torch.empty_like(moments) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, moments)
            means, variances = torch.stack(parts).unbind(1)
            moments = torch.stack([means.mean(0), variances.mean(0) + means.var(0, correction=0)])
        seen = self.num_batches_tracked.to(x.dtype)
        step = moments[0] - self.running_mean
        between = step.square() * seen / (seen + 1)
        # Of the first batch nothing is left of what stood there before.
        self.running_mean.add_(step / (seen + 1))
        self.running_var.copy_((self.running_var * seen + moments[1] + between) / (seen + 1))
        self.num_batches_tracked += 1


class LinearProbe(Network):
    """A linear classifier on the class token of the last layer, averaged over frames: blind to their order.

    Args:
        width: D.
        num_classes: Classes to tell apart.
        penalty: Half of it times the squared weights is a loss of its own, as in logistic regression.
        counts_all_clips: Whether the norm counts all clips so far, or those of a batch.
    """

    arrays = ("cls",)

    def __init__(self, width: int, num_classes: int, *, penalty: float = 0.0, counts_all_clips: bool = False) -> None:
        super().__init__()
        self.penalty = penalty
        # Without affine parameters: it only brings channels of very different size to one scale.
        self.norm: nn.Module = RunningNorm(width) if counts_all_clips else BatchNorm(width, affine=False)
        self.classifier = Classifier(width, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self,
        pixels: torch.Tensor | None,
        patches: torch.Tensor | None,
        cls: torch.Tensor,
        codec: Codec | None = None,
    ) -> torch.Tensor:
        """Score clips from cls (B, T, L, D) alone; returns (B, num_classes) logits."""
        return self.classifier(self.read(cls))

    def read(self, cls: torch.Tensor) -> torch.Tensor:
        """What is classified, of cls (B, T, L, D): (B, D)."""
        return self.norm(cls[:, :, -1].mean(dim=1))

    def own_losses(self, output: Any, batch: ClipBatch) -> Mapping[str, torch.Tensor]:
        """The penalty on large weights, where there is one."""
        return {"penalty": self.penalty / 2 * self.classifier.weight.square().sum()} if self.penalty else {}


class LinearProbes(NetworkStack):
    """Linear probes of the same clips: one norm, for they see the same, and one product.

    On a CPU there is a product for each: MKL shares out a product of several batches among its threads otherwise than
    a single one, and its last bits are others then (torch 2.14, two threads, 1,792 channels and 400 classes).
    """

    def __init__(self, probes: Sequence[LinearProbe]) -> None:
        super().__init__()
        for probe in probes:
            probe.norm = probes[0].norm
        self.probes = nn.ModuleList(probes)

    def inputs(self, batch: ClipBatch) -> tuple[Any, ...]:
        """As one of them."""
        return batch.pixels, batch.patches, batch.cls

    def forward(
        self,
        pixels: torch.Tensor | None,
        patches: torch.Tensor | None,
        cls: torch.Tensor,
        codec: Codec | None = None,
    ) -> Sequence[torch.Tensor]:
        """Score clips from cls (B, T, L, D) alone; returns (B, num_classes) logits of each probe."""
        probes: Sequence[LinearProbe] = list(self.probes)  # type: ignore[arg-type]
        x = probes[0].read(cls)
        if x.device.type == "cpu":
            return [probe.classifier(x) for probe in probes]
        return classify_together(x, [probe.classifier for probe in probes]).unbind()


def classify_together(x: torch.Tensor, classifiers: Sequence[nn.Linear]) -> torch.Tensor:
    """One product for all: (B, D) -> (heads, B, num_classes), in float32."""
    with torch.autocast(x.device.type, enabled=False):
        weights = torch.stack([one.weight for one in classifiers])  # (heads, num_classes, D)
        biases = torch.stack([one.bias for one in classifiers])[:, None]
        return torch.baddbmm(biases, x.to(weights.dtype).expand(len(classifiers), -1, -1), weights.mT)


@dataclass(frozen=True)
class LinearOptions:
    """What a command says of the probe."""

    penalty: float = 0.0
    """Of squared weights, in the loss: `--set penalty=1e-3`. Weight decay is apart from it."""


@dataclass(frozen=True, kw_only=True)
class LinearShape(NetworkShape):
    """Of the probe; runs from before these were options have a norm that counts a batch."""

    penalty: float = 0.0
    counts_all_clips: bool = False


class Linear(NetworkKind):
    """The linear probe: see above."""

    name = "linear"
    tasks = ("recognition",)
    extraction: ClassVar[Mapping[str, Any]] = {"with_pixels": False}
    reads = "class tokens of the last layer, averaged: blind to order"
    needs: ClassVar[Mapping[str, StoreNeeds]] = {
        "recognition": StoreNeeds(arrays=("cls",), instead={"cls": "train with --head attentive"})
    }
    tried_rates = (1e-3, 3e-3, 1e-2, 3e-2)
    tried_decays = (0.0, 0.15)
    options = LinearOptions
    shape: ClassVar[type[NetworkShape]] = LinearShape

    def find_recipe(self, task: str, width: int) -> Recipe:
        """At a rate of its own, whatever the backbone: the reference's are of side networks, and leave it half trained.

        Its norm brings channels of any backbone to one scale. docs/training.md has what was measured.
        """
        return Recipe(epochs=30, learning_rate=3e-3)

    def check_step(self, num_clips: int) -> None:
        """Of one clip its norm has no statistics."""
        if num_clips < 2:
            raise ConfigError(
                "a step of one clip has no statistics for the linear probe's norm: --batch-size 2 or more"
            )

    def plan(
        self, store: StoreReader, outputs: Outputs, options: LinearOptions, layers: tuple[int, ...]
    ) -> NetworkShape:
        """It has no sizes of its own."""
        if not 0 <= options.penalty < math.inf:
            raise ConfigError(f"--set penalty takes a number from 0 up; found {options.penalty:g}")
        return self.describe_shape(store, outputs, layers, penalty=options.penalty, counts_all_clips=True)

    def go_on_with(self, planned: LinearShape, begun: LinearShape) -> LinearShape:
        """With the norm that the run began with."""
        return replace(planned, counts_all_clips=begun.counts_all_clips)

    def build(self, shape: LinearShape) -> LinearProbe:
        """A probe of that width."""
        return LinearProbe(
            shape.width, shape.num_classes, penalty=shape.penalty, counts_all_clips=shape.counts_all_clips
        )

    def stack(self, networks: Sequence[LinearProbe]) -> LinearProbes:
        """Probes share their norm."""
        return LinearProbes(networks)
