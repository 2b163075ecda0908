"""The reference's released checkpoints: their names for our parameters.

So far CLIP recognition. The reference's files hold the backbone too; only the side network is kept.

Source:
    HJYao00/Side4Video at 5d72352, Recognition/clip/model.py and the `fc` classifier of train_vision.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch

from ..errors import WeightsError
from .side_network import SideNetwork

_PREFIX = r"^(?:module\.)?"
_BLOCK = r"visual\.transformer\.side_transformer\.(\d+)\."

# Reference's name -> ours; \1 is the number of the block.
_NAMES = (
    (r"visual\.side_conv1\.", r"stem."),
    (r"visual\.side_pre_bn3d\.", r"stem.norm."),
    (r"visual\.transformer\.side_spatial_position_embeddings$", r"position"),
    (r"visual\.transformer\.side_lns\.(\d+)\.", r"taps.\1.norm."),
    (r"visual\.transformer\.side_linears\.(\d+)\.", r"taps.\1.project."),
    (_BLOCK + r"bn_1\.", r"blocks.\1.temporal_norm."),
    (_BLOCK + r"conv\.0\.", r"blocks.\1.temporal.expand."),
    (_BLOCK + r"conv\.1\.", r"blocks.\1.temporal."),
    (_BLOCK + r"conv\.2\.", r"blocks.\1.temporal.project."),
    (_BLOCK + r"ln_1\.", r"blocks.\1.attention_norm."),
    (_BLOCK + r"attn\.in_proj_", r"blocks.\1.attention.qkv."),
    (_BLOCK + r"attn\.out_proj\.", r"blocks.\1.attention.project."),
    (_BLOCK + r"bn_2\.", r"blocks.\1.mlp_norm."),
    (_BLOCK + r"mlp\.fc1\.", r"blocks.\1.mlp.0."),
    (_BLOCK + r"mlp\.fc2\.", r"blocks.\1.mlp.2."),
    (r"visual\.side_post_bn\.", r"norm."),
    (r"fc\.", r"classifier."),
)


def rename_official(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights (or gradients) of the reference under our names and in our shapes; the backbone's are left out."""
    ours = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _NAMES:
            new_name, count = re.subn(_PREFIX + pattern, replacement, name)
            if count:
                ours[new_name] = _reshape(new_name, tensor)
                break
    return ours


def _reshape(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Convolution kernels as the matrices that we multiply with."""
    if name == "stem.weight":  # (S, 3, 3, p, p), colour before time -> (3 time steps, S, 3*p*p)
        return tensor.permute(2, 0, 1, 3, 4).flatten(2)
    if name.endswith("temporal.weight"):  # (S, 1, 3, 1, 1) -> (3 time steps, S)
        return tensor.flatten(1).T
    if tensor.ndim == 5:  # (S, S, 1, 1, 1) -> (S, S)
        return tensor.flatten(1)
    return tensor


def load_official_checkpoint(path: str | Path, frames: int) -> SideNetwork:
    """Load a recognition checkpoint of the reference that was trained beside a CLIP backbone.

    Args:
        path: The reference's `.pt` file: a dict with `model_state_dict`, names with or without `module.`.
        frames: Frames of the clips that it was trained on; the network itself takes any number.

    Returns:
        The side network in evaluation mode.

    Raises:
        WeightsError: If the file holds anything but tensors, is of another variant, or lacks a tensor.
    """
    if frames < 1:
        raise WeightsError(f"frames must be at least 1; found {frames}")
    tensors = _load_tensors(Path(path))
    state = rename_official(tensors)
    _require_variant(path, tensors, state)
    num_layers = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    num_patches, side_width = state["position"].shape
    network = SideNetwork(
        num_layers=num_layers,
        width=state["taps.0.project.weight"].shape[1],
        side_width=side_width,
        num_patches=num_patches,
        patch_px=round((state["stem.weight"].shape[2] / 3) ** 0.5),
        num_classes=len(state["classifier.bias"]),
    )
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(f"{path} is not a whole CLIP recognition checkpoint of Side4Video: {reason}") from error
    return network.eval()


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"  # older files cannot be memory-mapped
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path} is not a checkpoint of plain tensors: {reason}. Nothing in it was run.") from error
    state = checkpoint.get("model_state_dict", checkpoint) if isinstance(checkpoint, dict) else {}
    named = state.items() if isinstance(state, dict) else ()
    return {str(name): value for name, value in named if isinstance(value, torch.Tensor)}


def _require_variant(path: str | Path, names: Iterable[str], state: Mapping[str, torch.Tensor]) -> None:
    missing = [
        name for name in ("position", "taps.0.project.weight", "stem.weight", "classifier.bias") if name not in state
    ]
    if missing or any(".blocks." in name and "visual" in name for name in names):
        raise WeightsError(
            f"{path} is not a CLIP recognition checkpoint of Side4Video"
            + (f": no tensor for {', '.join(missing)}" if missing else ": its backbone is EVA")
            + ". EVA and retrieval checkpoints are not supported yet."
        )
