"""`folder`: a folder for each class, `train/` and `val/` above the classes or a seeded split."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ...errors import DataNotFoundError, DatasetError
from ...store.records import VideoRecord

VIDEO_ENDINGS = frozenset(
    ".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split()  # noqa: SIM905
)

_SPLIT_OF_FOLDER = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "test": "test",
}


def read_folder(root: Path, *, dataset: str = "folder") -> list[VideoRecord]:
    """List the videos below `root`: SPLIT/CLASS/.../VIDEO, or CLASS/.../VIDEO with the split left open.

    Args:
        root: The folder. Hidden files and files without a video's ending are ignored.
        dataset: Name for messages.

    Raises:
        DataNotFoundError: If the folder is not there.
        DatasetError: If it holds no video, or videos outside a class folder.
    """
    if not root.is_dir():
        raise DataNotFoundError(
            f"the videos of {dataset!r} were expected in {root}: no such folder. "
            f"Put them there as {root}/{{train,val}}/CLASS/VIDEO.mp4 or CLASS/VIDEO.mp4, or name another --root."
        )
    paths = sorted(_walk(root))
    if not paths:
        raise DatasetError(
            f"{root} holds no video: expected {root}/{{train,val}}/CLASS/VIDEO or CLASS/VIDEO "
            f"with one of the endings {' '.join(sorted(VIDEO_ENDINGS))}."
        )
    # All or nothing: with "test" as a class among others, it is a class.
    has_splits = all(path.split("/")[0].lower() in _SPLIT_OF_FOLDER for path in paths)
    records = []
    homeless = []
    for path in paths:
        folders = path.split("/")[:-1]
        split = _SPLIT_OF_FOLDER[folders.pop(0).lower()] if has_splits and folders else ""
        if not folders:
            homeless.append(path)
            continue
        records.append(VideoRecord(video_id=path, path=path, split=split, class_name=folders[0]))
    if homeless:
        raise DatasetError(
            f"{len(homeless)} videos below {root} lie in no class folder: {', '.join(homeless[:3])}. "
            "Put each into a folder named after its class, or list them in a table (--dataset table)."
        )
    return records


def _walk(root: Path) -> Iterator[str]:
    """Paths of all videos relative to root, with forward slashes; links to folders are followed."""
    for folder, names, files in os.walk(root, followlinks=True):
        names[:] = [name for name in names if not name.startswith(".")]
        for file in files:
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in VIDEO_ENDINGS:  # noqa: PTH122
                yield os.path.relpath(os.path.join(folder, file), root).replace(os.sep, "/")  # noqa: PTH118
