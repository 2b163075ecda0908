"""VATEX: captions of Kinetics-600 clips in JSON; the English ones are read."""

from __future__ import annotations

from ...errors import DatasetError
from ...store.records import VideoRecord
from ._clips import RETRIEVAL_CLIPS, make_retrieval_recipe
from ._files import DatasetFiles, split_clip_name
from ._names import check_name
from ._rows import MalformedRows, read_json, read_json_list, read_lines, shorten, text_of, texts_of
from .contract import DatasetFacts, DatasetReader, ReadOptions

_OFFICIAL = {
    "train": "vatex_training_v*.json",
    "val": "vatex_validation_v*.json",
    "test": "vatex_public_test_english_v*.json",
    "private_test": "vatex_private_test_without_annotations.json",
}
_LISTS = {"train": "train_list.txt", "val": "val_list.txt", "test": "test_list.txt"}


def read_vatex(files: DatasetFiles, options: ReadOptions) -> list[VideoRecord] | None:
    """Read a protocol: `official` takes the published files that are there, `hgr` `vatex_data.json` and its lists.

    Returns:
        Records, or None where no annotation file is there.

    Raises:
        DatasetError: If rows are malformed, all of them in one message, up to 20, or a file is missing.
    """
    if not files.list_annotations(*_OFFICIAL.values(), "vatex_data.json"):
        return None
    malformed = MalformedRows()
    records = _read_lists(files, malformed) if options.protocol == "hgr" else _read_official(files, malformed)
    malformed.refuse()
    return records


def _find_protocol(files: DatasetFiles) -> str | None:
    """Side4Video's, where its lists lie."""
    has_lists = files.list_annotations("vatex_data.json") and files.list_annotations(*_LISTS.values())
    return "hgr" if has_lists else None


def _read_official(files: DatasetFiles, malformed: MalformedRows) -> list[VideoRecord]:
    lists = {split: file for split, pattern in _OFFICIAL.items() if (file := files.find_annotation(pattern))}
    if not lists:
        hint = "--protocol hgr reads vatex_data.json and its lists"
        raise DatasetError(f"expected {', '.join(_OFFICIAL.values())}: none of them is there. {hint}.")
    records = []
    for split, file in lists.items():
        for place, entry in read_json_list(file):
            try:
                captions = () if split == "private_test" else texts_of(entry, "enCap")
                records.append(_as_record(files, text_of(entry, "videoID"), split, captions))
            except ValueError as error:
                malformed.add(file, place, error)
    return records


def _read_lists(files: DatasetFiles, malformed: MalformedRows) -> list[VideoRecord]:
    caption_file = files.require_annotation("vatex_data.json")
    captions = read_json(caption_file)
    if not isinstance(captions, dict):
        raise DatasetError(f"{caption_file}: expected an object of captions by id, found {shorten(captions)}")
    lists = {split: file for split, name in _LISTS.items() if (file := files.find_annotation(name))}
    if not lists:
        files.require_annotation(*_LISTS.values())
    records = []
    for split, file in lists.items():
        for line, clip in read_lines(file):
            try:
                if clip not in captions:
                    raise ValueError(f"expected an id in {caption_file}, found {clip!r}")
                records.append(_as_record(files, clip, split, texts_of(captions[clip], "enCap")))
            except ValueError as error:
                malformed.add(file, line, error)
    return records


def _as_record(files: DatasetFiles, clip: str, split: str, captions: tuple[str, ...]) -> VideoRecord:
    youtube_id, times = split_clip_name(check_name(clip))
    if not times:
        raise ValueError(f"expected YOUTUBEID_START_END, six digits each, found {clip!r}")
    path = files.tree.find_clip(clip, split, f"{split}_video") or f"{split}/{clip}.mp4"
    return VideoRecord(video_id=clip, source_id=youtube_id, path=path, split=split, captions=captions)


READER = DatasetReader(
    name="vatex",
    read=read_vatex,
    find_protocol=_find_protocol,
    facts=DatasetFacts(
        name="vatex",
        title="VATEX",
        source="VATEX (UC Santa Barbara and ByteDance): captions; the videos are clips of Kinetics-600",
        layout=(
            "vatex_training_v1.0.json, vatex_validation_v1.0.json, vatex_public_test_english_v1.1.json",
            "for hgr: vatex_data.json with train_list.txt, val_list.txt, test_list.txt",
            "YOUTUBEID_START_END.mp4, in any folder",
        ),
        annotation_folders=("vatex_data",),
        counts={"official": {"train": 25_991, "val": 3000, "test": 6000}},
        protocols=("official", "hgr"),
        clip_settings=RETRIEVAL_CLIPS,
        recipe=make_retrieval_recipe("vatex"),
    ),
)
