"""An index of a store's videos: pooled vectors for a first pass, every frame's for the moment.

Frames are the backbone's own, or those of a trained retrieval network. Then too a video's vector is the mean of its
frames' on the unit sphere: what the network was trained with, and what re-ranking starts from.

The first pass is exact: a scan in float16, then float32 for all that rounding could have kept from the top.
"""

from __future__ import annotations

import logging
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ..errors import EnvironmentFailedError, StoreBusyError, StoreDamagedError
from ..files import describe_bytes
from ..store.reader import StoreReader
from ..vectors import normalise_rows, score_rows
from .index_writer import IndexFacts, Report, build_index, fingerprint, read_facts, require_rows
from .trained_frames import TrainedFrames

_HALF = 2.0**-11
"""Rounding to float16 moves a number by at most this share of the result ..."""
_HALF_STEP = 2.0**-25
"""... or, of numbers so small that steps are even, by this."""
_SINGLE = 2.0**-24
"""The same of float32, as a share."""

_SCORED_AT_ONCE = 2**14
_OPENINGS = 5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Match:
    """One video that a vector found."""

    place: int
    """In the index."""
    row: int
    """In the store."""
    score: float
    """Cosine, in float32."""


class VideoIndex:
    """An open index; its arrays are memory-mapped."""

    def __init__(self, path: Path, facts: IndexFacts) -> None:
        self.path = path
        self.facts = facts
        self.rows = self._open("rows")
        self._offsets = self._open("offsets")
        self._pooled = self._open("pooled")
        self._frames = _RowsOnDisk(self.path / "frames.npy")
        self._times = self._open("times")
        self._scanned = torch.from_numpy(self._open("pooled16", "c"))  # torch wants it writable

    def _open(self, name: str, mode: Literal["r", "c"] = "r") -> np.ndarray:
        try:
            return np.load(self.path / f"{name}.npy", mmap_mode=mode)
        except (OSError, ValueError) as error:
            raise _damaged(self.path / f"{name}.npy") from error

    def find(self, vector: np.ndarray, top: int, *, allowed: np.ndarray | None = None) -> list[Match]:
        """The videos closest to a vector, exactly as `score_rows` of all of them has them; equal ones in row order.

        Args:
            vector: (E,) L2-normalised.
            top: Wanted.
            allowed: (n,) bool, which places may be found; None allows all.

        Raises:
            EnvironmentFailedError: If the vector holds NaN or infinity.
        """
        query = np.array(vector, dtype=np.float32)
        if not np.isfinite(query).all():
            raise EnvironmentFailedError("the query's embedding is not finite: the weights of its tower hold NaN")
        near = query.astype(np.float16)
        rough = (self._scanned @ torch.from_numpy(near)).float()
        if allowed is not None:
            rough[torch.from_numpy(~allowed)] = -torch.inf
        top = min(top, len(rough) if allowed is None else int(allowed.sum()))
        if top == 0:
            return []
        least = self._find_least(float(rough.topk(top).values[-1]), query, near)
        places = torch.nonzero(rough >= least)[:, 0].numpy()
        # In blocks: of an archive of near duplicates rounding lets everything through.
        blocks = np.split(places, range(_SCORED_AT_ONCE, len(places), _SCORED_AT_ONCE))
        scores = np.concatenate([score_rows(self._pooled[block], query) for block in blocks])
        order = np.argsort(-scores, kind="stable")[:top]
        return [Match(int(places[i]), int(self.rows[places[i]]), float(scores[i])) for i in order]

    def _find_least(self, last: float, query: np.ndarray, near: np.ndarray) -> float:
        """The lowest rough score of a video that may belong to the top, where the last one's is `last`.

        A rough score r is v16 . q16, added up in float32 and rounded to float16. It is off the score that counts by
        2^-11 |r| at most, for that last rounding, and by a constant: |v - v16| + |q - q16|, which is what rounding does
        to the product of vectors of length 1 (the first was measured when the index was built), and E 2^-24 for adding
        up, here and there. A hundredth more is for lengths that are not quite 1 and for errors of second order. So the
        last one's score is at least last - 2^-11 |last| - constant, and a video that reaches this has a rough score r
        with r + 2^-11 |r| + constant no smaller. tests/retrieve/test_index_reader.py holds it against vectors at the
        limit.
        """
        away = float(np.linalg.norm(query.astype(np.float64) - near.astype(np.float64)))
        constant = 1.01 * (self.facts.rounding + away + 2 * len(query) * _SINGLE) + _HALF_STEP
        least = last - _HALF * abs(last) - 2 * constant
        return least / (1 + math.copysign(_HALF, least))

    def frames_of(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Vectors (f, E) float32, L2-normalised, and times (f,) of a video's frames."""
        span = slice(int(self._offsets[place]), int(self._offsets[place + 1]))
        return normalise_rows(self.raw_frames_of(place)), np.asarray(self._times[span])

    def raw_frames_of(self, place: int) -> np.ndarray:
        """Vectors (f, E) float32 of a video's frames as the index holds them."""
        span = slice(int(self._offsets[place]), int(self._offsets[place + 1]))
        return self._frames.read(span.start, span.stop).astype(np.float32)

    def read_vectors(self, places: slice) -> np.ndarray:
        """Pooled vectors in float16, (n, E)."""
        return self._scanned[places].numpy()

    def vector_of(self, place: int) -> np.ndarray:
        """The pooled vector (E,) of a video."""
        return np.asarray(self._pooled[place])


class _RowsOnDisk:
    """An array of rows in a .npy file, of which few are wanted: mapped, each would bring megabytes around it along."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("rb")
            np.lib.format.read_magic(self._file)
            shape, _, self._dtype = np.lib.format.read_array_header_1_0(self._file)
        except (OSError, ValueError) as error:
            raise _damaged(path) from error
        self._path, self._tail, self._start = path, shape[1:], self._file.tell()
        self._row_bytes = self._dtype.itemsize * math.prod(self._tail)

    def read(self, first: int, stop: int) -> np.ndarray:
        """Rows from `first` up to `stop`.

        Raises:
            StoreDamagedError: If the file is too short.
        """
        num_bytes = (stop - first) * self._row_bytes
        data = os.pread(self._file.fileno(), num_bytes, self._start + first * self._row_bytes)
        if len(data) < num_bytes:
            raise _damaged(self._path)
        return np.frombuffer(data, self._dtype).reshape(-1, *self._tail)


def _damaged(path: Path) -> StoreDamagedError:
    return StoreDamagedError(f"{path} is missing or damaged: remove {path.parent}")


def default_index_path(store: Path, run: Path | None = None) -> Path:
    """`store/mine.zarr` has its index in `store/mine.index`, with the frames of `runs/a` in `runs/a/mine.index`."""
    name = f"{store.name.removesuffix('.zarr')}.index"
    return store.with_name(name) if run is None else run / name


def open_index(
    store: StoreReader,
    path: Path | None = None,
    report: Report = lambda *_: None,
    *,
    trained: TrainedFrames | None = None,
) -> VideoIndex:
    """The index of a store: built where there is none, built anew where the store or the run has changed since.

    Args:
        store: With at least one good video.
        path: Its folder; None takes `default_index_path`.
        report: Told about progress when it is built.
        trained: Whose frames; None takes the backbone's own.

    Raises:
        StoreMismatchError: If the store has no good video or has grown since it was opened, or another folder is in the
            way.
        StoreBusyError: If others keep building it anew.
    """
    path = path or default_index_path(store.path, None if trained is None else trained.run.path)
    for _ in range(_OPENINGS):
        facts = read_facts(path)
        if facts is None or facts.fingerprint != fingerprint(store, trained):
            facts = build_index(store, path, report, trained=trained)
        try:
            index = VideoIndex(path, facts)
        except StoreDamagedError:
            if read_facts(path) == facts:
                raise
            continue
        if read_facts(path) == facts:  # else another one came into its place meanwhile, between two arrays perhaps
            require_rows(store, int(index.rows[-1]) + 1)
            _warn_of_memory(index)
            return index
    raise StoreBusyError(f"others keep building {path} anew: wait until nothing changes {store.path}, and search again")


def _warn_of_memory(index: VideoIndex) -> None:
    with suppress(OSError, LookupError):  # elsewhere than on Linux
        available = Path("/proc/meminfo").read_text().split("MemAvailable:")[1]
        scanned, free = index.facts.videos * index.facts.width * 2, 1024 * int(available.split()[0])
        if scanned > free:
            _log.warning(
                "%s: each query scans %s, and %s of memory are free, so each reads the disk. At this size export the "
                "vectors (s4v index --export) and build an approximate index from them: docs/retrieval.md",
                index.path,
                describe_bytes(scanned),
                describe_bytes(free),
            )
