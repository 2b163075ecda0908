"""Patch tokens to codes and back, on whatever array library the tokens live in.

    code  = round(((patch - mean) @ basis.T) / scale)      encode, then cast to the store's dtype
    patch = mean + (code * scale) @ basis                  decode

A part that is absent is the identity. Layers are encoded and decoded one by one, so that no batch of full-width
tokens for all layers ever exists at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import array_api_compat
import numpy as np
from numcodecs import BitRound

from ...errors import ConfigError, EnvironmentFailedError
from ..layout import DEFAULT_CODEC, PatchDtype, StoreLayout
from .contract import AffineMap, Codec

# -128 is the fill value of int8 stores: a code never takes it.
INT8_LIMIT = 127

# Other videos reach further than the sample: channels whose extremes are a few enormous tokens by a little, ordinary
# ones by their tails. Measured on tokens as giant ViTs have them and on tiny-clip's (docs/decisions.md).
_HEADROOM = 1.2
_DEVIATIONS = 6.0

_FLOAT16_MAX = 65504.0


class AffineCodec(Codec):
    """A mean, a projection, and steps of int8; see above.

    Args:
        dtype: Type of the codes.
        mean: (L, D) float32, subtracted first, or None.
        basis: (L, K, D) float32 with orthonormal rows, projects D channels to K, or None for K = D.
        scale: (L, K) float32, one int8 step per layer and channel, or None for float codes.

    Raises:
        ConfigError: If the dtype is unknown, or a scale comes with float codes, or none with int8.
    """

    __slots__ = ()

    name = DEFAULT_CODEC
    is_linear = True

    def __init__(self, *, dtype: PatchDtype, mean: Any = None, basis: Any = None, scale: Any = None) -> None:
        super().__init__(dtype=dtype, mean=mean, basis=basis, scale=scale)
        if (dtype == "int8") != (scale is not None):
            raise ConfigError(f"int8 codes, and no others, have a scale; found dtype {dtype}, scale {scale}")

    @classmethod
    def part_shapes(cls, layout: StoreLayout) -> dict[str, tuple[int, ...]]:
        """Of mean, basis and scale."""
        layers, channels, width = len(layout.layers), layout.channels, layout.width
        return {"mean": (layers, width), "basis": (layers, channels, width), "scale": (layers, channels)}

    @classmethod
    def are_whole(cls, dtype: str, parts: Mapping[str, Any]) -> bool:
        """Int8 codes, and no others, have a scale."""
        return ("scale" in parts) == (dtype == "int8")

    @property
    def mean(self) -> Any:
        """(L, D), or None."""
        return self.parts.get("mean")

    @property
    def basis(self) -> Any:
        """(L, K, D), or None."""
        return self.parts.get("basis")

    @property
    def scale(self) -> Any:
        """(L, K), or None."""
        return self.parts.get("scale")

    def encode(self, tokens: Any, layer: int) -> Any:
        """(..., N, D) -> (..., N, K), as above."""
        xp = array_api_compat.array_namespace(tokens)
        dtype = getattr(xp, self.dtype)
        if not self.parts:
            return xp.astype(tokens, dtype)
        mean, basis, scale = self._parts_of(layer, tokens)
        values = xp.astype(tokens, xp.float32)
        if mean is not None:
            values = values - mean
        if basis is not None:
            values = values @ basis.T
        if scale is not None:
            values = xp.clip(xp.round(values / scale), -INT8_LIMIT, INT8_LIMIT)
        return xp.astype(values, dtype)

    def decode(self, codes: Any, layer: int) -> Any:
        """(..., N, K) -> (..., N, D), as above."""
        xp = array_api_compat.array_namespace(codes)
        mean, basis, scale = self._parts_of(layer, codes)
        values = xp.astype(codes, xp.float32)
        if scale is not None:
            values = values * scale
        if basis is not None:
            values = values @ basis
        if mean is not None:
            values = values + mean
        return values

    def as_affine(self, layer: int, like: Any) -> AffineMap | None:
        """What it is; None without a projection, where codes are as wide as tokens."""
        mean, basis, scale = self._parts_of(layer, like)
        return None if basis is None else AffineMap(basis, mean, scale)

    def _parts_of(self, layer: int, like: Any) -> tuple[Any, Any, Any]:
        """Mean, basis and scale of one layer, in the library and on the device of `like`; no copy if they are there."""
        xp = array_api_compat.array_namespace(like)
        device = array_api_compat.device(like)
        parts = (self.mean, self.basis, self.scale)
        mean, basis, scale = (None if part is None else xp.asarray(part[layer], device=device) for part in parts)
        return mean, basis, scale


def fit_scale(absmax: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """The int8 step per layer and channel: 127 of them reach a fifth beyond the largest value seen, and six deviations.

    Values beyond that are clipped. No percentile: giant ViTs have a few enormous tokens and channels, and clipping
    those makes them wrong by more than their own size.

    Args:
        absmax: (L, K) largest absolute value of each channel in the calibration sample.
        deviation: (L, K) standard deviation of each channel there.

    Returns:
        (L, K) float32, positive. A channel that was all but constant gets a hundredth of the layer's median step: it
        may move in a video that the sample does not hold.
    """
    scale = np.maximum(_HEADROOM * absmax, _DEVIATIONS * deviation) / INT8_LIMIT
    for steps in scale:
        moving = steps[steps > 0]
        np.maximum(steps, np.median(moving) / 100 if len(moving) else 1.0, out=steps)
    return np.maximum(scale, np.finfo(np.float32).tiny).astype(np.float32)


def fit_basis(covariance: np.ndarray, channels: int) -> np.ndarray:
    """The directions of most variance of one layer's patch tokens.

    Args:
        covariance: (D, D) of the tokens.
        channels: K, at most D.

    Returns:
        (K, D) float32, orthonormal rows, most variance first; the largest entry of each is positive, so that one
        covariance has one basis.
    """
    _, directions = np.linalg.eigh(np.asarray(covariance, dtype=np.float64))  # columns, ascending
    return _with_signs(directions.T[::-1][:channels])


def fit_basis_of_few(tokens: np.ndarray, mean: np.ndarray, channels: int) -> np.ndarray:
    """The same of fewer tokens than a token has channels, without their covariance, which is far larger than they are.

    Args:
        tokens: (n, D), all that there are.
        mean: (D,) theirs.
        channels: K, below n.
    """
    centred = np.asarray(tokens, dtype=np.float64) - mean
    return _with_signs(np.linalg.svd(centred, full_matrices=False)[2][:channels])


def _with_signs(basis: np.ndarray) -> np.ndarray:
    signs = np.sign(np.take_along_axis(basis, np.abs(basis).argmax(axis=1, keepdims=True), axis=1))
    return (basis * signs).astype(np.float32)


def round_mantissas(codes: np.ndarray, keep_bits: int | None) -> np.ndarray:
    """Float16 codes rounded to some bits of their mantissa, so that they compress; None keeps all ten."""
    if keep_bits is None:
        return codes
    return BitRound(keepbits=keep_bits).encode(codes).view(codes.dtype).reshape(codes.shape)


def check_finite(codes: Any, tokens: Any, block: int, video_ids: Sequence[str] = ()) -> None:
    """Stop when a layer's tokens or its codes hold NaN or infinity.

    Args:
        codes: (B, ...).
        tokens: (B, ...).
        block: Of the backbone.
        video_ids: Of each of the B frames, to be named.

    Raises:
        EnvironmentFailedError: With block and video named, and whether the cast to the store's dtype did it.
    """
    xp = array_api_compat.array_namespace(tokens)
    if not bool(xp.all(xp.isfinite(tokens))):
        raise EnvironmentFailedError(
            f"the backbone's block {block} produced NaN or infinity{_first_bad_video(tokens, video_ids)}. "
            "Run it in float32 (--precision fp32), or check its weights."
        )
    if xp.isdtype(codes.dtype, "real floating") and not bool(xp.all(xp.isfinite(codes))):
        reach, video = float(xp.max(xp.abs(tokens))), _first_bad_video(codes, video_ids)
        why = f"the tokens of backbone block {block} reach {reach:.3g}{video}, above float16's 65504"
        if reach <= _FLOAT16_MAX:  # projected or rounded they may
            why = f"the codes of backbone block {block} pass float16's 65504{video}; its tokens reach {reach:.3g}"
        raise EnvironmentFailedError(f"{why}. Store them as float32 (--dtype float32).")


def _first_bad_video(values: Any, video_ids: Sequence[str]) -> str:
    if not video_ids:
        return ""
    xp = array_api_compat.array_namespace(values)
    bad = (name for value, name in zip(values, video_ids, strict=False) if not bool(xp.all(xp.isfinite(value))))
    return f" on {name}" if (name := next(bad, None)) else ""  # a batch may end with padding, which has no video
