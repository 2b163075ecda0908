"""`folder`: a folder for each class, `train/` and `val/` above the classes or a seeded split; or videos alone."""

from __future__ import annotations

from pathlib import Path

from ...errors import DataNotFoundError, DatasetError
from ...store.records import VideoRecord
from ._files import VIDEO_ENDINGS, walk_videos
from ._rows import SPLIT_NAMES

_SPLIT_OF_FOLDER = {
    **SPLIT_NAMES,
    # As mmaction2 names them.
    **{f"{kind}_{split}": split for kind in ("videos", "rawframes") for split in ("train", "val", "test")},
}


def read_folder(root: Path, *, dataset: str = "folder") -> list[VideoRecord]:
    """List the videos below `root`: SPLIT/CLASS/.../VIDEO, or CLASS/.../VIDEO with the split left open.

    Of `folder` they may all lie in no class folder, as an archive to search: they have no class then.

    Args:
        root: The folder. Hidden files and files without a video's ending are ignored; a folder of numbered JPEGs is
            a video.
        dataset: Name for messages.

    Raises:
        DataNotFoundError: If the folder is not there.
        DatasetError: If it holds no video, or videos outside a class folder beside others in one.
    """
    if not root.is_dir():
        files = "" if dataset == "folder" else f" `s4v datasets {dataset}` says which files its annotations come in."
        raise DataNotFoundError(
            f"the videos of {dataset!r} were expected in {root}: no such folder. "
            f"Put them there as {root}/{{train,val}}/CLASS/VIDEO.mp4 or CLASS/VIDEO.mp4, or name another --root.{files}"
        )
    paths = sorted(walk_videos(root))
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
    for path in paths:
        folders = path.split("/")[:-1]
        split = _SPLIT_OF_FOLDER[folders.pop(0).lower()] if has_splits and folders else ""
        records.append(VideoRecord(video_id=path, path=path, split=split, class_name=folders[0] if folders else None))
    homeless = [record.path for record in records if record.class_name is None]
    if homeless and (len(homeless) < len(records) or dataset != "folder"):
        raise DatasetError(
            f"{len(homeless)} videos below {root} lie in no class folder: {', '.join(homeless[:3])}. "
            "Put each into a folder named after its class, or list them in a table (--dataset table)."
        )
    return records
