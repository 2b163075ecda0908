"""Frames that a store holds as YCbCr 4:2:0, decoded on the training device: store/pixel_formats.py has the formulas."""

from __future__ import annotations

import torch
from torch.nn import functional as F

_GREY = 128
_FRAMES_AT_ONCE = 16
"""On a CPU, whose cache then holds what is between two steps."""


def decode_ycbcr420(planes: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
    """RGB from planes of YCbCr 4:2:0.

    Args:
        planes: (..., P) uint8: Y, Cb and Cr of each frame.
        image_size: H, W, both even.

    Returns:
        (..., 3, H, W) float32 from 0 to 255, not rounded, on the same device.
    """
    lead, size = planes.shape[:-1], planes.shape[-1]
    rgb = torch.empty((*lead, 3, *image_size), dtype=torch.float32, device=planes.device)
    flat, pixels = planes.reshape(-1, size), rgb.view(-1, 3, *image_size)
    at_once = _FRAMES_AT_ONCE if planes.device.type == "cpu" else max(1, len(flat))
    for own, out in zip(flat.split(at_once), pixels.split(at_once), strict=True):
        _fill_pixels(own, out)
    return rgb


def _fill_pixels(planes: torch.Tensor, rgb: torch.Tensor) -> None:
    """(n, P) to (n, 3, H, W)."""
    count, _, height, width = rgb.shape
    luma = planes[:, : height * width].view(count, height, width).float()
    chroma = planes[:, height * width :].view(count, 2, height // 2, width // 2).float().sub_(_GREY)
    blue, red = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False).unbind(1)
    torch.add(luma, red, alpha=1.402, out=rgb[:, 0])
    torch.add(luma, blue, alpha=-0.344136, out=rgb[:, 1]).add_(red, alpha=-0.714136)
    torch.add(luma, blue, alpha=1.772, out=rgb[:, 2])
    rgb.clamp_(0, 255)
