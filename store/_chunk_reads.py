"""Read chunks of open shards into a batch: by the native module in one call where it was built, by Python elsewhere.

The native module (`_native.c`) reads with threads of its own, and holds the interpreter's lock for none of it. Python's
way needs a call for each chunk. Both verify every checksum and give the same bytes and the same errors.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import numpy as np

from ._shard_file import PASSING, WAITS_S, DamagedChunkError, ShardFile, wait

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

    def take(self, chunks: Sequence[int]) -> ChunkReads:
        """Some of the chunks."""
        own = np.asarray(chunks, np.int64)
        firsts = pieces = None
        if self.firsts is not None and self.pieces is not None:
            counts = np.diff(self.firsts)[own]
            firsts = np.concatenate([[0], np.cumsum(counts)])
            pieces = np.concatenate([self.pieces[self.firsts[chunk] : self.firsts[chunk + 1]] for chunk in own])
        return replace(
            self,
            files=self.files[own],
            numbers=self.numbers[own],
            rows=self.rows[own],
            offsets=None if self.offsets is None else self.offsets[own],
            firsts=firsts,
            pieces=pieces,
        )

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
        return None, "Python (the native module was not built: install a C compiler, then s4v again)"
    if module.ABI != _ABI:
        return None, "Python (the native module is of another version: install s4v again)"
    return module, f"native (crc32c by {module.CRC32C_KIND})"


class _Problem(NamedTuple):
    """A chunk that is not whole."""

    place: int
    """Of its array among the reads."""
    chunk: int
    """Among the array's chunks."""
    why: str
    """`missing`, `cut short`, `mismatch`, or what the system said."""

    @property
    def may_pass(self) -> bool:
        """Whether the system refused the read, and may give it later."""
        return self.why in PASSING


def read_chunks(reads: Sequence[ChunkReads], num_threads: int) -> None:
    """Fill the targets. What is not as it was written is read once more, what the system refused after waits too.

    Args:
        reads: Of one or several arrays.
        num_threads: The most that read.

    Raises:
        DamagedChunkError: For the first chunk, array by array, that is missing, or stays cut short, other than its
            checksum, or refused by the system; `place` says of which of the reads it is.
    """
    problems = _try_to_read(reads, num_threads)
    for wait_s in (0.0, *WAITS_S):
        again = [one for one in problems if one.may_pass or (wait_s == 0 and one.why != "missing")]
        if not again:
            break
        if wait_s:
            wait(wait_s, str(_describe(reads, again[0])))
        kept = [one for one in problems if one not in again]
        places = sorted({one.place for one in again})
        chunks = [[one.chunk for one in again if one.place == place] for place in places]
        parts = [reads[place].take(own) for place, own in zip(places, chunks, strict=True)]
        still = _try_to_read(parts, num_threads)
        problems = sorted([*kept, *(_Problem(places[i], chunks[i][chunk], why) for i, chunk, why in still)])
    if problems:
        raise _describe(reads, problems[0])


def _describe(reads: Sequence[ChunkReads], problem: _Problem) -> DamagedChunkError:
    """The error of a chunk."""
    own, chunk = reads[problem.place], problem.chunk
    shard = own.shards[int(own.files[chunk])]
    why = shard.explain(int(own.numbers[chunk]), problem.why)
    facts = {"may_pass": problem.may_pass, "is_gone": shard.is_gone}
    return DamagedChunkError(int(own.rows[chunk]), why, problem.place, path=shard.path, **facts)


def _try_to_read(reads: Sequence[ChunkReads], num_threads: int) -> list[_Problem]:
    """Read each chunk once; those that are not whole, in order."""
    native, _ = find_native()
    if native is None:
        return _read_by_python(reads, num_threads)
    whys = {native.MISSING: "missing", native.CUT_SHORT: "cut short", native.MISMATCH: "mismatch"}
    found = native.read_chunks(tuple(one.as_native() for one in reads), num_threads)
    if any(outcome == native.NO_MEMORY for *_, outcome in found):
        raise MemoryError("no room for a chunk")
    return [_Problem(place, chunk, whys.get(outcome) or os.strerror(-outcome)) for place, chunk, outcome in found]


def _read_by_python(reads: Sequence[ChunkReads], num_threads: int) -> list[_Problem]:
    """The same, a call for each chunk."""
    if num_threads == 1 or sum(len(one.numbers) for one in reads) <= num_threads:
        return [
            problem for place, one in enumerate(reads) for problem in _read_share(one, place, range(len(one.numbers)))
        ]
    threads = _threads(num_threads)
    tasks = [
        threads.submit(_read_share, one, place, share)
        for place, one in enumerate(reads)
        for share in _share_out(len(one.numbers), num_threads * _TASKS_PER_THREAD)
    ]
    try:
        return [problem for task in tasks for problem in task.result()]
    finally:
        for task in tasks:  # whoever was interrupted wants no more of them
            task.cancel()


@lru_cache
def _threads(count: int) -> ThreadPoolExecutor:
    """All readers of a process share them."""
    return ThreadPoolExecutor(count, thread_name_prefix="s4v-preadv")


def _share_out(count: int, num_shares: int) -> list[range]:
    """Neighbours together; no share is empty."""
    size = max(1, -(-count // num_shares))
    return [range(first, min(count, first + size)) for first in range(0, count, size)]


def _read_share(reads: ChunkReads, place: int, chunks: range) -> list[_Problem]:
    """Some of the chunks of one array."""
    target = reads.target.reshape(-1).view(np.uint8)
    scratch = None if reads.offsets is not None else np.empty(reads.chunk_bytes, np.uint8)
    problems = []
    for chunk in chunks:
        if reads.offsets is not None:
            start = int(reads.offsets[chunk])
            out = target[start : start + reads.chunk_bytes]
        else:
            assert scratch is not None
            out = scratch
        shard = reads.shards[int(reads.files[chunk])]
        if (why := shard.try_to_read(int(reads.numbers[chunk]), out)) is not None:
            problems.append(_Problem(place, chunk, why))
        elif reads.firsts is not None and reads.pieces is not None:
            for source, to, size in reads.pieces[reads.firsts[chunk] : reads.firsts[chunk + 1]].tolist():
                target[to : to + size] = out[source : source + size]
    return problems
