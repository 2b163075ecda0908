"""What codecs cost: decoded tokens beside the live ones, layer by layer; and what a pixel format costs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StoreDamagedError
from ..files import write_json
from . import names
from .codecs.affine import INT8_LIMIT
from .layout import PixelFormat
from .pixel_formats import decode_pixels, encode_pixels
from .reader import StoreReader

FIDELITY_NAME = "fidelity.json"
NOTABLE_LOSS = 0.05
"""Share of a layer's variance: above it, `s4v info` warns."""

_NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class LayerFidelity:
    """What is left of one layer's patch tokens, or class tokens, x after coding and decoding them to y.

    Errors are |x - y| / |x - m| of each token, m the mean token of the sample; `normed` after a layer norm of both, as
    a tap of the side network sees them.
    """

    layer: int
    """Backbone block."""
    variance_kept: float
    """1 - sum |x - y|^2 / sum |x - m|^2."""
    error_median: float
    error_worst: float
    normed_error_median: float
    normed_error_worst: float
    cosine_median: float
    """Of x - m and y - m."""
    cosine_worst: float


@dataclass(frozen=True, slots=True)
class PixelFidelity:
    """What is left of frames x that are held as another pixel format than RGB, and come back as y. Of 255."""

    psnr: float | None
    """Peak signal-to-noise ratio in dB: 10 log10(255^2 / mean of (x - y)^2), of all values together; None of no
    error."""
    error_mean: float
    """Mean of |x - y|."""
    error_worst: int
    """The largest |x - y|."""


class FidelityMeter:
    """Compares one layer batch by batch: all tokens once for their mean, then once more beside what became of them.

    Args:
        layer: Backbone block.
    """

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self._count = 0
        self._sum: Any = 0.0
        self._normed_sum: Any = 0.0
        # For each token: |x - y|, |x - m|, cosine, and the first two after the norm.
        self._measured: list[np.ndarray] = []

    def count_mean(self, tokens: np.ndarray) -> None:
        """First, (..., D) live tokens."""
        x = _as_rows(tokens)
        self._count += len(x)
        self._sum = self._sum + x.sum(axis=0)
        self._normed_sum = self._normed_sum + _normalise(x).sum(axis=0)

    def compare(self, tokens: np.ndarray, decoded: np.ndarray) -> None:
        """When all were counted: (..., D) live tokens, and the same after coding and decoding."""
        live, found = _as_rows(tokens), _as_rows(decoded)
        mean = self._sum / self._count
        x, y = live - mean, found - mean
        size = np.linalg.norm(x, axis=1)
        product = size * np.linalg.norm(y, axis=1)
        cosine = (x * y).sum(axis=1) / np.where(product > 0, product, 1)
        normed = _normalise(live)
        normed_size = np.linalg.norm(normed - self._normed_sum / self._count, axis=1)
        normed_difference = np.linalg.norm(normed - _normalise(found), axis=1)
        self._measured.append(np.stack([np.linalg.norm(x - y, axis=1), size, cosine, normed_difference, normed_size]))

    def summarise(self) -> LayerFidelity:
        """What all tokens together came to."""
        difference, size, cosine, normed_difference, normed_size = np.concatenate(self._measured, axis=1)
        errors, normed_errors = _relative(difference, size), _relative(normed_difference, normed_size)
        total = float((size**2).sum())
        return LayerFidelity(
            layer=self._layer,
            variance_kept=1 - float((difference**2).sum()) / total if total else float(not difference.any()),
            error_median=float(np.median(errors)),
            error_worst=float(errors.max()),
            normed_error_median=float(np.median(normed_errors)),
            normed_error_worst=float(normed_errors.max()),
            cosine_median=float(np.median(cosine)),
            cosine_worst=float(cosine.min()),
        )


def count_clipped(
    store: StoreReader, rows: Sequence[int], places: Sequence[int], views: Sequence[str]
) -> dict[str, float]:
    """Of the int8 codes of some rows, the share at the ends of their range, view by view: what lies beyond is cut off.

    Args:
        store: Whose codes.
        rows: Good ones, which have all views.
        places: The frame of each row that is looked at.
        views: Their names.

    Returns:
        By name of the view; nothing of no rows.
    """
    shares = {}
    for view, name in enumerate(views if rows else ()):
        clipped = []
        for row, place in zip(rows, places, strict=True):
            codes = store.read_clips([row], [[place]], view=view, arrays=("patches",)).patches
            assert codes is not None
            clipped.append(float((np.abs(codes) == INT8_LIMIT).mean()))  # no code is -128
        shares[name] = float(np.mean(clipped))
    return shares


def measure_fidelity(tokens: np.ndarray, decoded: np.ndarray, layer: int) -> LayerFidelity:
    """Compare one layer whose tokens are all there.

    Args:
        tokens: (..., D) live.
        decoded: (..., D) the same tokens after coding and decoding.
        layer: Backbone block.
    """
    meter = FidelityMeter(layer)
    meter.count_mean(tokens)
    meter.compare(tokens, decoded)
    return meter.summarise()


def measure_pixels(pixels: np.ndarray, pixel_format: PixelFormat) -> PixelFidelity:
    """Hold frames as a pixel format and compare what comes back.

    Args:
        pixels: (n, H, W, 3) uint8, at least one frame.
        pixel_format: Which.
    """
    image_size = (pixels.shape[1], pixels.shape[2])
    return compare_pixels(
        pixels, (decode_pixels(encode_pixels(one, pixel_format), pixel_format, image_size) for one in pixels)
    )


def compare_pixels(pixels: Iterable[np.ndarray], decoded: Iterable[np.ndarray]) -> PixelFidelity:
    """Compare frames, (H, W, 3) uint8 each, with what became of them; at least one."""
    count = absolute = squared = worst = 0
    for frame, other in zip(pixels, decoded, strict=True):
        error = np.abs(frame.astype(np.int64) - other)
        count, worst = count + error.size, max(worst, int(error.max()))
        absolute, squared = absolute + int(error.sum()), squared + int((error**2).sum())
    psnr = 10 * math.log10(255**2 * count / squared) if squared else None
    return PixelFidelity(psnr=psnr, error_mean=absolute / count, error_worst=worst)


def write_fidelity(
    store: Path,
    layers: list[LayerFidelity],
    *,
    videos: int,
    is_held_out: bool,
    clipped: Mapping[str, float] | None = None,
    cls_layers: list[LayerFidelity] | None = None,
    pixels: PixelFidelity | None = None,
) -> None:
    """Leave in a store what its codecs and its pixel format cost.

    Args:
        store: The store's folder.
        layers: One for each layer, of patches; none where tokens are as they were.
        videos: That were measured.
        is_held_out: Whether none of them was in the calibration sample.
        clipped: As `count_clipped` has it; nothing where there is one view.
        cls_layers: One for each layer, of class tokens; None where they are not coded.
        pixels: Of frames that are no RGB; None where they are.
    """
    by_view = {"clipped": dict(clipped)} if clipped else {}
    facts = {"videos": videos, "is_held_out": is_held_out, **by_view, "layers": [asdict(one) for one in layers]}
    if cls_layers is not None:
        facts["cls_layers"] = [asdict(one) for one in cls_layers]
    if pixels is not None:
        facts["pixels"] = asdict(pixels)
    write_json(store / FIDELITY_NAME, facts)


def read_fidelity(store: Path) -> dict[str, Any] | None:
    """What `write_fidelity` left; None in a store that is not finished or is older than that.

    Raises:
        StoreDamagedError: If the file holds anything else.
    """
    if not os.path.lexists(store / FIDELITY_NAME):
        return None
    value = names.read_json(store, FIDELITY_NAME)
    layers, cls_layers = value.get("layers"), value.get("cls_layers", [])
    is_right = type(value.get("videos")) is int and "is_held_out" in value
    clipped = value.get("clipped", {})
    is_right &= isinstance(clipped, dict) and all(type(share) is float for share in clipped.values())
    is_right &= all(isinstance(of, list) and all(map(_is_layer, of)) for of in (layers, cls_layers))
    is_right &= "pixels" not in value or _is_pixels(value["pixels"])
    if not is_right:
        raise StoreDamagedError(
            f"{store / FIDELITY_NAME} does not say what a codec costs, layer by layer. Remove it: the command "
            "that began the store measures anew."
        )
    return value


def _is_layer(value: object) -> bool:
    """Whether something is a `LayerFidelity` as JSON."""
    if not isinstance(value, dict) or set(value) != {field.name for field in fields(LayerFidelity)}:
        return False
    return all(type(number) in (int, float) for number in value.values())


def _is_pixels(value: object) -> bool:
    """Whether something is a `PixelFidelity` as JSON."""
    if not isinstance(value, dict) or set(value) != {field.name for field in fields(PixelFidelity)}:
        return False
    return all(type(one) in (int, float) or (one is None and name == "psnr") for name, one in value.items())


def _as_rows(tokens: np.ndarray) -> np.ndarray:
    return tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)


def _relative(differences: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Each difference by its token's size; a token at the mean itself, with no error, has none."""
    return differences / np.maximum(sizes, max(float(sizes.max()) * 1e-12, np.finfo(np.float64).tiny))


def _normalise(tokens: np.ndarray) -> np.ndarray:
    centred = tokens - tokens.mean(axis=1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + _NORM_EPS)
