"""Side4Video's released files: all four variants, told apart by the names in the file.

Source:
    HJYao00/Side4Video at 5d72352: Recognition/clip/model.py and Recognition/eva_clip/eva_vit_model.py with the `fc`
    classifier of train_vision.py, Retrieval/modules/module_clip.py, Retrieval/eva_clip/eva_vit_model.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from ...errors import WeightsError
from ...store.reader import StoreReader
from ..choices import Family
from ..networks.contract import NetworkShape
from ..networks.parts import HEAD_WIDTH
from ..networks.side4video import Side4Video, SideShape
from .checkpoint_file import CheckpointFile
from .released import NamePatterns, ReleasedNetwork, count_numbers, count_side_blocks, resolve_layers

# `module.` is DistributedDataParallel's, `clip.` the retrieval model's.
_PREFIX = r"^(?:module\.)?(?:clip\.)?"
_BLOCK = r"visual\.(?:transformer\.side_transformer|side_blocks)\.(\d+)\."
_BACKBONE_BLOCK = re.compile(_PREFIX + r"visual\.(?:transformer\.resblocks|blocks)\.(\d+)\.")
_VISION_TOWER = re.compile(_PREFIX + r"visual\.")
_OWN = re.compile(_PREFIX + r"visual\.(?:transformer\.)?side_")

_FAMILIES: Mapping[Family, str] = {"clip": ".side_transformer.", "eva": ".side_blocks."}

# The reference's modules state these; its files do not.
_FINAL_NORM_EPS: Mapping[Family, float] = {"clip": 1e-5, "eva": 1e-6}


def compile_names(*names: tuple[str, str]) -> NamePatterns:
    """Patterns of names behind any of the prefixes."""
    return tuple((re.compile(_PREFIX + theirs), ours) for theirs, ours in names)


class ReleasedLadder(ReleasedNetwork):
    """Side4Video's names and shapes, which others' files have too."""

    names: ClassVar[NamePatterns] = compile_names(
        (r"visual\.side_conv1\.", r"stem."),
        (r"visual\.side_pre_bn3d\.", r"stem.norm."),
        (r"visual\.(?:transformer\.)?side_spatial_position_embeddings$", r"position"),
        (r"visual\.(?:transformer\.)?side_lns\.(\d+)\.", r"taps.\1.norm."),
        (r"visual\.(?:transformer\.)?side_linears\.(\d+)\.", r"taps.\1.project."),
        (_BLOCK + r"(?:bn_1|norm1)\.", r"blocks.\1.temporal_norm."),
        (_BLOCK + r"(?:conv\.0|pw_conv1)\.", r"blocks.\1.temporal.expand."),
        (_BLOCK + r"(?:conv\.1|dw_conv1)\.", r"blocks.\1.temporal."),
        (_BLOCK + r"(?:conv\.2|pw_conv2)\.", r"blocks.\1.temporal.project."),
        (_BLOCK + r"ln_1\.", r"blocks.\1.attention_norm."),
        (_BLOCK + r"attn\.in_proj_", r"blocks.\1.attention.qkv."),
        (_BLOCK + r"attn\.([qkv])_proj\.(weight|bias)$", r"blocks.\1.attention.qkv.\3.\2"),
        (_BLOCK + r"attn\.(?:out_)?proj\.", r"blocks.\1.attention.project."),
        (_BLOCK + r"(?:bn_2|norm2)\.", r"blocks.\1.mlp_norm."),
        (_BLOCK + r"mlp\.(?:fc1|0)\.", r"blocks.\1.mlp.0."),
        (_BLOCK + r"mlp\.(?:fc2|2)\.", r"blocks.\1.mlp.2."),
        (r"visual\.side_post_bn\.", r"norm."),
        (r"visual\.side_proj$", r"widen.weight"),
        (r"visual\.(?:ln_post|norm)\.", r"end.norm."),
        (r"visual\.proj$", r"end.project.weight"),
        (r"visual\.head\.", r"end.project."),
        (r"fc\.", r"classifier."),
        (r"text_weight_fc\.", r"interaction.text_weight."),
        (r"video_weight_fc\.", r"interaction.frame_weight."),
    )

    def count_backbone_blocks(self, names: Iterable[str]) -> int | None:
        """Of either family."""
        return count_numbers(_BACKBONE_BLOCK, names)

    def reshape(self, name: str, new_name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Convolution kernels as the matrices that we multiply with, and x @ w as linear layers have it."""
        if new_name.startswith("stem.") and tensor.ndim == 5:
            # (S, C, 3, p, p), colour before time -> (3 time steps, S, C*p*p)
            return tensor.permute(2, 0, 1, 3, 4).flatten(2)
        if new_name.endswith("temporal.weight"):  # (S, 1, 3, 1, 1) -> (3 time steps, S)
            return tensor.flatten(1).T
        if name.endswith("visual.side_proj") or name.endswith("visual.proj"):  # (S, D) -> (D, S), (D, E) -> (E, D)
            return tensor.T
        if tensor.ndim in (4, 5):  # (S, S, 1, 1, 1) -> (S, S)
            return tensor.flatten(1)
        return tensor

    def rename(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Three projections (S, S) as one (3*S, S); what lacks its fellows keeps its own name, which no network has."""
        ours = super().rename(tensors)
        for first in [name for name in ours if name.endswith(".q")]:
            joined = first.removesuffix(".q")
            parts = [f"{joined}.{part}" for part in "qkv"]
            if all(part in ours for part in parts):
                ours[joined] = torch.cat([ours.pop(part) for part in parts])
        return ours


class ReleasedSide4Video(ReleasedLadder):
    """Four variants: see above."""

    title = "Side4Video"

    def is_named_in(self, names: Iterable[str]) -> bool:
        """By any name of the side network."""
        return any(_OWN.match(name) for name in names)

    def describe(self, shape: SideShape) -> str:
        """With the variant."""
        return f"{shape.family.upper()} {shape.task} checkpoint of {self.title}"

    def find_family(self, shape: SideShape) -> Family:
        """As its side blocks are."""
        return shape.family

    def compare(self, shape: SideShape, store: StoreReader) -> dict[str, tuple[Any, Any]]:
        """Of retrieval the eps of the end that it brings."""
        if shape.norm_eps is None:
            return {}
        return {"eps of the final norm": (np.float32(shape.norm_eps), np.float32(store.head["norm_eps"]))}

    def name_text(self, name: str, shape: SideShape) -> str | None:
        """Of retrieval, whatever was trained outside the vision tower."""
        is_text = shape.embed_dim is not None and not _VISION_TOWER.match(name)
        return name.removeprefix("module.") if is_text else None

    def is_state(self, new_name: str, shape: SideShape) -> bool:
        """Retrieval's end is its own."""
        return super().is_state(new_name, shape) or shape.embed_dim is not None

    def read_shape(
        self, file: CheckpointFile, ours: Mapping[str, torch.Tensor], layers: tuple[int, ...] | None
    ) -> NetworkShape:
        """Of the variant that its names tell."""
        task, family = _recognise_variant(file, ours)
        is_retrieval = task == "retrieval"
        num_positions, side_width = read_positions(file, self.title, ours)
        depth = self.count_backbone_blocks(file.tensors)
        read_layers = resolve_layers(file, count_side_blocks(ours), depth, layers)
        if is_retrieval and depth is not None and read_layers[-1] != depth - 1:
            raise WeightsError(
                f"{file.path} is of retrieval, which reads the last block, {depth - 1}: --layers must hold it"
            )
        return SideShape(
            name=Side4Video.name,
            num_classes=0 if is_retrieval else len(ours["classifier.bias"]),
            layers=read_layers,
            width=ours["taps.0.project.weight"].shape[1],
            num_patches=num_positions - (is_retrieval and family == "clip"),
            patch_px=find_patch_px(ours["stem.weight"]),
            side_width=side_width,
            family=family,
            task=task,
            interaction="wti" if any(name.startswith("interaction.") for name in ours) else "mean",
            embed_dim=len(ours["end.project.weight"]) if is_retrieval else None,
            norm_eps=_FINAL_NORM_EPS[family] if is_retrieval else None,
            has_projection_bias=is_retrieval and "end.project.bias" in ours,
            normalises_frames=not is_retrieval,  # of recognition what its runs record
        )


def read_positions(file: CheckpointFile, title: str, ours: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """How many places have a position, and S.

    Raises:
        WeightsError: If S is no whole number of attention heads.
    """
    num_positions, side_width = len(ours["position"]), ours["position"].shape[1]
    if side_width % HEAD_WIDTH:
        raise WeightsError(
            f"{file.path} has side blocks of width {side_width}: {title}'s are a multiple of {HEAD_WIDTH}"
        )
    return num_positions, side_width


def find_patch_px(stem: torch.Tensor, channels: int = 3) -> int:
    """The side of a patch, from a stem's weight (3 time steps, S, C*p*p)."""
    return round((stem.shape[2] / channels) ** 0.5)


def _recognise_variant(file: CheckpointFile, ours: Mapping[str, torch.Tensor]) -> tuple[str, Family]:
    matching = [family for family, part in _FAMILIES.items() if any(part in name for name in file.tensors)]
    tasks: dict[str, str] = {"recognition": "classifier.weight", "retrieval": "widen.weight"}
    meant = [task for task, name in tasks.items() if name in ours]
    needed = ["position", "stem.weight", "taps.0.project.weight"]
    needed += {"recognition": ["classifier.bias"], "retrieval": ["end.project.weight"]}[meant[0]] if meant else []
    if len(matching) == len(meant) == 1 and all(name in ours for name in needed):
        return meant[0], matching[0]
    problems = [f"no {name}" for name in needed if name not in ours]
    if len(matching) != 1:
        problems.append("side blocks of CLIP and of EVA" if matching else "no side block")
    if len(meant) != 1:
        problems.append(
            "a classifier (recognition) and visual.side_proj (retrieval)"
            if meant
            else "neither a classifier fc (recognition) nor visual.side_proj (retrieval)"
        )
    raise WeightsError(f"{file.path} is not a checkpoint of Side4Video that s4v knows: {'; '.join(problems)}")
