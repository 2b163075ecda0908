"""TVSum: how important twenty people found each two seconds of a video, in its own tables, or UMT's JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import DatasetError
from ...store.records import Moment, VideoRecord
from ._files import DatasetFiles
from ._names import check_name, check_text
from ._queries import (
    CLIP_S,
    GROUNDING_CLIPS,
    QueryList,
    as_scores,
    find_by_split,
    make_grounding_recipe,
    place_by_name,
    read_json_lines,
    read_number,
)
from ._rows import MalformedRows, read_csv, read_json, read_lines, shorten, text_of
from .contract import DatasetFacts, DatasetReader, ReadOptions

_IMPORTANCE = (1, 5)
_JSON_LINES = {"train": ("tvsum*train*.jsonl",), "val": ("tvsum*val*.jsonl",)}
_DOMAINS = ("BK", "BT", "DS", "FM", "GA", "MS", "PK", "PR", "VT", "VU")
_VALIDATION = frozenset(
    {
        *("Se3oxnaPsz0", "JgHubY5Vw3Y", "E11zDS9XGzg", "JKpqYvAdIsw", "Bhxk-O1Y7Ho"),
        *("Yi4Ij2NM7U4", "cjibtmSLxQ4", "fWutDQy1nnY", "J0nA4VgnoCo", "sTEELN-vY30"),
    }
)
"""Of each domain the video that papers test on, since UMT: https://github.com/TencentARC/UMT."""


@dataclass(slots=True)
class _Video:
    """What is known of one video, before its scores are in two-second clips."""

    title: str
    domain: str | None
    split: str = ""
    duration_s: float | None = None
    scores: list[Any] = field(default_factory=list)


def read_tvsum(files: DatasetFiles, options: ReadOptions) -> list[VideoRecord] | None:
    """Read the scores of each video: a query a video, which is its title. A domain is a class.

    Lines of JSON are read where there are such, else `tvsum_anno.json`, else the published tables.

    Returns:
        Records, or None where no annotation file is there.

    Raises:
        DatasetError: If rows are malformed, all of them in one message, up to 20.
    """
    malformed = MalformedRows()
    if found := find_by_split(files, _JSON_LINES):
        rows = _read_json_lines(found, malformed)
    elif file := files.find_annotation("tvsum_anno.json"):
        rows = _read_json_videos(file)
    elif file := files.find_annotation("ydata-tvsum50-anno.tsv"):
        rows = _read_tables(file, files.require_annotation("ydata-tvsum50-info.tsv"), malformed)
    else:
        return None
    queries = QueryList()
    videos = list(rows)
    is_known = any(video_id in _VALIDATION for _, _, video_id, _ in videos)
    for at, place, video_id, made in videos:
        try:
            video = made() if callable(made) else made
            split = video.split or (("val" if video_id in _VALIDATION else "train") if is_known else "")
            moment = _as_moment(video, check_name(video_id))
            queries.add(video_id, video.title, moment, split=split, class_name=video.domain)
        except ValueError as error:
            malformed.add(at, place, error)
    malformed.refuse()
    return queries.as_records(place_by_name(files.tree))


_Row = tuple[Path, int | str, str, Any]
"""File, place in it, id, and the video or what makes one."""


def _as_moment(video: _Video, video_id: str) -> Moment:
    scores = as_scores(video.scores, _IMPORTANCE)
    return Moment(
        query_id=video_id,
        duration_s=video.duration_s,
        clip_s=CLIP_S,
        clip_ids=tuple(range(len(scores))),
        scores=scores,
    )


def _read_json_lines(found: dict[str, Path], malformed: MalformedRows) -> Iterator[_Row]:
    for split, file in found.items():
        for line, entry in read_json_lines(file, malformed):
            try:
                video_id = text_of(entry, "vid")
            except ValueError as error:
                malformed.add(file, line, error)
                continue
            yield file, line, video_id, lambda entry=entry, split=split: _read_entry(entry, "query", split)


def _read_json_videos(file: Path) -> Iterator[_Row]:
    videos = read_json(file)
    if not isinstance(videos, dict):
        raise DatasetError(f"{file}: expected an object of videos by id, found {shorten(videos)}")
    for video_id, entry in videos.items():
        yield file, video_id, video_id, lambda entry=entry: _read_entry(entry, "title", "")


def _read_entry(entry: Any, title: str, split: str) -> _Video:
    video = _Video(text_of(entry, title), entry.get("domain") or entry.get("category"), split)
    video.scores = entry.get("anno") or entry.get("label") or entry.get("saliency_scores")
    if video.domain is not None and not isinstance(video.domain, str):
        raise ValueError(f"expected a domain such as BK, found {shorten(video.domain)}")
    duration = read_number(entry, "duration", above=0.0)
    frames, fps = (read_number(entry, key, above=0.0) for key in ("frames", "fps"))
    if frames is not None and fps is not None:
        video.duration_s = frames / fps
    elif duration is not None:
        # Copies of UniVTG's count clips there, and no seconds.
        is_of_clips = isinstance(video.scores, list) and abs(duration - len(video.scores)) < 1
        video.duration_s = duration * (CLIP_S if is_of_clips else 1)
    return video


def _read_tables(file: Path, info_file: Path, malformed: MalformedRows) -> Iterator[_Row]:
    """`anno`: a row an annotator, with an id, the domain and a score for each frame. `info`: titles and lengths."""
    videos = _read_info(info_file, malformed)
    lines: dict[str, int] = {}
    for line, text in read_lines(file):
        parts = text.split("\t")
        try:
            if len(parts) != 3 or parts[0].strip() not in videos:
                raise ValueError(f"expected a video of {info_file.name}, its domain and scores, found {shorten(text)}")
            scores = [int(float(score)) for score in parts[2].split(",")]
        except ValueError as error:
            malformed.add(file, line, error)
            continue
        lines.setdefault(video_id := parts[0].strip(), line)
        videos[video_id].scores.append(scores)
    for video_id, line in lines.items():
        yield file, line, video_id, lambda video=videos[video_id]: _cut_clips(video)


def _read_info(file: Path, malformed: MalformedRows) -> dict[str, _Video]:
    rows = list(read_csv(file, "\t"))
    header = [name.strip() for name in rows[0][1]] if rows else []
    if not {"video_id", "title", "length"} <= set(header):
        malformed.add(file, 1, f"expected the columns video_id, title and length, found {', '.join(header)[:120]}")
        return {}
    videos = {}
    for line, values in rows[1:]:
        row = dict(zip(header, (value.strip() for value in values), strict=False))
        try:
            title = check_text(row.get("title", ""))
            videos[check_name(row.get("video_id", ""))] = _Video(
                title, row.get("category"), duration_s=_parse_length(row.get("length", ""))
            )
        except ValueError as error:
            malformed.add(file, line, error)
    return videos


def _parse_length(text: str) -> float:
    """`5:54`, `1:02:03` or seconds."""
    try:
        seconds = 0.0
        for part in text.split(":"):
            seconds = 60 * seconds + float(part)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"expected a length such as 5:54, found {text!r}")
    return seconds


def _cut_clips(video: _Video) -> _Video:
    """With scores of clips in the place of those of frames: of each clip the one in its middle."""
    assert video.duration_s is not None
    lengths = {len(scores) for scores in video.scores}
    if len(lengths) > 1:
        raise ValueError(f"expected as many scores of each annotator, found {min(lengths)} to {max(lengths)}")
    num_scores = lengths.pop()
    num_clips = max(1, int(video.duration_s / CLIP_S + 0.5))
    if num_scores > num_clips:
        middles = [min((2 * clip + 1) * num_scores // (2 * num_clips), num_scores - 1) for clip in range(num_clips)]
    else:
        middles = list(range(num_scores))
    video.scores = [[scores[place] for scores in video.scores] for place in middles]
    return video


READER = DatasetReader(
    name="tvsum",
    read=read_tvsum,
    facts=DatasetFacts(
        name="tvsum",
        title="TVSum",
        source="TVSum50 (Song, Vallmitjana, Stent, Jaimes, 2015): tvsum50_ver_1_1.tgz",
        layout=(
            "ydata-tvsum50-anno.tsv with ydata-tvsum50-info.tsv; or UMT's tvsum_anno.json; or "
            "tvsum_train.jsonl and tvsum_val.jsonl",
            "YOUTUBEID.mp4, in any folder",
        ),
        annotation_folders=("data", "ydata-tvsum50-data/data", "ydata-tvsum50-v1_1/data"),
        counts={"": {"train": 40, "val": 10}},
        query_counts={"": {"train": 40, "val": 10}},
        num_classes=len(_DOMAINS),
        clip_settings=f"{GROUNDING_CLIPS}; a model a domain",
        recipe=make_grounding_recipe("tvsum", "fps:0.5"),
    ),
)
