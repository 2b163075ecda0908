"""What arrays a store has, their shapes, and how rows fall into shards.

Letters, here and in every docstring of s4v:

    V  rows: a video, or one segment of a long one     L  tapped layers
    A  views: spatial crop x flip                      N  patch tokens of a frame, the class token kept apart
    F  cached frames of a row                          D  backbone width
    B  clips in a batch                                K  stored channels (K = D unless projected)
    T  frames of a clip                                S  side network width
    E  embedding width                                 O  pixel frames around each cached frame
    H, W  pixels                                       C, M  captions, words
    Lt  kept blocks of the text tower                  Dt  its width

V, A and F are maxima: what a row does not use is absent from its shard and costs nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .offsets import SEEN_FRAME, PixelOffset

FORMAT_VERSION = 5
"""Of stores whose frames are no RGB: an older s4v would look for `pixels`, call them damaged, and mend them. Other new
stores are of `CODED_CLS_VERSION` or `CUT_VERSION`."""
CODED_CLS_VERSION = 4
"""Of stores whose class tokens are coded: an older s4v would call their `cls` damaged, and mend it."""
CUT_VERSION = 3
"""Of stores whose arrays are cut along F, and whose training rows may have augmented views: an older s4v would search
those, and train on labels that they do not have. A store of version 2 has neither, one of version 1 keeps its
done-markers in Parquet, too; each stays of its version."""

_UNCUT_VERSION = 2

STATS_NAME = "stats.json"
"""File of a store that says how long its last extraction took."""

PatchDtype = Literal["int8", "float16", "float32"]
CODED_ARRAY = "patches"
"""The array of frames that is coded in every store."""
CODEC_GROUPS = {CODED_ARRAY: "codec", "cls": "cls_codec"}
"""By array of frames that a codec may code: the group of that codec's arrays, and the attribute that tells of it."""
IDENTITY_CODEC = "identity"
"""Of arrays that are not coded: values as they are."""
DEFAULT_CODEC = "affine"
"""Of a store that names no codec: all before there was a choice."""
PATCH_DTYPES: tuple[PatchDtype, ...] = ("int8", "float16", "float32")

PixelFormat = Literal["rgb", "ycbcr420"]
PIXEL_ARRAYS: Mapping[PixelFormat, str] = {"rgb": "pixels", "ycbcr420": "ycbcr420"}
"""By pixel format: the array of frames that are held so. What plain Zarr reads under `pixels` are pixels."""

ClassTokens = Literal["own", "mean", "none"]
CLASS_TOKENS: tuple[ClassTokens, ...] = ("own", "mean", "none")
"""What `cls` holds: the tower's own class tokens, means of patch tokens in their place, or there is no such array."""

_SHARD_BYTES = 512 * 2**20
_MAX_VIDEOS_PER_SHARD = 64
_MIN_SHARDS = 16
_SPLIT_ABOVE_BYTES = 10**9
_FRAMES_PER_BLOCK = 16


def choose_block(num_frames: int, bytes_per_frame: int, lengths: Mapping[int, int] | None = None) -> int:
    """Frames of a row that lie in one file of a new store: 8 to 16, of shorter rows all, fewer where they pass 1 GB.

    A row's last block is padded in arrays whose chunks hold a block, so the length that pads least is taken. Rows of
    ten frames have blocks of ten, also where one row has thousands.

    Args:
        num_frames: F.
        bytes_per_frame: Of all arrays and views.
        lengths: How many rows (and views) hold so many frames; None takes rows that are all full.
    """
    most = max(1, min(_FRAMES_PER_BLOCK, num_frames, _SPLIT_ABOVE_BYTES // max(1, bytes_per_frame)))

    def count_held(block: int) -> int:
        return sum(count * -(-length // block) * block for length, count in (lengths or {num_frames: 1}).items())

    return min(range(most, max(1, most // 2) - 1, -1), key=count_held)


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

    @property
    def chunks_per_frame(self) -> int:
        """Into how many chunks the axes behind the frame's are cut."""
        if self.chunk_shape is None:
            return 1
        return math.prod(a // b for a, b in zip(self.shape[3:], self.chunk_shape[3:], strict=True))

    @property
    def parts_shape(self) -> tuple[int, ...]:
        """How many files lie along each axis behind the rows': those of a shard of rows."""
        return tuple(math.ceil(size / own) for size, own in zip(self.shape[1:], self.shard_shape[1:], strict=True))

    @property
    def files_per_shard(self) -> int:
        """Files of one shard of rows: one, or several where a row is split along its views or its frames."""
        return math.prod(self.parts_shape)

    def shard_parts(self) -> list[tuple[int, ...]]:
        """Where the files of one shard of rows lie on the axes behind the rows', counted in files."""
        return list(itertools.product(*map(range, self.parts_shape)))

    def shard_key(self, shard: int, part: tuple[int, ...]) -> str:
        """Name of one file of a shard of rows."""
        return ".".join(["c", str(shard), *map(str, part)])

    def shard_keys(self, shard: int) -> list[str]:
        """Names of the files of one shard of rows, in the order of `shard_parts`."""
        return [self.shard_key(shard, part) for part in self.shard_parts()]

    @property
    def chunks_per_shard(self) -> int:
        """Places in the index of one file; 1 where the file is a chunk."""
        chunk = self.chunk_shape or self.shard_shape
        return math.prod(own // size for own, size in zip(self.shard_shape, chunk, strict=True))


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
    pixel_offsets: tuple[PixelOffset, ...] = (SEEN_FRAME,)
    """Which frames around each cached one it holds, in this order; O is their number. A number is frames."""
    class_tokens: ClassTokens = "own"
    """One of `CLASS_TOKENS`; a store records it where it is not `own`."""
    pixel_format: PixelFormat = "rgb"
    """How frames are held (store/pixel_formats.py); a store records it where it is not `rgb`."""
    coded_cls_dtype: PatchDtype | None = None
    """Of the codes of class tokens; None, here and below, where they are not coded. A store records it else."""
    coded_cls_channels: int | None = None
    """Stored channels of a class token that is coded, at most D."""
    rows_per_shard: int = 0
    """Rows in one shard, the same for all arrays. 0 takes a pure function of V and sizes; a store that rows are added
    to keeps the number that it was begun with."""
    frames_per_block: int = 0
    """Frames of a row in one file, of every array. 0 is all of them in one: so are stores of format 1 and 2, whose
    embeddings are one chunk a file."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pixel_offsets", tuple(map(PixelOffset.of, self.pixel_offsets)))
        if not self.rows_per_shard:
            object.__setattr__(
                self, "rows_per_shard", self.choose_rows(self.num_rows * self.num_views * self.num_frames)
            )

    def choose_rows(self, frames_held: int) -> int:
        """Rows in one shard of a new store: as many as hold half a GB together, 64 at most, a sixteenth of all at most.

        Args:
            frames_held: Cached frames of all rows and views together.
        """
        bytes_per_row = frames_held * sum(self.bytes_per_frame.values()) // self.num_rows
        by_bytes = _SHARD_BYTES // max(1, bytes_per_row)
        return max(1, min(by_bytes, _MAX_VIDEOS_PER_SHARD, math.ceil(self.num_rows / _MIN_SHARDS)))

    @property
    def plain_cls_dtype(self) -> PatchDtype:
        """Of class tokens that are not coded: float32 beside float32 patches, float16 beside all others."""
        return "float32" if self.patch_dtype == "float32" else "float16"

    @property
    def cls_dtype(self) -> PatchDtype:
        """Of stored class tokens, coded or not."""
        return self.coded_cls_dtype or self.plain_cls_dtype

    @property
    def cls_channels(self) -> int:
        """Stored channels of a class token; D where they are not coded."""
        return self.coded_cls_channels or self.width

    @property
    def is_cls_coded(self) -> bool:
        """Whether a codec codes class tokens."""
        return self.coded_cls_dtype is not None

    def of_cls(self) -> StoreLayout:
        """The same with class tokens in the place of patches: the sizes by which their codec goes."""
        return replace(
            self,
            num_patches=1,
            channels=self.cls_channels,
            patch_dtype=self.cls_dtype,
            keep_bits=None,
            coded_cls_dtype=None,
            coded_cls_channels=None,
        )

    @property
    def pixel_array(self) -> str:
        """The name of the array that holds frames."""
        return PIXEL_ARRAYS[self.pixel_format]

    def name_stored(self, name: str) -> str:
        """What a store calls an array that is asked for: frames are asked for as `pixels`, however they are held."""
        return self.pixel_array if name == PIXEL_ARRAYS["rgb"] else name

    @property
    def seen_offset(self) -> int:
        """The place, on the axis O, of the frame that the backbone saw."""
        return self.pixel_offsets.index(SEEN_FRAME)

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

    @property
    def format_version(self) -> int:
        """The first format that has such arrays."""
        if self.pixel_format != "rgb":
            return FORMAT_VERSION
        if self.is_cls_coded:
            return CODED_CLS_VERSION
        return CUT_VERSION if self.frames_per_block else _UNCUT_VERSION

    @property
    def block(self) -> int:
        """Frames of a row in one file, of every array."""
        return self.frames_per_block or self.num_frames

    def array_specs(self) -> tuple[ArraySpec, ...]:
        """Every array that holds frames, with its shards and chunks."""
        block_bytes = self.num_views * self.block * sum(self.bytes_per_frame.values())
        views = 1 if block_bytes > _SPLIT_ABOVE_BYTES else self.num_views
        shard = (self.rows_per_shard, views, self.block)
        return tuple(replace(spec, shard_shape=(*shard, *spec.shape[3:])) for spec in self._unsharded_specs())

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
                shape=(v, a, f, num_layers, self.cls_channels),
                dtype=self.cls_dtype,
                shard_shape=(),
                # One chunk holds all frames of a block: a clip's class tokens are few small reads.
                chunk_shape=(1, 1, self.block, num_layers, self.cls_channels),
                dimension_names=(*place, "layer", "channel"),
            ),
            ArraySpec(
                name="embedding",
                shape=(v, a, f, self.embed_dim),
                dtype="float32",
                shard_shape=(),
                chunk_shape=(1, 1, self.block, self.embed_dim) if self.frames_per_block else None,
                dimension_names=(*place, "channel"),
            ),
        ]
        if self.class_tokens == "none":
            specs = [spec for spec in specs if spec.name != "cls"]
        if self.with_pixels:
            height, width = self.image_size
            is_rgb = self.pixel_format == "rgb"
            frame = (height, width, 3) if is_rgb else (height * width * 3 // 2,)
            specs.append(
                ArraySpec(
                    name=self.pixel_array,
                    shape=(v, a, f, len(self.pixel_offsets), *frame),
                    dtype="uint8",
                    shard_shape=(),
                    # One chunk for each offset: who wants fewer of them reads fewer bytes.
                    chunk_shape=(1, 1, 1, 1, *frame),
                    dimension_names=(*place, "offset", *(("height", "width", "colour") if is_rgb else ("byte",))),
                )
            )
        return specs
