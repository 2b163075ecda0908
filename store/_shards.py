"""Frames from local, uncompressed shards: a `preadv` for each chunk, straight into the batch, its checksum verified.

tensorstore reads any Zarr array, at about a third of what the page cache gives. This reads one layout, the one that
s4v writes by default, at nearly all of it. What it does not know (compression, another chunking) is tensorstore's.
"""

from __future__ import annotations

import errno
import math
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from crc32c import crc32c

from .layout import ArraySpec
from .names import open_file

_ABSENT = 2**64 - 1
"""Offset of a chunk that the shard does not hold, by Zarr's sharding codec."""
_CHECKSUM_BYTES = 4
_OPEN_SHARDS = 64
"""For each array: three arrays of a process stay below the 256 files that macOS lets it open."""
_INDEX_BYTES = 128 * 2**20
"""For each array, of the indices that are kept of shards which are no longer open: those of K400 are 60 to 120 MB."""


class DamagedChunkError(Exception):
    """A chunk is missing or is not as it was written."""

    def __init__(self, row: int, why: str) -> None:
        super().__init__(why)
        self.row = row


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
        """With its checksum."""
        values = self.frames_per_chunk * math.prod(self.tail) // self.parts_per_frame
        return values * self.dtype.itemsize + _CHECKSUM_BYTES


@dataclass(frozen=True, slots=True)
class ClipsUnderWay:
    """A batch that threads are reading."""

    clips: np.ndarray
    """(B, T, ...); not whole before `wait` has returned."""
    tasks: list[Future[None]]

    def wait(self) -> np.ndarray:
        """The clips, when they are there.

        Raises:
            DamagedChunkError: For the first clip of the batch that has one.
        """
        for task in self.tasks:
            task.result()
        return self.clips

    def cancel(self) -> None:
        """Read no more of them."""
        for task in self.tasks:
            task.cancel()


class ShardedArray:
    """A sharded array with the axes row, view, frame, and whatever comes behind; safe to read from several threads."""

    def __init__(self, folder: Path, geometry: _Geometry) -> None:
        self._folder = folder
        self._geometry = geometry
        self._shards: OrderedDict[str, _Shard] = OrderedDict()
        self._indices: OrderedDict[str, _Index] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, root: Path, spec: ArraySpec) -> ShardedArray | None:
        """An array of a store, or None where its layout is another than this module reads.

        Its `zarr.json` must have been compared with the layout: it is not read here.
        """
        geometry = _find_geometry(spec)
        return None if geometry is None or not hasattr(os, "preadv") else cls(root / spec.name, geometry)

    def read(
        self,
        rows: np.ndarray,
        views: np.ndarray,
        places: np.ndarray,
        layers: Sequence[int] | None,
        threads: ThreadPoolExecutor | None,
        allocate: Callable[[tuple[int, ...], np.dtype], np.ndarray] = np.empty,
    ) -> ClipsUnderWay:
        """Begin to read clips, one task for each; without threads, read them.

        Args:
            rows: (B,).
            views: (B,).
            places: (B, T) on the axis F; what is below zero is no frame, and comes out as zeros.
            layers: Places on the first axis behind the frame's, or of pixels their offsets; None takes all.
            threads: What reads; of small chunks one thread reads as fast, and tasks take longer than they do.
            allocate: Makes room for the clips.

        Returns:
            (B, T, ...), the axes behind the frame's, to be waited for.

        Raises:
            DamagedChunkError: If the first clip's shard is none; without threads, for the first clip that has one.
        """
        tail = self._geometry.tail
        if len(rows):  # before room is made: a store that promises more than its files hold gets none
            self._shard(int(rows[0]), int(views[0]), max(0, int(places[0, 0])) if places.size else 0)
        if layers is not None:
            tail = (len(layers), *tail[1:])
        clips = allocate((*places.shape, *tail), self._geometry.dtype)
        each = zip(rows.tolist(), views.tolist(), places, clips, strict=True)
        if threads is not None:
            return ClipsUnderWay(
                clips, [threads.submit(self._read_clip, row, view, p, layers, c) for row, view, p, c in each]
            )
        for row, view, steps, clip in each:
            self._read_clip(row, view, steps, layers, clip)
        return ClipsUnderWay(clips, [])

    def _read_clip(
        self, row: int, view: int, places: np.ndarray, layers: Sequence[int] | None, clip: np.ndarray
    ) -> None:
        """Read the frames of one clip, (T, ...), each chunk once."""
        geometry = self._geometry
        in_shard = row % geometry.rows_per_shard * geometry.views_per_shard + view % geometry.views_per_shard
        read = self._read_frames if geometry.frames_per_chunk == 1 else self._read_blocks
        read(row, view, in_shard * geometry.chunks_per_view, places, layers, clip)

    def _read_frames(
        self,
        row: int,
        view: int,
        first_chunk: int,
        places: np.ndarray,
        layers: Sequence[int] | None,
        clip: np.ndarray,
    ) -> None:
        """A clip of an array whose chunks hold one frame, or a part of one."""
        geometry, parts, open_block = self._geometry, self._geometry.parts_per_frame, -1
        wanted = range(parts) if layers is None else layers
        whole = None if parts > 1 or layers is None else np.empty(geometry.tail, dtype=geometry.dtype)
        for place, frame in zip(places.tolist(), clip, strict=True):
            if place < 0:
                frame[...] = 0
                continue
            block, in_block = divmod(place, geometry.frames_per_shard)
            if block != open_block:
                shard, open_block = self._shard(row, view, place), block
            number = first_chunk + in_block * parts
            if parts > 1:
                for part, values in zip(wanted, frame, strict=True):
                    shard.read_chunk(number + part, values, row)
            elif whole is None:
                shard.read_chunk(number, frame, row)
            else:
                shard.read_chunk(number, whole, row)
                for tokens, layer in zip(frame, wanted, strict=True):
                    tokens[...] = whole[layer]

    def _read_blocks(
        self,
        row: int,
        view: int,
        first_chunk: int,
        places: np.ndarray,
        layers: Sequence[int] | None,
        clip: np.ndarray,
    ) -> None:
        """A clip of an array whose chunks hold several frames."""
        geometry, size = self._geometry, self._geometry.frames_per_chunk
        chunk = np.empty((size, *geometry.tail), dtype=geometry.dtype)
        numbers = places // size  # of chunks, counted along F; below zero there is none
        for number in np.unique(numbers).tolist():
            own = np.flatnonzero(numbers == number)
            if number < 0:
                clip[own] = 0
                continue
            shard = self._shard(row, view, number * size)
            shard.read_chunk(first_chunk + number % geometry.chunks_per_view, chunk, row)
            frames = chunk[places[own] % size]
            clip[own] = frames if layers is None else frames[:, layers]

    def _shard(self, row: int, view: int, frame: int) -> _Shard:
        geometry = self._geometry
        place = (row // geometry.rows_per_shard, view // geometry.views_per_shard, frame // geometry.frames_per_shard)
        key = ".".join(["c", *map(str, place), *["0"] * len(geometry.tail)])
        with self._lock:
            if (shard := self._shards.get(key)) is not None:
                self._shards.move_to_end(key)
                return shard
            known = self._indices.get(key)
        shard = _Shard(self._folder / key, geometry.chunks_per_shard, row, known, geometry.bytes_per_chunk)
        with self._lock:
            self._shards[key] = shard
            self._indices[key] = shard.index_as_read
            self._indices.move_to_end(key)
            if len(self._shards) > _OPEN_SHARDS:
                self._shards.popitem(last=False)  # its file closes when the last thread lets go of it
            if len(self._indices) * shard.index.nbytes > _INDEX_BYTES:
                self._indices.popitem(last=False)
        return shard


def verify_shard(path: Path, num_chunks: int) -> tuple[np.ndarray, dict[int, str]]:
    """Read all of a shard and check it, whatever codecs its chunks went through before their checksum.

    Args:
        path: The shard; chunks and index end with a crc32c.
        num_chunks: Places in its index.

    Returns:
        (num_chunks,) bool, which chunks the shard holds; and what is wrong with which of them.

    Raises:
        DamagedChunkError: If there is no reading the index.
    """
    shard = _Shard(path, num_chunks, row=-1)
    problems: dict[int, str] = {}
    is_there = shard.index[:, 0] != _ABSENT
    for number in np.flatnonzero(is_there).tolist():
        try:
            shard.read_chunk(number, np.empty(max(0, int(shard.index[number, 1]) - _CHECKSUM_BYTES), np.uint8), row=-1)
        except DamagedChunkError as error:
            problems[number] = str(error)
    return is_there, problems


def verify_chunk_file(path: Path, num_bytes: int) -> str | None:
    """What is wrong with a file that is one chunk of so many bytes with a crc32c behind it; None if nothing is."""
    try:
        read_chunk_file(path, (num_bytes,), np.dtype(np.uint8))
    except DamagedChunkError as error:
        return str(error)
    return None


def read_chunk_file(path: Path, shape: tuple[int, ...], dtype: np.dtype, row: int = -1) -> np.ndarray:
    """Read a file that is one uncompressed chunk with a crc32c behind it.

    Args:
        path: The file.
        shape: Of the chunk; no room is made for it unless the file has as many bytes.
        dtype: Little-endian.
        row: Whose it is, for the error.

    Raises:
        DamagedChunkError: If it is missing, has another size, or does not match its checksum.
    """
    expected = math.prod(shape) * dtype.itemsize + _CHECKSUM_BYTES
    try:
        with os.fdopen(open_file(path), "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) != expected:
                raise DamagedChunkError(row, f"{path.name} has {size} bytes, expected {expected}")
            values = np.empty(shape, dtype)
            is_whole = file.readinto(values.reshape(-1).view(np.uint8).data) == values.nbytes
            checksum = file.read(_CHECKSUM_BYTES)
    except FileNotFoundError:
        raise DamagedChunkError(row, f"the file {path.name} is missing") from None
    except OSError as error:
        raise _refused(path, row, error) from error
    if not is_whole or crc32c(values.reshape(-1).view(np.uint8).data) != int.from_bytes(checksum, "little"):
        raise DamagedChunkError(row, f"{path.name} does not match its checksum")
    return values


def _refused(path: Path, row: int, error: OSError) -> DamagedChunkError | OSError:
    """What to raise for a file that does not open: a process out of file handles is not the shard's fault."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return error
    is_link = error.errno == errno.ELOOP
    return DamagedChunkError(row, f"{path.name}: {'it is a link' if is_link else error.strerror}")


@dataclass(frozen=True, slots=True)
class _Index:
    """Where the chunks of a shard are, and of which state of the file that is true."""

    places: np.ndarray
    """(chunks, 2) offset and length."""
    state: tuple[int, int, int]
    """Inode, size and time of the last change."""


class _Shard:
    """An open shard and its index, which is read unless it is known of this state of the file.

    Args:
        path: Its file.
        num_chunks: Places in its index.
        row: Whose read it is, for errors.
        known: An index that was read before.
        chunk_bytes: What each chunk takes with its checksum; None where they are compressed.
    """

    def __init__(
        self, path: Path, num_chunks: int, row: int, known: _Index | None = None, chunk_bytes: int | None = None
    ) -> None:
        self._name = path.name
        try:
            self._descriptor = open_file(path)
        except FileNotFoundError:
            raise DamagedChunkError(row, f"the file {path.name} is missing") from None
        except OSError as error:
            raise _refused(path, row, error) from error
        stat = os.fstat(self._descriptor)
        state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if known is None or known.state != state:
            known = _Index(self._read_index(stat.st_size, num_chunks, row, chunk_bytes), state)
        self.index_as_read = known
        self.index = known.places

    def _read_index(self, file_bytes: int, num_chunks: int, row: int, chunk_bytes: int | None) -> np.ndarray:
        size = 16 * num_chunks
        start = file_bytes - size - _CHECKSUM_BYTES
        try:
            data = os.pread(self._descriptor, size + _CHECKSUM_BYTES, start) if start >= 0 else b""
        except OSError as error:
            raise DamagedChunkError(row, f"the index of {self._name}: {error.strerror}") from error
        index, checksum = data[:size], data[size:]
        if len(checksum) != _CHECKSUM_BYTES or crc32c(index) != int.from_bytes(checksum, "little"):
            raise DamagedChunkError(row, f"the index at the end of {self._name} is cut short or damaged")
        places = np.frombuffer(index, dtype="<u8").reshape(num_chunks, 2)
        if (problem := _judge_places(places, start, chunk_bytes)) is not None:
            raise DamagedChunkError(row, f"the index at the end of {self._name} {problem}")
        return places

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read_chunk(self, number: int, out: np.ndarray, row: int) -> None:
        """Fill a contiguous array with a chunk.

        Raises:
            DamagedChunkError: If the chunk is missing, is cut short, or does not match its checksum.
        """
        offset, length = self.index[number].tolist()
        if offset == _ABSENT:
            raise DamagedChunkError(row, f"chunk {number} of {self._name} is missing")
        target, checksum = out.data.cast("B"), bytearray(_CHECKSUM_BYTES)
        num_bytes = out.nbytes + _CHECKSUM_BYTES
        try:
            is_whole = length == num_bytes and os.preadv(self._descriptor, [target, checksum], offset) == num_bytes
        except OSError as error:
            raise DamagedChunkError(row, f"chunk {number} of {self._name}: {error.strerror}") from error
        if not is_whole:
            raise DamagedChunkError(row, f"chunk {number} of {self._name} is cut short")
        if crc32c(target) != int.from_bytes(checksum, "little"):
            raise DamagedChunkError(row, f"chunk {number} of {self._name} does not match its checksum")


def _judge_places(places: np.ndarray, data_bytes: int, chunk_bytes: int | None) -> str | None:
    """What is wrong with an index, (chunks, 2) offsets and lengths; None if nothing is.

    A checksum tells accidents, not intent: whoever makes a store may write any index, and its checksum.

    Args:
        places: As they stand in the file, unsigned.
        data_bytes: What lies before the index.
        chunk_bytes: What each chunk takes; None where they differ.
    """
    present = places[places[:, 0] != _ABSENT]
    offsets, lengths = present[:, 0], present[:, 1]
    room = np.uint64(data_bytes)
    # Unsigned: lengths are compared first, so that nothing wraps around.
    is_inside = (lengths >= _CHECKSUM_BYTES) & (lengths <= room) & (offsets <= room - np.minimum(lengths, room))
    if not is_inside.all():
        return "names bytes that are not in the file"
    if chunk_bytes is not None and (lengths != chunk_bytes).any():
        return "names chunks of another size than the array's"
    ends = offsets + lengths
    if (offsets[1:] < ends[:-1]).any():  # written in another order, or over each other
        order = np.argsort(offsets)
        if (offsets[order][1:] < ends[order][:-1]).any():
            return "has chunks that lie over each other"
    return None


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
