"""A file of an array: a shard with its index, or one chunk; bytes verified, and only an ordinary file opened."""

from __future__ import annotations

import errno
import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from crc32c import crc32c

from .names import open_file

CHECKSUM_BYTES = 4
PASSING = frozenset(
    os.strerror(getattr(errno, name))
    for name in ("EIO", "EAGAIN", "ETIMEDOUT", "ESTALE", "EREMOTEIO", "ENETDOWN", "ENETUNREACH", "EHOSTDOWN",
                 "ECONNRESET", "ENOTCONN", "EBUSY")
    if hasattr(errno, name)
)  # fmt: skip
"""What the system says of a read that may do later."""
WAITS_S = (0.1, 1.0, 5.0)
"""Before such a read is tried again."""
_NOTE_EVERY_S = 1.0
_log = logging.getLogger(__name__)
_Read = TypeVar("_Read")
_ABSENT = 2**64 - 1
"""Offset of a chunk that the shard does not hold, by Zarr's sharding codec."""


class DamagedChunkError(Exception):
    """A chunk is missing or is not as it was written."""

    def __init__(
        self,
        row: int,
        why: str,
        place: int = 0,
        *,
        may_pass: bool = False,
        is_gone: bool = False,
        path: Path | None = None,
    ) -> None:
        super().__init__(why)
        self.row = row
        self.is_gone = is_gone
        """Whether the file has no name any more: another one may have it, or none."""
        self.path = path
        """The file, where whoever reads may have another one for it."""
        self.place = place
        """Of the array it was read of, among those that were read together."""
        self.may_pass = may_pass
        """Whether the same read may do later: of a disk on a network that was away for a moment."""


def try_patiently(read: Callable[[], _Read]) -> _Read:
    """Read, and read again after waits as long as the error may pass.

    Raises:
        DamagedChunkError: That of the last time.
    """
    for wait_s in WAITS_S:
        try:
            return read()
        except DamagedChunkError as error:
            if not error.may_pass:
                raise
            wait(wait_s, str(error))
    return read()


def wait(seconds: float, why: str) -> None:
    """Say why, and wait."""
    _log.warning("%s; reading again in %g s", why, seconds)
    time.sleep(seconds)


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
    shard = ShardFile(path, num_chunks, row=-1)
    problems: dict[int, str] = {}
    is_there = shard.index[:, 0] != _ABSENT
    for number in np.flatnonzero(is_there).tolist():
        try:
            shard.read_chunk(number, np.empty(max(0, int(shard.index[number, 1]) - CHECKSUM_BYTES), np.uint8), row=-1)
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
    expected = math.prod(shape) * dtype.itemsize + CHECKSUM_BYTES
    try:
        with os.fdopen(open_file(path), "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) != expected:
                raise DamagedChunkError(row, f"{path.name} has {size} bytes, expected {expected}")
            values = np.empty(shape, dtype)
            is_whole = file.readinto(values.reshape(-1).view(np.uint8).data) == values.nbytes
            checksum = file.read(CHECKSUM_BYTES)
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
    why = "it is a link" if error.errno == errno.ELOOP else str(error.strerror)
    return DamagedChunkError(row, f"{path.name}: {why}", may_pass=why in PASSING, path=path)


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Where the chunks of a shard are, and of which state of the file that is true."""

    places: np.ndarray
    """(chunks, 2) offset and length."""
    state: tuple[int, int, int]
    """Inode, size and time of the last change."""


class ShardFile:
    """An open shard and its index, which is read unless it is known of this state of the file.

    Args:
        path: Its file.
        num_chunks: Places in its index.
        row: Whose read it is, for errors.
        known: An index that was read before.
        chunk_bytes: What each chunk takes with its checksum; None where they are compressed.
    """

    def __init__(
        self, path: Path, num_chunks: int, row: int, known: ShardIndex | None = None, chunk_bytes: int | None = None
    ) -> None:
        self.path = path
        self.used_at = math.inf
        """Of a copy in a cache, when its use was last noted, by the monotonic clock."""
        self._name = path.name
        try:
            self.descriptor = open_file(path)
        except FileNotFoundError:
            raise DamagedChunkError(row, f"the file {path.name} is missing", path=path) from None
        except OSError as error:
            raise _refused(path, row, error) from error
        stat = os.fstat(self.descriptor)
        state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if known is None or known.state != state:
            known = ShardIndex(self._read_index(stat.st_size, num_chunks, row, chunk_bytes), state)
        self.index_as_read = known
        self.index = known.places

    def _read_index(self, file_bytes: int, num_chunks: int, row: int, chunk_bytes: int | None) -> np.ndarray:
        size = 16 * num_chunks
        start = file_bytes - size - CHECKSUM_BYTES
        try:
            data = os.pread(self.descriptor, size + CHECKSUM_BYTES, start) if start >= 0 else b""
        except OSError as error:
            why = str(error.strerror)
            said = f"the index of {self._name}: {why}"
            raise DamagedChunkError(row, said, may_pass=why in PASSING, path=self.path) from error
        index, checksum = data[:size], data[size:]
        if len(checksum) != CHECKSUM_BYTES or crc32c(index) != int.from_bytes(checksum, "little"):
            said = f"the index at the end of {self._name} is cut short or damaged"
            raise DamagedChunkError(row, said, path=self.path)
        places = np.frombuffer(index, dtype="<u8").reshape(num_chunks, 2)
        if (problem := _judge_places(places, start, chunk_bytes)) is not None:
            raise DamagedChunkError(row, f"the index at the end of {self._name} {problem}", path=self.path)
        return places

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    @property
    def is_gone(self) -> bool:
        """Whether it was removed or replaced since it was opened."""
        return os.fstat(self.descriptor).st_nlink == 0

    def note_use(self) -> None:
        """Have a cache see that its copy is in use; not more often than it matters."""
        now = time.monotonic()
        if now - self.used_at > _NOTE_EVERY_S:
            self.used_at = now
            with suppress(OSError):
                os.utime(self.descriptor)

    def read_chunk(self, number: int, out: np.ndarray, row: int) -> None:
        """Fill a contiguous array with a chunk.

        Raises:
            DamagedChunkError: If the chunk is missing, is cut short, or does not match its checksum.
        """
        if (why := self.try_to_read(number, out)) is not None:
            raise DamagedChunkError(row, self.explain(number, why))

    def try_to_read(self, number: int, out: np.ndarray) -> str | None:
        """The same, but what is wrong is returned: `missing`, `cut short`, `mismatch`, or what the system said."""
        offset, length = self.index[number].tolist()
        if offset == _ABSENT:
            return "missing"
        target, checksum = out.data.cast("B"), bytearray(CHECKSUM_BYTES)
        num_bytes = out.nbytes + CHECKSUM_BYTES
        try:
            is_whole = length == num_bytes and os.preadv(self.descriptor, [target, checksum], offset) == num_bytes
        except OSError as error:
            return str(error.strerror)
        if not is_whole:
            return "cut short"
        return None if crc32c(target) == int.from_bytes(checksum, "little") else "mismatch"

    def explain(self, number: int, why: str) -> str:
        """What `try_to_read` said, as a sentence."""
        name = f"chunk {number} of {self._name}"
        known = {"missing": "is missing", "cut short": "is cut short", "mismatch": "does not match its checksum"}
        return f"{name} {known[why]}" if why in known else f"{name}: {why}"


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
    is_inside = (lengths >= CHECKSUM_BYTES) & (lengths <= room) & (offsets <= room - np.minimum(lengths, room))
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
