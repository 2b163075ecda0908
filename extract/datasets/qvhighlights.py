"""QVHighlights: queries with windows and scored clips, one on each line of JSON."""

from __future__ import annotations

from dataclasses import replace

from ...store.records import VideoRecord
from ._files import DatasetFiles
from ._queries import (
    GROUNDING_CLIPS,
    QueryList,
    find_by_split,
    make_grounding_recipe,
    place_by_name,
    read_query_lines,
)
from ._rows import MalformedRows
from .contract import DatasetFacts, DatasetReader, ReadOptions

_FILES = {
    "train": ("highlight_train_release.jsonl", "qvhighlights_train*.jsonl"),
    "val": ("highlight_val_release.jsonl", "qvhighlights_val*.jsonl"),
    # The test's truths came out when its server went away; copies without them are older.
    "test": ("highlight_test_with_gt*.jsonl", "highlight_test_release.jsonl", "qvhighlights_test*.jsonl"),
}
_SUBTITLES = "subs_train"


def read_qvhighlights(files: DatasetFiles, options: ReadOptions) -> list[VideoRecord] | None:
    """Read the queries of the splits whose files are there.

    The protocol `with-subtitles` adds `subs_train.jsonl`, spoken sentences with the window in which they are said. They
    are queries of the split `subs_train`, also of videos of `train`.

    Returns:
        Records, or None where no annotation file is there.

    Raises:
        DatasetError: If rows are malformed, all of them in one message, up to 20.
    """
    found = find_by_split(files, _FILES)
    if options.protocol == "with-subtitles":
        found[_SUBTITLES] = files.require_annotation(f"{_SUBTITLES}.jsonl")
    if not found:
        return None
    queries, malformed = QueryList(), MalformedRows()
    for split, file in found.items():
        read_query_lines(file, split, queries, malformed)
    malformed.refuse()
    return [_with_source(record) for record in queries.as_records(place_by_name(files.tree))]


def _with_source(record: VideoRecord) -> VideoRecord:
    """With YouTube's id, which may hold `_`: YOUTUBEID_START_END is cut from the right."""
    return replace(record, source_id=record.video_id.rsplit("_", 2)[0])


READER = DatasetReader(
    name="qvhighlights",
    read=read_qvhighlights,
    facts=DatasetFacts(
        name="qvhighlights",
        title="QVHighlights",
        source="QVHighlights (Lei, Berg, Bansal, 2021): annotations in jayleicn/moment_detr",
        layout=(
            "highlight_train_release.jsonl, highlight_val_release.jsonl, "
            "highlight_test_release.jsonl (or highlight_test_with_gt.jsonl)",
            "for with-subtitles: subs_train.jsonl too",
            "YOUTUBEID_START_END.mp4, in any folder",
        ),
        counts={
            "official": {"train": 7100, "val": 1519, "test": 1529},
        },
        query_counts={"official": {"train": 7218, "val": 1550, "test": 1542}},
        protocols=("official", "with-subtitles"),
        clip_settings=GROUNDING_CLIPS,
        recipe=make_grounding_recipe("qvhighlights", "fps:0.5"),
    ),
)
