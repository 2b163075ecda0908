"""The linear probe: what the backbone's own class tokens say of a clip, without order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import ConfigError
from ...store.codecs.contract import Codec
from ...store.reader import StoreReader
from .contract import Network, NetworkKind, NetworkShape, NetworkStack, Outputs
from .norms import BatchNorm
from .parts import Classifier

if TYPE_CHECKING:
    from ..clips import ClipBatch


class LinearProbe(Network):
    """A linear classifier on the class token of the last layer, averaged over frames: blind to their order."""

    arrays = ("cls",)

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        # Without affine parameters: it only brings channels of very different size to one scale.
        self.norm = BatchNorm(width, affine=False)
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


class Linear(NetworkKind):
    """The linear probe: see above."""

    name = "linear"
    tasks = ("recognition",)
    reads = "class tokens of the last layer, averaged: blind to order"
    tried_rates = (1e-3, 3e-3, 1e-2, 3e-2)
    tried_decays = (0.0, 0.15)

    def check_step(self, num_clips: int) -> None:
        """Of one clip its norm has no statistics."""
        if num_clips < 2:
            raise ConfigError(
                "a step of one clip has no statistics for the linear probe's norm: --batch-size 2 or more"
            )

    def plan(self, store: StoreReader, outputs: Outputs, options: Any, layers: tuple[int, ...]) -> NetworkShape:
        """It has no sizes of its own."""
        return self.describe_shape(store, outputs, layers)

    def build(self, shape: NetworkShape) -> LinearProbe:
        """A probe of that width."""
        return LinearProbe(shape.width, shape.num_classes)

    def stack(self, networks: Sequence[LinearProbe]) -> LinearProbes:
        """Probes share their norm."""
        return LinearProbes(networks)
