"""The linear probe: what the backbone's own class tokens say of a clip, without order."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...errors import ConfigError
from ...store.codecs.contract import Codec
from ...store.reader import StoreReader
from .contract import Network, NetworkKind, NetworkShape, Outputs
from .norms import BatchNorm
from .parts import Classifier


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
        return self.classifier(self.norm(cls[:, :, -1].mean(dim=1)))


class Linear(NetworkKind):
    """The linear probe: see above."""

    name = "linear"
    tasks = ("recognition",)
    reads = "class tokens of the last layer, averaged: blind to order"

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
