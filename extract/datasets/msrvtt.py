"""MSR-VTT: captions in JSON, and the ways to divide 10,000 videos that papers report."""

from __future__ import annotations

from pathlib import Path

from ...errors import DatasetError
from ...store.records import VideoRecord
from ._clips import RETRIEVAL_CLIPS, make_retrieval_recipe
from ._files import DatasetFiles, name_of
from ._names import SPLIT_NAMES, check_name, check_path, fold_split
from ._rows import MalformedRows, read_csv, read_json, read_json_list, read_text, shorten, sniff_csv, text_of, texts_of
from .contract import DatasetFacts, DatasetReader, ReadOptions

_CAPTION_FILES = ("MSRVTT_data.json", "train_val_videodatainfo.json", "test_videodatainfo.json")


def read_msrvtt(files: DatasetFiles, options: ReadOptions) -> list[VideoRecord] | None:
    """Read the videos of a protocol with their captions.

    `1k-A-9k` and `1k-A-7k` train on the videos of a list, with all captions of each from the JSON files, and test on
    the 1,000 of JSFUSION with one caption each. `full` takes the split in the JSON files. The lists of VindLU and
    mmaction2 (`msrvtt_ret_train9k.json` and the like) are read where CLIP4Clip's are not there.

    Returns:
        Records, or None where no annotation file is there.

    Raises:
        DatasetError: If rows are malformed, all of them in one message, up to 20, or a file is missing.
    """
    is_there = files.list_annotations(*_CAPTION_FILES, "MSRVTT_*.csv", "msrvtt_ret_*.json")
    if not is_there:
        return None
    malformed = MalformedRows()
    if options.protocol == "full":
        split_of, captions = _read_challenge(files, malformed)
        chosen = {video_id: (split, captions.get(video_id, [])) for video_id, split in split_of.items()}
    else:
        chosen = _read_train(files, "9k" if options.protocol != "1k-A-7k" else "7k", malformed)
        # A video that is in both belongs to the test.
        chosen.update(_read_test(files, malformed))
    malformed.refuse()
    return [
        VideoRecord(
            video_id=video_id,
            source_id=video_id,
            path=files.tree.find_name(video_id) or f"{video_id}.mp4",
            split=split,
            captions=tuple(captions),
        )
        for video_id, (split, captions) in chosen.items()
    ]


_Chosen = dict[str, tuple[str, list[str]]]
"""video_id -> split and captions."""


def _read_challenge(files: DatasetFiles, malformed: MalformedRows) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Splits and captions by video_id, from the merged JSON file or the challenge's two."""
    merged = files.find_annotation(_CAPTION_FILES[0])
    parts = [merged] if merged else files.list_annotations(*_CAPTION_FILES[1:])
    if not parts:
        files.require_annotation(*_CAPTION_FILES)
    split_of: dict[str, str] = {}
    captions: dict[str, list[str]] = {}
    for file in parts:
        data = read_json(file)
        if not isinstance(data, dict) or not {"videos", "sentences"} <= data.keys():
            raise DatasetError(f'{file}: expected an object with "videos" and "sentences", found {shorten(data)}')
        for place, entry in read_json_list(file, data["videos"]):
            try:
                split = fold_split(text_of(entry, "split"))
                if split not in SPLIT_NAMES.values():
                    raise ValueError(f"expected a split, one of {', '.join(SPLIT_NAMES)}, found {entry['split']!r}")
                split_of[check_name(text_of(entry, "video_id"))] = split
            except ValueError as error:
                malformed.add(file, f"videos, {place}", error)
        for place, entry in read_json_list(file, data["sentences"]):
            try:
                captions.setdefault(text_of(entry, "video_id"), []).append(text_of(entry, "caption"))
            except ValueError as error:
                malformed.add(file, f"sentences, {place}", error)
    return split_of, captions


def _read_train(files: DatasetFiles, size: str, malformed: MalformedRows) -> _Chosen:
    official, other = f"MSRVTT_train.{size}.csv", f"msrvtt_ret_train{size}.json"
    if files.find_annotation(official) is None and (file := files.find_annotation(other)):
        return _read_pairs(file, "train", malformed)
    file = files.require_annotation(official, other)
    _, captions = _read_challenge(files, malformed)
    chosen: _Chosen = {}
    for line, row in _read_table(file, ("video_id",), malformed):
        if row["video_id"] in captions:
            chosen[row["video_id"]] = ("train", captions[row["video_id"]])
        else:
            malformed.add(file, line, f"expected a video with captions, found {row['video_id']!r}")
    return chosen


def _read_test(files: DatasetFiles, malformed: MalformedRows) -> _Chosen:
    official, other = "MSRVTT_JSFUSION_test.csv", "msrvtt_ret_test1k.json"
    if files.find_annotation(official) is None and (file := files.find_annotation(other)):
        return _read_pairs(file, "test", malformed)
    file = files.require_annotation(official, other)
    chosen: _Chosen = {}
    for line, row in _read_table(file, ("video_id", "sentence"), malformed):
        if row["video_id"] in chosen:
            malformed.add(file, line, f"expected one caption for each video, found a second of {row['video_id']}")
        chosen[row["video_id"]] = ("test", [row["sentence"]])
    return chosen


def _read_pairs(file: Path, split: str, malformed: MalformedRows) -> _Chosen:
    chosen: _Chosen = {}
    for place, entry in read_json_list(file):
        try:
            video_id = name_of(check_path(text_of(entry, "video")))
            chosen.setdefault(video_id, (split, []))[1].extend(texts_of(entry, "caption"))
        except ValueError as error:
            malformed.add(file, place, error)
    return chosen


def _read_table(file: Path, wanted: tuple[str, ...], malformed: MalformedRows) -> list[tuple[int, dict[str, str]]]:
    """Rows with the wanted columns; copies write `sentences` for `sentence`, and `;` for the comma."""
    delimiter = sniff_csv(read_text(file), (*wanted, "sentences"))
    rows = list(read_csv(file, delimiter))
    line, header = rows[0] if rows else (1, [])
    names = [{"sentences": "sentence"}.get(name.strip(), name.strip()) for name in header]
    if not set(wanted) <= set(names):
        malformed.add(file, line, f"expected the columns {', '.join(wanted)}, found {', '.join(names)}")
        return []
    good = []
    for line, values in rows[1:]:
        row = dict(zip(names, (value.strip() for value in values), strict=False))
        if len(values) != len(names) or not all(row[name] for name in wanted):
            malformed.add(file, line, f"expected {delimiter.join(header)}, found {shorten(delimiter.join(values))}")
            continue
        try:
            check_name(row["video_id"])
        except ValueError as error:
            malformed.add(file, line, error)
        else:
            good.append((line, row))
    return good


READER = DatasetReader(
    name="msrvtt",
    read=read_msrvtt,
    facts=DatasetFacts(
        name="msrvtt",
        title="MSR-VTT",
        source="MSR-VTT (Microsoft Research, 2016); the 1k-A lists are in CLIP4Clip's msrvtt_data.zip",
        layout=(
            "MSRVTT_data.json, or train_val_videodatainfo.json with test_videodatainfo.json",
            "for 1k-A: MSRVTT_train.9k.csv or MSRVTT_train.7k.csv, and MSRVTT_JSFUSION_test.csv "
            "(or msrvtt_ret_train9k.json, msrvtt_ret_train7k.json, msrvtt_ret_test1k.json)",
            "videoN.mp4, in any folder",
        ),
        annotation_folders=("msrvtt_data",),
        counts={
            "1k-A-9k": {"train": 9000, "test": 1000},
            "1k-A-7k": {"train": 7010, "test": 1000},
            "full": {"train": 6513, "val": 497, "test": 2990},
        },
        protocols=("1k-A-9k", "1k-A-7k", "full"),
        clip_settings=RETRIEVAL_CLIPS,
        recipe=make_retrieval_recipe("msrvtt"),
    ),
)
