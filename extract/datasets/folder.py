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
    tops = {path.split("/")[0] for path in paths}
    others = sorted(top for top in tops if top.lower() not in _SPLIT_OF_FOLDER)
    if {"train", "val"} <= {_SPLIT_OF_FOLDER.get(top.lower()) for top in tops} and others:
        raise DatasetError(
            f"{root} holds training and validation folders, and videos beside them in {', '.join(others[:3])}. "
            "Move those elsewhere, or list the videos in a table (--dataset table)."
        )
    # All or nothing: with "test" as a class among others, it is a class.
    has_splits = not others
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
    """Paths of all videos relative to root, with forward slashes; links to folders are followed, circles are not."""
    open_folders = [(os.fspath(root), "", frozenset({_identity(root)}))]
    while open_folders:
        folder, prefix, above = open_folders.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise DatasetError(
                f"the folder {folder} cannot be read: {error.strerror}. Mend it or move it away."
            ) from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if (identity := _identity(Path(entry.path))) not in above:
                    open_folders.append((entry.path, f"{prefix}{entry.name}/", above | {identity}))
            elif os.path.splitext(entry.name)[1].lower() in VIDEO_ENDINGS:  # noqa: PTH122
                path = f"{prefix}{entry.name}"
                if not path.isprintable() and any("\ud800" <= c <= "\udfff" for c in path):
                    raise DatasetError(f"the name of {path!r} below {root} is not valid UTF-8: rename it")
                yield path


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
