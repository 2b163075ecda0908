"""Queries with their moments, as data sets of temporal grounding have them: one or many of each video."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...store.records import Moment, VideoRecord
from ._files import DatasetFiles, VideoTree
from ._names import check_name
from ._rows import MalformedRows, read_lines, shorten, text_of
from .contract import ExtractionRecipe

CLIP_S = 2.0
"""Of a labelled clip of QVHighlights and TVSum, and of tables that say nothing else."""
GRADES = (0, 4)
"""Scores of clips beside windows."""
_LEAST_CLIP_S = 0.01

GROUNDING_CLIPS = "R2-Tuning: all frames of a video at a fixed rate, one centre crop, all words of a query"


def make_grounding_recipe(name: str, sampling: str) -> ExtractionRecipe:
    """Temporal grounding as R2-Tuning caches it: frames at a rate, one crop; `--for` adds blocks and words.

    Source:
        https://github.com/yeliudev/R2-Tuning at 03fbcf6.
    """
    return ExtractionRecipe(
        name=name,
        told_as="R2-Tuning's of temporal grounding",
        network="r2-tuning",
        frames={},
        sampling=sampling,
        resize="224",
        augmentation=("crop",),  # queries tell left from right, and colours
    )


@dataclass(slots=True)
class _Video:
    split: str
    class_name: str | None
    captions: list[str] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)


class QueryList:
    """Queries as they are read, gathered by video in the order in which they come."""

    def __init__(self) -> None:
        self._videos: dict[str, _Video] = {}
        self._known: dict[tuple[str, str], str] = {}

    def add(self, video_id: str, text: str, moment: Moment, *, split: str, class_name: str | None = None) -> None:
        """Take a query; a video is of the split of its first one.

        Raises:
            ValueError: If the split has a query of this id.
        """
        key = split, moment.query_id
        if key in self._known:
            raise ValueError(f"query id {moment.query_id!r} occurs a second time: it was one of {self._known[key]}")
        self._known[key] = video_id
        video = self._videos.setdefault(video_id, _Video(split, class_name))
        video.captions.append(text)
        video.moments.append(replace(moment, split="" if split == video.split else split))

    def add_video(self, video_id: str, *, split: str) -> None:
        """Take a video that may have no query."""
        self._videos.setdefault(video_id, _Video(split, None))

    def as_records(self, place: Callable[[str], VideoRecord]) -> list[VideoRecord]:
        """One a video; `place` gives each its path, and whatever else is known of it."""
        return [
            replace(
                place(video_id),
                split=video.split,
                class_name=video.class_name,
                captions=tuple(video.captions),
                moments=tuple(video.moments),
            )
            for video_id, video in self._videos.items()
        ]


def place_by_name(tree: VideoTree, *suffixes: str) -> Callable[[str], VideoRecord]:
    """Videos that are called by their id, in any folder.

    Args:
        tree: The data set's videos.
        suffixes: That may stand behind an id in the name of its file; the first is taken where none is there.
    """

    def place(video_id: str) -> VideoRecord:
        names = [f"{video_id}{suffix}" for suffix in suffixes or ("",)]
        found = next((path for name in names if (path := tree.find_name(name))), None)
        return VideoRecord(video_id=video_id, source_id=video_id, path=found or f"{names[0]}.mp4", split="")

    return place


def find_by_split(files: DatasetFiles, patterns: Mapping[str, tuple[str, ...]]) -> dict[str, Path]:
    """The annotation file of each split that has one: the first that fits one of its patterns."""
    return {split: file for split, names in patterns.items() if (file := files.find_annotation(*names))}


def read_json_lines(file: Path, malformed: MalformedRows) -> Iterator[tuple[int, Any]]:
    """The values of a file with one on each line, with the numbers of their lines; lines that are no JSON are noted."""
    for line, text in read_lines(file):
        try:
            yield line, json.loads(text)
        except (ValueError, RecursionError) as error:
            malformed.add(file, line, f"expected JSON, found {shorten(text)}: {error}")


def read_query_lines(
    file: Path,
    split: str,
    queries: QueryList,
    malformed: MalformedRows,
    *,
    clip_s: float | None = CLIP_S,
    rename: Callable[[str], str] = str,
) -> None:
    """Take the queries of a file as QVHighlights has them, one on each line.

    Args:
        file: Its lines have `query` and `vid`; `qid`, `duration`, `relevant_windows`, `relevant_clip_ids` and
            `saliency_scores` where these are known. Other keys are passed over.
        split: Of its queries.
        queries: Take them.
        malformed: Takes the rows that are not.
        clip_s: Of a labelled clip.
        rename: Makes the id of a video of what the file calls it.
    """
    for line, entry in read_json_lines(file, malformed):
        try:
            video_id = check_name(rename(text_of(entry, "vid")))
            queries.add(video_id, text_of(entry, "query"), read_moment(entry, str(line), clip_s=clip_s), split=split)
        except ValueError as error:
            malformed.add(file, line, error)


def read_moment(entry: dict[str, Any], query_id: str, *, clip_s: float | None = CLIP_S) -> Moment:
    """What an entry says of where its query is shown.

    Args:
        entry: As for `read_query_lines`.
        query_id: Where the entry has none.
        clip_s: Of a labelled clip.

    Raises:
        ValueError: If a value cannot be.
    """
    duration_s = read_number(entry, "duration", above=0.0)
    clip_ids, scores = read_scores(entry)
    if clip_ids is not None and clip_s is not None and duration_s is not None and max(clip_ids) * clip_s >= duration_s:
        raise ValueError(
            f"clip {max(clip_ids)} of {clip_s:g} s begins at {max(clip_ids) * clip_s:g} s, and the video ends at "
            f"{duration_s:g} s"
        )
    return Moment(
        query_id=text_of(entry, "qid") if entry.get("qid") is not None else query_id,
        duration_s=duration_s,
        windows=read_windows(entry),
        clip_s=None if scores is None else clip_s,
        clip_ids=clip_ids,
        scores=scores,
    )


def read_windows(entry: dict[str, Any]) -> tuple[tuple[float, float], ...] | None:
    """`relevant_windows` in seconds, as they stand there; None where there are none, () where the list is empty.

    Raises:
        ValueError: If they are no pairs of numbers.
    """
    windows = entry.get("relevant_windows")
    if windows is None:
        return None
    if not isinstance(windows, list) or not all(isinstance(one, list) and len(one) == 2 for one in windows):
        raise ValueError(f"expected relevant_windows such as [[10, 16], [40, 42]], found {shorten(windows)}")
    return tuple((_as_number(start, "a window"), _as_number(end, "a window")) for start, end in windows)


def read_scores(
    entry: dict[str, Any], limits: tuple[int, int] = GRADES
) -> tuple[tuple[int, ...] | None, tuple[tuple[int, ...], ...] | None]:
    """`relevant_clip_ids` and `saliency_scores`; None of both where no clip is scored.

    Raises:
        ValueError: If they do not belong together, or a score is beyond its limits.
    """
    scores, ids = entry.get("saliency_scores"), entry.get("relevant_clip_ids")
    if not scores:
        return None, None
    if not isinstance(ids, list) or not all(type(one) is int and one >= 0 for one in ids) or len(set(ids)) < len(ids):
        raise ValueError(f"expected relevant_clip_ids, whole numbers from 0, for the scores, found {shorten(ids)}")
    rows = as_scores(scores, limits)
    if len(rows) != len(ids):
        raise ValueError(f"expected a score for each of {len(ids)} clips, found {len(rows)}")
    return tuple(ids), rows


def as_scores(values: Any, limits: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """Scores of clips, each of as many annotators.

    Raises:
        ValueError: If that is not what they are.
    """
    least, most = limits
    if not isinstance(values, list) or not values or not all(isinstance(row, list) and row for row in values):
        raise ValueError(f"expected for each clip a list of scores, found {shorten(values)}")
    if len({len(row) for row in values}) > 1:
        raise ValueError(f"expected as many scores of each clip, found {shorten(values)}")
    for score in (score for row in values for score in row):
        if type(score) not in (int, float) or score != score // 1 or not least <= score <= most:
            raise ValueError(f"expected whole scores from {least} to {most}, found {shorten(score)}")
    return tuple(tuple(map(int, row)) for row in values)


def read_number(entry: dict[str, Any], key: str, *, above: float = -math.inf) -> float | None:
    """A number, or None where the entry has none.

    Raises:
        ValueError: If it is none, or not above a bound.
    """
    if entry.get(key) is None:
        return None
    number = _as_number(entry[key], repr(key))
    if number <= above:
        raise ValueError(f"expected {key!r} above {above:g}, found {number:g}")
    return number


def check_clip_s(clip_s: float) -> float:
    """Seconds of a clip that a video can be cut into.

    Raises:
        ValueError: If they are too few.
    """
    if clip_s < _LEAST_CLIP_S:
        raise ValueError(f"expected clips of at least {_LEAST_CLIP_S} s, found {clip_s:g} s")
    return clip_s


def _as_number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected numbers of {what}, found {shorten(value)}")
    return float(value)
