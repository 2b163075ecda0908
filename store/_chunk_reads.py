"""Read chunks of open shards into a batch: by the native module in one call where it was built, by Python elsewhere.

The native module (`_native.c`) reads with threads of its own, and holds the interpreter's lock for none of it. Python's
way needs a call for each chunk. Both verify every checksum and give the same bytes and the same errors.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy as np

from ._shard_file import DamagedChunkError, ShardFile

_ABI = 1
"""Of the native module that this code goes with: one that an older s4v left behind is not used."""
_SWITCH = "S4V_NATIVE"
"""In the environment: 0 reads by Python, and of an installation builds no native module."""
_TASKS_PER_THREAD = 4
"""Of Python's threads: a slow one leaves the others something to do."""


@dataclass(frozen=True, slots=True)
class ChunkReads:
    """Chunks of one array, (n,), and where their bytes go."""

    shards: tuple[ShardFile, ...]
    """Open files."""
    files: np.ndarray
    """(n,) which of them."""
    numbers: np.ndarray
    """(n,) of chunks, in their shard."""
    rows: np.ndarray
    """(n,) for whom: what errors name."""
    chunk_bytes: int
    """Without the checksum."""
    target: np.ndarray
    """Contiguous, of any shape."""
    offsets: np.ndarray | None = None
    """(n,) of bytes in the target, where whole chunks are wanted."""
    firsts: np.ndarray | None = None
    """(n + 1,) where parts of chunks are wanted: the first of a chunk's pieces, one more behind the last."""
    pieces: np.ndarray | None = None
    """(p, 3) bytes: offset in the chunk, offset in the target, length."""

    def as_native(self) -> tuple[object, ...]:
        """As `_native.read_chunks` takes it."""
        descriptors = np.array([shard.descriptor for shard in self.shards], dtype=np.int32)
        indices = tuple(shard.index for shard in self.shards)
        whole = [None if part is None else np.ascontiguousarray(part, np.int64) for part in (self.offsets, self.firsts,
                 self.pieces)]  # fmt: skip
        return (
            *(descriptors, indices, self.files.astype(np.int32), np.ascontiguousarray(self.numbers, np.int64)),
            *(self.chunk_bytes, self.target, *whole),
        )


@lru_cache(1)
def find_native() -> tuple[ModuleType | None, str]:
    """The native module, or None; and what reads, for `s4v info` and `s4v train` to say."""
    if os.environ.get(_SWITCH) == "0":
        return None, f"Python ({_SWITCH}=0)"
    try:
        module = importlib.import_module("._native", __package__)
    except ImportError:
        return None, "Python (the native module was not built: no C compiler at installation)"
    if module.ABI != _ABI:
        return None, "Python (the native module is of another version: install s4v again)"
    return module, f"native (crc32c by {module.CRC32C_KIND})"


def read_chunks(reads: Sequence[ChunkReads], num_threads: int) -> None:
    """Fill the targets.

    Args:
        reads: Of one or several arrays.
        num_threads: The most that read.

    Raises:
        DamagedChunkError: For the first chunk, array by array, that is missing, is cut short, or does not match its
            checksum; `place` says of which of the reads it is.
    """
    native, _ = find_native()
    if native is None:
        _read_by_python(reads, num_threads)
    elif problems := native.read_chunks(tuple(one.as_native() for one in reads), num_threads):
        place, chunk, outcome = problems[0]
        raise _describe(native, reads[place], place, chunk, outcome)


def _describe(native: ModuleType, reads: ChunkReads, place: int, chunk: int, outcome: int) -> Exception:
    """The error of a chunk that is not whole."""
    if outcome == native.NO_MEMORY:
        return MemoryError(f"no room for a chunk of {reads.chunk_bytes} bytes")
    shard, number = reads.shards[int(reads.files[chunk])], int(reads.numbers[chunk])
    whys = {native.MISSING: "missing", native.CUT_SHORT: "cut short", native.MISMATCH: "mismatch"}
    why = shard.explain(number, whys.get(outcome) or os.strerror(-outcome))
    return DamagedChunkError(int(reads.rows[chunk]), why, place)


def _read_by_python(reads: Sequence[ChunkReads], num_threads: int) -> None:
    """The same, a call for each chunk."""
    if num_threads == 1 or sum(len(one.numbers) for one in reads) <= num_threads:
        for place, one in enumerate(reads):
            _read_share(one, place, range(len(one.numbers)))
        return
    threads = _threads(num_threads)
    tasks = [
        threads.submit(_read_share, one, place, share)
        for place, one in enumerate(reads)
        for share in _share_out(len(one.numbers), num_threads * _TASKS_PER_THREAD)
    ]
    try:
        for task in tasks:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


@lru_cache
def _threads(count: int) -> ThreadPoolExecutor:
    """All readers of a process share them."""
    return ThreadPoolExecutor(count, thread_name_prefix="s4v-preadv")


def _share_out(count: int, num_shares: int) -> list[range]:
    """Neighbours together; no share is empty."""
    size = max(1, -(-count // num_shares))
    return [range(first, min(count, first + size)) for first in range(0, count, size)]


def _read_share(reads: ChunkReads, place: int, chunks: range) -> None:
    """Some of the chunks of one array."""
    target = reads.target.reshape(-1).view(np.uint8)
    scratch = None if reads.offsets is not None else np.empty(reads.chunk_bytes, np.uint8)
    for chunk in chunks:
        if reads.offsets is not None:
            start = int(reads.offsets[chunk])
            out = target[start : start + reads.chunk_bytes]
        else:
            assert scratch is not None
            out = scratch
        try:
            reads.shards[int(reads.files[chunk])].read_chunk(int(reads.numbers[chunk]), out, int(reads.rows[chunk]))
        except DamagedChunkError as error:
            error.place = place
            raise
        if reads.firsts is not None and reads.pieces is not None:
            for source, to, size in reads.pieces[reads.firsts[chunk] : reads.firsts[chunk + 1]].tolist():
                target[to : to + size] = out[source : source + size]
