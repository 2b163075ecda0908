"""Class tokens on their way to a store: of a batch, and of a sample's frames for what fits and measures their codec."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from ..backbone.contract import FrameTokens
from ..backbone.facts import BackboneInfo
from ..store.layout import ClassTokens


class Tower(Protocol):
    """What fits and measures a codec asks of a backbone."""

    info: BackboneInfo
    device: torch.device

    def encode_frames(self, pixels: torch.Tensor, layers: Iterable[int]) -> FrameTokens:
        """See `Backbone.encode_frames`."""
        ...


def take_class_tokens(
    tokens: FrameTokens, class_tokens: ClassTokens, is_picture: torch.Tensor | None = None
) -> torch.Tensor | None:
    """What a store keeps as class tokens of a batch, before it is cast or coded.

    Args:
        tokens: Of its frames.
        class_tokens: The tower's own, or means of patches; of `none` there are none.
        is_picture: (B, N) bool, on the device: the patches that a mean of them is taken of; None takes all.

    Returns:
        (B, L, D), means in float32.
    """
    if class_tokens == "none":
        return None
    if class_tokens == "mean":
        # In float32: half precision would round the sum of a thousand patches.
        return torch.stack([_average(one.float(), is_picture) for one in tokens.patches], dim=1)
    assert tokens.cls is not None
    return tokens.cls


def _average(patches: torch.Tensor, is_picture: torch.Tensor | None) -> torch.Tensor:
    """The mean of patch tokens (B, N, D), of those that show something of the picture."""
    if is_picture is None:
        return patches.mean(dim=1)
    shares = is_picture / is_picture.sum(dim=1, keepdim=True)
    return (patches * shares[:, :, None]).sum(dim=1)


class ClassTokenRecorder:
    """A tower that keeps the class tokens of a sample's frames as it is shown them, so that none runs twice for them.

    Whoever fits or measures a codec of patches shows it all frames, in their order, once or several times.

    Args:
        tower: With weights.
        pixels: (n, H, W, 3) uint8, the sample's.
        layers: Blocks to tap.
        class_tokens: `own` or `mean`.
        padding: (n, N) bool, the patches that show nothing of the picture; None where none does.
    """

    def __init__(
        self,
        tower: Tower,
        pixels: np.ndarray,
        layers: tuple[int, ...],
        class_tokens: ClassTokens,
        padding: np.ndarray | None,
    ) -> None:
        self.info, self.device = tower.info, tower.device
        self._tower, self._pixels, self._layers = tower, pixels, layers
        self._class_tokens, self._padding = class_tokens, padding
        self._kept: list[torch.Tensor] = []
        self._num_kept = 0

    def encode_frames(self, pixels: torch.Tensor, layers: Iterable[int]) -> FrameTokens:
        """See `Backbone.encode_frames`."""
        tokens = self._tower.encode_frames(pixels, layers)
        if self._num_kept < len(self._pixels):
            own, is_picture = slice(self._num_kept, self._num_kept + len(pixels)), None
            if self._padding is not None:
                is_picture = torch.from_numpy(~self._padding[own]).to(tokens.patches[0].device)
            taken = take_class_tokens(tokens, self._class_tokens, is_picture)
            assert taken is not None
            self._kept.append(taken)
            self._num_kept += len(pixels)
        return tokens

    def finish(self, batch_size: int) -> ClassTokenTable:
        """The class tokens of all frames; those that nobody has shown it yet run now.

        Args:
            batch_size: The most frames in one pass.
        """
        while self._num_kept < len(self._pixels):
            frames = self._pixels[self._num_kept : self._num_kept + batch_size]
            self.encode_frames(torch.from_numpy(frames), self._layers)
        return ClassTokenTable(torch.cat(self._kept), self.info)


class ClassTokenTable:
    """Class tokens for what fits and measures codecs of patches: a tower whose frames are numbers, of one patch each.

    Args:
        tokens: (n, L, D).
        info: Of the backbone that made them.
    """

    def __init__(self, tokens: torch.Tensor, info: BackboneInfo) -> None:
        self._tokens = tokens
        self.info, self.device = replace(info, grid=(1, 1)), tokens.device

    @property
    def frames(self) -> np.ndarray:
        """(n,) the numbers of all frames."""
        return np.arange(len(self._tokens))

    def encode_frames(self, pixels: torch.Tensor, layers: Iterable[int]) -> FrameTokens:
        """Of frames by their numbers, (B,): a class token of each layer as the only patch, (B, 1, D)."""
        values = self._tokens[pixels.to(self.device)]
        return FrameTokens([values[:, place, None] for place in range(values.shape[1])], None, values[:, -1].float())
