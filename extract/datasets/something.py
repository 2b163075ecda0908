"""Something-Something V1 (semicolon lists, frames as JPEGs) and V2 (JSON, webm): one class for each template."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ...errors import DatasetError
from ...store.records import VideoRecord
from ._clips import make_test_recipe
from ._files import DatasetFiles
from ._rows import MalformedRows, read_json, read_json_list, read_lines, shorten, split_of_name, text_of
from .contract import DatasetFacts, DatasetReader, ExtractionRecipe, ReadOptions

_Row = tuple[Path, int | str, str, str | None]
"""File, place in it, id, and the class where there is one."""


def read_something_v1(files: DatasetFiles, options: ReadOptions) -> list[VideoRecord] | None:
    """Read `ID;LABEL` lists, and `ID` for the test split.

    Public lists number the same classes in two ways (in the order of the labels file, or sorted): numbers are not used.

    Returns:
        Records, or None where no such list is there.

    Raises:
        DatasetError: If rows are malformed, all of them in one message, up to 20.
    """
    lists = files.list_annotations("*-train.csv", "*-validation.csv", "*-test.csv")
    if not lists or not _is_v1(lists[0]):
        return None
    labels = files.find_annotation("*-labels.csv")
    known = {text for _, text in read_lines(labels)} if labels else None
    malformed = MalformedRows()
    rows = (
        (file, line, video_id.strip(), label.strip() or None)
        for file in lists
        for line, text in read_lines(file)
        for video_id, _, label in [text.partition(";")]
    )
    return _as_records(rows, known, labels, files, malformed, ending="")


def read_something_v2(files: DatasetFiles, options: ReadOptions) -> list[VideoRecord] | None:
    """Read the JSON lists; the class is the template without its brackets.

    Returns:
        Records, or None where no such list is there.

    Raises:
        DatasetError: If rows are malformed, all of them in one message, up to 20.
    """
    lists = files.list_annotations("*-train.json", "*-validation.json", "*-test.json")
    lists = lists or files.list_annotations("train.json", "validation.json", "test.json")
    if not lists:
        return None
    labels = files.find_annotation("*-labels.json", "labels.json")
    known = _read_labels(labels) if labels else None
    malformed = MalformedRows()
    return _as_records(_read_entries(lists, malformed), known, labels, files, malformed, ending=".webm")


def _is_v1(file: Path) -> bool:
    lines = read_lines(file)
    return not lines or ";" in lines[0][1] or lines[0][1].isdecimal()


def _read_labels(file: Path) -> set[str]:
    """Class names; the numbers beside them, texts in the official file, are not used."""
    value = read_json(file)
    if not isinstance(value, dict):
        raise DatasetError(f'{file}: expected an object of "name": "number", found {shorten(value)}')
    return set(value)


def _read_entries(lists: list[Path], malformed: MalformedRows) -> Iterator[_Row]:
    for file in lists:
        for place, entry in read_json_list(file):
            try:
                video_id = text_of(entry, "id")
                has_class = split_of_name(file) != "test" or "template" in entry
                template = text_of(entry, "template") if has_class else None
            except ValueError as error:
                malformed.add(file, place, error)
                continue
            yield file, place, video_id, template.replace("[", "").replace("]", "") if template else None


def _as_records(
    rows: Iterator[_Row],
    known: set[str] | None,
    labels: Path | None,
    files: DatasetFiles,
    malformed: MalformedRows,
    *,
    ending: str,
) -> list[VideoRecord]:
    records: list[VideoRecord] = []
    for file, place, video_id, class_name in rows:
        split = split_of_name(file)
        if not video_id.isdecimal():
            malformed.add(file, place, f"expected a number as id, found {video_id!r}")
        elif not split:
            malformed.add(file, place, "expected train, validation or test in the file's name")
        elif class_name is None and split != "test":
            malformed.add(file, place, f"expected a label for {video_id}, found none")
        elif class_name is not None and known is not None and class_name not in known:
            malformed.add(file, place, f"expected a class of {labels}, found {class_name!r}")
        else:
            path = files.tree.find_name(video_id) or f"{video_id}{ending}"
            records.append(
                VideoRecord(video_id=video_id, source_id=video_id, path=path, split=split, class_name=class_name)
            )
    malformed.refuse()
    return records


_CLIPS = "Side4Video: 8 or 16 frames, frames resized to 256 x 320, test with 3 crops x 2 clips"


def _make_recipe(name: str) -> ExtractionRecipe:
    recipe = make_test_recipe(
        name,
        "Side4Video's of Something-Something",
        clips=2,
        sampling="reference-sth",
        resize="256x320",
        holds_validation_clip=True,  # it stands between the two
    )
    return replace(recipe, augmentation=("randaugment", "crop", "flip"))


V1_READER = DatasetReader(
    name="ssv1",
    read=read_something_v1,
    may_be_mirrored=False,
    facts=DatasetFacts(
        name="ssv1",
        title="Something-Something V1",
        source="20BN-SOMETHING-SOMETHING-V1: frames as JPEG files in 20bn-something-something-v1-??",
        layout=(
            "something-something-v1-{train,validation,test,labels}.csv",
            "ID/00001.jpg, in any folder",
        ),
        counts={"": {"train": 86_017, "val": 11_522, "test": 10_960}},
        num_classes=174,
        clip_settings=_CLIPS,
        recipe=_make_recipe("ssv1"),
        frame_fps=12.0,
    ),
)

V2_READER = DatasetReader(
    name="ssv2",
    read=read_something_v2,
    may_be_mirrored=False,
    facts=DatasetFacts(
        name="ssv2",
        title="Something-Something V2",
        source="Something-Something V2 (Qualcomm AI datasets): 20bn-something-something-v2-?? and the labels archive",
        layout=(
            "something-something-v2-{train,validation,test,labels}.json, or labels/{train,validation,test,labels}.json",
            "ID.webm (or .mp4, or ID/00001.jpg), in any folder",
        ),
        counts={"": {"train": 168_913, "val": 24_777, "test": 27_157}},
        num_classes=174,
        clip_settings=_CLIPS,
        recipe=_make_recipe("ssv2"),
    ),
)
