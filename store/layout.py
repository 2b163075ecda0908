"""What arrays a store has, their shapes, and how rows fall into shards.

Letters, here and in every docstring of s4v:

    V  rows: a video, or one segment of a long one     L  tapped layers
    A  views: spatial crop x flip                      N  patch tokens of a frame, the class token kept apart
    F  cached frames of a row                          D  backbone width
    B  clips in a batch                                K  stored channels (K = D unless projected)
    T  frames of a clip                                S  side network width
    E  embedding width                                 O  pixel frames around each cached frame
    H, W  pixels                                       C, M  captions, words

V, A and F are maxima: what a row does not use is absent from its shard and costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

FORMAT_VERSION = 2
"""Of new stores. A store of version 1 keeps its done-markers in Parquet, and stays of that version."""

STATS_NAME = "stats.json"
"""File of a store that says how long its last extraction took."""

PatchDtype = Literal["int8", "float16", "float32"]
DEFAULT_CODEC = "affine"
"""Of a store that names no codec: all before there was a choice."""
PATCH_DTYPES: tuple[PatchDtype, ...] = ("int8", "float16", "float32")

ClassTokens = Literal["own", "mean", "none"]
CLASS_TOKENS: tuple[ClassTokens, ...] = ("own", "mean", "none")
"""What `cls` holds: the tower's own class tokens, means of patch tokens in their place, or there is no such array."""

_SHARD_BYTES = 512 * 2**20
_MAX_VIDEOS_PER_SHARD = 64
_MIN_SHARDS = 16
_SPLIT_VIEWS_ABOVE_BYTES = 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class ArraySpec:
    """One array of a store: its shape, its file (shard) and, inside the file, what one read fetches (chunk)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    shard_shape: tuple[int, ...]
    """Shape of one file."""
    chunk_shape: tuple[int, ...] | None = None
    """Shape of an inner chunk; None for a file that is one chunk."""
    dimension_names: tuple[str, ...] = ()
    is_compressed: bool = False

    def shard_keys(self, shard: int) -> list[str]:
        """Names of the files of one shard of rows: one, or several where a row is split along its views."""
        views = math.ceil(self.shape[1] / self.shard_shape[1])
        return [".".join(["c", str(shard), str(view), *["0"] * (len(self.shape) - 2)]) for view in range(views)]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreLayout:
    """Sizes of a store; everything else about its arrays follows from them."""

    num_rows: int
    """V."""
    num_views: int
    """A."""
    num_frames: int
    """F, the most frames that any split caches."""
    layers: tuple[int, ...]
    """0-based backbone blocks whose outputs are cached, ascending; L is their number."""
    num_patches: int
    """N."""
    width: int
    """D."""
    channels: int
    """K."""
    embed_dim: int
    """E."""
    image_size: tuple[int, int]
    """H, W of the frames that the backbone sees."""
    patch_dtype: PatchDtype
    with_pixels: bool = True
    keep_bits: int | None = None
    """Mantissa bits kept of float16 patches, which are then compressed; None keeps all and compresses nothing."""
    pixel_offsets: tuple[int, ...] = (0,)
    """Which frames around each cached one `pixels` holds; O is their number."""
    class_tokens: ClassTokens = "own"
    """One of `CLASS_TOKENS`; a store records it where it is not `own`."""
    rows_per_shard: int = 0
    """Rows in one shard, the same for all arrays. 0 takes a pure function of V and sizes; a store that rows are added
    to keeps the number that it was begun with."""

    def __post_init__(self) -> None:
        if not self.rows_per_shard:
            by_bytes = _SHARD_BYTES // max(1, self.bytes_per_row)
            rows = max(1, min(by_bytes, _MAX_VIDEOS_PER_SHARD, math.ceil(self.num_rows / _MIN_SHARDS)))
            object.__setattr__(self, "rows_per_shard", rows)

    @property
    def cls_dtype(self) -> str:
        """Class tokens are never quantised: float32 beside float32 patches, float16 beside all others."""
        return "float32" if self.patch_dtype == "float32" else "float16"

    @property
    def bytes_per_frame(self) -> dict[str, int]:
        """Bytes that one cached frame of one view takes, by array, checksums and compression aside."""
        return {
            spec.name: math.prod(spec.shape[3:]) * np.dtype(spec.dtype).itemsize
            for spec in self._unsharded_specs()
            if len(spec.shape) > 3
        }

    @property
    def bytes_per_row(self) -> int:
        """Bytes of a row that uses all views and frames."""
        return self.num_views * self.num_frames * sum(self.bytes_per_frame.values())

    @property
    def num_shards(self) -> int:
        """Shards of each array, counted along the rows."""
        return math.ceil(self.num_rows / self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        """The rows of one shard."""
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.num_rows))

    def array_specs(self) -> tuple[ArraySpec, ...]:
        """Every array that holds frames, with its shards and chunks."""
        rows = self.rows_per_shard
        views = 1 if self.bytes_per_row > _SPLIT_VIEWS_ABOVE_BYTES else self.num_views
        return tuple(replace(spec, shard_shape=(rows, views, *spec.shape[2:])) for spec in self._unsharded_specs())

    def _unsharded_specs(self) -> list[ArraySpec]:
        v, a, f = self.num_rows, self.num_views, self.num_frames
        num_layers = len(self.layers)
        place = ("row", "view", "frame")
        tokens = (num_layers, self.num_patches, self.channels)
        specs = [
            ArraySpec(
                name="patches",
                shape=(v, a, f, *tokens),
                dtype=self.patch_dtype,
                shard_shape=(),
                chunk_shape=(1, 1, 1, *tokens),
                dimension_names=(*place, "layer", "patch", "channel"),
                is_compressed=self.keep_bits is not None,
            ),
            ArraySpec(
                name="cls",
                shape=(v, a, f, num_layers, self.width),
                dtype=self.cls_dtype,
                shard_shape=(),
                # One chunk holds all frames of a row: a clip's class tokens are one small read.
                chunk_shape=(1, 1, f, num_layers, self.width),
                dimension_names=(*place, "layer", "channel"),
            ),
            ArraySpec(
                name="embedding",
                shape=(v, a, f, self.embed_dim),
                dtype="float32",
                shard_shape=(),
                dimension_names=(*place, "channel"),
            ),
        ]
        if self.class_tokens == "none":
            specs = [spec for spec in specs if spec.name != "cls"]
        if self.with_pixels:
            height, width = self.image_size
            offsets = len(self.pixel_offsets)
            specs.append(
                ArraySpec(
                    name="pixels",
                    shape=(v, a, f, offsets, height, width, 3),
                    dtype="uint8",
                    shard_shape=(),
                    chunk_shape=(1, 1, 1, offsets, height, width, 3),
                    dimension_names=(*place, "offset", "height", "width", "colour"),
                )
            )
        return specs
