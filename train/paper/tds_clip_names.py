"""TDS-CLIP's released files: every name of a Side4Video file of the same sizes, and those of its own.

Source:
    BBYL9413/TDS-CLIP at cf4e58c: clip/model.py with the `fc` classifier of train_vision.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch

from ...errors import WeightsError
from ..networks.contract import NetworkShape
from ..networks.tds_clip import PIXEL_OFFSETS, TdsClip, TdsShape
from .checkpoint_file import CheckpointFile
from .released import NamePatterns, count_side_blocks, require_names, resolve_layers
from .side4video_names import (
    ReleasedLadder,
    compile_names,
    find_patch_px,
    read_positions,
)

_OWN = re.compile(r"(?:^|\.)visual\.side_\w+_c5\.|\.side_transformer\.\d+\.mse\.")
_GATE = r"visual\.transformer\.side_transformer\.(\d+)\.mse\."
_NEEDED = ("position", "stem.frames.weight", "stem.differences.weight", "taps.0.project.weight", "classifier.bias")


class ReleasedTdsClip(ReleasedLadder):
    """Side4Video's recognition beside CLIP with a second stem and gates: names of what that lacks, or has elsewhere."""

    title = "TDS-CLIP"
    names: ClassVar[NamePatterns] = (
        *compile_names(
            (r"visual\.side_conv1\.", "stem.frames."),
            (r"visual\.side_conv1_c5\.", "stem.differences."),
            (r"visual\.side_pre_bn3d\.", "stem.frames.norm."),
            (r"visual\.side_pre_bn3d_c5\.", "stem.differences.norm."),
            (_GATE + r"conv1\.", r"blocks.\1.gate.squeeze."),
            (_GATE + r"bn1\.", r"blocks.\1.gate.squeeze_norm."),
            (_GATE + r"conv2\.", r"blocks.\1.gate.excite."),
            (_GATE + r"bn2\.", r"blocks.\1.gate.excite_norm."),
        ),
        *ReleasedLadder.names,
    )

    def is_named_in(self, names: Iterable[str]) -> bool:
        """By its second stem or a gate."""
        return any(_OWN.search(name) for name in names)

    def read_shape(
        self, file: CheckpointFile, ours: Mapping[str, torch.Tensor], layers: tuple[int, ...] | None
    ) -> NetworkShape:
        """From the same tensors as Side4Video's."""
        require_names(file, self.title, ours, _NEEDED)
        patch_px = find_patch_px(ours["stem.frames.weight"])
        if (num_offsets := ours["stem.differences.weight"].shape[2] / (3 * patch_px**2) + 1) != len(PIXEL_OFFSETS):
            raise WeightsError(
                f"{file.path} has a second stem on {num_offsets:g} frames: {self.title}'s sees {len(PIXEL_OFFSETS)}"
            )
        num_patches, side_width = read_positions(file, self.title, ours)
        depth = self.count_backbone_blocks(file.tensors)
        return TdsShape(
            name=TdsClip.name,
            num_classes=len(ours["classifier.bias"]),
            layers=resolve_layers(file, count_side_blocks(ours), depth, layers),
            width=ours["taps.0.project.weight"].shape[1],
            num_patches=num_patches,
            patch_px=patch_px,
            side_width=side_width,
        )
