"""TDS-CLIP: Side4Video's recognition network with a second stem, on differences of frames, and a gate for motion.

Three changes make it of Side4Video's. A second stem sees differences of the five frames around each cached one. A gate
scales what a block's convolution over time finds. Stems cut their patches a pixel further up and left.
docs/networks.md has all of it as formulas.

Source:
    TDS-CLIP, https://arxiv.org/abs/2408.10688; its code BBYL9413/TDS-CLIP at cf4e58c, clip/model.py. Ours differs
    where Side4Video's does (train/networks/side4video.py), and computes the gate again in the backward pass. Outputs
    and gradients agree: tests/golden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import StoreMismatchError
from ...store.needs import StoreNeeds
from ...store.reader import StoreReader
from ..paper.presets import TDS_CLIP_PRESETS
from .contract import NetworkKind, NetworkShape, Outputs
from .norms import BatchNorm
from .parts import PixelStem, make_again, normalise_tokens
from .side4video import ARRAYS, SideBlock, SideNetwork, find_side_width, require_square_patches

if TYPE_CHECKING:
    from ..clips import ClipBatch

PIXEL_OFFSETS = (-2, -1, 0, 1, 2)
"""Of the source's frames around each cached one, whatever the distance of the cached ones."""

_SEEN = PIXEL_OFFSETS.index(0)
_NUM_DIFFERENCES = len(PIXEL_OFFSETS) - 1

_DIFFERENCES_SHARE = 0.5
"""Of the second stem, beside the first."""

_SHIFT_PX = 1
"""Of each patch: TDS-CLIP's code has a pixel of zeros around its convolutions, which have a patch's stride."""

_REDUCTION = 16
"""How many times narrower than S a gate is inside."""


class MotionStem(nn.Module):
    """A stem on the frames that the backbone saw, plus half of one on differences of frames around them."""

    def __init__(self, side_width: int, patch_px: int) -> None:
        super().__init__()
        self.frames = PixelStem(side_width, patch_px, shift_px=_SHIFT_PX)
        self.differences = PixelStem(side_width, patch_px, channels=3 * _NUM_DIFFERENCES, shift_px=_SHIFT_PX)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (B, T, 5, 3, H, W) at `PIXEL_OFFSETS` -> (B, T, N, S).

        Raises:
            StoreMismatchError: If they are not of so many offsets.
        """
        if pixels.ndim != 6 or pixels.shape[2] != len(PIXEL_OFFSETS):
            raise StoreMismatchError(
                f"this network takes pixels (B, T, 5, 3, H, W) at offsets {', '.join(map(str, PIXEL_OFFSETS))}; "
                f"found {tuple(pixels.shape)}"
            )
        differences = pixels[:, :, 1:] - pixels[:, :, :-1]  # successive ones, not to the frame in the middle
        # (B, T, 4, 3, H, W) -> (B, T, 12, H, W), difference major
        return self.frames(pixels[:, :, _SEEN]) + _DIFFERENCES_SHARE * self.differences(differences.flatten(2, 3))


class MotionGate(nn.Module):
    """Scales each number of what a convolution over time found by 0.5 to 1.5, by how it stands out in its moment."""

    def __init__(self, side_width: int) -> None:
        super().__init__()
        narrow = side_width // _REDUCTION
        self.squeeze = nn.Linear(side_width, narrow, bias=False)
        self.squeeze_norm = BatchNorm(narrow)
        self.excite = nn.Linear(narrow, side_width, bias=False)
        self.excite_norm = BatchNorm(side_width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, N, S) -> (B, T, N, S)."""

        def scale(x: torch.Tensor) -> torch.Tensor:
            squeezed = normalise_tokens(self.squeeze_norm, self.squeeze(x))
            behind = squeezed - find_neighbours_maximum(squeezed)  # (B, T, N, S / 16), never positive
            mixed = 0.5 * behind + 0.5 * behind.mean(dim=-1, keepdim=True)
            return x * (0.5 + normalise_tokens(self.excite_norm, self.excite(mixed)).sigmoid())

        # Two products of a sixteenth: cheap to compute again, and all in between is as wide as the side network.
        return make_again(scale, x, side_width=x.shape[-1])


def find_neighbours_maximum(x: torch.Tensor) -> torch.Tensor:
    """Of each number the largest at its moment, the one before and the one after: (B, T, N, R) -> (B, T, N, R).

    A clip's ends see two. Of equal ones the first has the gradient, as in torch's pooling.
    """
    return F.max_pool2d(x.flatten(2), (3, 1), stride=1, padding=(1, 0)).view_as(x)


class GatedBlock(SideBlock):
    """Side4Video's block beside CLIP, its convolution over time behind a gate."""

    def __init__(self, side_width: int) -> None:
        super().__init__(side_width)
        self.gate = MotionGate(side_width)

    def convolve_time(self, x: torch.Tensor) -> torch.Tensor:
        """The temporal branch: (B, T, N, S) -> (B, T, N, S)."""
        return self.gate(super().convolve_time(x))


class TdsNetwork(SideNetwork):
    """The network: `SideNetwork` beside CLIP, on pixels (B, T, 5, 3, H, W)."""

    pixel_offsets = PIXEL_OFFSETS

    def make_stem(self, side_width: int, patch_px: int) -> nn.Module:
        """Two stems."""
        return MotionStem(side_width, patch_px)

    def make_block(self, side_width: int) -> nn.Module:
        """With a gate."""
        return GatedBlock(side_width)

    def reverse_batch(self, batch: ClipBatch) -> ClipBatch:
        """Frames around each cached one in reverse too, or motion inside of it still ran forwards."""
        assert batch.pixels is not None
        return replace(batch, pixels=batch.pixels.flip(2))


@dataclass(frozen=True)
class TdsOptions:
    """What a command says of the network."""

    side_width: int | None = None
    """S; None takes Side4Video's for this backbone, which is the paper's."""


@dataclass(frozen=True, kw_only=True)
class TdsShape(NetworkShape):
    """Of the network."""

    side_width: int
    """S."""


class TdsClip(NetworkKind):
    """TDS-CLIP: see above. The paper has it beside CLIP; beside any other backbone it is the same."""

    name = "tds-clip"
    tasks = ("recognition",)
    reads = "patch and class tokens of all layers, pixels of five frames each, order"
    extraction: ClassVar[Mapping[str, Any]] = {"layers": "all", "pixel_offsets": PIXEL_OFFSETS}
    options = TdsOptions
    shape: ClassVar[type[NetworkShape]] = TdsShape
    presets = TDS_CLIP_PRESETS
    needs: ClassVar[Mapping[str, StoreNeeds]] = {
        "recognition": StoreNeeds(
            arrays=ARRAYS["all"],
            pixel_offsets=PIXEL_OFFSETS,
            instead={"cls": "train with --head attentive", "offsets": "train with --head side4video"},
        )
    }
    can_begin_with_a_run = True
    can_checkpoint_activations = True

    def plan(self, store: StoreReader, outputs: Outputs, options: TdsOptions, layers: tuple[int, ...]) -> NetworkShape:
        """Fit it to a store."""
        require_square_patches(store, "Train with --head attentive.")
        return self.describe_shape(store, outputs, layers, side_width=find_side_width(options.side_width, store))

    def build(self, shape: TdsShape) -> TdsNetwork:
        """A network of those sizes."""
        return TdsNetwork(
            num_layers=len(shape.layers),
            width=shape.width,
            side_width=shape.side_width,
            num_patches=shape.num_patches,
            patch_px=shape.patch_px,
            num_classes=shape.num_classes,
        )
