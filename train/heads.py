"""What can be trained on a store, by the name that `--head` takes, and how each fits a store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, StoreMismatchError
from ..store.codec import Codec
from ..store.reader import StoreReader
from .config import Family, Inputs, Similarity, Task
from .paper.presets import PAPER_SIDE_WIDTHS, side_family
from .side_network import ARRAYS, BatchNorm, LadderSizes, RetrievalSideNetwork, SideNetwork, Tap, make_again

_MOST_PROBE_WIDTH = 768
"""Of the attentive probe, beside backbones that are wider."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """Everything that a head's shapes follow from; saved with the run."""

    name: str
    num_classes: int
    """0 for retrieval."""
    layers: tuple[int, ...]
    """Backbone blocks that it reads, ascending."""
    width: int
    """D, the backbone's."""
    num_patches: int
    patch_px: int
    side_width: int | None = None
    """S; None for heads without one."""
    inputs: Inputs = "all"
    """What the side network sees; other heads always see all that they read."""
    family: Family = "clip"
    """The side network's blocks; runs from before there was a choice have CLIP's, whatever their backbone."""
    task: Task = "recognition"
    embed_dim: int | None = None
    """E, of retrieval."""
    norm_eps: float | None = None
    """Of the tower's final norm, of retrieval."""
    has_projection_bias: bool = False
    """Whether the tower's projection has a bias, of retrieval."""
    interaction: Similarity = "mean"
    """How frames are compared with texts, of retrieval."""


class LinearProbe(nn.Module):
    """A linear classifier on the class token of the last layer, averaged over frames: blind to their order."""

    arrays = ("cls",)

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        # Without affine parameters: it only brings channels of very different size to one scale.
        self.norm = BatchNorm(width, affine=False)
        self.classifier = nn.Linear(width, num_classes)
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


class AttentiveProbe(nn.Module):
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

    arrays = ("patches", "cls")

    def __init__(self, *, num_layers: int, width: int, side_width: int, num_classes: int) -> None:
        super().__init__()
        self.num_heads = side_width // 64
        self.taps = nn.ModuleList(Tap(width, side_width) for _ in range(num_layers))
        self.layer = nn.Parameter(torch.empty(num_layers, side_width))
        self.query = nn.Parameter(torch.empty(1, side_width))
        self.keys_values = nn.Linear(side_width, 2 * side_width)
        self.mlp_norm = nn.LayerNorm(side_width)
        self.mlp = nn.Sequential(
            nn.Linear(side_width, 4 * side_width), nn.GELU(), nn.Linear(4 * side_width, side_width)
        )
        self.norm = nn.LayerNorm(side_width)
        self.classifier = nn.Linear(side_width, num_classes)
        for parameter in (self.layer, self.query, self.classifier.weight):
            nn.init.trunc_normal_(parameter, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self,
        pixels: torch.Tensor | None,
        patches: torch.Tensor,
        cls: torch.Tensor,
        codec: Codec | None = None,
    ) -> torch.Tensor:
        """Score clips from patches (B, T, L, N, D), or codes with a codec; returns (B, num_classes) logits."""
        width = self.query.shape[1]
        ask, times = self._fold_query(), embed_times(patches.shape[1], width, patches.device)[:, None]
        pooled, masses = [], []
        for place, tap in enumerate(self.taps):
            assert isinstance(tap, Tap)

            def pool(codes: torch.Tensor, where: torch.Tensor, tap: Tap = tap, place: int = place) -> torch.Tensor:
                read = tap(codes.to(cls.dtype)) if codec is None else tap.read_codes(codes, codec, place)
                return _pool_tokens((read + where).flatten(1, 2), ask)

            found = make_again(pool, patches[:, :, place], self.layer[place] + times, side_width=width)
            pooled.append(found[..., :-1])
            masses.append(found[..., -1])
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


HEADS = ("side4video", "linear", "attentive")


def plan_head(
    name: str,
    store: StoreReader,
    *,
    layers: tuple[int, ...] | None = None,
    side_width: int | None = None,
    inputs: Inputs = "all",
    task: Task = "recognition",
    interaction: Similarity = "mean",
) -> HeadConfig:
    """Fit a head to a store.

    Args:
        name: One of `HEADS`.
        store: Whose tokens it will read.
        layers: Backbone blocks to use; None takes all that the store holds.
        side_width: S; None takes the paper's for this backbone, about 0.4 D for others.
        inputs: What the side network sees.
        task: What it is for.
        interaction: How frames are compared with texts, of retrieval.

    Raises:
        ConfigError: If there is no such head, or the side width or the inputs do not fit it.
        StoreMismatchError: If the store lacks a layer or the pixels.
    """
    if name not in HEADS:
        raise ConfigError(f"--head takes {', '.join(HEADS)}; found {name!r}")
    layout = store.layout
    chosen = tuple(sorted(layers)) if layers else layout.layers
    store.layer_places(chosen)
    idle = ["--side-width"] if side_width is not None and name == "linear" else []
    idle += ["--inputs"] if inputs != "all" and name != "side4video" else []
    if idle:
        verb, them = ("has", "it") if len(idle) == 1 else ("have", "them")
        raise ConfigError(
            f"{' and '.join(idle)} {verb} no effect on --head {name}: leave {them} out, or train --head side4video"
        )
    if name == "side4video" and "pixels" in ARRAYS[inputs] and not layout.with_pixels:
        raise StoreMismatchError(
            f"{store.path} was extracted with --no-pixels, and the side network's stem reads pixels. "
            "Train with --inputs tokens or --head linear, or extract with pixels."
        )
    if side_width is None and name != "linear":
        side_width = _default_side_width(name, layout.width)
    if side_width is not None and side_width % 64:
        raise ConfigError(f"--side-width must be a multiple of 64 (one attention head); found {side_width}")
    if task == "retrieval" and chosen[-1] != (last := store.attributes["backbone"]["depth"] - 1):
        raise StoreMismatchError(
            f"retrieval adds to the class token of the backbone's last block, {last}; --layers ends with {chosen[-1]}"
        )
    ends: dict[str, Any] = {}
    if task == "retrieval":
        ends = {
            "embed_dim": layout.embed_dim,
            "norm_eps": float(store.head["norm_eps"]),
            "has_projection_bias": "proj_bias" in store.head,
            "interaction": interaction,
        }
    return HeadConfig(
        name=name,
        task=task,
        **ends,
        num_classes=len(store.classes.names) if task == "recognition" else 0,
        layers=chosen,
        width=layout.width,
        num_patches=layout.num_patches,
        patch_px=store.attributes["backbone"]["patch_size"][0],
        side_width=side_width,
        inputs=inputs,
        family=side_family(store) if name == "side4video" else "clip",
    )


def _default_side_width(name: str, width: int) -> int:
    if name == "attentive":
        return max(64, min(width, _MOST_PROBE_WIDTH) // 64 * 64)
    return PAPER_SIDE_WIDTHS.get(width) or max(64, round(0.4 * width / 64) * 64)


def build_head(config: HeadConfig) -> Any:
    """A freshly initialised head; seed torch before for the same weights."""
    if config.name == "linear":
        return LinearProbe(config.width, config.num_classes)
    assert config.side_width is not None
    if config.name == "attentive":
        return AttentiveProbe(
            num_layers=len(config.layers),
            width=config.width,
            side_width=config.side_width,
            num_classes=config.num_classes,
        )
    sizes: LadderSizes = {
        "num_layers": len(config.layers),
        "width": config.width,
        "side_width": config.side_width,
        "num_patches": config.num_patches,
        "patch_px": config.patch_px,
        "family": config.family,
        "inputs": config.inputs,
    }
    if config.task == "recognition":
        return SideNetwork(**sizes, num_classes=config.num_classes)
    assert config.embed_dim is not None and config.norm_eps is not None
    return RetrievalSideNetwork(
        **sizes,
        embed_dim=config.embed_dim,
        norm_eps=config.norm_eps,
        has_projection_bias=config.has_projection_bias,
        interaction=config.interaction,
    )
