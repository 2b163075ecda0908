"""Frames from local, uncompressed shards: which chunks make up clips, and where their bytes go.

tensorstore reads any Zarr array, at a part of what the page cache gives. This reads one layout, the one that s4v writes
by default, at nearly all of it. What it does not know (compression, another chunking) is tensorstore's.
"""

from __future__ import annotations

import math
import os
import sys
import threading
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


@dataclass(frozen=True, slots=True)
class _Frames:
    """Frames that are read, (n,) each."""

    row: np.ndarray
    first_chunk: np.ndarray
    """Of the row's view, in its shard."""
    in_block: np.ndarray
    """Place in the row's part of the shard."""
    target: np.ndarray
    """Place among the batch's frames."""

    def take(self, which: np.ndarray) -> _Frames:
        return _Frames(self.row[which], self.first_chunk[which], self.in_block[which], self.target[which])


def _number(coordinates: np.ndarray) -> np.ndarray:
    """(n, axes) places -> (n,) numbers that are equal where all places are, in their order."""
    sizes = coordinates.max(axis=0, initial=0) + 1
    return np.ravel_multi_index(tuple(coordinates.T), tuple(sizes.tolist()))


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

    def __init__(self, folder: Path, geometry: _Geometry) -> None:
        self._folder = folder
        self._geometry = geometry
        self._shards: OrderedDict[str, ShardFile] = OrderedDict()
        self._indices: OrderedDict[str, ShardIndex] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, root: Path, spec: ArraySpec) -> ShardedArray | None:
        """An array of a store, or None where its layout is another than this module reads.

        Its `zarr.json` must have been compared with the layout: it is not read here.
        """
        geometry = _find_geometry(spec)
        return None if geometry is None or not hasattr(os, "preadv") else cls(root / spec.name, geometry)

    def plan(
        self,
        rows: np.ndarray,
        views: np.ndarray,
        places: np.ndarray,
        layers: Sequence[int] | None = None,
        allocate: Callable[[tuple[int, ...], np.dtype], np.ndarray] = np.empty,
    ) -> PlannedClips:
        """Say which chunks make up clips.

        Args:
            rows: (B,).
            views: (B,).
            places: (B, T) on the axis F; what is below zero is no frame.
            layers: Places on the first axis behind the frame's, or of pixels their offsets; None takes all.
            allocate: Makes room for the clips.

        Raises:
            DamagedChunkError: If the first clip's shard is none.
        """
        tail = self._geometry.tail
        if len(rows):  # before room is made: a store that promises more than its files hold gets none
            self._shard(int(rows[0]), int(views[0]), max(0, int(places[0, 0])) if places.size else 0)
        if layers is not None:
            tail = (len(layers), *tail[1:])
        clips = allocate((*places.shape, *tail), self._geometry.dtype)
        is_frame = places >= 0
        if not is_frame.all():
            clips[~is_frame] = 0
        return PlannedClips(clips, self._plan_rounds(rows, views, places, is_frame, layers, clips))

    def _plan_rounds(
        self,
        rows: np.ndarray,
        views: np.ndarray,
        places: np.ndarray,
        is_frame: np.ndarray,
        layers: Sequence[int] | None,
        clips: np.ndarray,
    ) -> Iterator[ChunkReads]:
        """Frames of as many shards as may be open, one round after another, in the order of shards."""
        geometry = self._geometry
        clip, step = np.nonzero(is_frame)
        row, view = rows[clip], views[clip]
        block, in_block = np.divmod(places[is_frame], geometry.frames_per_shard)
        first = (row % geometry.rows_per_shard * geometry.views_per_shard + view % geometry.views_per_shard) * (
            geometry.chunks_per_view
        )
        frames = _Frames(row, first, in_block, clip * places.shape[1] + step)
        shards = np.stack([row // geometry.rows_per_shard, view // geometry.views_per_shard, block], axis=1)
        _, one_of_each, files = np.unique(_number(shards), return_index=True, return_inverse=True)
        for start in range(0, len(one_of_each), _OPEN_SHARDS):
            open_now = one_of_each[start : start + _OPEN_SHARDS].tolist()
            found = tuple(
                self._shard(int(row[one]), int(view[one]), int(block[one]) * geometry.frames_per_shard)
                for one in open_now
            )
            if len(one_of_each) <= _OPEN_SHARDS:
                yield self._plan_chunks(found, files, frames, layers, clips)
            else:
                is_now = (files >= start) & (files < start + _OPEN_SHARDS)
                yield self._plan_chunks(found, files[is_now] - start, frames.take(is_now), layers, clips)

    def _plan_chunks(
        self,
        shards: tuple[ShardFile, ...],
        files: np.ndarray,
        frames: _Frames,
        layers: Sequence[int] | None,
        clips: np.ndarray,
    ) -> ChunkReads:
        """Chunks of frames that lie in these shards, (n,) files, each chunk once where it holds several frames."""
        geometry = self._geometry
        is_all = layers is None or list(layers) == list(range(geometry.tail[0]))
        if geometry.parts_per_frame == 1 and (geometry.frames_per_chunk > 1 or not is_all):
            return self._plan_pieces(shards, files, frames, None if is_all else layers, clips)
        parts = np.arange(geometry.parts_per_frame) if is_all else np.asarray(layers)
        first = frames.first_chunk + frames.in_block * geometry.parts_per_frame
        target = frames.target[:, None] * len(parts) + np.arange(len(parts))
        return ChunkReads(
            shards=shards,
            files=np.repeat(files, len(parts)),
            numbers=(first[:, None] + parts).ravel(),
            rows=np.repeat(frames.row, len(parts)),
            chunk_bytes=geometry.bytes_per_chunk,
            target=clips,
            offsets=target.ravel() * geometry.bytes_per_chunk,
        )

    def _plan_pieces(
        self,
        shards: tuple[ShardFile, ...],
        files: np.ndarray,
        frames: _Frames,
        layers: Sequence[int] | None,
        clips: np.ndarray,
    ) -> ChunkReads:
        """Chunks of which not all is wanted, or not in their own order; each is read once."""
        geometry = self._geometry
        of_frame = geometry.bytes_per_chunk // geometry.frames_per_chunk
        in_block, in_chunk = np.divmod(frames.in_block, geometry.frames_per_chunk)
        keys = files * geometry.chunks_per_shard + frames.first_chunk + in_block
        _, one_of_each, chunk_of = np.unique(keys, return_index=True, return_inverse=True)
        order = np.argsort(chunk_of, kind="stable")
        source, target = in_chunk[order] * of_frame, frames.target[order]
        wanted = np.zeros(1, np.int64) if layers is None else np.asarray(layers)
        size = of_frame if layers is None else of_frame // geometry.tail[0]
        places = np.arange(len(wanted))
        pieces = np.broadcast_arrays(
            source[:, None] + wanted * size, (target[:, None] * len(wanted) + places) * size, np.int64(size)
        )
        return ChunkReads(
            shards=shards,
            files=files[one_of_each],
            numbers=keys[one_of_each] % geometry.chunks_per_shard,
            rows=frames.row[one_of_each],
            chunk_bytes=geometry.bytes_per_chunk,
            target=clips,
            firsts=np.concatenate([[0], np.cumsum(np.bincount(chunk_of) * len(wanted))]),
            pieces=np.stack(pieces, axis=-1).reshape(-1, 3),
        )

    def _shard(self, row: int, view: int, frame: int) -> ShardFile:
        geometry = self._geometry
        place = (row // geometry.rows_per_shard, view // geometry.views_per_shard, frame // geometry.frames_per_shard)
        key = ".".join(["c", *map(str, place), *["0"] * len(geometry.tail)])
        with self._lock:
            if (shard := self._shards.get(key)) is not None:
                self._shards.move_to_end(key)
                return shard
            known = self._indices.get(key)
        chunk_bytes = geometry.bytes_per_chunk + CHECKSUM_BYTES
        path, count = self._folder / key, geometry.chunks_per_shard
        shard = try_patiently(lambda: ShardFile(path, count, row, known, chunk_bytes))
        with self._lock:
            self._shards[key] = shard
            self._indices[key] = shard.index_as_read
            self._indices.move_to_end(key)
            if len(self._shards) > _OPEN_SHARDS:
                self._shards.popitem(last=False)  # its file closes when the last thread lets go of it
            if len(self._indices) * shard.index.nbytes > _INDEX_BYTES:
                self._indices.popitem(last=False)
        return shard


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
