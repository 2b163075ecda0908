"""Writes an index, in a folder beside its place that is then renamed.

    index.json     what it was made of: hashes, sizes; how far float16 moves a vector
    pooled.npy     (n, E) float32, L2-normalised; one row for each good row of the store
    pooled16.npy   the same in float16: what a query scans
    frames.npy     (frames, E) float16, row after row; L2-normalised, but of a trained network as it gave them
    times.npy      (frames,) float64, NaN where a frame's time is not known
    offsets.npy    (n + 1,) where each row's frames begin
    rows.npy       (n,) rows of the store

What reads them is retrieve/index.py.
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
from ..store._files import hash_file, hash_text, kill_point, read_json, sync_folder, write_json
from ..store.checksums import CHECKSUMS_NAME
from ..store.lease import Lease, hold_place
from ..store.markers import find_markers
from ..store.reader import StoreReader
from ..store.scratch import make_scratch, remove_dead_scratch
from .trained import TrainedFrames
from .vectors import normalise_rows, pool_frames

FORMAT_VERSION = 2
_FACTS_NAME = "index.json"

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
    counts = table["num_cached_frames"].to_numpy()[good].astype(np.int64)
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
    for shard in range(store.layout.num_shards):
        rows = store.layout.shard_rows(shard)
        held = good[(good >= rows.start) & (good < rows.stop)]
        if not len(held):
            continue
        here, span = slice(place, place + len(held)), slice(offsets[place], offsets[place + len(held)])
        stamps = table["timestamps_s"].take(held).to_pylist()
        if trained is None:
            vectors = normalise_rows(store.read_embeddings(rows)[held - rows.start])
            if (np.isfinite(vectors[:, 0]).all(axis=2).sum(axis=1) != counts[here]).any():
                raise StoreDamagedError(f"{store.path / 'embedding'} has lost frames of rows {held[0]} to {held[-1]}")
            pooled[here] = pool_frames(vectors)
            frames[span] = np.concatenate([_join_views(video) for video in vectors])
            times[span] = np.concatenate(stamps)
        else:
            clips = trained.embed(held, [one[0] for one in table["eval_clips"].take(held).to_pylist()])
            pooled[here] = pool_frames(normalise_rows(clips.frames)[:, None])
            frames[span] = clips.frames.reshape(-1, width)
            times[span] = np.concatenate([np.asarray(s)[p] for s, p in zip(stamps, clips.places, strict=True)])
        scanned[here] = pooled[here]
        rounding = max(rounding, measure_rounding(pooled[here], scanned[here]))
        place += len(held)
        report("indexing", place, len(good))
    assert place == len(good), f"{place} of {len(good)} rows were written"
    for array in (pooled, scanned, frames, times):
        array.flush()
    for file in folder.glob("*.npy"):
        with file.open("rb+") as written:
            os.fsync(written.fileno())
    return rounding


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


def _join_views(video: np.ndarray) -> np.ndarray:
    """(A, F, E) with NaN where there is no such frame -> (f, E): the mean over views, normalised again."""
    is_there = ~np.isnan(video[0, :, 0])
    return normalise_rows(np.nanmean(video[:, is_there], axis=0))


def _is_index(path: Path) -> bool:
    """Whether a folder is an index, of this version of s4v or of another one."""
    try:
        told: Any = read_json(path / _FACTS_NAME)
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and {"format_version", "fingerprint"} <= told.keys()


def read_facts(path: Path) -> IndexFacts | None:
    """What an index says of itself; None where there is none that this version reads."""
    try:
        told: Any = read_json(path / _FACTS_NAME)
        return IndexFacts(**told) if told.get("format_version") == FORMAT_VERSION else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None
