"""Writes an index, in a folder beside its place that is then renamed.

    index.json     what it was made of: hashes, sizes; how far float16 moves a vector
    pooled.npy     (n, E) float32, L2-normalised; one row for each good row of the store
    pooled16.npy   the same in float16: what a query scans
    frames.npy     (frames, E) float16, row after row; L2-normalised, but of a trained network as it gave them
    times.npy      (frames,) float64, NaN where a frame's time is not known
    offsets.npy    (n + 1,) where each row's frames begin
    rows.npy       (n,) rows of the store

What reads them is retrieve/index_reader.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import StoreDamagedError, StoreMismatchError
from ..files import hash_file, hash_text, kill_point, read_json, sync_folder, write_json
from ..store.checksums import CHECKSUMS_NAME
from ..store.lease import Lease, hold_place
from ..store.manifest import MANIFEST_NAME
from ..store.markers import find_markers
from ..store.reader import StoreReader
from ..store.scratch import make_scratch, remove_dead_scratch
from ..vectors import normalise_rows, pool_clips, pool_frames
from .trained_frames import TrainedFrames

FORMAT_VERSION = 2
_FACTS_NAME = "index.json"
_BYTES_TOGETHER = 2**28
"""Of embeddings that are in memory at once."""

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class IndexFacts:
    """What an index was made of."""

    format_version: int
    store: str
    fingerprint: str
    """Of the store: a store that changed has another."""
    videos: int
    width: int
    """E."""
    rounding: float
    """The longest difference between a pooled vector and the same in float16."""
    run: str | None = None
    """The trained run; None for the backbone's own frames."""


def fingerprint(store: StoreReader, trained: TrainedFrames | None = None) -> str:
    """A hash that another state of the store and of the run does not have.

    Of the store's list of hashes, of which shards are done, and of the run's weights.
    """
    done = [str(shard) for shard in find_markers(store.path)]
    weights = [] if trained is None else [trained.sha256]
    return hash_text("\n".join([hash_file(store.path / CHECKSUMS_NAME), *done, *weights]))


def build_index(
    store: StoreReader,
    path: Path,
    report: Report = lambda *_: None,
    *,
    trained: TrainedFrames | None = None,
) -> IndexFacts:
    """Write the index of a store beside its place, and rename it.

    Raises:
        StoreMismatchError: If the store has no good video or has grown since it was opened, or something else stands at
            `path`.
    """
    _require_free(path)
    state = fingerprint(store, trained)  # before what it is the state of
    table = store.read_manifest(["status", "num_cached_frames", "timestamps_s", "eval_clips"])
    require_rows(store, len(table))
    good = np.flatnonzero(pa.compute.equal(table["status"], "ok").to_numpy())
    if not len(good):
        raise StoreMismatchError(f"{store.path} holds no good video: finish its extraction first")
    run = None if trained is None else str(trained.run.path.resolve())
    facts = IndexFacts(FORMAT_VERSION, str(store.path.resolve()), state, len(good), store.layout.embed_dim, 0.0, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _make_room(path) as (room, lease):
        found = read_facts(path)
        if found is not None and found.fingerprint == state:  # another process has built it meanwhile
            return found
        folder = room / "new"
        folder.mkdir()
        facts = replace(facts, rounding=_write_arrays(folder, store, table, good, report, trained))
        write_json(folder / _FACTS_NAME, asdict(facts))
        _move_into_place(folder, path, lease)
    return facts


def _require_free(path: Path) -> None:
    """Refuse a place where something stands that is not an index."""
    if path.exists() and not _is_index(path) and (not path.is_dir() or any(path.iterdir())):
        raise StoreMismatchError(
            f"{path} exists and is no index. Nothing was written; name another folder (--index of `s4v retrieve`, "
            "--out of `s4v index`)."
        )


def require_rows(store: StoreReader, num_rows: int) -> None:
    """Refuse a store that was opened before rows were added to it: its arrays end where they ended then.

    Raises:
        StoreMismatchError: If it has more rows by now than it was opened with.
    """
    if num_rows > store.layout.num_rows:
        raise StoreMismatchError(
            f"{store.path} has {num_rows} rows, and had {store.layout.num_rows} when it was opened: open it again"
        )


class RowFacts:
    """What an index wants of a manifest's good rows, as flat arrays: parts of them are slices, not look-ups.

    `Table.take` costs the whole of a column's chunk for each call: minutes, where there are thousands of shards.

    Args:
        table: The columns num_cached_frames, timestamps_s and eval_clips of all rows.
        good: (n,) rows, ascending.
    """

    def __init__(self, table: pa.Table, good: np.ndarray) -> None:
        # Filtered once, and at once: what is left is one chunk a column.
        is_good = np.zeros(len(table), dtype=bool)
        is_good[good] = True
        own = table.select(["num_cached_frames", "timestamps_s", "eval_clips"]).filter(pa.array(is_good))
        self.num_frames: np.ndarray = own["num_cached_frames"].fill_null(0).to_numpy().astype(np.int64)
        """(n,) of each row."""
        self._times, self._time_offsets = _flatten(own["timestamps_s"])
        clips, self._clip_offsets = _flatten_lists(own["eval_clips"])
        self._places, self._place_offsets = _flatten(clips)

    @property
    def num_times(self) -> np.ndarray:
        """(n,) how many frames of each row have a time."""
        return np.diff(self._time_offsets)

    @property
    def num_clips(self) -> np.ndarray:
        """(n,) evaluation clips of each row."""
        return np.diff(self._clip_offsets)

    def times_of(self, span: slice) -> np.ndarray:
        """Seconds of all frames of consecutive rows; NaN where a time is not known."""
        return self._times[self._time_offsets[span.start] : self._time_offsets[span.stop]]

    def first_clips_of(self, span: slice) -> list[list[int]]:
        """The first evaluation clip of each of consecutive rows, as places on the axis F."""
        firsts = self._clip_offsets[span]
        ends = self._place_offsets
        return [self._places[ends[clip] : ends[clip + 1]].tolist() for clip in firsts]


def _flatten_lists(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, np.ndarray]:
    """The entries of a column of lists, row after row, and where each row's begin, (rows + 1,); null is empty."""
    lengths = pa.compute.list_value_length(column).fill_null(0).to_numpy().astype(np.int64)
    return pa.compute.list_flatten(column), np.concatenate([[0], lengths.cumsum()])


def _flatten(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """As `_flatten_lists`, of numbers; a null among them is NaN."""
    values, offsets = _flatten_lists(column)
    return values.to_numpy(), offsets


def _require_frames(store: StoreReader, facts: RowFacts, *, has_clips: bool) -> None:
    """Refuse good rows that lack what an index is made of."""
    lacking = {"frames": facts.num_frames < 1, "times": facts.num_times != facts.num_frames}
    if has_clips:
        lacking = {"frames": lacking["frames"], "evaluation clips": facts.num_clips < 1, "times": lacking["times"]}
    for name, is_lacking in lacking.items():
        if is_lacking.any():
            raise StoreDamagedError(
                f"{store.path / MANIFEST_NAME} says that {int(is_lacking.sum())} rows are ok and lacks their {name}. "
                "The command that began the store mends it, with --repair."
            )


def _write_arrays(
    folder: Path,
    store: StoreReader,
    table: pa.Table,
    good: np.ndarray,
    report: Report,
    trained: TrainedFrames | None,
) -> float:
    """Write the arrays of an index.

    Returns:
        The longest difference between a pooled vector and the same in float16.
    """
    facts = RowFacts(table, good)
    counts = facts.num_frames
    _require_frames(store, facts, has_clips=trained is not None)
    if trained is not None:
        counts = np.full_like(counts, trained.run.frames)
    offsets = np.concatenate([[0], counts.cumsum()])
    width = store.layout.embed_dim
    pooled, scanned, frames, times = (
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
        for name, dtype, shape in (
            ("pooled", np.float32, (len(good), width)),
            ("pooled16", np.float16, (len(good), width)),
            ("frames", np.float16, (int(offsets[-1]), width)),
            ("times", np.float64, (int(offsets[-1]),)),
        )
    )
    np.save(folder / "rows.npy", good)
    np.save(folder / "offsets.npy", offsets)
    place, rounding = 0, 0.0
    while place < len(good):
        shard = store.layout.shard_rows(int(good[place]) // store.layout.rows_per_shard)
        stop = int(np.searchsorted(good, shard.stop))
        here = slice(place, place + _count_together(facts.num_frames[place:stop], store.layout.num_views * width))
        held, span = good[here], slice(offsets[here.start], offsets[here.stop])
        rows = range(int(held[0]), int(held[-1]) + 1)
        if trained is None:
            vectors = normalise_rows(store.read_shown_embeddings(rows)[held - rows.start])
            if (np.isfinite(vectors[:, 0]).all(axis=2).sum(axis=1) != counts[here]).any():
                raise StoreDamagedError(f"{store.path / 'embedding'} has lost frames of rows {held[0]} to {held[-1]}")
            pooled[here] = pool_frames(vectors)
            frames[span] = _join_views(vectors)
            times[span] = facts.times_of(here)
        else:
            clips = trained.embed(held, facts.first_clips_of(here))
            pooled[here] = pool_clips(clips.frames, normalises_frames=trained.network.normalises_frames)
            frames[span] = clips.frames.reshape(-1, width)
            stamps = np.split(facts.times_of(here), np.cumsum(facts.num_frames[here])[:-1])
            times[span] = np.concatenate([s[p] for s, p in zip(stamps, clips.places, strict=True)])
        scanned[here] = pooled[here]
        rounding = max(rounding, measure_rounding(pooled[here], scanned[here]))
        place = here.stop
        report("indexing", place, len(good))
    for array in (pooled, scanned, frames, times):
        array.flush()
    for file in folder.glob("*.npy"):
        with file.open("rb+") as written:
            os.fsync(written.fileno())
    return rounding


def _count_together(num_frames: np.ndarray, values_per_frame: int) -> int:
    """How many of some rows are read at once: all take the room of the longest of them."""
    most = np.maximum.accumulate(num_frames) * np.arange(1, len(num_frames) + 1) * values_per_frame * 4
    return max(1, int((most <= _BYTES_TOGETHER).sum()))


def measure_rounding(vectors: np.ndarray, rounded: np.ndarray) -> float:
    """The longest difference between vectors (n, E) and the same in float16."""
    return float(np.linalg.norm(vectors.astype(np.float64) - rounded, axis=1).max())


@contextmanager
def _make_room(path: Path) -> Iterator[tuple[Path, Lease]]:
    """A folder to build an index in, as the only process that does; what is left in it goes afterwards."""
    with hold_place(path, purpose="index", waiting=f"another process builds {path.name}") as lease:
        remove_dead_scratch(path.parent, path.name)
        with make_scratch(path.parent, path.name, "index") as room:
            yield room, lease


def _move_into_place(folder: Path, path: Path, lease: Lease) -> None:
    """Rename an index to its place; the one that was there goes into the folder beside `folder`."""
    kill_point("index built")
    lease.check()
    _require_free(path)
    if path.exists():
        path.rename(folder.with_name("old"))
    kill_point("old index away")
    folder.rename(path)
    sync_folder(path.parent)


def _join_views(videos: np.ndarray) -> np.ndarray:
    """(n, A, F, E) with NaN where there is no such frame -> (frames, E): the mean over views, normalised again."""
    views = videos.swapaxes(1, 2)[~np.isnan(videos[:, 0, :, 0])]  # (frames, A, E), video after video
    return normalise_rows(np.nanmean(views, axis=1))


def _is_index(path: Path) -> bool:
    """Whether a folder is an index, of this version of s4v or of another one."""
    try:
        facts: Any = read_json(path / _FACTS_NAME)
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and {"format_version", "fingerprint"} <= facts.keys()


def read_facts(path: Path) -> IndexFacts | None:
    """What an index says of itself; None where there is none that this version reads."""
    try:
        facts: Any = read_json(path / _FACTS_NAME)
        return IndexFacts(**facts) if facts.get("format_version") == FORMAT_VERSION else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None
