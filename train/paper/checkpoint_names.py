"""The reference's released checkpoints: their names for our parameters, and what else they tell.

All four variants, told apart by the names in the file. The reference's files hold the backbone too, gigabytes of it:
the file is mapped, not read, and only the side network's tensors are ever touched.

Source:
    HJYao00/Side4Video at 5d72352: Recognition/clip/model.py and Recognition/eva_clip/eva_vit_model.py with the `fc`
    classifier of train_vision.py, Retrieval/modules/module_clip.py, Retrieval/eva_clip/eva_vit_model.py.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ...errors import WeightsError
from ..choices import Family
from ..networks.side4video import RetrievalSideNetwork, Side4Video, SideNetwork, SideShape

_log = logging.getLogger(__name__)

# `module.` is DistributedDataParallel's, `clip.` the retrieval model's.
_PREFIX = r"^(?:module\.)?(?:clip\.)?"
_BLOCK = r"visual\.(?:transformer\.side_transformer|side_blocks)\.(\d+)\."
_BACKBONE_BLOCK = re.compile(_PREFIX + r"visual\.(?:transformer\.resblocks|blocks)\.(\d+)\.")
_VISION_TOWER = re.compile(_PREFIX + r"visual\.")

# What the reference calls a side network's; its backbones have no such name.
_SIDE = re.compile(r"(?:^|[._])side")

# Tensors that a message names.
_MOST_NAMED = 4

# Reference's name -> ours; \1 is the number of the block.
_NAMES = tuple(
    (re.compile(_PREFIX + theirs), ours)
    for theirs, ours in (
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
)

# The reference's modules state these; its files do not.
_FINAL_NORM_EPS: dict[Family, float] = {"clip": 1e-5, "eva": 1e-6}


@dataclass(frozen=True, slots=True)
class OfficialCheckpoint:
    """What a checkpoint of the reference holds, sorted; tensors are those of the mapped file."""

    path: Path
    shape: SideShape
    """Everything that the network's shapes follow from."""
    state: dict[str, torch.Tensor]
    """The network's weights, under our names."""
    end: dict[str, torch.Tensor]
    """The frozen tower's own end, as far as the file carries it: norm.*, project.*."""
    depth: int | None
    """Blocks of the backbone that the file carries; None where it carries none."""
    text: dict[str, torch.Tensor]
    """Of retrieval, the rest of what was trained outside the vision tower: the text tower, under its own names."""
    unused: dict[str, int]
    """What nothing of ours takes: places in the file, and how many tensors lie there."""

    def build(self) -> SideNetwork | RetrievalSideNetwork:
        """The network with the checkpoint's weights, in evaluation mode on the CPU.

        Raises:
            WeightsError: If a tensor is missing, left over, or of another size.
        """
        network = Side4Video().build(self.shape)
        try:
            network.load_state_dict(self.state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            kind = f"{self.shape.family.upper()} {self.shape.task}"
            raise WeightsError(f"{self.path} is not a whole {kind} checkpoint of Side4Video: {reason}") from error
        network.eval()
        return network


def load_official_checkpoint(
    path: str | Path, frames: int, layers: tuple[int, ...] | None = None
) -> SideNetwork | RetrievalSideNetwork:
    """Load the network of a checkpoint of the reference; what the file holds beyond it is logged.

    Args:
        path: The reference's `.pt` file: a dict with `model_state_dict` or a bare state dict, names with or without
            `module.`.
        frames: Frames of the clips that it was trained on; the network itself takes any number.
        layers: Backbone blocks that it reads, where the names leave it open; see `read_official_checkpoint`.

    Returns:
        The side network in evaluation mode: logits (B, classes) for recognition, (B, T, E) for retrieval.

    Raises:
        WeightsError: If the file holds anything but tensors, is no checkpoint of Side4Video, or lacks a tensor.
    """
    if frames < 1:
        raise WeightsError(f"frames must be at least 1; found {frames}")
    official = read_official_checkpoint(path, layers)
    network = official.build()
    if official.unused:
        _log.info("%s: not used: %s", path, describe_unused(official.unused))
    return network


def read_official_checkpoint(path: str | Path, layers: tuple[int, ...] | None = None) -> OfficialCheckpoint:
    """Sort out what a checkpoint of the reference holds, without reading the backbone in it.

    Which layers it taps follows from the number of side blocks and of backbone blocks in the file: all of them, or
    every second one up to the last. Where it is neither, or the file holds no backbone, `layers` must tell.

    Args:
        path: As in `load_official_checkpoint`.
        layers: 0-based backbone blocks.

    Raises:
        WeightsError: If the file holds anything but tensors, is no checkpoint of Side4Video, holds a tensor of a side
            network that ours has no place for, or does not fit `layers`.
    """
    path = Path(path)
    tensors, others = _load_tensors(path)
    new_names = _translate(tensors)
    try:
        ours = _rename(tensors, new_names)
        task, family = _recognise_variant(path, tensors, ours)
        depth = _count_backbone_blocks(tensors)
        head = _read_shape(path, ours, task, family, depth, layers)
    except (RuntimeError, IndexError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"{path} holds tensors of other shapes than Side4Video's: {reason}") from error
    end = {name.removeprefix("end."): tensor for name, tensor in ours.items() if name.startswith("end.")}
    state = {name: tensor for name, tensor in ours.items() if task == "retrieval" or not name.startswith("end.")}
    text: dict[str, torch.Tensor] = {}
    unused = []
    for name, tensor in tensors.items():
        if task == "retrieval" and name not in new_names and not _VISION_TOWER.match(name):
            text[name.removeprefix("module.")] = tensor
        elif name not in new_names or (task == "recognition" and new_names[name].startswith("end.")):
            unused.append(name)
    places = Counter(new_names.values())
    doubled = [name for name, new_name in new_names.items() if places[new_name] > 1]
    _require_all_of_side(path, [name for name in (*unused, *text, *doubled) if _SIDE.search(name)])
    return OfficialCheckpoint(path, head, state, end, depth, text, _group(unused, others))


def _require_all_of_side(path: Path, unused: list[str]) -> None:
    """Refuse a file whose side network has more parts than ours: without them it would compute something else.

    Raises:
        WeightsError: With the first few of them.
    """
    if unused:
        more = f" and {len(unused) - _MOST_NAMED} more" if len(unused) > _MOST_NAMED else ""
        raise WeightsError(
            f"{path} holds {len(unused)} tensors of a side network that Side4Video's has no place for: "
            f"{', '.join(unused[:_MOST_NAMED])}{more}. It is another network's (TDS-CLIP's holds all of Side4Video's "
            "names and more): name a checkpoint of Side4Video."
        )


def _read_shape(
    path: Path,
    ours: Mapping[str, torch.Tensor],
    task: str,
    family: Family,
    depth: int | None,
    layers: tuple[int, ...] | None,
) -> SideShape:
    num_blocks = len({name.split(".")[1] for name in ours if name.startswith("blocks.")})
    num_positions, side_width = len(ours["position"]), ours["position"].shape[1]
    if side_width % 64:
        raise WeightsError(f"{path} has side blocks of width {side_width}: Side4Video's are a multiple of 64")
    is_retrieval = task == "retrieval"
    read_layers = _resolve_layers(path, num_blocks, depth, layers)
    if is_retrieval and depth is not None and read_layers[-1] != depth - 1:
        raise WeightsError(f"{path} is of retrieval, which reads the last block, {depth - 1}: --layers must hold it")
    return SideShape(
        name=Side4Video.name,
        num_classes=0 if is_retrieval else len(ours["classifier.bias"]),
        layers=read_layers,
        width=ours["taps.0.project.weight"].shape[1],
        num_patches=num_positions - (is_retrieval and family == "clip"),
        patch_px=round((ours["stem.weight"].shape[2] / 3) ** 0.5),
        side_width=side_width,
        family=family,
        task=task,
        interaction="wti" if any(name.startswith("interaction.") for name in ours) else "mean",
        embed_dim=len(ours["end.project.weight"]) if is_retrieval else None,
        norm_eps=_FINAL_NORM_EPS[family] if is_retrieval else None,
        has_projection_bias=is_retrieval and "end.project.bias" in ours,
        normalises_frames=not is_retrieval,  # of recognition what its runs record
    )


def describe_unused(unused: Mapping[str, int]) -> str:
    """What was not used, in a line: `visual.transformer.resblocks (24 tensors), epoch`."""
    counts = {name: f" ({count} tensor{'s' * (count > 1)})" if count else "" for name, count in unused.items()}
    return ", ".join(name + count for name, count in counts.items()) or "nothing"


def rename_official(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights (or gradients) of the reference under our names and in our shapes; the backbone's blocks are left out."""
    return _rename(tensors, _translate(tensors))


def _rename(tensors: Mapping[str, torch.Tensor], new_names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    return _join_queries_keys_values({new: _reshape(name, new, tensors[name]) for name, new in new_names.items()})


def _translate(names: Iterable[str]) -> dict[str, str]:
    """Our names by the reference's, of those that have one."""
    new_names = {}
    for name in names:
        for pattern, replacement in _NAMES:
            new_name, count = pattern.subn(replacement, name)
            if count:
                new_names[name] = new_name
                break
    return new_names


def _reshape(name: str, new_name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Convolution kernels as the matrices that we multiply with, and x @ w as linear layers have it."""
    if new_name == "stem.weight":  # (S, 3, 3, p, p), colour before time -> (3 time steps, S, 3*p*p)
        return tensor.permute(2, 0, 1, 3, 4).flatten(2)
    if new_name.endswith("temporal.weight"):  # (S, 1, 3, 1, 1) -> (3 time steps, S)
        return tensor.flatten(1).T
    if name.endswith("visual.side_proj") or name.endswith("visual.proj"):  # (S, D) -> (D, S), (D, E) -> (E, D)
        return tensor.T
    if tensor.ndim == 5:  # (S, S, 1, 1, 1) -> (S, S)
        return tensor.flatten(1)
    return tensor


def _join_queries_keys_values(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Three projections (S, S) as one (3*S, S); what lacks its fellows keeps its own name, which no network has."""
    for first in [name for name in ours if name.endswith(".q")]:
        joined = first.removesuffix(".q")
        parts = [f"{joined}.{part}" for part in "qkv"]
        if all(part in ours for part in parts):
            ours[joined] = torch.cat([ours.pop(part) for part in parts])
    return ours


def _load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The model's tensors by name, and the names of what lies beside the model."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise WeightsError(f"{path}: {found}. Name a checkpoint of the reference, a .pt file.")
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"  # older files cannot be memory-mapped
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"{path} is not a whole checkpoint of plain tensors: {reason}. Nothing in it was run; download it again."
        ) from error
    if not isinstance(checkpoint, dict):
        return {}, []
    is_wrapped = isinstance(checkpoint.get("model_state_dict"), dict)
    state: dict[Any, Any] = checkpoint["model_state_dict"] if is_wrapped else checkpoint
    others = [str(name) for name in checkpoint if name != "model_state_dict"] if is_wrapped else []
    return {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}, others


def _recognise_variant(
    path: Path, tensors: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor]
) -> tuple[str, Family]:
    families: dict[Family, str] = {"clip": ".side_transformer.", "eva": ".side_blocks."}
    matching = [family for family, part in families.items() if any(part in name for name in tensors)]
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
    raise WeightsError(f"{path} is not a checkpoint of Side4Video that s4v knows: {'; '.join(problems)}")


def _count_backbone_blocks(names: Mapping[str, torch.Tensor]) -> int | None:
    blocks = {int(match[1]) for match in map(_BACKBONE_BLOCK.match, names) if match}
    return max(blocks) + 1 if blocks else None


def _resolve_layers(path: Path, num_blocks: int, depth: int | None, layers: tuple[int, ...] | None) -> tuple[int, ...]:
    backbone = "no backbone" if depth is None else f"a backbone of {depth} blocks"
    facts = f"{path} holds {num_blocks} side blocks and {backbone}"
    if layers is not None:
        chosen = tuple(sorted(set(layers)))
        if len(chosen) != num_blocks:
            raise WeightsError(f"{facts}: --layers must name {num_blocks} backbone blocks; found {len(chosen)}")
        if chosen[0] < 0 or (depth is not None and chosen[-1] >= depth):
            raise WeightsError(f"{facts}: --layers {','.join(map(str, chosen))} are not all among them")
        return chosen
    if depth == num_blocks:
        return tuple(range(num_blocks))
    if depth == 2 * num_blocks:
        return tuple(range(1, depth, 2))
    raise WeightsError(f"{facts}: which it reads is left open. Name them: --layers 1,3,5 (0-based)")


def _group(names: list[str], others: list[str]) -> dict[str, int]:
    """Tensors by the part of their name before a block's number, else before its last word."""
    places = Counter(re.split(r"\.\d+\.", name)[0] if re.search(r"\.\d+\.", name) else name for name in names)
    return {**places, **dict.fromkeys(others, 0)}
