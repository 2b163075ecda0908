"""`s4v retrieve`: rank a store's videos by how close they are to a text, or to a video.

By the backbone's stored embeddings, or by the frames of a trained run. A run that compares word by word gets its first
hundred candidates by their means and ranks those again.
"""

from __future__ import annotations

import errno
import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..backbone.text_tower import TextTower, load_store_text_tower
from ..errors import ConfigError, StoreError, StoreNotFoundError
from ..store.info import count_statuses
from ..store.needs import StoreNeeds, require_needs
from ..store.reader import StoreReader, open_store
from ..store.text_choice import read_text_choice
from ..store.texts import MAX_WORDS
from ..terminal import quote
from ..train.tasks.tuned_texts import load_tuned_text_tower
from ..vectors import find_moment, normalise_rows, score_rows
from .filters import filter_rows, find_columns
from .index_reader import Match, VideoIndex, open_index
from .index_writer import Report, build_index
from .trained_frames import TrainedFrames

_log = logging.getLogger(__name__)

_TEXT_NEEDS = StoreNeeds(
    arrays=("embedding",),
    text_tower=True,
    instead={"text_tower": "search by --like VIDEO, or with a trained run that brings a text tower (--run)"},
)
_RERANKED = 100
_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class Answer:
    """One video that a query found."""

    rank: int
    """From 1."""
    score: float
    """Cosine of the query's embedding and the video's; of a run that compares word by word, its similarity."""
    video_id: str
    path: str
    """Relative to the root that the store records."""
    row: int
    """In the store."""
    time_s: float | None
    """Time of the cached frame that fits best; None in a folder of frames whose rate is not known."""
    start_s: float | None
    """The moment: from here ..."""
    end_s: float | None
    """... to here the frames fit about as well."""
    frame_score: float
    """The best frame's own cosine."""


def find_newest_store(folder: Path = Path("store")) -> Path:
    """The store in a folder whose manifest was written last, of those with a good video.

    Raises:
        StoreNotFoundError: If there is none; stores without a good video are named.
    """
    stores = sorted(folder.glob("*.zarr/videos.parquet"), key=lambda p: p.stat().st_mtime, reverse=True)
    newest = next((manifest.parent for manifest in stores if _may_be_searched(manifest.parent)), None)
    if newest is not None:
        return newest
    empty = ", ".join(manifest.parent.name for manifest in stores[:_MOST_NAMED])
    more = f" and {len(stores) - _MOST_NAMED} more" if len(stores) > _MOST_NAMED else ""
    without = f" with a good video ({empty}{more}: none has one, see s4v info)" if stores else ""
    raise StoreNotFoundError(
        f"no store{without} in {folder.resolve()}: name one with --features, or make one with `s4v extract`"
    )


def _may_be_searched(path: Path) -> bool:
    """Whether a store has a good video, or cannot be read: then whoever opens it is told why."""
    try:
        return count_statuses(open_store(path))["ok"] > 0
    except (StoreError, OSError):
        return True


class Searcher:
    """A store that is asked many things: its index is opened, and its text tower loaded, once each when first needed.

    Use it as a context manager.

    Args:
        store: An open store or its path.
        index: Folder of its index; None takes the one beside the store, or in the run's folder.
        run: A retrieval run whose frames are searched; None takes the backbone's own.
        checkpoint: Of the run, `best` or `last`.
        where: Only rows that fulfil this condition on the manifest's columns are found.
        weights: Where the backbone's weights are now; None takes what the store recorded.
        device: Where the text tower and the run's network compute; None takes the CPU.
        report: Told about progress when the index is built.

    Raises:
        StoreMismatchError: If the store does not fit the run.
        ConfigError: If `where` is no condition, or the run is none that a search can use.
    """

    def __init__(
        self,
        store: StoreReader | str | Path,
        *,
        index: Path | None = None,
        run: Path | None = None,
        checkpoint: str = "best",
        where: str | None = None,
        weights: str | None = None,
        device: torch.device | None = None,
        report: Report = lambda *_: None,
    ) -> None:
        self.store = store if isinstance(store, StoreReader) else open_store(store)
        self._weights = weights
        self._device = device
        self._report = report
        self._tower: TextTower | None = None
        self.text_tower_seconds: float | None = None
        """What loading the text tower took; None as long as nothing has needed it."""
        self._trained = None if run is None else TrainedFrames(run, self.store.path, device, checkpoint)
        self.left_out: dict[str, str] = {}
        """What the text tower did not read of queries that were longer than its context."""
        self._asked: dict[bytes, str] = {}
        """Queries by what the text tower made of them."""
        self._index_path = index
        self._open = ExitStack()
        self._fulfils = None if where is None else self._filter(where)

    def __enter__(self) -> Searcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    # What follows is made when it is first needed: all that can be wrong with a question is told before.

    @cached_property
    def _index(self) -> VideoIndex:
        path = self._index_path
        try:
            return open_index(self.store, path, self._report, trained=self._trained)
        except OSError as error:
            if path is not None or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            _log.warning("%s: no index can be kept there; it is built anew each time", error)
        folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="s4v-index-"))) / "index"
        return VideoIndex(folder, build_index(self.store, folder, self._report, trained=self._trained))

    @cached_property
    def _allowed(self) -> np.ndarray | None:
        """(n,) bool, which places of the index fulfil the condition."""
        return None if self._fulfils is None else self._fulfils[self._index.rows]

    @cached_property
    def _facts(self) -> pa.Table:
        """What answers tell of a row; as Arrow has it, a million rows take 0.1 GB."""
        columns = ["video_id", "path", "status", "start_s", "end_s", "duration_s"]
        return self.store.read_manifest(columns).combine_chunks()

    def _filter(self, where: str) -> np.ndarray:
        """(rows,) bool."""
        known = self.store.videos.schema.names
        return filter_rows(self.store.read_manifest(find_columns(where, known)), where)

    def find_text(self, query: str, top: int = 10) -> list[Answer]:
        """Videos that fit a text best, best first; equal scores in row order.

        Raises:
            ConfigError: If the query is empty or `top` below 1.
            StoreMismatchError: If the store has no good video.
            WeightsError: If the weights cannot be had, or are not those that the store was made with.
        """
        if not query.strip():
            raise ConfigError("--query is empty: say what to look for")
        _require_top(top)
        vector = normalise_rows(self._text_tower.encode([query]))[0]
        self._note_query(query, vector)
        if self._trained is None or not self._trained.reads_words:
            return self._describe_all(self._find(vector, top), vector)
        candidates = self._find(vector, max(top, _RERANKED))
        return self._describe_all(self._rank_again(query, candidates, self._trained)[:top], vector)

    def _note_query(self, query: str, vector: np.ndarray) -> None:
        """Keep what of a query is not read; warn where the rest is the same as another query's."""
        self.left_out.update(self._text_tower.find_cut([query], self._num_words()))
        same = self._asked.setdefault(vector.tobytes(), query)
        if same.casefold().split() != query.casefold().split():
            _log.warning(
                "the text tower reads %s as it reads %s: both have the same answers and scores",
                *(quote(query), quote(same)),
            )

    def _num_words(self) -> int:
        """Words of a query, start and end among them, that decide its ranking."""
        most = self._text_tower.context_length
        if self._trained is None or not self._trained.reads_words:
            return most
        return min(read_text_choice(self.store.path).num_words or MAX_WORDS, most)

    def find_like(self, video_id: str, top: int = 10) -> list[Answer]:
        """Videos like a video of the store, itself left out.

        Raises:
            ConfigError: If the store has no such good video, or `top` is below 1.
        """
        _require_top(top)
        row = self._facts["video_id"].index(video_id).as_py()
        is_good = row >= 0 and self._facts["status"][row].as_py() == "ok"
        # Looked up in the index, which may have to be built first, only where the store has such a video.
        places = np.flatnonzero(self._index.rows == row) if is_good else np.empty(0, dtype=np.int64)
        if not len(places):
            raise ConfigError(f"--like: {self.store.path} has no good video {video_id!r}; s4v info counts its videos")
        vector = self._index.vector_of(int(places[0]))
        others = [match for match in self._find(vector, top + 1) if match.row != row][:top]
        return self._describe_all(others, vector)

    @property
    def _text_tower(self) -> TextTower:
        if self._tower is None:
            start = time.perf_counter()
            if self._trained is not None and self._trained.run.is_imported:
                self._tower = load_tuned_text_tower(self._trained.run, self.store, device=self._device)
            else:
                require_needs(self.store, _TEXT_NEEDS, "a search by text")
                self._tower = load_store_text_tower(self.store, weights=self._weights, device=self._device)
            self.text_tower_seconds = round(time.perf_counter() - start, 3)
        return self._tower

    def _find(self, vector: np.ndarray, top: int) -> list[Match]:
        return self._index.find(vector, top, allowed=self._allowed)

    def _rank_again(self, query: str, candidates: Sequence[Match], trained: TrainedFrames) -> list[Match]:
        """The same matches by what the run makes of words and frames; equal ones as they were."""
        if not candidates:
            return []
        texts = self._text_tower.encode_words([query], self._num_words())
        assert texts.tokens is not None and texts.mask is not None
        frames = np.stack([self._index.raw_frames_of(match.place) for match in candidates])
        scores = trained.compare_words(texts.tokens[0], texts.mask[0], frames)
        order = np.argsort(-scores, kind="stable")
        return [replace(candidates[place], score=float(scores[place])) for place in order]

    def _describe_all(self, matches: Sequence[Match], vector: np.ndarray) -> list[Answer]:
        if not matches:
            return []
        facts = self._facts.take([match.row for match in matches]).to_pylist()
        return [
            self._describe(rank, match, vector, fact)
            for rank, (match, fact) in enumerate(zip(matches, facts, strict=True), start=1)
        ]

    def _describe(self, rank: int, match: Match, vector: np.ndarray, fact: dict[str, Any]) -> Answer:
        frames, times = self._index.frames_of(match.place)
        scores = score_rows(frames, vector)
        ends = (fact["start_s"] or 0.0, fact["duration_s"] if fact["end_s"] is None else fact["end_s"])
        best, start, end = find_moment(scores, times, None if ends[1] is None else ends)
        time_s = None if math.isnan(times[best]) else float(times[best])
        frame_score = float(scores[best])
        return Answer(rank, match.score, fact["video_id"], fact["path"], match.row, time_s, start, end, frame_score)


def _require_top(top: int) -> None:
    if top < 1:
        raise ConfigError(f"--top must be at least 1; found {top}")


def search_store(
    store: StoreReader | str | Path,
    query: str,
    *,
    top: int = 10,
    run: Path | None = None,
    where: str | None = None,
    weights: str | None = None,
    device: torch.device | None = None,
) -> list[Answer]:
    """Find the videos of a store that fit a text best, with the frozen backbone alone or with a trained run.

    A video's embedding is the mean of its frames' normalised embeddings, over all views that were not drawn
    for training, normalised again. The index
    beside the store (in the run's folder) is used, and built where there is none or the store or run has changed.

    Args:
        store: An open store or its path.
        query: What to look for; cut at the text tower's context length, with a warning that says what is left out.
        top: Answers wanted, fewer where the store has fewer good videos.
        run: A retrieval run; None takes the backbone alone.
        where: A condition on the manifest's columns.
        weights: Where the backbone's weights are now; None takes what the store recorded.
        device: Where the text tower and the run's network compute; None takes the CPU.

    Returns:
        Answers, best first; equal scores in row order.

    Raises:
        ConfigError: If the query is empty, `top` below 1, `where` no condition, or the run none to search with.
        StoreMismatchError: If the store has no good video, or does not fit the run.
        WeightsError: If the weights cannot be had, or are not those that the store was made with.
    """
    _require_top(top)
    with Searcher(store, run=run, where=where, weights=weights, device=device) as searcher:
        return searcher.find_text(query, top)


def render_answers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Answers to one query as a table, line by line: fields of `Answer` by name."""
    lines = [f"{'rank':>4}  {'score':>7}  {'best frame':>10}  {'moment':>14}  path"]
    for row in rows:
        time_s = moment = "not known"
        if row["time_s"] is not None:
            time_s, moment = f"{row['time_s']:.2f} s", f"{row['start_s']:.1f} to {row['end_s']:.1f} s"
        lines.append(f"{row['rank']:>4}  {row['score']:>7.4f}  {time_s:>10}  {moment:>14}  {row['path']}")
    return lines
