"""Kinetics-400, -600 and -700: official CSV files, and videos named by YouTube id and times in any folder."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from ...store.records import VideoRecord
from ._clips import make_test_recipe
from ._files import DatasetFiles
from ._names import SPLIT_NAMES, check_name, check_path, fold_split
from ._rows import MalformedRows, cut_excel_hint, read_csv, read_text, shorten, sniff_csv, split_of_name
from .contract import DatasetFacts, DatasetReader, ReadOptions
from .folder import read_folder

_COLUMNS = ("youtube_id", "time_start", "time_end")
_YOUTUBE_ID_LENGTH = 11
_COUNTS: dict[int, dict[str, dict[str, int]]] = {400: {"": {"train": 246_535, "val": 19_907}}, 600: {}, 700: {}}
"""Of classes: the official counts of rows, where they are sure."""


KINETICS_RECIPE = make_test_recipe(
    "k400",
    "Side4Video's of Kinetics-400",
    clips=4,
    sampling="reference-k400",
    resize="256",
    holds_validation_clip=False,  # it is the first of the four
)
SMALL_RECIPE = replace(KINETICS_RECIPE, told_as="Side4Video's of Kinetics-400, which s4v takes here too")
"""Of recognition data sets that Side4Video was not trained on: our choice."""


def read_kinetics(files: DatasetFiles, options: ReadOptions) -> list[VideoRecord] | None:
    """Read the official CSV files: with or without `is_cc`, and without `label` for the test split.

    The video_id is YOUTUBEID_START_END, as the official file names are; the same row in two files is one row.

    Returns:
        Records, or None where no official file is there.

    Raises:
        DatasetError: If rows are malformed, all of them in one message, up to 20.
    """
    patterns = ("*.csv",) if files.named_file else ("*train*.csv", "*val*.csv", "*test*.csv")
    tables = [file for file in files.list_annotations(*patterns) if is_kinetics_table(read_text(file))]
    if not tables:
        return None
    malformed = MalformedRows()
    records: dict[str, VideoRecord] = {}
    for file in tables:
        for line, row in _read_rows(file, malformed):
            try:
                record = _as_record(row, file, files)
                known = records.setdefault(record.video_id, record)
                if known is not record and known != record:
                    raise ValueError(
                        f"expected {known.video_id} once, found it with {known.split}, {known.class_name!r} "
                        f"and with {record.split}, {record.class_name!r}"
                    )
            except ValueError as error:
                malformed.add(file, line, error)
    malformed.refuse()
    return list(records.values())


def is_kinetics_table(text: str) -> bool:
    """Whether a file's text begins with the header of an official list."""
    return _COLUMNS[0] in cut_excel_hint(text)[0].partition("\n")[0]


def has_kinetics_columns(names: Collection[str]) -> bool:
    """Whether a table's columns are those of an official list."""
    return _COLUMNS[0] in names


def name_options(table: Path) -> str:
    """The options that read an official list as what it is, for readers that are given one by mistake."""
    first, *others = (f"k{number}" for number in _COUNTS)
    return f"--dataset {first} ({', '.join(others)}) --annotations {table}"


def read_kinetics_folder(files: DatasetFiles, *, dataset: str) -> list[VideoRecord]:
    """Read folders by class; below `videos_train/` and the like, which mmaction2 makes, `_` stands for a blank."""
    return [
        replace(record, class_name=record.class_name.replace("_", " "))
        if record.class_name is not None and record.path.startswith(("videos_", "rawframes_"))
        else record
        for record in read_folder(files.tree, dataset=dataset)
    ]


def _read_rows(file: Path, malformed: MalformedRows) -> Iterator[tuple[int, dict[str, str]]]:
    rows = read_csv(file, sniff_csv(read_text(file), (*_COLUMNS, "label", "split")))
    line, header = next(rows)
    names = [name.strip() for name in header]
    if missing := [name for name in _COLUMNS if name not in names]:
        malformed.add(file, line, f"expected the columns {', '.join(_COLUMNS)}, found no {', '.join(missing)}")
        return
    for line, row in rows:
        if len(row) == len(names):
            yield line, dict(zip(names, row, strict=True))
        else:
            malformed.add(file, line, f"expected {len(names)} columns ({','.join(names)}), found {shorten(row)}")


def _as_record(row: dict[str, str], file: Path, files: DatasetFiles) -> VideoRecord:
    youtube_id = check_name(row["youtube_id"].strip())
    if len(youtube_id) != _YOUTUBE_ID_LENGTH:
        raise ValueError(f"expected a YouTube id of {_YOUTUBE_ID_LENGTH} characters, found {youtube_id!r}")
    # Some copies write 59.0: whole seconds all the same.
    start, end = _whole_seconds(row, "time_start"), _whole_seconds(row, "time_end")
    if end <= start:
        raise ValueError(f"expected time_end after time_start, found {start} to {end}")
    named = row.get("split", "").strip()
    split = fold_split(named) if named else split_of_name(file)
    if split not in SPLIT_NAMES.values():
        raise ValueError(f"expected a split, one of {', '.join(SPLIT_NAMES)}, found {named!r}")
    label = row.get("label", "").strip()
    class_name = check_path(label) and label if label else None
    if class_name is None and split != "test":
        raise ValueError(f"expected a label in the split {split}, found none")
    clip = f"{youtube_id}_{start:06d}_{end:06d}"
    folder = f"{split}/{class_name}" if class_name else split
    path = files.tree.find_clip(clip, split, f"videos_{split}", f"{split}_video", class_name or "")
    return VideoRecord(
        video_id=clip, source_id=youtube_id, path=path or f"{folder}/{clip}.mp4", split=split, class_name=class_name
    )


def _whole_seconds(row: dict[str, str], column: str) -> int:
    try:
        seconds = int(float(row[column]))
    except (ValueError, OverflowError):
        seconds = -1
    if not 0 <= seconds < 10**6:
        raise ValueError(f"expected seconds in {column}, found {row[column]!r}")
    return seconds


def _make_reader(number: int) -> DatasetReader:
    name = f"k{number}"
    return DatasetReader(
        name=name,
        read=read_kinetics,
        read_folder=partial(read_kinetics_folder, dataset=name),
        facts=DatasetFacts(
            name=name,
            title=f"Kinetics-{number}",
            source=f"Kinetics-{number} (DeepMind); videos from the mirror cvdfoundation/kinetics-dataset",
            layout=(
                "train.csv, val.csv (or validate.csv), test.csv: here or in annotations/",
                "{train,val,test}/[CLASS/]YOUTUBEID_START_END.mp4, in any folder; or YOUTUBEID.mp4",
            ),
            counts=_COUNTS[number],
            num_classes=number,
            clip_settings="Side4Video: 8 or 16 frames, short side 256, test with 3 crops x 4 clips; no training on "
            "videos below 8 frames",
            recipe=KINETICS_RECIPE if name == KINETICS_RECIPE.name else SMALL_RECIPE,
        ),
    )


READERS = tuple(_make_reader(number) for number in _COUNTS)
