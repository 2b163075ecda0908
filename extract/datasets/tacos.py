"""TACoS: many sentences of each long video of a kitchen; their times in frames (JSON), or in seconds (lines of it)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import DatasetError
from ...store.records import Moment, VideoRecord
from ._files import DatasetFiles, name_of
from ._names import check_name, check_text
from ._queries import (
    GROUNDING_CLIPS,
    QueryList,
    find_by_split,
    make_grounding_recipe,
    place_by_name,
    read_number,
    read_query_lines,
    read_windows,
)
from ._rows import MalformedRows, read_json, shorten
from .contract import DatasetFacts, DatasetReader, ReadOptions

_CAMERA = "-cam-002"
"""Behind the name of each video of MPII Cooking 2; annotations leave it out."""
_SPLITS = ("train", "val", "test")
_JSON_LINES = {split: (f"tacos*{split}*.jsonl", f"{split}.jsonl") for split in _SPLITS}
_JSON = {split: (f"tacos*{split}*.json", f"{split}.json") for split in _SPLITS}


def read_tacos(files: DatasetFiles, options: ReadOptions) -> list[VideoRecord] | None:
    """Read sentences with their windows: lines of JSON where there are such, else TALL's files by video.

    Returns:
        Records, or None where no annotation file is there.

    Raises:
        DatasetError: If rows are malformed, all of them in one message, up to 20.
    """
    queries, malformed = QueryList(), MalformedRows()
    if found := find_by_split(files, _JSON_LINES):
        for split, file in found.items():
            read_query_lines(file, split, queries, malformed, rename=_cut_camera)
    elif found := find_by_split(files, _JSON):
        for split, file in found.items():
            _read_videos(file, split, queries, malformed)
    else:
        return None
    malformed.refuse()
    return queries.as_records(place_by_name(files.tree, _CAMERA, ""))


def _cut_camera(name: str) -> str:
    """`s10-d20.avi`, `s10-d20-cam-002` -> `s10-d20`."""
    return name_of(name).removesuffix(_CAMERA)


def _read_videos(file: Path, split: str, queries: QueryList, malformed: MalformedRows) -> None:
    """TALL's form: an object by video, with lists of `timestamps` (frames) and `sentences`."""
    videos = read_json(file)
    if not isinstance(videos, dict):
        raise DatasetError(f"{file}: expected an object of videos by name, found {shorten(videos)}")
    for name, entry in videos.items():
        try:
            video_id, fps, duration_s, pairs = _read_video(name, entry)
        except ValueError as error:
            malformed.add(file, name, error)
            continue
        for place, (span, sentence) in enumerate(pairs):
            try:
                if not isinstance(sentence, str) or not sentence.strip():
                    raise ValueError(f"expected a sentence, found {shorten(sentence)}")
                frames = read_windows({"relevant_windows": [span]})
                assert frames is not None
                moment = Moment(
                    query_id=f"{video_id}_{place}",
                    duration_s=duration_s,
                    windows=tuple((start / fps, end / fps) for start, end in frames),
                )
                queries.add(video_id, check_text(sentence.strip()), moment, split=split)
            except ValueError as error:
                malformed.add(file, f"{name}, sentence {place + 1}", error)


def _read_video(name: str, entry: Any) -> tuple[str, float, float, list[tuple[Any, Any]]]:
    """Its id, frames a second, seconds, and pairs of times and sentence."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object with fps, num_frames, timestamps and sentences, found {shorten(entry)}")
    fps, num_frames = (read_number(entry, key, above=0.0) for key in ("fps", "num_frames"))
    spans, sentences = entry.get("timestamps"), entry.get("sentences")
    if fps is None or num_frames is None or not (isinstance(spans, list) and isinstance(sentences, list)):
        raise ValueError(f"expected fps, num_frames, timestamps and sentences, found {shorten(entry)}")
    if len(spans) != len(sentences):
        raise ValueError(f"expected times for each sentence, found {len(spans)} of {len(sentences)}")
    return check_name(_cut_camera(name)), fps, num_frames / fps, list(zip(spans, sentences, strict=True))


READER = DatasetReader(
    name="tacos",
    read=read_tacos,
    facts=DatasetFacts(
        name="tacos",
        title="TACoS",
        source="TACoS (Regneri and others, 2013); videos: MPII Cooking 2; the splits are TALL's",
        layout=(
            "tacos_train.jsonl, tacos_val.jsonl, tacos_test.jsonl; or train.json, val.json, test.json of TALL",
            "s10-d20-cam-002.avi, in any folder",
        ),
        annotation_folders=("TACoS", "tacos"),
        counts={"": {"train": 75, "val": 27, "test": 25}},
        query_counts={"": {"train": 9790, "val": 4436, "test": 4001}},
        clip_settings=GROUNDING_CLIPS,
        recipe=make_grounding_recipe("tacos", "fps:0.5"),
    ),
)
