"""Vision towers by their models' names, the layers to tap, and what a GPU could do with them."""

from __future__ import annotations

import re

import torch

from ..errors import ConfigError
from . import find_library
from .contract import Backbone, FrameTokens, normalise_pixels
from .facts import BackboneInfo, Precision

__all__ = [
    "Backbone",
    "BackboneInfo",
    "FrameTokens",
    "Precision",
    "build_backbone",
    "find_peak_flops",
    "normalise_pixels",
    "parse_layers",
    "read_peak_flops",
]

# "Paper" layers: up to this depth every block is tapped, above it every second one (ViT-E: 32 of 64).
_EVERY_BLOCK_UP_TO = 32

# By words of the device's name, the more exact first; None for relatives that the words would take in.
_PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "RTX 4090 Laptop": None,
    "RTX 4090 D": None,
    "RTX 3090 Ti": None,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "V100": 125e12,
    "L4": 121e12,
    "T4": 65e12,
}


def build_backbone(
    name: str,
    *,
    weights: str | None,
    device: torch.device,
    precision: Precision | None = None,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
) -> Backbone:
    """Build a model's vision tower, without its weights as yet.

    Args:
        name: A short name, or an architecture of a library in the table.
        weights: A tag of the library, a local file, or `random`; None takes the model's own.
        device: Where it runs.
        precision: Of weights and arithmetic; None takes fp32 on a CPU and fp16 elsewhere.
        seed: Of random weights.
        image_size: H, W of its frames; None takes the size that its weights were made for.

    Raises:
        BackboneError: If there is no such model, its tower has no class token or no blocks, or takes one size alone.
        ConfigError: If a side of its frames is no multiple of the patch's.
        WeightsError: If the weights cannot be had.
    """
    precision = precision or ("fp32" if device.type == "cpu" else "fp16")
    backbone = find_library(name).build_backbone(name, weights=weights, device=device, precision=precision, seed=seed)
    if image_size is not None:
        backbone.resize_input(image_size)
    return backbone


def find_peak_flops(device: torch.device, precision: Precision) -> float | None:
    """What a GPU could do in a second in half precision; None where that is not known.

    Source:
        The makers' data sheets: dense matrix products, sums in float32.
    """
    if device.type != "cuda" or precision == "fp32":
        return None
    return read_peak_flops(torch.cuda.get_device_name(device))


def read_peak_flops(device_name: str) -> float | None:
    """The same by a GPU's name, such as `NVIDIA A100-SXM4-80GB`."""
    peaks = (peak for words, peak in _PEAK_FLOPS.items() if re.search(rf"\b{words}\b", device_name))
    return next(peaks, None)


def parse_layers(text: str, depth: int) -> tuple[int, ...]:
    """Read `--layers`: `paper`, `all`, `last4`, or 0-based blocks such as `1,3,5`; the last block is always tapped.

    Raises:
        ConfigError: If a layer is no number or out of range, or there are fewer blocks than the last ones asked for.
    """
    if text == "all":
        return tuple(range(depth))
    if text == "paper":
        step = 1 if depth <= _EVERY_BLOCK_UP_TO else 2
        return tuple(range(depth - 1, -1, -step))[::-1]
    if last := re.fullmatch(r"last(\d+)", text):
        count = int(last[1])
        if not 1 <= count <= depth:
            raise ConfigError(f"--layers must be last1 to last{depth} for this model; found {text}")
        return tuple(range(depth - count, depth))
    try:
        layers = {int(part) for part in text.split(",")}
    except ValueError:
        raise ConfigError(f"--layers takes paper, all, last4 or numbers such as 1,3,5; found {text!r}") from None
    if outside := sorted(layer for layer in layers if not 0 <= layer < depth):
        raise ConfigError(f"--layers must lie in 0 to {depth - 1} for this model; found {outside}")
    return tuple(sorted(layers | {depth - 1}))
