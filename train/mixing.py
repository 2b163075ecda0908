"""Mixing of clips in token space: mixup and CutMix of what two clips of a store hold, and of their labels.

A clip's partner is its neighbour in the order of the epoch: the first and the second clip of each two exchange a part.
Batches and processes take their clips from that order, so whoever has a clip knows its partner. Where that is of
another batch it is read too.

It is no mixing of pictures: a backbone that sees a mixed picture makes other tokens than the mix of two pictures'.

Source:
    mixup, https://arxiv.org/abs/1710.09412, and CutMix, https://arxiv.org/abs/1905.04899. Both mix pixels before a
    network, by one draw for a batch; here every clip has a draw of its own, and a box is one of whole patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..store.codecs.affine import AffineCodec
from ..store.codecs.contract import Codec
from .choices import Mix

if TYPE_CHECKING:
    from .clips import ClipBatch, ClipPlan
    from .config import TrainConfig

_STREAM = 0x6D69786E
"""Of the numbers that are drawn here, apart from those that decide the order of an epoch."""


@dataclass(frozen=True, slots=True)
class MixedLabels:
    """What else the clips of a mixed batch show."""

    labels: torch.Tensor
    """(B,) of the partners."""
    shares: torch.Tensor
    """(B,) float32, what is left of each clip itself: its own label's part of the target."""


@dataclass(frozen=True, slots=True)
class Draws:
    """How much of each clip of a batch stays, and where."""

    shares: np.ndarray
    """(B,) float32."""
    maps: np.ndarray
    """(B, rows, columns) float32, the same for each patch of the frame, whatever the frame; of a box 0 and around it 1.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """How the clips of one epoch are mixed: a pure function of seed, epoch and clip, whoever has it in its batch."""

    kind: Mix
    """Not `none`."""
    mixup_alpha: float
    cutmix_alpha: float
    seed: int
    epoch: int
    """From 0."""

    @classmethod
    def of_config(cls, config: TrainConfig, epoch: int) -> Mixing | None:
        """What a training's options ask for; None is no mixing."""
        if config.mix == "none":
            return None
        return cls(
            kind=config.mix,
            mixup_alpha=config.mixup_alpha,
            cutmix_alpha=config.cutmix_alpha,
            seed=config.seed_of_order,
            epoch=epoch,
        )

    @property
    def has_whole_patches(self) -> bool:
        """Whether a patch is always that of one clip, and none is between two."""
        return self.kind == "cutmix"

    def decodes(self, codec: Codec) -> bool:
        """Whether patches must be decoded before they are mixed: codes between two codes would mean something else."""
        return not self.has_whole_patches and not codec.is_linear

    def draw(self, rows: np.ndarray, views: np.ndarray, grid: tuple[int, int]) -> Draws:
        """What is drawn for clips.

        Args:
            rows: (B,) of the store.
            views: (B,) on the axis A.
            grid: Patches down and across.
        """
        maps = np.stack([self._draw_map(row, view, grid) for row, view in zip(rows, views, strict=True)])
        return Draws(maps.mean(axis=(1, 2)).astype(np.float32), maps.astype(np.float32))

    def _draw_map(self, row: int, view: int, grid: tuple[int, int]) -> np.ndarray:
        generator = np.random.default_rng([self.seed, self.epoch, int(row), int(view), _STREAM])
        is_mixup = generator.random() < 0.5 if self.kind == "both" else self.kind == "mixup"
        if is_mixup:
            return np.full(grid, generator.beta(self.mixup_alpha, self.mixup_alpha))
        side = (1 - generator.beta(self.cutmix_alpha, self.cutmix_alpha)) ** 0.5
        map_ = np.ones(grid)
        map_[tuple(_draw_span(length, side, generator) for length in grid)] = 0
        return map_


def _draw_span(length: int, share: float, generator: np.random.Generator) -> slice:
    """A share of the patches along one side, around any of them; what would lie outside is cut off."""
    size = round(length * share)
    first = int(generator.integers(length)) - size // 2
    return slice(max(0, first), max(0, first + size))


def pair_clips(plan: ClipPlan, mixing: Mixing) -> ClipPlan:
    """The same batch, and behind its clips those partners that it does not hold.

    The partner of a video's clip is the clip of the same number of its neighbour; of the last one without a neighbour
    behind it, that of the one before. So partners are those of any other way to share the epoch out.

    Args:
        plan: With its order, of two videos or more.
        mixing: Of the epoch.
    """
    assert plan.order is not None and plan.positions is not None
    videos, numbers = plan.positions.T
    others = videos ^ 1
    others = np.where(others < len(plan.order.rows), others, videos - 1)
    wanted = np.stack([others, np.minimum(numbers, plan.order.num_views[others] - 1)], axis=1)
    held = {tuple(position): clip for clip, position in enumerate(plan.positions.tolist())}
    partners = [held.setdefault(tuple(position), len(held)) for position in wanted.tolist()]
    positions = np.array(list(held), dtype=plan.positions.dtype)
    at, order = tuple(positions.T), plan.order
    return replace(
        plan,
        rows=order.rows[at[0]],
        views=order.views[at],
        places=order.places[at],
        labels=order.labels[at],
        positions=positions,
        partners=np.asarray(partners, dtype=np.int64),
        mixing=mixing,
    )


class Mixer:
    """Mixes batches on the device that they lie on; what it is given is written over.

    Args:
        grid: Patches down and across.
        patch_size: Pixels of a patch, down and across.
        codec: Decodes patches before they are mixed; None mixes them as they are.
    """

    def __init__(self, grid: tuple[int, int], patch_size: tuple[int, int], codec: Codec | None = None) -> None:
        self._grid = grid
        self._patch_size = patch_size
        self._codec = codec

    def mix(self, batch: ClipBatch, plan: ClipPlan, to_device: Callable[[np.ndarray], torch.Tensor]) -> ClipBatch:
        """The clips of a plan, each mixed with its partner.

        Patches between two clips are float16, or as wide as codes that are wider. Of decoded ones they are float32
        tokens, (B, T, L, N, D).

        Args:
            batch: As it was read: its clips, and partners behind them.
            plan: Of `pair_clips`.
            to_device: Brings an array to the batch's device.
        """
        assert plan.mixing is not None and plan.partners is not None
        count, is_cut = plan.num_clips, plan.mixing.has_whole_patches
        draws = plan.mixing.draw(plan.rows[:count], plan.views[:count], self._grid)
        partners, shares, maps = map(to_device, (plan.partners, draws.shares, draws.maps))
        pixels, patches, cls, mask = batch.pixels, batch.patches, batch.cls, batch.frame_mask
        if pixels is not None:
            spread = _spread_map(maps, self._patch_size, pixels.shape[-2:])
            spread = spread.view(count, *(1,) * (pixels.ndim - 4), *spread.shape[1:])  # one for all offsets and colours
            _mix_frames(pixels, pixels, partners, spread, is_cut)
            pixels = pixels[:count]
        if cls is not None:
            _mix_frames(cls, cls, partners, shares[:, None, None], is_cut=False)
            cls = cls[:count]
        if patches is not None:
            patches = self._mix_patches(patches, partners, maps.view(count, 1, -1, 1), is_cut)
        return replace(
            batch,
            pixels=pixels,
            patches=patches,
            cls=cls,
            labels=batch.labels[:count],
            mixed=MixedLabels(batch.labels[partners], shares),
            frame_mask=None if mask is None else mask[:count] | mask[partners],
            draws=None if batch.draws is None else batch.draws[:count],
        )

    def _mix_patches(
        self, codes: torch.Tensor, partners: torch.Tensor, share: torch.Tensor, is_cut: bool
    ) -> torch.Tensor:
        """(B and more, T, L, N, K) -> (B, T, L, N, K), or tokens (B, T, L, N, D)."""
        count, decode = len(partners), None if is_cut else self._decode
        if is_cut:
            out = codes
        elif self._codec is None:
            out = codes.new_empty((count, *codes.shape[1:]), dtype=torch.promote_types(codes.dtype, torch.float16))
        else:
            width = self._decode(codes[:1, 0]).shape[-1]
            out = codes.new_empty((count, *codes.shape[1:-1], width), dtype=torch.float32)
        _mix_frames(out, codes, partners, share, is_cut, decode)
        return out[:count]

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        """One frame's (B, L, N, K) as floats to be mixed, or their tokens (B, L, N, D)."""
        codec = self._codec
        if codec is None:
            return codes.float()
        return torch.stack([codec.decode(codes[:, place], place) for place in range(codes.shape[1])], dim=1)


def codec_after(codec: Codec, mixing: Mixing | None) -> Codec:
    """The codec of a batch's patches once it is mixed: of decoded ones, one that takes tokens as they are."""
    return AffineCodec(dtype="float32") if mixing is not None and mixing.decodes(codec) else codec


def _mix_frames(
    out: torch.Tensor,
    values: torch.Tensor,
    partners: torch.Tensor,
    share: torch.Tensor,
    is_cut: bool,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Write B mixed clips into the first B of `out`, which may be `values` itself.

    A frame is mixed in one piece: beside it no second copy of the batch is made.

    Args:
        out: (B or more, T, ...).
        values: (B and more, T, ...).
        partners: (B,) places among the values.
        share: Of each clip itself, (B, ...) as a frame is.
        is_cut: Whether shares are 0 and 1 alone: then values are taken, and never computed.
        decode: What is mixed, of a frame's values.
    """
    count = len(partners)
    for frame in range(values.shape[1]):
        frames = values[:, frame]
        frames = frames if decode is None else decode(frames)
        own, other = frames[:count], frames[partners]
        out[:count, frame] = torch.where(share > 0, own, other) if is_cut else other.lerp_(own, share)


def _spread_map(maps: torch.Tensor, patch_size: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """Shares of patches (B, rows, columns) to those of pixels (B, H, W); what no patch covers goes with the last."""
    for axis, (patch, length) in enumerate(zip(patch_size, size, strict=True), start=1):
        places = torch.arange(length, device=maps.device).div_(patch, rounding_mode="floor")
        maps = maps.index_select(axis, places.clamp_(max=maps.shape[axis] - 1))
    return maps
