"""`folder`: a folder for each class, `train/` and `val/` above the classes or a held-out share; or videos alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ...errors import DataNotFoundError, DatasetError
from ...store.records import VideoRecord
from ._files import PICTURE_VIDEO_ENDINGS, VIDEO_ENDINGS, DatasetFiles, VideoTree, ending_of
from ._names import SPLIT_NAMES, fold_split
from .contract import DatasetReader, ReadOptions

# As mmaction2 names folders of splits: videos_train, rawframes_val.
_KINDS = ("videos_", "rawframes_")

_log = logging.getLogger(__name__)


def read_folder(tree: VideoTree, *, dataset: str = "folder", with_classes: bool = True) -> list[VideoRecord]:
    """List the videos of a tree: SPLIT/CLASS/.../VIDEO, or CLASS/.../VIDEO with the split left open.

    Of `folder` they may all lie in no class folder, as an archive to search: they have no class then. So it is where
    some lie in folders and some do not, and there are no folders of splits: a warning says so.

    Args:
        tree: The folder. Hidden files and files without a video's ending are ignored; a folder of numbered pictures
            is a video.
        dataset: Name for messages.
        with_classes: Whether folders are classes.

    Raises:
        DataNotFoundError: If the folder is not there.
        DatasetError: If it holds no video, or folders of splits hold some videos in class folders and some in none.
    """
    root = tree.root
    if not root.is_dir():
        files = "" if dataset == "folder" else f" `s4v datasets {dataset}` says which files its annotations come in."
        raise DataNotFoundError(
            f"the videos of {dataset!r} were expected in {root}: no such folder. "
            f"Put them there as {root}/{{train,val}}/CLASS/VIDEO.mp4 or CLASS/VIDEO.mp4, or name another --root.{files}"
        )
    paths = _leave_out_pictures(tree) if with_classes else tree.paths
    if not paths:
        raise DatasetError(
            f"{root} holds no video: expected {root}/{{train,val}}/CLASS/VIDEO or CLASS/VIDEO "
            f"with one of the endings {' '.join(sorted(VIDEO_ENDINGS))}."
        )
    tops = {path.split("/")[0] for path in paths}
    others = sorted(top for top in tops if _split_of_folder(top) is None)
    if with_classes and {"train", "val"} <= {_split_of_folder(top) for top in tops} and others:
        raise DatasetError(
            f"{root} holds training and validation folders, and videos beside them in {', '.join(others[:3])}. "
            "Move those elsewhere, list the videos in a table (--dataset table), or take all of them for an archive "
            "without classes (--no-classes)."
        )
    # All or nothing: with "test" as a class among others, it is a class.
    has_splits = not others
    records = []
    for path in paths:
        folders = path.split("/")[:-1]
        split = _split_of_folder(folders.pop(0)) if has_splits and folders else None
        class_name = folders[0] if folders and with_classes else None
        records.append(VideoRecord(video_id=path, path=path, split=split or "", class_name=class_name))
    homeless = [record.path for record in records if record.class_name is None]
    is_mixed = with_classes and 0 < len(homeless) < len(records)
    if is_mixed and not has_splits and dataset == "folder":
        _log.warning(
            "%d of %d videos below %s lie in no folder (%s): taken for an archive, whose videos have no classes. "
            "If its folders are classes, move these into one.",
            *(len(homeless), len(records), root, _name_some(homeless)),
        )
        return read_folder(tree, dataset=dataset, with_classes=False)
    if is_mixed or (homeless and dataset != "folder"):
        hint = ", or take no classes (--no-classes)" if dataset == "folder" else ""
        raise DatasetError(
            f"{len(homeless)} videos below {root} lie in no class folder: {', '.join(homeless[:3])}. "
            f"Put each into a folder named after its class, list them in a table (--dataset table){hint}."
        )
    return records


def _split_of_folder(name: str) -> str | None:
    """The split that a folder's name tells; None where it is no split's name."""
    lower = name.strip().lower()
    for kind in _KINDS:
        lower = lower.removeprefix(kind)
    return fold_split(lower) if lower in SPLIT_NAMES else None


def _leave_out_pictures(tree: VideoTree) -> list[str]:
    """Without pictures that lie in no folder where all else does: a banner or a figure is no reason to drop classes."""
    homeless = [path for path in tree.paths if "/" not in path]
    pictures = {
        path for path in homeless if path in tree.walk.picture_folders or ending_of(path) in PICTURE_VIDEO_ENDINGS
    }
    if not pictures or len(pictures) < len(homeless) or len(homeless) == len(tree.paths):
        return tree.paths
    _log.warning(
        "%d pictures or folders of pictures in no class folder were not taken for videos: %s (--no-classes takes them)",
        *(len(pictures), _name_some(sorted(pictures))),
    )
    return [path for path in tree.paths if path not in pictures]


def _name_some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")


def _read(files: DatasetFiles, options: ReadOptions) -> list[VideoRecord]:
    files.require_annotations()
    return read_folder(files.tree, with_classes=options.with_classes)


READER = DatasetReader(name="folder", read=_read, takes_annotations=False, takes_archives=True)
