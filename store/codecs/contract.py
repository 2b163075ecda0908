"""What a codec is to a store and to a network: codes of one layer's patch tokens, and their way back.

Of class tokens that are coded it is the same: a frame has one of them, so N is 1 (`StoreLayout.of_cls`).

A new codec is one file here and its line in the table, and one that fits it in extract/codec_fit.py.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from ...errors import ConfigError
from ..layout import PATCH_DTYPES, PatchDtype, StoreLayout


@dataclass(frozen=True, slots=True)
class AffineMap:
    """Codes of one layer as a linear map with an offset: token = offset + (code * scale) @ matrix."""

    matrix: Any
    """(K, D) float32 with orthonormal rows."""
    offset: Any
    """(D,) float32; None is zero."""
    scale: Any
    """(K,) float32; None is one."""


class Codec(ABC):
    """How a store's patch tokens are coded.

    Arrays may be numpy's or any other library's: they follow the tokens, at the price of a copy for each call where
    they are elsewhere (see `map_parts`).

    Not a dataclass: lightning-fabric walks into dataclasses among a module's arguments, and refuses frozen ones.

    Args:
        dtype: Type of the codes.
        parts: Its arrays, by name.

    Raises:
        ConfigError: If the dtype is unknown, or the parts do not fit it.
    """

    __slots__ = ("dtype", "parts")

    name: ClassVar[str]
    is_linear: ClassVar[bool] = False
    """Whether a code half way between two decodes to the token half way between theirs, and so for every share. Only
    then are clips mixed as codes; else they are decoded first."""

    def __init__(self, *, dtype: PatchDtype, **parts: Any) -> None:
        if dtype not in PATCH_DTYPES:
            raise ConfigError(f"a codec's dtype is one of {', '.join(PATCH_DTYPES)}; found {dtype!r}")
        self.dtype = dtype
        self.parts = {name: array for name, array in parts.items() if array is not None}

    @classmethod
    @abstractmethod
    def part_shapes(cls, layout: StoreLayout) -> Mapping[str, tuple[int, ...]]:
        """Shapes of all arrays that it may have, the first axis L, by name."""

    @classmethod
    def are_whole(cls, dtype: str, parts: Mapping[str, Any]) -> bool:
        """Whether these parts, each of its shape, make a codec of that dtype."""
        return True

    @property
    def sha256(self) -> str:
        """Hash of dtype and arrays (numpy): two stores merge only when theirs agree."""
        digest = hashlib.sha256(self.dtype.encode())
        for name, array in sorted(self.parts.items()):
            digest.update(f"{name}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
        return digest.hexdigest()

    def map_parts(self, convert: Callable[[Any], Any]) -> Self:
        """The same codec with each array converted, say to another library or device."""
        return type(self)(dtype=self.dtype, **{name: convert(array) for name, array in self.parts.items()})

    @abstractmethod
    def encode(self, tokens: Any, layer: int) -> Any:
        """Code the patch tokens of one layer.

        Args:
            tokens: (..., N, D) floats.
            layer: Place of the layer on the axis L (not the backbone's block number).

        Returns:
            (..., N, K) of this codec's dtype. A float16 code may overflow to infinity: see `check_finite`.
        """

    @abstractmethod
    def decode(self, codes: Any, layer: int) -> Any:
        """Patch tokens of one layer from their codes.

        Args:
            codes: (..., N, K).
            layer: Place of the layer on the axis L.

        Returns:
            (..., N, D) float32.
        """

    def as_affine(self, layer: int, like: Any) -> AffineMap | None:
        """Its decoding of one layer as a map that a network may fold into its own first product.

        Args:
            layer: Place of the layer on the axis L.
            like: Whose library and device the arrays are to be of.

        Returns:
            None where decoding is no such map, or folding it gains nothing: then tokens are decoded.
        """
        return None
