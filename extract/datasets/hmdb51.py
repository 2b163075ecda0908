"""HMDB51: one list for each class and split, with a code for each video."""

from __future__ import annotations

from ...errors import DatasetError
from ...store.records import VideoRecord
from ._clips import SMALL_CLIPS
from ._files import DatasetFiles, name_of
from ._names import check_name
from ._rows import MalformedRows, read_lines
from .contract import DatasetFacts, DatasetReader, ReadOptions
from .kinetics import SMALL_RECIPE

# 0: in neither part of this split.
_SPLIT_OF_CODE = {"0": None, "1": "train", "2": "val"}


def read_hmdb51(files: DatasetFiles, options: ReadOptions) -> list[VideoRecord] | None:
    """Read `CLASS_test_splitN.txt`; code 2, the test part, is the split `val`: there is no other held-out one.

    The class is in the list's name. Names of videos hold blanks, `#`, `(`, `)`, `&` and `;`: they are only compared.

    Returns:
        Records of the videos that the split uses, or None where no list is there.

    Raises:
        DatasetError: If rows are malformed, all of them in one message, up to 20.
    """
    ending = f"_test_{options.protocol or 'split1'}"
    if files.find_annotation("*_test_split?.txt") is None:
        return None
    lists = files.list_annotations(f"*{ending}.txt")
    lists = [file for file in lists if file.stem.endswith(ending)]
    if not lists:
        raise DatasetError(
            f"expected lists CLASS{ending}.txt (--protocol {options.protocol}): there are other splits only"
        )
    malformed = MalformedRows()
    records = []
    for file in lists:
        class_name = file.stem.removesuffix(ending)
        for line, text in read_lines(file):
            name, _, code = text.rpartition(" ")
            if not name.strip() or code not in _SPLIT_OF_CODE:
                malformed.add(file, line, f"expected NAME and a code of {', '.join(_SPLIT_OF_CODE)}, found {text!r}")
            elif split := _SPLIT_OF_CODE[code]:
                try:
                    name = check_name(name.strip())
                    check_name(class_name)
                except ValueError as error:
                    malformed.add(file, line, error)
                    continue
                path = files.tree.find_name(name_of(name), class_name) or f"{class_name}/{name}"
                video_id = f"{class_name}/{name_of(name)}"
                records.append(
                    VideoRecord(
                        video_id=video_id, source_id=name_of(name), path=path, split=split, class_name=class_name
                    )
                )
    malformed.refuse()
    return records


READER = DatasetReader(
    name="hmdb51",
    read=read_hmdb51,
    facts=DatasetFacts(
        name="hmdb51",
        title="HMDB51",
        source="HMDB: a large human motion database (Serre lab): hmdb51_org.rar, test_train_splits.rar",
        layout=(
            "testTrainMulti_7030_splits/CLASS_test_split{1,2,3}.txt (or here, or in annotations/, splits/)",
            "CLASS/NAME.avi, in any folder",
        ),
        annotation_folders=("testTrainMulti_7030_splits", "test_train_splits", "splits"),
        counts={f"split{n}": {"train": 3570, "val": 1530} for n in (1, 2, 3)},
        num_classes=51,
        protocols=("split1", "split2", "split3"),
        clip_settings=SMALL_CLIPS,
        recipe=SMALL_RECIPE,
    ),
)
