"""UCF101: three official splits, class numbers from 1."""

from __future__ import annotations

from ...store.records import VideoRecord
from ._clips import SMALL_CLIPS
from ._files import DatasetFiles, name_of
from ._names import check_path
from ._rows import MalformedRows, read_lines
from .contract import DatasetFacts, DatasetReader, ReadOptions
from .kinetics import SMALL_RECIPE


def read_ucf101(files: DatasetFiles, options: ReadOptions) -> list[VideoRecord] | None:
    """Read `trainlist0N.txt` and `testlist0N.txt`; the test list is the split `val`: there is no other held-out one.

    The class is the name in `classInd.txt`. Upper and lower case of folders and names may differ from it.

    Returns:
        Records, or None where the lists are not there.

    Raises:
        DatasetError: If rows are malformed, all of them in one message, up to 20.
    """
    number = (options.protocol or "split1").removeprefix("split")
    if files.find_annotation("trainlist0?.txt", "testlist0?.txt") is None:
        return None
    malformed = MalformedRows()
    class_of_number: dict[str, str] = {}
    class_file = files.require_annotation("classInd.txt")
    for line, text in read_lines(class_file):
        class_number, _, name = text.partition(" ")
        if not class_number.isdecimal() or not name.strip():
            malformed.add(class_file, line, f"expected NUMBER NAME, found {text!r}")
        class_of_number[class_number] = name.strip()
    class_of_name = {name.lower(): name for name in class_of_number.values()}
    records = []
    for split, pattern in (("train", f"trainlist0{number}.txt"), ("val", f"testlist0{number}.txt")):
        file = files.require_annotation(pattern)
        for line, text in read_lines(file):
            path, _, label = text.rpartition(" ") if text.rpartition(" ")[2].isdecimal() else (text, "", "")
            try:
                path = check_path(path.strip()).replace("\\", "/")
            except ValueError as error:
                malformed.add(file, line, error)
                continue
            folder = path.rpartition("/")[0].rpartition("/")[2]
            class_name = class_of_name.get(folder.lower())
            if class_name is None:
                malformed.add(file, line, f"expected CLASS/VIDEO with a class of {class_file}, found {text!r}")
            elif label and class_of_number.get(label) != class_name:
                other = class_of_number.get(label, "no class")
                malformed.add(file, line, f"expected the number of {class_name}, found {label}, which is {other}")
            else:
                video_id = name_of(path)
                found = files.tree.find_name_in_any_case(video_id, folder, class_name)
                records.append(
                    VideoRecord(
                        video_id=video_id, source_id=video_id, path=found or path, split=split, class_name=class_name
                    )
                )
    malformed.refuse()
    return records


READER = DatasetReader(
    name="ucf101",
    read=read_ucf101,
    facts=DatasetFacts(
        name="ucf101",
        title="UCF101",
        source="UCF101 (University of Central Florida): UCF101.rar, UCF101TrainTestSplits-RecognitionTask.zip",
        layout=(
            "ucfTrainTestlist/{classInd,trainlist01,testlist01,..03}.txt (or here, or in annotations/)",
            "CLASS/v_CLASS_gNN_cNN.avi, in any folder",
        ),
        annotation_folders=("ucfTrainTestlist",),
        counts={
            "split1": {"train": 9537, "val": 3783},
            "split2": {"train": 9586, "val": 3734},
            "split3": {"train": 9624, "val": 3696},
        },
        num_classes=101,
        protocols=("split1", "split2", "split3"),
        clip_settings=SMALL_CLIPS,
        recipe=SMALL_RECIPE,
    ),
)
