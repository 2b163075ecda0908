"""YouTube Highlights: short clips of a domain's videos, each a highlight or not, in UMT's JSON or in lines of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import DatasetError
from ...store.records import Moment, VideoRecord
from ._files import DatasetFiles
from ._names import check_name, fold_split
from ._queries import (
    GROUNDING_CLIPS,
    QueryList,
    as_scores,
    check_clip_s,
    find_by_split,
    make_grounding_recipe,
    place_by_name,
    read_json_lines,
    read_number,
)
from ._rows import MalformedRows, read_json, shorten, text_of
from .contract import DatasetFacts, DatasetReader, ReadOptions

_DOMAINS = ("dog", "gymnastics", "parkour", "skating", "skiing", "surfing")
_JSON_LINES = {
    "train": ("youtube*train*.jsonl",),
    "val": ("youtube*val*.jsonl",),
}
_MATCHES = (-1, 1)


def read_youtube_highlights(files: DatasetFiles, options: ReadOptions) -> list[VideoRecord] | None:
    """Read the labels of each video: a query a video, which is its domain, and a score for each labelled clip.

    Lines of JSON are read where there are such, else `youtube_anno.json` with `youtube_splits.json`. A domain is
    a class.

    Returns:
        Records, or None where no annotation file is there.

    Raises:
        DatasetError: If rows are malformed, all of them in one message, up to 20.
    """
    queries, malformed = QueryList(), MalformedRows()
    found = find_by_split(files, _JSON_LINES)
    whole = None if found else files.find_annotation("youtube_anno.json")
    if not found and whole is None:
        return None
    entries = _list_lines(found, malformed) if whole is None else _list_videos(whole, _read_splits(files))
    for file, place, video_id, split, entry in entries:
        try:
            domain, moment = _read_labels(entry, check_name(video_id))
            queries.add(video_id, domain, moment, split=split, class_name=domain)
        except ValueError as error:
            malformed.add(file, place, error)
    malformed.refuse()
    return queries.as_records(place_by_name(files.tree))


_Entry = tuple[Path, int | str, str, str, Any]
"""File, place in it, id, split, and what is said of the video."""


def _list_lines(found: Mapping[str, Path], malformed: MalformedRows) -> Iterator[_Entry]:
    for split, file in found.items():
        for line, entry in read_json_lines(file, malformed):
            try:
                yield file, line, text_of(entry, "vid"), split, entry
            except ValueError as error:
                malformed.add(file, line, error)


def _list_videos(file: Path, splits: Mapping[str, str]) -> Iterator[_Entry]:
    videos = read_json(file)
    if not isinstance(videos, dict):
        raise DatasetError(f"{file}: expected an object of videos by id, found {shorten(videos)}")
    for video_id, entry in videos.items():
        if not splits or video_id in splits:  # papers leave out what is in no split
            yield file, video_id, video_id, splits.get(video_id, ""), entry


def _read_splits(files: DatasetFiles) -> dict[str, str]:
    """Split by id, of `{"dog": {"train": [..], "val": [..]}, ..}`; empty where that file is not there."""
    file = files.find_annotation("youtube_splits.json")
    if file is None:
        return {}
    split_of: dict[str, str] = {}
    domains = read_json(file)
    try:
        for splits in domains.values():
            for split, ids in splits.items():
                split_of.update((str(one), fold_split(split)) for one in ids)
    except (AttributeError, TypeError) as error:
        raise DatasetError(
            f'{file}: expected ids by domain and split, {{"dog": {{"train": [..], "val": [..]}}}}, found '
            f"{shorten(domains)}"
        ) from error
    return split_of


def _read_labels(entry: Any, video_id: str) -> tuple[str, Moment]:
    """The domain of a video, and its labels: -1 is no highlight, 0 between, 1 a highlight."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object with frames, fps and match, found {shorten(entry)}")
    frames, fps = (read_number(entry, key, above=0.0) for key in ("frames", "fps"))
    matches = entry.get("match")
    if frames is None or fps is None or not isinstance(matches, list) or not matches:
        raise ValueError(f"expected frames, fps and match, found {shorten(entry)}")
    duration_s = frames / fps
    moment = Moment(
        query_id=video_id,
        duration_s=duration_s,
        clip_s=check_clip_s(duration_s / len(matches)),
        clip_ids=tuple(range(len(matches))),
        scores=as_scores([[match] for match in matches], _MATCHES),
    )
    return _find_domain(entry), moment


def _find_domain(entry: dict[str, Any]) -> str:
    """By its name, or among the facts that UMT's file lists without names."""
    info = entry.get("info")
    candidates = [entry.get("domain"), *(info if isinstance(info, list) else [])]
    domain = next((one for one in candidates if isinstance(one, str) and one.lower() in _DOMAINS), None)
    if domain is None:
        raise ValueError(f"expected a domain, one of {', '.join(_DOMAINS)}, found {shorten(candidates)}")
    return domain.lower()


READER = DatasetReader(
    name="youtube-highlights",
    read=read_youtube_highlights,
    facts=DatasetFacts(
        name="youtube-highlights",
        title="YouTube Highlights",
        source="YouTube Highlights (Sun, Farhadi, Seitz, 2014): annotations in UMT's youtube_anno.json",
        layout=(
            "youtube_highlight_train_release.jsonl, youtube_highlight_val_release.jsonl",
            'or youtube_anno.json, with youtube_splits.json: {"dog": {"train": [ID, ..], "val": [ID, ..]}, ..}',
            "YOUTUBEID.mp4, in any folder",
        ),
        counts={"": {"train": 233, "val": 152}},
        query_counts={"": {"train": 233, "val": 152}},
        num_classes=len(_DOMAINS),
        clip_settings=f"{GROUNDING_CLIPS}; here one frame for each label, a model a domain",
        recipe=make_grounding_recipe("youtube-highlights", "fps:labels"),
    ),
)
