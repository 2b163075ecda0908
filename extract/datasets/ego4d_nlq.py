"""Ego4D's natural language queries: questions about clips of long videos, in one JSON file for each split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DatasetError
from ...store.records import Moment, VideoRecord
from ._files import DatasetFiles
from ._names import check_name, check_text
from ._queries import (
    GROUNDING_CLIPS,
    QueryList,
    find_by_split,
    make_grounding_recipe,
    place_by_name,
    read_number,
    read_query_lines,
)
from ._rows import MalformedRows, read_json, shorten, text_of
from .contract import DatasetFacts, DatasetReader, ReadOptions

_JSON = {
    "train": ("nlq_train.json",),
    "val": ("nlq_val.json",),
    "test": ("nlq_test_unannotated.json", "nlq_test.json"),
}
_JSON_LINES = {split: (f"nlq_{split}*.jsonl", f"ego4d*{split}*.jsonl") for split in _JSON}


@dataclass(frozen=True, slots=True)
class _Clip:
    """A part of a video of Ego4D: a row of the store."""

    video_uid: str
    start_s: float
    end_s: float


def read_ego4d_nlq(files: DatasetFiles, options: ReadOptions) -> list[VideoRecord] | None:
    """Read the clips of the splits whose files are there; a row is a clip.

    A clip is a file of its name. Where there is none and its whole video is there, it is that part of the video.

    Returns:
        Records, or None where no annotation file is there.

    Raises:
        DatasetError: If rows are malformed, all of them in one message, up to 20.
    """
    queries, malformed = QueryList(), MalformedRows()
    clips: dict[str, _Clip] = {}
    if found := find_by_split(files, _JSON):
        for split, file in found.items():
            _read_split(file, split, queries, clips, malformed)
    elif found := find_by_split(files, _JSON_LINES):
        for split, file in found.items():
            read_query_lines(file, split, queries, malformed)
    else:
        return None
    malformed.refuse()
    place = place_by_name(files.tree)

    def place_clip(clip_uid: str) -> VideoRecord:
        clip = clips.get(clip_uid)
        whole = None if clip is None or files.tree.find_name(clip_uid) else files.tree.find_name(clip.video_uid)
        if clip is None or whole is None:
            return place(clip_uid)
        return VideoRecord(
            video_id=clip_uid, source_id=clip.video_uid, path=whole, split="", start_s=clip.start_s, end_s=clip.end_s
        )

    return queries.as_records(place_clip)


def _read_split(file: Path, split: str, queries: QueryList, clips: dict[str, _Clip], malformed: MalformedRows) -> None:
    data = read_json(file)
    if not isinstance(data, dict) or not isinstance(data.get("videos"), list):
        raise DatasetError(f'{file}: expected an object with "videos", found {shorten(data)}')
    for place, video_uid, clip in _list_clips(file, data["videos"], malformed):
        try:
            clip_uid = check_name(text_of(clip, "clip_uid"))
            start_s, end_s = (_require(clip, f"video_{key}_sec") for key in ("start", "end"))
            if end_s <= start_s:
                raise ValueError(f"the clip ends at {end_s:g} s of its video, before or at its start {start_s:g} s")
            clips[clip_uid] = _Clip(video_uid, start_s, end_s)
            queries.add_video(clip_uid, split=split)
            annotations = _list_of(clip, "annotations")
        except ValueError as error:
            malformed.add(file, place, error)
            continue
        for number, annotation in enumerate(annotations, start=1):
            where = f"{place}, annotation {number}"
            _read_annotation(annotation, clip_uid, end_s - start_s, split, queries, (malformed, file, where))


def _list_clips(file: Path, videos: list[Any], malformed: MalformedRows) -> Iterator[tuple[str, str, Any]]:
    """Where each clip stands, the id of its video, and the clip."""
    for number, video in enumerate(videos, start=1):
        try:
            video_uid, clips = check_name(text_of(video, "video_uid")), _list_of(video, "clips")
        except ValueError as error:
            malformed.add(file, f"video {number}", error)
            continue
        yield from ((f"video {number}, clip {place}", video_uid, clip) for place, clip in enumerate(clips, start=1))


def _read_annotation(
    annotation: Any,
    clip_uid: str,
    duration_s: float,
    split: str,
    queries: QueryList,
    at: tuple[MalformedRows, Path, str],
) -> None:
    """Take the questions of one annotator. Entries without one are passed over, and count in the ids of the others."""
    malformed, file, where = at
    try:
        uid, asked = text_of(annotation, "annotation_uid"), _list_of(annotation, "language_queries")
    except ValueError as error:
        malformed.add(file, where, error)
        return
    for place, entry in enumerate(asked):
        if isinstance(entry, dict) and not entry.get("query"):
            continue
        try:
            text = check_text(text_of(entry, "query"))
            start_s, end_s = (read_number(entry, f"clip_{key}_sec") for key in ("start", "end"))
            if (start_s is None) != (end_s is None):
                raise ValueError(f"expected clip_start_sec with clip_end_sec, found {shorten(entry)}")
            windows = None if start_s is None or end_s is None else ((start_s, end_s),)
            moment = Moment(query_id=f"{uid}_{place}", duration_s=duration_s, windows=windows)
            queries.add(clip_uid, text, moment, split=split)
        except ValueError as error:
            malformed.add(file, f"{where}, query {place}", error)


def _list_of(entry: Any, key: str) -> list[Any]:
    values = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(values, list):
        raise ValueError(f"expected an object with the list {key!r}, found {shorten(entry)}")
    return values


def _require(entry: dict[str, Any], key: str) -> float:
    number = read_number(entry, key)
    if number is None:
        raise ValueError(f"expected {key!r} in seconds, found {shorten(entry)}")
    return number


READER = DatasetReader(
    name="ego4d-nlq",
    read=read_ego4d_nlq,
    facts=DatasetFacts(
        name="ego4d-nlq",
        title="Ego4D NLQ",
        source="Ego4D (episodic memory, natural language queries): annotations and clips by its command line",
        layout=(
            "nlq_train.json, nlq_val.json, nlq_test_unannotated.json",
            "CLIP_UID.mp4, in any folder; or VIDEO_UID.mp4, of which the clips are parts",
        ),
        annotation_folders=("v1/annotations", "v2/annotations"),
        clip_settings=GROUNDING_CLIPS,
        recipe=make_grounding_recipe("ego4d-nlq", "fps:0.5"),
    ),
)
