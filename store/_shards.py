"""Frames from local, uncompressed shards: which chunks make up clips, and where their bytes go.

tensorstore reads any Zarr array, at a part of what the page cache gives. This reads one layout, the one that s4v writes
by default, at nearly all of it. What it does not know (compression, another chunking) is tensorstore's.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ._chunk_reads import ChunkReads
from ._shard_file import CHECKSUM_BYTES, ShardFile, ShardIndex, try_patiently
from .layout import ArraySpec

_OPEN_SHARDS = 64
"""For each array: three arrays of a process stay below the 256 files that macOS lets it open."""
_INDEX_BYTES = 128 * 2**20
"""For each array, of the indices that are kept of shards which are no longer open: those of K400 are 60 to 120 MB."""


@dataclass(frozen=True, slots=True)
class _Geometry:
    """Chunks are (1, 1, f, ...) in shards of (rows, views, frames, ...): only the first three axes are divided.

    Where a chunk holds one frame, the axis behind it may be divided too, into chunks of one place each.
    """

    tail: tuple[int, ...]
    """Axes behind row, view and frame."""
    dtype: np.dtype
    rows_per_shard: int
    views_per_shard: int
    frames_per_shard: int
    """Of a row: a block."""
    frames_per_chunk: int
    parts_per_frame: int = 1
    """Chunks that the axis behind the frame's is divided into: 1, or one for each of its places."""

    @property
    def chunks_per_view(self) -> int:
        """Of a row, in one shard."""
        return self.frames_per_shard // self.frames_per_chunk * self.parts_per_frame

    @property
    def chunks_per_shard(self) -> int:
        return self.rows_per_shard * self.views_per_shard * self.chunks_per_view

    @property
    def bytes_per_chunk(self) -> int:
        """Without its checksum."""
        return self.frames_per_chunk * math.prod(self.tail) // self.parts_per_frame * self.dtype.itemsize

    @property
    def division(self) -> tuple[int, int, int]:
        """What decides in which shard a frame lies: all arrays of most stores have the same."""
        return self.rows_per_shard, self.views_per_shard, self.frames_per_shard


@dataclass(frozen=True, slots=True)
class ShardedFrames:
    """The frames of a batch of clips, (n,) each, and where they lie; the same for arrays that are divided alike.

    Places of clips that are below zero are no frames, and not among them.
    """

    row: np.ndarray
    in_shard: np.ndarray
    """Which of a shard's rows and views."""
    in_block: np.ndarray
    """Place in the row's part of the shard."""
    target: np.ndarray
    """Place among the batch's frames, those that are none counted."""
    shards: Sequence[tuple[int, int, int]]
    """Of the frames, by row, view and block."""
    files: np.ndarray
    """Which of those."""

    @classmethod
    def of(
        cls, rows: np.ndarray, views: np.ndarray, places: np.ndarray, division: tuple[int, int, int]
    ) -> ShardedFrames:
        """Those of clips: rows (B,), views (B,), places (B, T)."""
        rows_per_shard, views_per_shard, frames_per_shard = division
        if (places >= 0).all():
            clip, target, place = (
                np.repeat(np.arange(len(rows)), places.shape[1]),
                np.arange(places.size),
                places.ravel(),
            )
        else:
            target = np.flatnonzero(places >= 0)
            clip, place = target // places.shape[1], places.ravel()[target]
        row, view = rows[clip], views[clip]
        block, in_block = np.divmod(place, frames_per_shard)
        of_row, in_row = np.divmod(row, rows_per_shard)
        of_view, in_view = np.divmod(view, views_per_shard)
        sizes = [int(axis.max(initial=0)) + 1 for axis in (of_view, block)]
        keys, files = _number((of_row * sizes[0] + of_view) * sizes[1] + block)
        shards = [(key // (sizes[0] * sizes[1]), key // sizes[1] % sizes[0], key % sizes[1]) for key in keys]
        return cls(row, in_row * views_per_shard + in_view, in_block, target, shards, files)

    def split(self, most: int) -> Iterator[ShardedFrames]:
        """Frames of so many shards at a time, in the order of shards."""
        if len(self.shards) <= most:
            yield self
            return
        for start in range(0, len(self.shards), most):
            own = (self.files >= start) & (self.files < start + most)
            yield ShardedFrames(
                row=self.row[own],
                in_shard=self.in_shard[own],
                in_block=self.in_block[own],
                target=self.target[own],
                shards=self.shards[start : start + most],
                files=self.files[own] - start,
            )


@dataclass(frozen=True, slots=True)
class PlannedClips:
    """What of an array is read for a batch."""

    clips: np.ndarray
    """(B, T, ...); zeros where there is no frame, and whole when all rounds are read."""
    rounds: Iterator[ChunkReads]
    """One after another, so that only so many files are open at a time; each opens its own when its turn comes.

    Raises DamagedChunkError where a shard is none.
    """


class ShardedArray:
    """A sharded array with the axes row, view, frame, and whatever comes behind; safe to read from several threads."""

    def __init__(
        self, folder: Path, geometry: _Geometry, find_copy: Callable[[int, str], Path | None] = lambda *_: None
    ) -> None:
        self._folder = folder
        self._geometry = geometry
        self._find_copy = find_copy
        self._shards: OrderedDict[tuple[int, int, int], ShardFile] = OrderedDict()
        self._indices: OrderedDict[tuple[int, int, int], ShardIndex] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls, root: Path, spec: ArraySpec, find_copy: Callable[[int, str], Path | None] = lambda *_: None
    ) -> ShardedArray | None:
        """An array of a store, or None where its layout is another than this module reads.

        Its `zarr.json` must have been compared with the layout: it is not read here.

        Args:
            root: The store.
            spec: Of the array.
            find_copy: By a shard's number and the name of a file of it, what to open in its place; None: the file.
        """
        geometry = _find_geometry(spec)
        return None if geometry is None or not hasattr(os, "preadv") else cls(root / spec.name, geometry, find_copy)

    @property
    def division(self) -> tuple[int, int, int]:
        """Which `ShardedFrames` it takes: those of its rows, views and frames in a shard."""
        return self._geometry.division

    def plan(
        self,
        frames: ShardedFrames,
        shape: tuple[int, int],
        layers: Sequence[int] | None = None,
        allocate: Callable[[tuple[int, ...], np.dtype], np.ndarray] = np.empty,
    ) -> PlannedClips:
        """Say which chunks make up clips.

        Args:
            frames: Of the clips, of this array's division.
            shape: (B, T).
            layers: Places on the first axis behind the frame's, or of pixels their offsets; None takes all.
            allocate: Makes room for the clips.

        Raises:
            DamagedChunkError: If the first shard is none.
        """
        tail = self._geometry.tail
        if frames.shards:  # before room is made: a store that promises more than its files hold gets none
            self._shard(frames.shards[0], frames)
        if layers is not None:
            tail = (len(layers), *tail[1:])
        clips = allocate((*shape, *tail), self._geometry.dtype)
        if len(frames.target) < shape[0] * shape[1]:
            flat = clips.reshape(-1, *tail)
            is_none = np.ones(len(flat), bool)
            is_none[frames.target] = False
            flat[is_none] = 0
        return PlannedClips(clips, self._plan_rounds(frames, layers, clips))

    def _plan_rounds(
        self, frames: ShardedFrames, layers: Sequence[int] | None, clips: np.ndarray
    ) -> Iterator[ChunkReads]:
        """Frames of as many shards as may be open, one round after another."""
        geometry = self._geometry
        is_all = layers is None or list(layers) == list(range(geometry.tail[0]))
        cuts_chunks = geometry.parts_per_frame == 1 and (geometry.frames_per_chunk > 1 or not is_all)
        for own in frames.split(max(1, _OPEN_SHARDS // 2)):  # a loader reads two batches at a time
            shards = tuple(self._shard(place, own) for place in own.shards)
            if cuts_chunks:
                yield self._plan_pieces(shards, own, None if is_all else layers, clips)
            else:
                yield self._plan_whole(shards, own, None if is_all else layers, clips)

    def _plan_whole(
        self, shards: tuple[ShardFile, ...], frames: ShardedFrames, layers: Sequence[int] | None, clips: np.ndarray
    ) -> ChunkReads:
        """Chunks that go straight into the clips."""
        geometry = self._geometry
        files, rows, target = frames.files, frames.row, frames.target
        numbers = frames.in_shard * geometry.chunks_per_view + frames.in_block * geometry.parts_per_frame
        if geometry.parts_per_frame > 1:
            parts = np.arange(geometry.parts_per_frame) if layers is None else np.asarray(layers)
            numbers = (numbers[:, None] + parts).ravel()
            target = (target[:, None] * len(parts) + np.arange(len(parts))).ravel()
            files, rows = np.repeat(files, len(parts)), np.repeat(rows, len(parts))
        return ChunkReads(
            shards, files, numbers, rows, geometry.bytes_per_chunk, clips, offsets=target * geometry.bytes_per_chunk
        )

    def _plan_pieces(
        self,
        shards: tuple[ShardFile, ...],
        frames: ShardedFrames,
        layers: Sequence[int] | None,
        clips: np.ndarray,
    ) -> ChunkReads:
        """Chunks of which not all is wanted, or not in their own order; each is read once."""
        geometry = self._geometry
        of_frame = geometry.bytes_per_chunk // geometry.frames_per_chunk
        in_block, in_chunk = np.divmod(frames.in_block, geometry.frames_per_chunk)
        of_view = frames.in_shard * geometry.chunks_per_view
        chunks, chunk_of = _number(frames.files * geometry.chunks_per_shard + of_view + in_block)
        numbers = np.array(chunks, np.int64)
        one_of_each = np.empty(len(chunks), np.int64)
        one_of_each[chunk_of] = np.arange(len(chunk_of))
        order = np.argsort(chunk_of, kind="stable")
        source, target = in_chunk[order] * of_frame, frames.target[order]
        wanted = np.zeros(1, np.int64) if layers is None else np.asarray(layers)
        size = of_frame if layers is None else of_frame // geometry.tail[0]
        pieces = np.empty((len(source), len(wanted), 3), np.int64)
        pieces[..., 0] = source[:, None] + wanted * size
        pieces[..., 1] = (target[:, None] * len(wanted) + np.arange(len(wanted))) * size
        pieces[..., 2] = size
        return ChunkReads(
            shards=shards,
            files=frames.files[one_of_each],
            numbers=numbers % geometry.chunks_per_shard,
            rows=frames.row[one_of_each],
            chunk_bytes=geometry.bytes_per_chunk,
            target=clips,
            firsts=np.concatenate([[0], np.cumsum(np.bincount(chunk_of) * len(wanted))]),
            pieces=pieces.reshape(-1, 3),
        )

    def file_of(self, key: tuple[int, int, int]) -> str:
        """The name of a shard's file, by row, view and block."""
        return ".".join(["c", *map(str, key), *["0"] * len(self._geometry.tail)])

    def forget(self, path: Path) -> None:
        """Open a file anew when it is read next: a damaged copy is to be replaced."""
        with self._lock:
            for key in [key for key, shard in self._shards.items() if shard.path == path]:
                del self._shards[key]

    def _shard(self, key: tuple[int, int, int], frames: ShardedFrames) -> ShardFile:
        """An open shard, by row, view and block."""
        with self._lock:
            if (shard := self._shards.get(key)) is not None:
                self._shards.move_to_end(key)
                shard.note_use()
                return shard
            known = self._indices.get(key)
        geometry = self._geometry
        chunk_bytes, count = geometry.bytes_per_chunk + CHECKSUM_BYTES, geometry.chunks_per_shard
        row = int(frames.row[np.argmax(frames.files == frames.shards.index(key))])  # for whom, should it be damaged
        path = self._folder / self.file_of(key)
        copy = self._find_copy(key[0], path.name)
        shard = try_patiently(lambda: ShardFile(copy or path, count, row, known, chunk_bytes))
        if copy is not None:
            shard.used_at = time.monotonic()
        with self._lock:
            self._shards[key] = shard
            if copy is None:  # each use of a copy is noted in its time of change: its index would never count as known
                self._indices[key] = shard.index_as_read
                self._indices.move_to_end(key)
            if len(self._shards) > _OPEN_SHARDS:
                self._shards.popitem(last=False)  # its file closes when the last thread lets go of it
            if len(self._indices) * shard.index.nbytes > _INDEX_BYTES:
                self._indices.popitem(last=False)
        return shard


def _number(keys: np.ndarray) -> tuple[list[int], np.ndarray]:
    """The different ones of some whole numbers (n,), in the order of their first, and which of them each is (n,).

    Of the few hundred of a batch a dict finds them in half of the time that numpy's `unique` takes.
    """
    found: dict[int, int] = {}
    places = [found.setdefault(key, len(found)) for key in keys.tolist()]
    return list(found), np.array(places, np.int64)


def _find_geometry(spec: ArraySpec) -> _Geometry | None:
    """How an array's shards are divided, if it is laid out as this module reads it."""
    if sys.byteorder != "little" or spec.is_compressed or spec.chunk_shape is None:
        return None
    shape, chunk, shard = spec.shape, spec.chunk_shape, spec.shard_shape
    if chunk[:2] != (1, 1) or shard[3:] != shape[3:] or shard[2] % chunk[2]:
        return None
    parts = spec.chunks_per_frame
    if chunk[3:] != shape[3:] and (chunk[2:4] != (1, 1) or chunk[4:] != shape[4:]):
        return None
    return _Geometry(
        tail=shape[3:],
        dtype=np.dtype(spec.dtype),
        rows_per_shard=shard[0],
        views_per_shard=shard[1],
        frames_per_shard=shard[2],
        frames_per_chunk=chunk[2],
        parts_per_frame=parts,
    )
