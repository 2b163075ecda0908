"""Read a store: clips of codes, decoding, and the manifest."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import tensorstore as ts

from ..errors import StoreBusyError, StoreDamagedError, StoreMismatchError, StoreNotFoundError
from ..files import hash_file
from . import manifest, names
from ._chunk_reads import ChunkReads, find_native, read_chunks
from ._shard_file import DamagedChunkError, read_chunk_file
from ._shards import PlannedClips, ShardedArray, ShardedFrames
from ._zarr import fill_value_of, open_array, read_small_array, require_metadata
from .attributes import check_attributes, parse_layout
from .checksums import APPEND_NAME, CHECKSUMS_NAME
from .codecs import CODECS
from .codecs.contract import Codec
from .facts import StoreFacts
from .layout import CODEC_GROUPS, CODED_ARRAY, FORMAT_VERSION, IDENTITY_CODEC, ArraySpec
from .markers import (
    PARTS_NAME,
    Marker,
    MarkerState,
    find_markers,
    marker_path,
    read_joined,
    read_marker,
    read_marker_state,
)
from .moments import Moments, read_moment_table, require_moments
from .offsets import PixelOffset, describe_offsets
from .padding import find_padding
from .pixel_formats import decode_pixels
from .records import WHOLE, View, count_augmented
from .row_checks import check_captions, check_rows
from .shard_cache import ShardCache, StoreCopies

NO_FRAME = -1
"""In a clip's places: no frame. Its codes, class tokens and pixels are zeros, as they are stored."""

_CLIP_ARRAYS = ("patches", "cls", "pixels")
_HEAD_AXES = 2
_MOST_HEAD_ARRAYS = 64
_ROWS_PER_BYTE = 1
"""More rows than a manifest has bytes are no videos with names of their own."""

_MARKER_LIFE_S = 10.0
"""So long a done-marker is not looked at again: that is a way to a disk that is slow."""

_THREADS = (8, 16)
"""Fewest and most: a cold disk wants more reads under way than a small machine has cores."""

_MEND = "The command that began the store mends it, with --repair."


@dataclass(frozen=True, slots=True)
class Clips:
    """A batch of clips, codes as stored; an array that was not asked for is None."""

    patches: np.ndarray | None
    """(B, T, L, N, K) codes."""
    cls: np.ndarray | None
    """(B, T, L, D) float16 or float32, or (B, T, L, K) codes where they are coded: `StoreReader.decode_cls`."""
    pixels: np.ndarray | None
    """(B, T, O, H, W, 3) uint8, or (B, T, O, P) uint8 where they are no RGB: `StoreReader.decode_pixels`."""


def pad_places(places: Sequence[Sequence[int]]) -> np.ndarray:
    """Clips of different lengths as (B, T), T the longest: what `read_clips` takes, `NO_FRAME` behind the others."""
    padded = np.full((len(places), max(map(len, places), default=0)), NO_FRAME, dtype=np.int64)
    for row, clip in zip(padded, places, strict=True):
        row[: len(clip)] = clip
    return padded


@dataclass(frozen=True, slots=True)
class _MarkerFacts:
    """What is known of a done-marker."""

    state: MarkerState | None
    seen_at: float
    """By the monotonic clock."""
    files: Mapping[str, str]
    """Fingerprints by name."""


class _StaleFileError(Exception):
    """The same is to be read again, of a file that is opened anew."""

    def __init__(self, path: Path, damage: StoreDamagedError) -> None:
        super().__init__(str(damage))
        self.path = path
        self.damage = damage
        """What it is if that does not help."""


class StoreReader:
    """An open store. Opening reads a few small files, whatever the number of videos; use `open_store`."""

    def __init__(self, path: Path, attributes: dict[str, Any]) -> None:
        self.path = path
        self.cache: ShardCache | None = None
        self.ahead_bytes = 0
        self._copies: StoreCopies | None = None
        self.attributes = check_attributes(path, attributes)
        self.layout = parse_layout(path, self.attributes["layout"])
        self.facts = StoreFacts(self.attributes)
        self.classes = manifest.ClassList(self.facts.class_names)

    @cached_property
    def codec(self) -> Codec:
        """How patches are coded, with numpy arrays."""
        return self._read_codec(CODED_ARRAY)

    @cached_property
    def cls_codec(self) -> Codec | None:
        """How class tokens are coded, with numpy arrays; None where they are not."""
        return self._read_codec("cls") if "cls" in self.facts.codecs else None

    def _read_codec(self, coded: str) -> Codec:
        group, recorded, shapes = CODEC_GROUPS[coded], self.facts.codecs[coded], self._codec_shapes(coded)
        if unknown := sorted(set(recorded.parts) - set(shapes)):
            raise StoreMismatchError(
                f"the codec of {self.path} has {', '.join(unknown)}; this s4v knows {', '.join(shapes)}. Update s4v."
            )
        arrays = {part: read_small_array(self.path, f"{group}/{part}", shapes[part].__eq__) for part in recorded.parts}
        kind = CODECS[recorded.name]
        if not kind.are_whole(recorded.dtype, arrays):
            raise StoreDamagedError(
                f"{self.path} records a codec of {recorded.dtype} with {', '.join(arrays)}. {_MEND}"
            )
        codec = kind(dtype=recorded.dtype, **arrays)
        if codec.sha256 != recorded.sha256:
            raise StoreDamagedError(f"{self.path / group} is not the codec that the store was written with. {_MEND}")
        return codec

    def _codec_shapes(self, coded: str) -> Mapping[str, tuple[int, ...]]:
        """The shapes of all arrays that the codec of an array of frames may have, by part."""
        name = self.facts.codecs[coded].name
        if name not in CODECS:
            raise StoreMismatchError(
                f"{self.path} has a codec {ascii(name)[:80]}; this s4v knows {', '.join(CODECS)}. Update s4v."
            )
        return CODECS[name].part_shapes(self.layout if coded == CODED_ARRAY else self.layout.of_cls())

    @property
    def codec_arrays(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all arrays of its codecs, by their names in the store; parts that s4v does not know left out.

        Raises:
            StoreMismatchError: If this s4v has no such codec.
        """
        return {
            f"{CODEC_GROUPS[coded]}/{part}": shape
            for coded, codec in self.facts.codecs.items()
            for part, shape in self._codec_shapes(coded).items()
            if part in codec.parts
        }

    def read_codec_arrays(self) -> dict[str, np.ndarray]:
        """All arrays of its codecs, by their names in the store.

        Raises:
            StoreDamagedError: If one of them is not as it was written.
        """
        groups = ((CODEC_GROUPS[CODED_ARRAY], self.codec), (CODEC_GROUPS["cls"], self.cls_codec))
        parts = ((group, {} if codec is None else codec.parts) for group, codec in groups)
        return {f"{group}/{part}": array for group, arrays in parts for part, array in arrays.items()}

    @cached_property
    def head(self) -> dict[str, np.ndarray]:
        """The frozen tower's end, by name: final norm, projection, logit scale.

        Raises:
            StoreMismatchError: If the store has none.
        """
        if not self.has_head:
            raise StoreMismatchError(
                f"{self.path} has no `head`: the embedding of {self.facts.backbone.name} is no projection of a norm of "
                "its class token"
            )
        return {name: read_small_array(self.path, f"head/{name}", self.is_head_shape) for name in self.head_names}

    @property
    def has_head(self) -> bool:
        """Whether it was written with the tower's end."""
        return os.path.lexists(self.path / "head") or "head/zarr.json" in _recorded_hashes(self.path)

    @property
    def head_names(self) -> list[str]:
        """The arrays of `head`.

        Raises:
            StoreDamagedError: If there are things that are no arrays of a tower's end.
        """
        arrays = sorted(child.parent.name for child in (self.path / "head").glob("*/zarr.json"))
        if unknown := [name for name in arrays if not names.is_known(f"head/{name}/zarr.json")]:
            raise StoreDamagedError(f"{self.path / 'head'} holds {ascii(unknown[0])[:80]}, which s4v did not write")
        if len(arrays) > _MOST_HEAD_ARRAYS:
            raise StoreDamagedError(f"{self.path / 'head'} holds {len(arrays)} arrays; a tower's end has some six")
        return arrays

    def is_head_shape(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of the tower's end may have a shape: numbers, or one or two axes of D or E."""
        return len(shape) <= _HEAD_AXES and all(size in (self.layout.width, self.layout.embed_dim) for size in shape)

    @property
    def videos(self) -> pyarrow.dataset.Dataset:
        """A lazy pyarrow dataset over the manifest file."""
        names.require_file(self.path, manifest.MANIFEST_NAME)
        return pyarrow.dataset.dataset(self.path / manifest.MANIFEST_NAME)

    def read_manifest(self, columns: list[str] | None = None) -> pa.Table:
        """The manifest; while an extraction is under way, with the results of the shards finished so far."""
        self._require_recorded_hash(manifest.MANIFEST_NAME)
        table = self._read_rows(columns)
        if columns is not None and set(columns) <= set(manifest.INPUT_SCHEMA.names):
            return table
        if "pending" not in self._statuses(table):
            return table
        parts = {}
        markers = find_markers(self.path)
        joined = read_joined(self.path, _recorded_hashes(self.path).get(manifest.MANIFEST_NAME))
        for shard in self.finished_shards():
            if markers.get(shard) == joined.get(shard):
                continue  # the manifest holds it
            marker = read_marker(self.path, shard, self.facts.codecs_sha256)
            if marker is not None:  # a retry may have undone it since
                parts[self.layout.shard_rows(shard).start] = marker.results
        if not parts:
            return table
        joined = manifest.replace_results(self._read_rows(None), parts)
        check_rows(joined, self.layout, len(self.classes.names), self.path / PARTS_NAME, self.layout.num_rows)
        return joined if columns is None else joined.select(columns)

    def finished_shards(self) -> list[int]:
        """Shards with a done-marker, ascending."""
        return [shard for shard in find_markers(self.path) if shard < self.layout.num_shards]

    def read_marker(self, shard: int) -> Marker | None:
        """What the done-marker of a shard says, checked; None where there is none.

        Raises:
            StoreDamagedError: If it is no plain file, is unreadable, or holds what no row can have.
        """
        path = marker_path(self.path, shard)
        if not os.path.lexists(path):
            return None
        names.require_file(self.path, f"{PARTS_NAME}/{path.name}")
        marker = read_marker(self.path, shard, self.facts.codecs_sha256)
        if marker is not None:
            # Fewer rows than the shard has, where rows were added since.
            num_rows = min(len(marker.results), len(self.layout.shard_rows(shard)))
            check_rows(marker.results, self.layout, len(self.classes.names), path, num_rows)
        return marker

    def _read_rows(self, columns: list[str] | None) -> pa.Table:
        """The manifest's file, checked."""
        path = self.path / manifest.MANIFEST_NAME
        try:
            table = manifest.read_table(path, columns=columns)
        except (KeyError, ValueError, TypeError, OverflowError) as error:  # a column that it lacks, say
            raise StoreDamagedError(f"{path} is not what s4v writes: {error}. {_MEND}") from error
        if len(table) != self.layout.num_rows and _has_changed(self):
            raise StoreMismatchError(
                f"{self.path} has {len(table)} rows, and had {self.layout.num_rows} when it was opened: open it again"
            )
        check_rows(table, self.layout, len(self.classes.names), path, self.layout.num_rows, columns)
        return table

    def _statuses(self, table: pa.Table) -> set[str]:
        """The statuses that a manifest has; its own column where some were read without it."""
        if "status" not in table.column_names:
            table = self._read_rows(["status"])
        return set(table["status"].unique().to_pylist())

    def input_columns(self) -> pa.Table:
        """The manifest's input columns: which videos, whatever became of them."""
        self._require_recorded_hash(manifest.MANIFEST_NAME)
        return self._read_rows(manifest.INPUT_SCHEMA.names).cast(manifest.INPUT_SCHEMA).combine_chunks()

    def read_captions(self) -> pa.Table:
        """Captions: caption_id, video_id, text."""
        self._require_recorded_hash(manifest.CAPTIONS_NAME)
        path = self.path / manifest.CAPTIONS_NAME
        table = manifest.read_table(path)
        check_captions(table, path, lambda: self.read_manifest(["video_id"])["video_id"])
        return table

    def read_moments(self) -> Moments:
        """Where the videos show what the captions say: entry c is row c of the captions.

        Raises:
            StoreMismatchError: If the store has none, or those of other captions.
            StoreDamagedError: If they are not as they were written.
        """
        require_moments(self.path)
        self._require_recorded_hash(manifest.MOMENTS_NAME)
        return Moments(read_moment_table(self))

    def read_clips(
        self,
        videos: Sequence[int] | np.ndarray,
        frames: Sequence[Sequence[int]] | np.ndarray,
        view: int | Sequence[int] | np.ndarray = 0,
        layers: Sequence[int] | None = None,
        arrays: Sequence[str] | None = None,
        allocate: Callable[[tuple[int, ...], np.dtype], np.ndarray] = np.empty,
        offsets: Sequence[PixelOffset | int | str] | None = None,
    ) -> Clips:
        """Read a batch of clips.

        Args:
            videos: (B,) row numbers.
            frames: (B, T) places on the axis F, the same number for every clip; `NO_FRAME` is no frame (`pad_places`).
            view: One view for all clips, or (B,) views.
            layers: Backbone blocks to return, all cached ones by default.
            arrays: Which arrays to read; all that the store has by default.
            allocate: Makes room for each array, from its shape and dtype; say in pinned memory.
            offsets: Of the pixels, in the order wanted: `-1`, `"0.5step"`; all stored ones by default.

        Returns:
            Codes, class tokens and pixels in the order asked for; zeros where there is no frame.

        Raises:
            StoreMismatchError: If a row is not ok, or a frame, view, layer, array or offset is not in the store.
            StoreDamagedError: If a chunk is missing or its bytes do not match their checksum, shard and video named.
        """
        rows = np.asarray(videos, dtype=np.int64)
        places = np.asarray(frames, dtype=np.int64)
        if places.ndim != 2 or len(places) != len(rows):
            raise StoreMismatchError(
                f"frames must be (B, T) places for {len(rows)} videos; found shape {places.shape} in {self.path}"
            )
        views = np.asarray(view, dtype=np.int64)
        if views.shape not in ((), rows.shape):
            raise StoreMismatchError(
                f"view must be one view, or one for each of {len(rows)} videos; found shape {views.shape}"
            )
        views = np.broadcast_to(views, rows.shape)
        if arrays is None:
            arrays = [name for name in _CLIP_ARRAYS if self.layout.name_stored(name) in self._specs]
        if unknown := sorted(set(arrays) - set(_CLIP_ARRAYS)):
            raise StoreMismatchError(f"read_clips reads {', '.join(_CLIP_ARRAYS)}; found {', '.join(unknown)}")
        self._check_rows(rows, places, views)
        layer_places = None if layers is None else self.layer_places(layers)
        stored = {name: self.layout.name_stored(name) for name in arrays}
        wanted = {stored[name]: layer_places if name in ("patches", "cls") else None for name in arrays}
        if offsets is not None and "pixels" in stored:
            wanted[stored["pixels"]] = self._offset_places(tuple(offsets))
        read = self._read(lambda: self._plan(list(wanted), rows, views, places, wanted, allocate))
        for name in wanted:
            if name not in read:
                read[name] = self._read_with_tensorstore(name, rows, views, places, wanted[name])
        return Clips(**{name: read[stored[name]] if name in stored else None for name in _CLIP_ARRAYS})

    def _plan(
        self,
        arrays: Sequence[str],
        rows: np.ndarray,
        views: np.ndarray,
        places: np.ndarray,
        layers: Mapping[str, Sequence[int] | None] | None = None,
        allocate: Callable[[tuple[int, ...], np.dtype], np.ndarray] = np.empty,
    ) -> dict[str, PlannedClips]:
        """What is read of those arrays that our own reader knows; layers by array, where not all are wanted."""
        planned: dict[str, PlannedClips] = {}
        frames: dict[tuple[int, int, int], ShardedFrames] = {}
        for name in arrays:
            if (sharded := self._sharded(name)) is None:
                continue
            if sharded.division not in frames:
                frames[sharded.division] = ShardedFrames.of(rows, views, places, sharded.division)
            with self._naming(name):
                wanted = None if layers is None else layers[name]
                planned[name] = sharded.plan(frames[sharded.division], places.shape, wanted, allocate)
        return planned

    def _read(self, plan: Callable[[], dict[str, PlannedClips]], num_threads: int | None = None) -> dict[str, Any]:
        """What is planned; planned anew where a file is to be opened anew: a copy went bad, or a disk came back."""
        opened_anew: set[Path] = set()
        while True:
            try:
                return self._read_planned(plan(), num_threads)
            except _StaleFileError as stale:
                is_copy = self._copies is not None and self._copies.holds(stale.path)
                if stale.path in opened_anew and not is_copy:
                    raise stale.damage from stale
                if stale.path in opened_anew and self._copies is not None:
                    self._copies.pass_by(stale.path)
                opened_anew.add(stale.path)

    def _read_planned(self, planned: Mapping[str, PlannedClips], num_threads: int | None = None) -> dict[str, Any]:
        """The clips of several arrays, round by round of all of them; by so many threads, or the usual number."""
        names = list(planned)
        rounds = [self._rounds_of(name, one) for name, one in planned.items()]
        for together in itertools.zip_longest(*rounds):
            held = [(name, reads) for name, reads in zip(names, together, strict=True) if reads is not None]
            try:
                read_chunks([reads for _, reads in held], num_threads or count_threads())
            except DamagedChunkError as error:
                raise self._explain(held[error.place][0], error) from error
        return {name: one.clips for name, one in planned.items()}

    def _rounds_of(self, name: str, planned: PlannedClips) -> Iterator[ChunkReads]:
        with self._naming(name):
            yield from planned.rounds

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Errors of shards say of which array they are, and for which video."""
        try:
            yield
        except DamagedChunkError as error:
            raise self._explain(name, error) from error

    def _explain(self, name: str, error: DamagedChunkError) -> Exception:
        """What to raise for a chunk of an array.

        A copy that is damaged is not the store's fault, and one that was evicted is nobody's. And of a disk on a
        network that went and came back, an open file may stay stale for ever.
        """
        sharded, damage = self._sharded(name), self._damage(name, np.array([error.row]), str(error))
        if sharded is None or error.path is None:
            return damage
        may_be_another = error.is_gone or error.may_pass
        if not may_be_another and not (self._copies is not None and self._copies.reject(error.path, str(error))):
            return damage
        sharded.forget(error.path)
        return _StaleFileError(error.path, damage)

    def read_padding(
        self, videos: Sequence[int] | np.ndarray, view: int | Sequence[int] | np.ndarray = 0
    ) -> np.ndarray:
        """Which patches of clips show nothing of the picture: the rest of a whole frame is padded.

        Args:
            videos: (B,) row numbers.
            view: One view for all clips, or (B,) views.

        Returns:
            (B, N) bool, true where a patch is padding in every frame.

        Raises:
            StoreMismatchError: If a row is not ok, or a view is not in the store.
            StoreDamagedError: If the manifest does not say how a view was made.
        """
        rows = np.asarray(videos, dtype=np.int64)
        views = np.broadcast_to(np.asarray(view, dtype=np.int64), rows.shape)
        self._check_rows(rows, np.zeros((len(rows), 0), np.int64), views)
        padding = np.zeros((len(rows), self.layout.num_patches), bool)
        if self.facts.resize != WHOLE:
            return padding
        masks: dict[View, np.ndarray] = {}
        for place, made in enumerate(self._views.take(pa.array(rows)).to_pylist()):
            if len(made or ()) <= views[place]:
                raise self._unknown_view(int(rows[place]))
            view_of_row = View(**made[views[place]])
            if view_of_row not in masks:
                masks[view_of_row] = find_padding(view_of_row, self.facts.backbone.patch_size)
                if masks[view_of_row].shape != padding.shape[1:]:
                    raise self._unknown_view(int(rows[place]))
            padding[place] = masks[view_of_row]
        return padding

    def _unknown_view(self, row: int) -> StoreDamagedError:
        path = self.path / manifest.MANIFEST_NAME
        return StoreDamagedError(f"{path} does not say how a view of row {row} was made. {_MEND}")

    @cached_property
    def _views(self) -> pa.ChunkedArray:
        """How the pixels of each row were made, view by view; null of rows that are not ok."""
        return self.read_manifest(["views"])["views"]

    def decode_patches(self, codes: np.ndarray, layers: Sequence[int] | None = None) -> np.ndarray:
        """Patch tokens from codes.

        Args:
            codes: (..., L, N, K) as `read_clips` returns them.
            layers: Backbone blocks that the axis L holds, all cached ones by default.

        Returns:
            (..., L, N, D) float32.
        """
        places = range(len(self.layout.layers)) if layers is None else self.layer_places(layers)
        return np.stack([self.codec.decode(codes[..., i, :, :], place) for i, place in enumerate(places)], axis=-3)

    def decode_cls(self, codes: np.ndarray, layers: Sequence[int] | None = None) -> np.ndarray:
        """Class tokens from what is stored of them, coded or not.

        Args:
            codes: (..., L, K) as `read_clips` returns them; K is D where they are not coded.
            layers: Backbone blocks that the axis L holds, all cached ones by default.

        Returns:
            (..., L, D) float32.
        """
        codec = self.cls_codec
        if codec is None:
            return codes.astype(np.float32)
        places = range(len(self.layout.layers)) if layers is None else self.layer_places(layers)
        # A codec takes patches, (..., N, K): a frame has one class token.
        decoded = [codec.decode(codes[..., i, None, :], place) for i, place in enumerate(places)]
        return np.concatenate(decoded, axis=-2)

    def decode_pixels(self, stored: np.ndarray) -> np.ndarray:
        """Pixels from what is stored of them, whatever the store's pixel format.

        Args:
            stored: (..., H, W, 3) or (..., P) uint8 as `read_clips` returns them.

        Returns:
            (..., H, W, 3) uint8. Zeros of a frame that is none are a colour where they are no RGB.
        """
        return decode_pixels(stored, self.layout.pixel_format, self.layout.image_size)

    def read_embeddings(self, rows: range | None = None) -> np.ndarray:
        """The backbone's image embedding of every cached frame.

        Args:
            rows: Consecutive rows; None takes all.

        Returns:
            (rows, A, f, E) float32, not normalised, f the most frames that one of them holds; NaN where a row has no
            such frame.
        """
        rows = range(self.layout.num_rows) if rows is None else rows
        is_ok, num_frames, _ = self._row_states
        longest = int(np.where(is_ok, num_frames, 0)[rows.start : rows.stop].max(initial=0))
        pieces = [self._read_embedding_shard(shard, rows, longest) for shard in self._shards_of(rows)]
        empty = np.empty((0, self.layout.num_views, longest, self.layout.embed_dim), np.float32)
        return np.concatenate([empty, *pieces])

    def _shards_of(self, rows: range) -> range:
        size = self.layout.rows_per_shard
        return range(rows.start // size, -(-rows.stop // size) if len(rows) else rows.start // size)

    def _read_embedding_shard(self, shard: int, rows: range, num_frames: int) -> np.ndarray:
        """Those of some rows that lie in one shard, (rows, A, f, E); NaN where there is no such frame."""
        spec, is_ok = self._spec("embedding"), self._row_states[0]
        shard_rows = self.layout.shard_rows(shard)
        taken = range(max(rows.start, shard_rows.start), min(rows.stop, shard_rows.stop))
        good = taken.start + np.flatnonzero(is_ok[taken.start : taken.stop])
        values = np.full((len(taken), spec.shape[1], num_frames, spec.shape[3]), np.nan, np.float32)
        if not len(good):
            return values
        if spec.chunk_shape is None:
            self._read_whole_embeddings(spec, shard, good, values, taken.start)
        else:
            self._read_cut_embeddings(good, values, taken.start)
        missing = np.isnan(values[good - taken.start, 0, 0, 0])
        if missing.any():
            raise self._damage("embedding", good[missing], "the chunk is missing")
        return values

    def _read_cut_embeddings(self, good: np.ndarray, values: np.ndarray, first: int) -> None:
        """Fill in the good rows of an array whose chunks hold single rows."""
        sharded = self._sharded("embedding")
        _, num_frames, num_views = self._row_states
        rows, views = np.repeat(good, num_views[good]), np.concatenate([np.arange(n) for n in num_views[good]])
        places = np.arange(values.shape[2])
        places = np.where(places < num_frames[rows, None], places, -1)
        if sharded is None:
            found = self._read_with_tensorstore("embedding", rows, views, places, None)
        else:
            # Of small chunks one thread reads as fast.
            found = self._read(lambda: self._plan(["embedding"], rows, views, places), num_threads=1)["embedding"]
        found[places < 0] = np.nan
        values[rows - first, views] = found

    def _read_whole_embeddings(
        self, spec: ArraySpec, shard: int, good: np.ndarray, values: np.ndarray, first: int
    ) -> None:
        """Fill in the good rows of an array whose files are one chunk each, one for each part of the views."""
        pieces = []
        for key in spec.shard_keys(shard):
            file = names.locate(self.path, f"embedding/{key}")
            try:
                pieces.append(read_chunk_file(file, spec.shard_shape, np.dtype(np.float32)))
            except DamagedChunkError as error:
                why = "the chunk is missing" if not file.exists() else str(error)
                raise self._damage("embedding", good, why) from error
        whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)[:, : spec.shape[1]]
        start = self.layout.shard_rows(shard).start
        values[good - first] = whole[good - start, :, : values.shape[2]]

    def read_shown_embeddings(self, rows: range | None = None) -> np.ndarray:
        """As `read_embeddings`, with NaN for views that were drawn for training: a search does not look at them."""
        values = self.read_embeddings(rows)
        if self._is_augmented.any():
            values[self._is_augmented if rows is None else self._is_augmented[rows.start : rows.stop], 1:] = np.nan
        return values

    def read_row(self, row: int, num_views: int, num_frames: int) -> dict[str, np.ndarray]:
        """All that a row has in the arrays, whatever the manifest says of it.

        Args:
            row: Its number.
            num_views: Views that it has.
            num_frames: Frames that it has.

        Returns:
            Codes and all else by array name, (a, f, ...).

        Raises:
            StoreDamagedError: If a chunk is missing or its bytes do not match their checksum.
        """
        views, rows = np.arange(num_views), np.full(num_views, row)
        places = np.broadcast_to(np.arange(num_frames), (num_views, num_frames))
        read = self._read(lambda: self._plan(list(self._specs), rows, views, places))
        return {
            name: read[name] if name in read else self._read_with_tensorstore(name, rows, views, places, None)
            for name in self._specs
        }

    def describe_reading(self) -> str:
        """What reads patches here: the native module, Python, or tensorstore."""
        if self._sharded(CODED_ARRAY) is None:
            return "tensorstore (patches are compressed, or cut otherwise than s4v cuts them by default)"
        return find_native()[1]

    def _spec(self, name: str) -> ArraySpec:
        """An array as the layout has it, its `zarr.json` compared with that once."""
        if (spec := self._specs.get(name)) is None:
            why = "its backbone has no class token" if name == "cls" else "it was extracted without it"
            raise StoreMismatchError(f"{self.path} has no array {name!r}: {why}")
        coded = self.facts.codecs.get(name)
        expected = IDENTITY_CODEC if coded is None else coded.name
        if (codec := self.facts.codec_of(name)) != expected:
            raise StoreMismatchError(
                f"`{name}` of {self.path} has a codec {ascii(codec)[:80]}, expected {expected}: use the s4v that made "
                "it, or a later one"
            )
        if name not in self._compared:
            self._require_recorded_hash(f"{name}/zarr.json")
            require_metadata(self.path, spec)
            self._compared.add(name)
        return spec

    @cached_property
    def _specs(self) -> dict[str, ArraySpec]:
        """By name, in the layout's order."""
        return {spec.name: spec for spec in self.layout.array_specs()}

    @cached_property
    def _compared(self) -> set[str]:
        return set()

    def require_arrays(self) -> None:
        """Refuse a store whose arrays are not those of its layout, before anything is written to them.

        Raises:
            StoreDamagedError: If a `zarr.json` says anything else, or a link, a pipe or a device lies in the store.
        """
        names.refuse_links(self.path)
        for spec in self.layout.array_specs():
            self._spec(spec.name)

    def layer_places(self, layers: Sequence[int]) -> list[int]:
        """Places on the axis L of backbone blocks.

        Raises:
            StoreMismatchError: If the store does not hold one of them.
        """
        own_layers = self.layout.layers
        if missing := sorted(set(layers) - set(own_layers)):
            raise StoreMismatchError(
                f"{self.path} holds layers {_join(own_layers)}, wanted {_join(layers)}: missing {_join(missing)}. "
                f"Use --layers with layers of the store, or extract the missing ones into a new store."
            )
        return [own_layers.index(layer) for layer in layers]

    def offset_places(self, offsets: Sequence[PixelOffset | int | str]) -> list[int] | None:
        """Places on the axis O of pixel offsets; None where they are all that there are, in their order.

        Raises:
            StoreMismatchError: If the store does not hold pixels at one of them.
        """
        own, wanted = self.layout.pixel_offsets, tuple(map(PixelOffset.of, offsets))
        if not self.layout.with_pixels:
            raise StoreMismatchError(
                f"{self.path} was extracted with --no-pixels, wanted pixels at offsets {describe_offsets(wanted)} from "
                f"its frames. Extract a new store with --pixel-offsets={describe_offsets(wanted)}."
            )
        if missing := [offset for offset in wanted if offset not in own]:
            raise StoreMismatchError(
                f"{self.path} holds pixels at offsets {describe_offsets(own)} from its frames, wanted "
                f"{describe_offsets(wanted)}: missing {describe_offsets(missing)}. Extract a new store with "
                f"--pixel-offsets={describe_offsets([*own, *missing])}, which serves both."
            )
        return None if wanted == own else [own.index(offset) for offset in wanted]

    def _offset_places(self, offsets: tuple[PixelOffset | int | str, ...]) -> list[int] | None:
        """The same, looked up once: a loader asks with every batch."""
        if offsets not in self._known_offsets:
            self._known_offsets[offsets] = self.offset_places(offsets)
        return self._known_offsets[offsets]

    @cached_property
    def _known_offsets(self) -> dict[tuple[PixelOffset | int | str, ...], list[int] | None]:
        return {}

    def _require_recorded_hash(self, name: str) -> None:
        """Refuse a file without checksums of its own that is not as it was written; looked at once."""
        if name in self._verified:
            return
        file = names.require_file(self.path, name)
        # Both read now: an extraction under way replaces them.
        if _recorded_hashes(self.path).get(name) not in (None, hash_file(file)):
            raise StoreDamagedError(f"{file} does not match its recorded hash. {_MEND}")
        self._verified.add(name)

    @cached_property
    def _verified(self) -> set[str]:
        return set()

    @cached_property
    def _is_augmented(self) -> np.ndarray:
        """(V,) whether views behind the first one of a row were drawn."""
        if not any(map(count_augmented, self.facts.views.values())):
            return np.zeros(self.layout.num_rows, dtype=bool)
        return np.array([self.facts.is_augmented(split) for split in self.input_columns()["split"].to_pylist()])

    @cached_property
    def _row_states(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        table = self.read_manifest(["status", "num_cached_frames", "num_views"])
        counts = [table[name].fill_null(0).to_numpy() for name in ("num_cached_frames", "num_views")]
        is_ok = pa.compute.equal(table["status"], "ok").to_numpy()
        return is_ok, counts[0], counts[1]

    def _check_rows(self, rows: np.ndarray, places: np.ndarray, views: np.ndarray) -> None:
        if rows.size and not (rows.min() >= 0 and rows.max() < self.layout.num_rows):
            raise StoreMismatchError(f"{self.path} has rows 0 to {self.layout.num_rows - 1}; wanted {rows.tolist()}")
        is_ok, num_frames, num_views = self._row_states
        if not is_ok[rows].all():
            bad = rows[~is_ok[rows]]
            raise StoreMismatchError(f"rows {_join(bad)} of {self.path} are not ok: see their reason in the manifest")
        beyond = (places < NO_FRAME).any(axis=1) | (places >= num_frames[rows, None]).any(axis=1)
        beyond |= (views < 0) | (views >= num_views[rows])
        if beyond.any():
            first = int(np.flatnonzero(beyond)[0])
            raise StoreMismatchError(
                f"row {rows[first]} of {self.path} holds {num_frames[rows[first]]} frames and "
                f"{num_views[rows[first]]} views; wanted frames {_join(places[first])} of view {views[first]}"
            )

    def _array(self, name: str) -> ts.TensorStore:
        if name not in self._open_arrays:
            self._spec(name)
            self._open_arrays[name] = open_array(self.path, name)
        return self._open_arrays[name]

    @cached_property
    def _open_arrays(self) -> dict[str, ts.TensorStore]:
        return {}

    def _sharded(self, name: str) -> ShardedArray | None:
        """The array as our own reader has it, or None where that cannot read its layout."""
        if name not in self._sharded_arrays:
            spec = self._spec(name)
            self._sharded_arrays[name] = ShardedArray.open(self.path, spec, lambda *file: self._find_copy(spec, *file))
        return self._sharded_arrays[name]

    def _find_copy(self, spec: ArraySpec, shard: int, file: str) -> Path | None:
        return None if self._copies is None else self._copies.find(spec, shard, file)

    def read_through(self, cache: ShardCache, *, waits: bool, ahead_bytes: int | None = None) -> None:
        """Keep shards on a fast disk as they are read, and read them from there.

        Args:
            cache: Whose room is shared with other processes and stores.
            waits: Whether a shard is copied before it is read. Else what is not there yet is read from the store.
            ahead_bytes: Of copies that may be made before they are read; None is an eighth of the cache.
        """
        self.cache = cache
        self.ahead_bytes = cache.most_bytes // 8 if ahead_bytes is None else ahead_bytes
        self._copies = StoreCopies(cache, self.path, self._find_fingerprint, waits=waits)

    def list_files(
        self, rows: np.ndarray, views: np.ndarray, places: np.ndarray, arrays: Sequence[str]
    ) -> list[tuple[str, int, str]]:
        """The shards' files that clips are read of: array, shard of rows, name; of arrays that can have copies.

        Args:
            rows: (B,).
            views: (B,).
            places: (B, T).
            arrays: Which.
        """
        files = []
        for name in map(self.layout.name_stored, arrays):
            if (sharded := self._sharded(name)) is not None:
                keys = ShardedFrames.of(rows, views, places, sharded.division).shards
                files += [(name, key[0], sharded.file_of(key)) for key in keys]
        return files

    def bring(self, array: str, shard: int, file: str) -> int:
        """See that a file has a copy before it is read; the bytes of the copy, 0 where there is none."""
        if self._copies is None:
            return 0
        num_bytes = self._copies.bring(self._spec(array), shard, file)
        if num_bytes and (sharded := self._sharded(array)) is not None:
            sharded.forget(self.path / array / file)  # what is open is opened anew, there
        return num_bytes

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Copies are made inside; who leaves with an error, or early, waits for none that is under way."""
        if self._copies is not None:
            self._copies.go_on()
        try:
            yield
        finally:
            if self._copies is not None:
                self._copies.stop()

    def _find_fingerprint(self, shard: int, file: str) -> str | None:
        """What a shard's done-marker says of a file now; None where it says nothing, or nothing that can be read."""
        known = self._fingerprints.get(shard)
        now = time.monotonic()
        if known is None or now - known.seen_at > _MARKER_LIFE_S:
            state, files = (None, {}) if known is None else (known.state, known.files)
            with suppress(OSError):  # a disk that is away for a moment: what was known stays
                found = read_marker_state(self.path, shard)
                if known is None or known.state != found:
                    marker = self.read_marker(shard)
                    files = marker.files or {} if marker is not None else {}
                state = found
            self._fingerprints[shard] = known = _MarkerFacts(state, now, files)
        return known.files.get(file)

    @cached_property
    def _fingerprints(self) -> dict[int, _MarkerFacts]:
        return {}

    @cached_property
    def _sharded_arrays(self) -> dict[str, ShardedArray | None]:
        return {}

    def _read_with_tensorstore(
        self, name: str, rows: np.ndarray, views: np.ndarray, places: np.ndarray, layer_places: list[int] | None
    ) -> np.ndarray:
        self._check_shard_files(name, rows, views, places)
        shape, held = places.shape, np.maximum(places, 0)
        index = (np.broadcast_to(rows[:, None], shape), np.broadcast_to(views[:, None], shape), held)
        selected = self._array(name).vindex[index]
        if layer_places is not None:
            selected = selected[:, :, layer_places]
        try:
            values = selected.read().result()
        except ValueError as error:
            raise self._damage(name, self._find_unreadable(name, rows, views, places), str(error)) from error
        self._check_present(name, values, rows)
        values[places < 0] = 0
        return values

    def _find_unreadable(self, name: str, rows: np.ndarray, *places: np.ndarray) -> np.ndarray:
        """The first of some rows that cannot be read by itself: tensorstore does not say which one it was."""
        for place, index in enumerate(zip(rows, *places, strict=True)):
            try:
                self._array(name).vindex[index].read().result()
            except ValueError:
                return rows[place : place + 1]
        return rows

    def _check_present(self, name: str, values: np.ndarray, rows: np.ndarray) -> None:
        """A missing chunk reads as the fill value, which no written token has; a black pixel has it."""
        if values.size == 0:
            return
        if name == self.layout.pixel_array:
            return
        first = values.reshape(*values.shape[:2], -1)[:, :, 0]
        fill = fill_value_of(values.dtype.name)
        missing = np.isnan(first) if fill == "NaN" else first == fill
        if missing.any():
            raise self._damage(name, rows[missing.any(axis=1)], "the chunk is missing")

    def _check_shard_files(self, name: str, rows: np.ndarray, views: np.ndarray, places: np.ndarray) -> None:
        """Refuse what tensorstore would wait for, follow, or take for black pixels: a pipe, a link, no file."""
        spec = self._spec(name)
        axes = np.broadcast_arrays(rows[:, None], views[:, None], places)
        files = np.stack([axis // size for axis, size in zip(axes, spec.shard_shape, strict=False)], axis=-1)
        rest = (0,) * (len(spec.shape) - 3)
        for shard, *part in np.unique(files[places >= 0], axis=0).tolist():
            try:
                names.require_file(self.path, f"{name}/{spec.shard_key(shard, (*part, *rest))}")
            except StoreDamagedError as error:
                raise self._damage(name, rows[rows // spec.shard_shape[0] == shard], str(error)) from error

    def _damage(self, name: str, rows: np.ndarray, why: str) -> StoreDamagedError:
        shards = sorted({int(row) // self.layout.rows_per_shard for row in rows})
        ids = self.read_manifest(["video_id"])["video_id"]
        named = ", ".join(ids[int(row)].as_py() for row in rows[:3])
        said = f"{self.path / name}, shard {_join(shards[:3])}: {why}. Read for video {named}. {_MEND}"
        return StoreDamagedError(said, row=int(rows[0]))


@lru_cache(1)
def count_threads() -> int:
    """How many threads of a reader read clips."""
    fewest, most = _THREADS
    return min(max(fewest, os.cpu_count() or 1), most)


def is_store(path: Path) -> bool:
    """Whether a store was begun there, whatever its state."""
    return (path / "zarr.json").is_file()


def open_store(path: str | Path) -> StoreReader:
    """Open a store for reading.

    Args:
        path: Folder of the store.

    Raises:
        StoreNotFoundError: If there is nothing, or something that is not a store.
        StoreBusyError: If rows are being added to it.
        StoreMismatchError: If the store has a later format version.
        StoreDamagedError: If its metadata does not match the recorded hash.
    """
    path = Path(path)
    metadata = path / "zarr.json"
    if os.path.lexists(path / APPEND_NAME):
        raise StoreBusyError(
            f"rows are being added to {path}, or were when that was interrupted: `s4v extract --append` completes it"
        )
    if not metadata.is_file():
        reason = "nothing there" if not path.exists() else "no zarr.json in it"
        raise StoreNotFoundError(f"{path} is not a store: {reason}. `s4v extract --out {path}` makes one.")
    node = names.read_json(path, "zarr.json")
    group = node.get("attributes")
    attributes = group.get("s4v") if isinstance(group, dict) else None
    if not isinstance(attributes, dict) or "format_version" not in attributes:
        raise StoreNotFoundError(f"{path} is a Zarr group, but not a store that s4v wrote: no `s4v` attribute.")
    version = attributes["format_version"]
    if type(version) is not int or version < 1:
        raise StoreDamagedError(f"{metadata} records the format {ascii(version)[:60]}, which is none. {_MEND}")
    if version > FORMAT_VERSION:
        raise StoreMismatchError(f"{path} has format {version}, this s4v reads up to {FORMAT_VERSION}. Update s4v.")
    if _recorded_hashes(path).get("zarr.json") not in (None, hash_file(metadata)):
        raise StoreDamagedError(f"{metadata} does not match its recorded hash. Extract the store anew (--overwrite).")
    store = StoreReader(path, attributes)
    _require_as_many_rows(store)
    return store


def _require_as_many_rows(store: StoreReader) -> None:
    """Refuse a store whose layout and manifest are of different numbers of rows.

    Where the manifest's hash tells that it is damaged, the layout stands: `verify` tells, and `--repair` mends it.
    """
    name = manifest.MANIFEST_NAME
    file = store.path / name
    if not names.is_plain_file(file):
        return  # whatever needs it says so
    try:
        num_rows = pyarrow.parquet.read_metadata(file).num_rows
    except (OSError, ValueError, pa.ArrowException):
        return
    expected = store.layout.num_rows
    if num_rows == expected and num_rows <= _ROWS_PER_BYTE * file.stat().st_size:
        return
    if (store.path / APPEND_NAME).exists() or _has_changed(store):
        raise StoreBusyError(f"rows are being added to {store.path}: open it again in a moment")
    recorded = _recorded_hashes(store.path).get(name)
    if recorded is None or recorded == hash_file(file):
        raise StoreDamagedError(
            f"{store.path} has {expected} rows by its zarr.json and {num_rows} by its {name}, which has "
            f"{file.stat().st_size} bytes: one of them is another store's. Take both from where they came from."
        )


def _has_changed(store: StoreReader) -> bool:
    """Whether a store's attributes are others by now than when it was opened."""
    group = names.read_json(store.path, "zarr.json").get("attributes")
    return not isinstance(group, dict) or group.get("s4v") != store.attributes


def _recorded_hashes(path: Path) -> dict[str, Any]:
    """The recorded hashes as they are now; a store of a million videos has 15,000 of them."""
    try:
        state = (path / CHECKSUMS_NAME).lstat()
    except FileNotFoundError:
        return {}
    return _parse_hashes(path, state.st_mtime_ns, state.st_size, state.st_ino)


@lru_cache(maxsize=8)
def _parse_hashes(path: Path, *_state: int) -> dict[str, Any]:
    return names.read_json(path, CHECKSUMS_NAME)


def _join(values: Sequence[int] | np.ndarray) -> str:
    return ",".join(str(int(value)) for value in values)
