"""An index of a store's videos: pooled vectors for a first pass, every frame's for the moment.

Frames are the backbone's own, or those of a trained retrieval network. Then too a video's vector is the mean of its
frames' on the unit sphere: what the network was trained with, and what re-ranking starts from.

    index.json     what it was made of: hashes, sizes
    pooled.npy     (n, E) float32, L2-normalised; one row for each good row of the store
    pooled16.npy   the same in float16: what a query scans
    frames.npy     (frames, E) float16, row after row; L2-normalised, but of a trained network as it gave them
    times.npy      (frames,) float64, NaN where a frame's time is not known
    offsets.npy    (n + 1,) where each row's frames begin
    rows.npy       (n,) rows of the store

The first pass is exact: a scan in float16, then float32 for all that rounding could have kept from the top.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..errors import StoreDamagedError, StoreMismatchError
from ..store._files import hash_file, hash_text, read_json, sync_folder, wait_for_folder, write_json
from ..store.checksums import CHECKSUMS_NAME
from ..store.manifest import PARTS_NAME
from ..store.reader import StoreReader
from .trained import TrainedFrames
from .vectors import normalise_rows, pool_frames

FORMAT_VERSION = 1
_FACTS_NAME = "index.json"

# Each of the two factors of a product is rounded to 11 bits, and so may be the sum: of vectors of length 1 that moves a
# score by at most 2^-11 a time.
_ROUNDING = 3 * 2.0**-11


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
    run: str | None = None
    """The trained run; None for the backbone's own frames."""


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
        self._frames = self._open("frames")
        self._times = self._open("times")
        self._scanned = torch.from_numpy(self._open("pooled16", "c"))  # torch wants it writable

    def _open(self, name: str, mode: Literal["r", "c"] = "r") -> np.ndarray:
        try:
            return np.load(self.path / f"{name}.npy", mmap_mode=mode)
        except (OSError, ValueError) as error:
            raise StoreDamagedError(f"{self.path / name}.npy is missing or damaged: remove {self.path}") from error

    def find(self, vector: np.ndarray, top: int, *, allowed: np.ndarray | None = None) -> list[Match]:
        """The videos closest to a vector, exactly as brute force in float32 has them; equal ones in row order.

        Args:
            vector: (E,) L2-normalised.
            top: Wanted.
            allowed: (n,) bool, which places may be found; None allows all.
        """
        query = torch.from_numpy(np.array(vector, dtype=np.float32))
        rough = (self._scanned @ query.to(torch.float16)).float()
        if allowed is not None:
            rough[torch.from_numpy(~allowed)] = -torch.inf
        top = min(top, len(rough) if allowed is None else int(allowed.sum()))
        if top == 0:
            return []
        least = float(rough.topk(top).values[-1]) - 2 * _ROUNDING
        places = torch.nonzero(rough >= least)[:, 0].numpy()
        scores = self._pooled[places] @ query.numpy()
        order = np.argsort(-scores, kind="stable")[:top]
        return [Match(int(places[i]), int(self.rows[places[i]]), float(scores[i])) for i in order]

    def frames_of(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Vectors (f, E) float32, L2-normalised, and times (f,) of a video's frames."""
        span = slice(int(self._offsets[place]), int(self._offsets[place + 1]))
        return normalise_rows(self.raw_frames_of(place)), np.asarray(self._times[span])

    def raw_frames_of(self, place: int) -> np.ndarray:
        """Vectors (f, E) float32 of a video's frames as the index holds them."""
        span = slice(int(self._offsets[place]), int(self._offsets[place + 1]))
        return np.asarray(self._frames[span], dtype=np.float32)

    def read_vectors(self, places: slice) -> np.ndarray:
        """Pooled vectors in float16, (n, E)."""
        return self._scanned[places].numpy()

    def vector_of(self, place: int) -> np.ndarray:
        """The pooled vector (E,) of a video."""
        return np.asarray(self._pooled[place])


def default_index_path(store: Path, run: Path | None = None) -> Path:
    """`store/mine.zarr` has its index in `store/mine.index`, with the frames of `runs/a` in `runs/a/mine.index`."""
    name = f"{store.name.removesuffix('.zarr')}.index"
    return store.with_name(name) if run is None else run / name


def open_index(
    store: StoreReader,
    path: Path | None = None,
    report: Callable[[str, int, int], None] = lambda *_: None,
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
        StoreMismatchError: If the store has no good video, or another folder is in the way.
    """
    path = path or default_index_path(store.path, None if trained is None else trained.run.path)
    facts = _read_facts(path)
    if facts is None or facts.fingerprint != fingerprint(store, trained):
        build_index(store, path, report, trained=trained)
        facts = _read_facts(path)
    assert facts is not None
    return VideoIndex(path, facts)


def fingerprint(store: StoreReader, trained: TrainedFrames | None = None) -> str:
    """A hash that another state of the store and of the run does not have.

    Of the store's list of hashes, of which shards are done, and of the run's weights.
    """
    done = sorted(path.name for path in (store.path / PARTS_NAME).glob("[0-9]*.parquet"))
    weights = [] if trained is None else [trained.sha256]
    return hash_text("\n".join([hash_file(store.path / CHECKSUMS_NAME), *done, *weights]))


def build_index(
    store: StoreReader,
    path: Path,
    report: Callable[[str, int, int], None] = lambda *_: None,
    *,
    trained: TrainedFrames | None = None,
) -> IndexFacts:
    """Write the index of a store beside its place, and rename it.

    Raises:
        StoreMismatchError: If the store has no good video, or something else stands at `path`.
    """
    if path.exists() and _read_facts(path) is None and (not path.is_dir() or any(path.iterdir())):
        raise StoreMismatchError(f"{path} exists and is no index. Nothing was written; name another --index.")
    state = fingerprint(store, trained)  # before what it is the state of
    table = store.read_manifest(["status", "num_cached_frames", "timestamps_s", "eval_clips"])
    good = np.flatnonzero(np.asarray(table["status"].to_pylist()) == "ok")
    if not len(good):
        raise StoreMismatchError(f"{store.path} holds no good video: finish its extraction first")
    run = None if trained is None else str(trained.run.path.resolve())
    facts = IndexFacts(FORMAT_VERSION, str(store.path.resolve()), state, len(good), store.layout.embed_dim, run)
    counts = table["num_cached_frames"].to_numpy()[good].astype(np.int64)
    if trained is not None:
        counts = np.full_like(counts, trained.run.frames)
    offsets = np.concatenate([[0], counts.cumsum()])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with _hold_partial(partial):
        for file in partial.iterdir():  # what one that was killed has left
            file.unlink()
        if _read_facts(path) == facts:  # another process has built it meanwhile
            partial.rmdir()
            return facts
        pooled, scanned, frames, times = (
            np.lib.format.open_memmap(partial / f"{name}.npy", "w+", dtype, shape)
            for name, dtype, shape in (
                ("pooled", np.float32, (len(good), facts.width)),
                ("pooled16", np.float16, (len(good), facts.width)),
                ("frames", np.float16, (int(offsets[-1]), facts.width)),
                ("times", np.float64, (int(offsets[-1]),)),
            )
        )
        np.save(partial / "rows.npy", good)
        np.save(partial / "offsets.npy", offsets)
        place = 0
        for shard in range(store.layout.num_shards):
            rows = store.layout.shard_rows(shard)
            held = good[(good >= rows.start) & (good < rows.stop)]
            if not len(held):
                continue
            span = slice(offsets[place], offsets[place + len(held)])
            stamps = table["timestamps_s"].take(held).to_pylist()
            if trained is None:
                vectors = normalise_rows(store.read_embeddings(rows)[held - rows.start])
                pooled[place : place + len(held)] = pool_frames(vectors)
                frames[span] = np.concatenate([_join_views(video) for video in vectors])
                times[span] = np.concatenate(stamps)
            else:
                clips = trained.embed(held, [one[0] for one in table["eval_clips"].take(held).to_pylist()])
                pooled[place : place + len(held)] = pool_frames(normalise_rows(clips.frames)[:, None])
                frames[span] = clips.frames.reshape(-1, facts.width)
                times[span] = np.concatenate([np.asarray(s)[p] for s, p in zip(stamps, clips.places, strict=True)])
            place += len(held)
            report("indexing", place, len(good))
        scanned[:] = pooled
        for array in (pooled, scanned, frames, times):
            array.flush()
        for file in partial.glob("*.npy"):
            with file.open("rb+") as written:
                os.fsync(written.fileno())
        write_json(partial / _FACTS_NAME, asdict(facts))
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
        sync_folder(path.parent)
    return facts


@contextmanager
def _hold_partial(partial: Path) -> Iterator[None]:
    """Be the only one that builds an index, in the folder that is renamed into its place at the end."""
    while True:
        partial.mkdir(exist_ok=True)
        with ExitStack() as held:
            try:
                folder = held.enter_context(wait_for_folder(partial, f"another process builds {partial.stem}: waiting"))
                is_still_there = os.path.samestat(os.fstat(folder), partial.stat())
            except FileNotFoundError:
                continue
            if is_still_there:
                yield
                return


def _join_views(video: np.ndarray) -> np.ndarray:
    """(A, F, E) with NaN where there is no such frame -> (f, E): the mean over views, normalised again."""
    is_there = ~np.isnan(video[0, :, 0])
    return normalise_rows(np.nanmean(video[:, is_there], axis=0))


def _read_facts(path: Path) -> IndexFacts | None:
    """What an index says of itself; None where there is none that this version reads."""
    try:
        told: Any = read_json(path / _FACTS_NAME)
        return IndexFacts(**told) if told.get("format_version") == FORMAT_VERSION else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None
