"""The attentive probe: one learned query over all tokens of a clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ...errors import ConfigError
from ...store.codecs.contract import Codec
from ...store.needs import StoreNeeds
from ...store.reader import StoreReader
from ..recipe import Recipe
from .contract import Network, NetworkKind, NetworkShape, Outputs
from .parts import HEAD_WIDTH, Classifier, Tap, make_again

_MOST_WIDTH = 768
"""Of the probe, beside backbones that are wider."""


class AttentiveProbe(Network):
    """One learned query that attends to all patch tokens of all layers and frames of a clip, then an MLP.

    A token knows its layer and its time; where it is in the frame, it knows from the backbone.

    Args:
        num_layers: L.
        width: D, the backbone's.
        side_width: S, what tokens are projected to; a multiple of 64.
        num_classes: Classes to tell apart.

    Source:
        Attentive probing as in V-JEPA, https://arxiv.org/abs/2404.08471; ours reads several layers.
    """

    arrays = ("patches",)

    def __init__(self, *, num_layers: int, width: int, side_width: int, num_classes: int) -> None:
        super().__init__()
        self.num_heads = side_width // 64
        self.taps = nn.ModuleList(_make_tap(width, side_width) for _ in range(num_layers))
        self.layer = nn.Parameter(torch.empty(num_layers, side_width))
        self.query = nn.Parameter(torch.empty(1, side_width))
        self.keys_values = nn.Linear(side_width, 2 * side_width)
        self.mlp_norm = nn.LayerNorm(side_width)
        self.mlp = nn.Sequential(
            nn.Linear(side_width, 4 * side_width), nn.GELU(), nn.Linear(4 * side_width, side_width)
        )
        self.norm = nn.LayerNorm(side_width)
        self.classifier = Classifier(side_width, num_classes)
        for parameter in (self.layer, self.query, self.classifier.weight):
            nn.init.trunc_normal_(parameter, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self,
        pixels: torch.Tensor | None,
        patches: torch.Tensor,
        cls: torch.Tensor | None,
        codec: Codec | None = None,
    ) -> torch.Tensor:
        """Score clips from patches (B, T, L, N, D), or codes with a codec; returns (B, num_classes) logits."""
        width = self.query.shape[1]
        ask, times = self._fold_query(), embed_times(patches.shape[1], width, patches.device)[:, None]
        pooled, masses = [], []
        for place, tap in enumerate(self.taps):
            assert isinstance(tap, Tap)

            def pool(codes: torch.Tensor, where: torch.Tensor, tap: Tap = tap, place: int = place) -> torch.Tensor:
                read = tap(codes.to(self.layer.dtype)) if codec is None else tap.read_codes(codes, codec, place)
                return _pool_tokens((read + where).flatten(1, 2), ask)

            pooled_and_mass = make_again(pool, patches[:, :, place], self.layer[place] + times, side_width=width)
            pooled.append(pooled_and_mass[..., :-1])
            masses.append(pooled_and_mass[..., -1])
        # Each layer's mean counts as much as its tokens weigh: the softmax over all of them, without holding them.
        shares = torch.stack(masses, dim=-1).softmax(dim=-1)  # (B, heads, L)
        mean = torch.einsum("bhl,bhls->bhs", shares, torch.stack(pooled, dim=2))
        return self._classify(mean)

    def _fold_query(self) -> torch.Tensor:
        """What a token is multiplied by to get each head's logit, (heads, S): the query, seen through the keys.

        The keys' bias adds the same to all logits of a head and is left out.
        """
        width = self.query.shape[1]
        keys = self.keys_values.weight[:width].unflatten(0, (self.num_heads, -1))  # (heads, 64, S)
        query = self.query.view(self.num_heads, -1)  # (heads, 64)
        return torch.einsum("hcs,hc->hs", keys, query) * query.shape[1] ** -0.5

    def _classify(self, mean: torch.Tensor) -> torch.Tensor:
        """Each head's mean token (B, heads, S) -> (B, num_classes): the values of a mean are the mean of the values."""
        width = self.query.shape[1]
        values = self.keys_values.weight[width:].unflatten(0, (self.num_heads, -1))  # (heads, 64, S)
        pooled = torch.einsum("bhs,hcs->bhc", mean, values).flatten(1) + self.keys_values.bias[width:]  # (B, S)
        return self.classifier(self.norm(pooled + self.mlp(self.mlp_norm(pooled))))


def _make_tap(width: int, side_width: int) -> Tap:
    tap = Tap(width, side_width)
    nn.init.normal_(tap.project.weight, std=(2 * side_width) ** -0.5)
    return tap


def _pool_tokens(x: torch.Tensor, ask: torch.Tensor) -> torch.Tensor:
    """The mean of tokens (B, M, S) by each head's weights, and the logarithm of their sum: (B, heads, S + 1)."""
    precise = torch.promote_types(x.dtype, torch.float32)
    logits = (x @ ask.T).to(precise)  # (B, M, heads)
    mass = logits.logsumexp(dim=1)  # (B, heads)
    shares = (logits - mass[:, None]).exp()
    mean = shares.to(x.dtype).transpose(1, 2) @ x
    return torch.cat([mean.to(precise), mass[..., None]], dim=-1)


def embed_times(num_frames: int, width: int, device: torch.device) -> torch.Tensor:
    """Sines and cosines of each frame's place in its clip, (T, width): any number of frames has its own."""
    times = torch.arange(num_frames, device=device)[:, None] / num_frames
    waves = torch.arange(width // 2, device=device)[None]
    angles = 2 * torch.pi * times * (1 + waves / 8)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@dataclass(frozen=True)
class AttentiveOptions:
    """What a command says of the probe."""

    side_width: int | None = None
    """S; None takes the backbone's width, at most 768."""


@dataclass(frozen=True, kw_only=True)
class AttentiveShape(NetworkShape):
    """Of the probe."""

    side_width: int
    """S."""


class Attentive(NetworkKind):
    """The attentive probe: see above."""

    name = "attentive"
    tasks = ("recognition",)
    extraction: ClassVar[Mapping[str, Any]] = {"with_pixels": False}
    reads = "patch tokens of all layers, order"
    needs: ClassVar[Mapping[str, StoreNeeds]] = {"recognition": StoreNeeds(arrays=("patches",))}
    tried_rates = (3e-4, 1e-3, 3e-3)
    options = AttentiveOptions
    shape: ClassVar[type[NetworkShape]] = AttentiveShape

    def find_recipe(self, task: str, width: int) -> Recipe:
        """At one rate, whatever the backbone: beside a wide one the reference's, of side networks, is a tenth of it."""
        return Recipe(epochs=30, learning_rate=1e-3)

    def plan(
        self, store: StoreReader, outputs: Outputs, options: AttentiveOptions, layers: tuple[int, ...]
    ) -> NetworkShape:
        """As wide as the backbone, in whole heads."""
        side_width = options.side_width or max(HEAD_WIDTH, min(store.layout.width, _MOST_WIDTH) // 64 * 64)
        if side_width % HEAD_WIDTH:
            raise ConfigError(f"--side-width must be a multiple of 64 (one attention head); found {side_width}")
        return self.describe_shape(store, outputs, layers, side_width=side_width)

    def build(self, shape: AttentiveShape) -> AttentiveProbe:
        """A probe of those sizes."""
        return AttentiveProbe(
            num_layers=len(shape.layers),
            width=shape.width,
            side_width=shape.side_width,
            num_classes=shape.num_classes,
        )
