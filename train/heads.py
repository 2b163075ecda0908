"""What can be trained on a store, by the name that `--head` takes, and how each fits a store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import ConfigError, StoreMismatchError
from ..store.codec import Codec
from ..store.reader import StoreReader
from .config import Family, Inputs, Task
from .side_network import ARRAYS, RetrievalSideNetwork, SideNetwork

_SIDE_WIDTHS = {768: 320, 1024: 512, 1792: 576}
"""The paper's side widths, by the backbone's."""


class Head(Protocol):
    """A trainable module over clips; `arrays` says what it reads from a store."""

    arrays: tuple[str, ...]

    def __call__(
        self,
        pixels: torch.Tensor | None,
        patches: torch.Tensor | None,
        cls: torch.Tensor | None,
        codec: Codec | None = None,
    ) -> torch.Tensor:
        """Clips to (B, num_classes) logits; arrays that it does not read may be None."""


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


class LinearProbe(nn.Module):
    """A linear classifier on the class token of the last layer, averaged over frames: blind to their order."""

    arrays = ("cls",)

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        # Without affine parameters: it only brings channels of very different size to one scale.
        self.norm = nn.BatchNorm1d(width, affine=False)
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


HEADS = ("side4video", "linear")


def plan_head(
    name: str,
    store: StoreReader,
    *,
    layers: tuple[int, ...] | None = None,
    side_width: int | None = None,
    inputs: Inputs = "all",
) -> HeadConfig:
    """Fit a head to a store.

    Args:
        name: One of `HEADS`.
        store: Whose tokens it will read.
        layers: Backbone blocks to use; None takes all that the store holds.
        side_width: S; None takes the paper's for this backbone, about 0.4 D for others.
        inputs: What the side network sees.

    Raises:
        ConfigError: If there is no such head, or the side width or the inputs do not fit it.
        StoreMismatchError: If the store lacks a layer or the pixels.
    """
    if name not in HEADS:
        raise ConfigError(f"--head takes {', '.join(HEADS)}; found {name!r}")
    layout = store.layout
    chosen = tuple(sorted(layers)) if layers else layout.layers
    store.layer_places(chosen)
    if name == "side4video":
        if "pixels" in ARRAYS[inputs] and not layout.with_pixels:
            raise StoreMismatchError(
                f"{store.path} was extracted with --no-pixels, and the side network's stem reads pixels. "
                "Train with --inputs tokens or --head linear, or extract with pixels."
            )
        side_width = side_width or _SIDE_WIDTHS.get(layout.width) or max(64, round(0.4 * layout.width / 64) * 64)
        if side_width % 64:
            raise ConfigError(f"--side-width must be a multiple of 64 (one attention head); found {side_width}")
    elif idle := [o for o, given in (("--side-width", side_width), ("--inputs", inputs != "all")) if given]:
        verb, them = ("has", "it") if len(idle) == 1 else ("have", "them")
        raise ConfigError(
            f"{' and '.join(idle)} {verb} no effect on --head {name}: leave {them} out, or train --head side4video"
        )
    return HeadConfig(
        name=name,
        num_classes=len(store.classes.names),
        layers=chosen,
        width=layout.width,
        num_patches=layout.num_patches,
        patch_px=store.attributes["backbone"]["patch_size"][0],
        side_width=side_width,
        inputs=inputs,
        family=side_family(store) if name == "side4video" else "clip",
    )


def side_family(store: StoreReader) -> Family:
    """Which side blocks the reference puts beside a store's backbone: EVA's beside EVA, else CLIP's."""
    return "eva" if store.attributes["backbone"]["architecture"].startswith("EVA") else "clip"


def build_head(config: HeadConfig) -> Any:
    """A freshly initialised head; seed torch before for the same weights."""
    if config.name == "linear":
        return LinearProbe(config.width, config.num_classes)
    assert config.side_width is not None
    if config.task == "retrieval":
        assert config.embed_dim is not None and config.norm_eps is not None
        return RetrievalSideNetwork(
            num_layers=len(config.layers),
            width=config.width,
            side_width=config.side_width,
            num_patches=config.num_patches,
            patch_px=config.patch_px,
            embed_dim=config.embed_dim,
            norm_eps=config.norm_eps,
            has_projection_bias=config.has_projection_bias,
            family=config.family,
        )
    return SideNetwork(
        num_layers=len(config.layers),
        width=config.width,
        side_width=config.side_width,
        num_patches=config.num_patches,
        patch_px=config.patch_px,
        num_classes=config.num_classes,
        family=config.family,
        inputs=config.inputs,
    )
