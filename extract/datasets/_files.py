"""Where a data set's annotation files and videos lie: looked for once, then asked by name."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

from ...errors import DataNotFoundError, DatasetError
from .._frames import is_frame_name

VIDEO_ENDINGS = frozenset(
    ".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split()  # noqa: SIM905
)

_ANNOTATION_FOLDERS = ("", "annotations", "labels")
"""Below the root, for every data set."""


class VideoTree:
    """The videos below a folder: files with a video's ending, and folders of numbered JPEGs.

    The folder is walked once, when first needed.
    """

    def __init__(self, root: Path, paths: Iterable[str] | None = None) -> None:
        self.root = root
        self._given = paths

    @cached_property
    def paths(self) -> list[str]:
        """Paths relative to the root, with forward slashes, sorted."""
        # A list may have the whole file system for its root: that is not walked.
        is_walkable = self.root.resolve() != Path(self.root.resolve().anchor)
        return sorted(self._given if self._given is not None else walk_videos(self.root) if is_walkable else ())

    @cached_property
    def _path_set(self) -> frozenset[str]:
        return frozenset(self.paths)

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        found = defaultdict(list)
        for path in self.paths:
            found[name_of(path)].append(path)
        return dict(found)

    @cached_property
    def _by_lower_name(self) -> dict[str, list[str]]:
        found = defaultdict(list)
        for path in self.paths:
            found[name_of(path).lower()].append(path)
        return dict(found)

    @cached_property
    def _by_youtube_id(self) -> dict[str, list[tuple[str, str]]]:
        found = defaultdict(list)
        for path in self.paths:
            youtube_id, times = split_clip_name(name_of(path))
            found[youtube_id].append((times, path))
        return dict(found)

    def holds(self, path: str) -> bool:
        """Whether something lies at a path relative to the root, whatever its ending."""
        # Asking the disk is slow on network drives: what the walk found need not be asked for.
        return ("paths" in self.__dict__ and path in self._path_set) or (self.root / path).exists()

    def find_name(self, name: str, *near: str) -> str | None:
        """The video of this name, whatever its ending and folder; of several the one in the folder `near`."""
        return _best(self._by_name.get(name, ()), near)

    def find_name_in_any_case(self, name: str, *near: str) -> str | None:
        """As `find_name`; where no video has the name, one whose name differs in upper and lower case alone."""
        return self.find_name(name, *near) or _best(self._by_lower_name.get(name.lower(), ()), near)

    def find_clip(self, name: str, *near: str) -> str | None:
        """The video of a clip YOUTUBEID_START_END; a copy whose name drops the times is the same clip."""
        youtube_id, times = split_clip_name(name)
        same_id = self._by_youtube_id.get(youtube_id, ())
        exact = [path for other, path in same_id if other == times]
        return _best(exact or [path for other, path in same_id if not other], near)

    def find_path(self, path: str) -> str | None:
        """The video at a path as a list names it: perhaps without its ending, or below folders of another machine.

        Lists of frame folders fit video files of the same names, and the other way round.
        """
        if self.holds(path):
            return path
        name = name_of(path)
        same_name = self._by_name.get(name, [])
        folders = path.split("/")[:-1]
        if not folders and len(same_name) == 1:
            return same_name[0]
        for first in range(len(folders) + 1):
            above = "/".join(folders[first:])
            if found := [other for other in same_name if other.rpartition("/")[0] == above]:
                return _best(found, ())
        return None


class DatasetFiles:
    """The annotation files and videos of one data set; `folders` are those below the root that may hold annotations."""

    def __init__(
        self,
        root: Path,
        annotations: Path | None = None,
        *,
        folders: Iterable[str] = (),
        tree: VideoTree | None = None,
    ) -> None:
        self.root = root
        self.annotations = annotations
        self.tree = tree or VideoTree(root)
        self._folders = (*_ANNOTATION_FOLDERS, *folders)
        if annotations is not None and not annotations.exists():
            raise DataNotFoundError(f"{annotations} is not there (--annotations)")

    @property
    def named_file(self) -> Path | None:
        """The one annotation file that the user names, if it is not a folder."""
        return self.annotations if self.annotations is not None and self.annotations.is_file() else None

    def list_annotations(self, *patterns: str) -> list[Path]:
        """Annotation files whose names fit one of the patterns, whatever their case, in order of the patterns.

        They are looked for in the root, and in its folders for annotations; or, where the user names a folder of
        annotations, there. Where the user names a file, there is no other.
        """
        if self.named_file is not None:
            return [self.named_file] if _fits(self.named_file, patterns) else []
        base = self.annotations or self.root
        found: dict[Path, None] = {}
        files = [
            file
            for folder in self._folders
            if (base / folder).is_dir()
            for file in sorted(base.joinpath(folder).iterdir())
            if not file.name.startswith(".") and "." in file.name
        ]
        for pattern in patterns:
            found.update((file, None) for file in files if _fits(file, (pattern,)))
        return [file for file in found if file.is_file()]

    def find_annotation(self, *patterns: str) -> Path | None:
        """The first annotation file whose name fits, or None."""
        found = self.list_annotations(*patterns)
        return found[0] if found else None

    def require_annotation(self, *patterns: str) -> Path:
        """The first annotation file whose name fits.

        Raises:
            DataNotFoundError: If there is none.
        """
        found = self.find_annotation(*patterns)
        if found is None:
            wanted = " or ".join(patterns)
            if self.named_file is not None:
                raise DataNotFoundError(
                    f"{self.named_file} needs {wanted} too: name the folder of both (--annotations)"
                )
            base = self.annotations or self.root
            places = ", ".join(str(base / folder) for folder in self._folders)
            raise DataNotFoundError(
                f"expected {wanted} in one of {places}: not there. "
                "Put it there, or name the folder that holds it (--annotations)."
            )
        return found


def _fits(file: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(file.name.lower(), pattern.lower()) for pattern in patterns)


def is_video_name(name: str) -> bool:
    """Whether a file's name ends as a video's does."""
    # By hand: this runs several times for each of 250,000 names.
    return name[name.rfind(".") :].lower() in VIDEO_ENDINGS


def name_of(path: str) -> str:
    """A video's name without folders and without a video's ending."""
    name = path.rpartition("/")[2]
    return name[: name.rfind(".")] if is_video_name(name) else name


def split_clip_name(name: str) -> tuple[str, str]:
    """Cut YOUTUBEID_START_END, six digits each, into id and times; the times are "" where there are none.

    From the right: ids may hold and begin with `_` and `-`.
    """
    times = name[-13:]
    if len(name) > 14 and name[-14] == "_" and times[6] == "_" and (times[:6] + times[7:]).isdecimal():
        return name[:-14], times
    return name, ""


def walk_videos(root: Path) -> Iterator[str]:
    """Paths of all videos relative to root, with forward slashes; links to folders are followed, circles are not.

    A folder that holds numbered JPEGs, and neither videos nor folders, is a video.

    Raises:
        DatasetError: If a folder cannot be read or a name is not UTF-8.
    """
    open_folders = [(os.fspath(root), "", frozenset({_identity(root)}))]
    while open_folders:
        folder, prefix, above = open_folders.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise DatasetError(
                f"the folder {folder} cannot be read: {error.strerror}. Mend it or move it away."
            ) from error
        has_frames = has_others = False
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                has_others = True
                if (identity := _identity(Path(entry.path))) not in above:
                    open_folders.append((entry.path, f"{prefix}{entry.name}/", above | {identity}))
            elif is_video_name(entry.name):
                has_others = True
                yield _printable(f"{prefix}{entry.name}", root)
            elif not has_frames:
                has_frames = is_frame_name(entry.name)
        if has_frames and not has_others and prefix:
            yield _printable(prefix[:-1], root)


def _printable(path: str, root: Path) -> str:
    if not path.isprintable() and any("\ud800" <= c <= "\udfff" for c in path):
        raise DatasetError(f"the name of {path!r} below {root} is not valid UTF-8: rename it")
    return path


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _best(paths: Sequence[str], near: tuple[str, ...]) -> str | None:
    """Of several videos: the one with most of the folders `near` above it, files before folders of frames.

    One in a folder of replacements goes before all: the Kinetics mirror has one for its corrupt files.
    """
    if len(paths) < 2:
        return paths[0] if paths else None

    def rank(path: str) -> tuple[bool, int, bool, str]:
        folders = path.split("/")[:-1]
        is_replacement = any(folder.startswith("replacement") for folder in folders)
        return not is_replacement, -len({*near} & {*folders}), not is_video_name(path), path

    return min(paths, key=rank)
