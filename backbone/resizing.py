"""Towers that take frames of another size than their weights were made for: the grid, positions and rotations.

Weights and tensors without memory are treated alike, so a tower can be resized before its weights are there. Positions
are interpolated on the CPU, so that they are the same whatever the tower runs on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Grid = tuple[int, int]
"""Patches down and across."""


def resize_open_clip(tower: Any, image_size: tuple[int, int]) -> None:
    """Give one of open_clip's own ViTs another size of frames.

    Args:
        tower: Its `VisionTransformer`, with one class token before the patches.
        image_size: H, W, multiples of the patch.
    """
    height, width = image_size
    patch_height, patch_width = tower.patch_size
    old, new = tuple(tower.grid_size), (height // patch_height, width // patch_width)
    positions = interpolate_positions(tower.positional_embedding, old, new, num_prefix=1)
    tower.positional_embedding = nn.Parameter(positions, requires_grad=False)
    tower.grid_size, tower.image_size = new, image_size


def resize_timm(trunk: Any, image_size: tuple[int, int]) -> None:
    """Give one of timm's ViTs another size of frames, by its own `set_input_size`.

    Tables of rotations, which that computes anew, keep the precision and the device that they had.

    Args:
        trunk: The ViT.
        image_size: H, W, multiples of the patch.
    """
    before = {name: (buffer.device, buffer.dtype) for name, buffer in trunk.named_buffers()}
    positions = getattr(trunk, "pos_embed", None)
    if positions is not None:
        trunk.pos_embed = nn.Parameter(_off_device(positions), requires_grad=False)
    trunk.set_input_size(image_size)
    if positions is not None:
        trunk.pos_embed = nn.Parameter(trunk.pos_embed.to(positions.device), requires_grad=False)
    for module_name, module in trunk.named_modules():
        for name, buffer in module._buffers.items():
            full = f"{module_name}.{name}" if module_name else name
            if buffer is not None and full in before:
                module._buffers[name] = buffer.to(*before[full])


def interpolate_positions(positions: torch.Tensor, old: Grid, new: Grid, *, num_prefix: int) -> torch.Tensor:
    """Position embeddings of another grid: bicubic, antialiased, in float32; those of other tokens stay.

    Args:
        positions: (P + h w, D).
        old: Their grid, h x w.
        new: The one wanted; grids of as many patches but another shape are interpolated too.
        num_prefix: P, tokens before those of the patches.

    Returns:
        (P + h' w', D) in the precision of `positions`; themselves where the grid is the same.

    Source:
        open_clip's `resize_pos_embed`, which begins with a square grid.
    """
    if new == old:
        return positions
    values = _off_device(positions)
    prefix, grid = values[:num_prefix], values[num_prefix:]
    picture = grid.float().reshape(1, *old, -1).permute(0, 3, 1, 2)  # (1, D, h, w)
    resized = F.interpolate(picture, size=new, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([prefix, resized.permute(0, 2, 3, 1).flatten(0, 2).to(positions.dtype)]).to(positions.device)


def _off_device(values: torch.Tensor) -> torch.Tensor:
    """Values on the CPU; such as have no memory as they are."""
    return values if values.is_meta else values.cpu()
