"""Where a data set's annotation files and videos lie: looked for once, then asked by name."""

from __future__ import annotations

import difflib
import errno
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

from ...errors import DataNotFoundError, DatasetError, EnvironmentFailedError
from ..decode.frame_folder import PICTURE_ENDINGS, is_frame_name
from ._names import check_path, compose, show_name

_FILM_ENDINGS = (
    ".264 .265 .3g2 .3gp .3gp2 .3gpp .amv .apng .asf .avi .bik .cdxl .dav .dif .divx .dv .evo .f4v .flc .fli "
    ".flv .gif .gxf .h264 .h265 .hevc .ifv .ismv .ivf .m1v .m2p .m2t .m2ts .m2v .m4v .mk3d .mkv .mjpeg .mjpg "
    ".mov .mp4 .mp4v .mpe .mpeg .mpg .mpv .mts .mxf .nsv .nut .obu .ogm .ogv .qt .rm .rmvb .roq .smk .tod .tp "
    ".trp .ts .viv .vob .vro .webm .wmv .wtv .xmv .y4m"
)

VIDEO_ENDINGS = frozenset(_FILM_ENDINGS.split())
"""What FFmpeg's demuxers read as films. Not `.dat`, `.mod`, `.ogg` and the like, which are mostly something else."""

PICTURE_VIDEO_ENDINGS = frozenset({".apng", ".gif"})
"""Of them, those of files that are as often pictures beside the videos."""

_LONGEST_ENDING = 10
_STORE_MARK = "zarr.json"
_PICTURE_TAILS = frozenset(ending[-4:] for ending in PICTURE_ENDINGS)
_NOT_OURS = frozenset({errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})

_MOST_LIKE = 3
"""Names that are told where one is not there."""

_ANNOTATION_FOLDERS = ("", "annotations", "labels")
"""Below the root, for every data set."""


@dataclass
class Walk:
    """What lies below a folder."""

    paths: list[str] = field(default_factory=list)
    """Of videos, relative to the folder, with forward slashes."""
    dangling: set[str] = field(default_factory=set)
    """Those of them that are links to nothing, or to themselves."""
    picture_folders: set[str] = field(default_factory=set)
    """Those of them that are folders of numbered pictures."""
    endings: Counter[str] = field(default_factory=Counter)
    """How many other files there are, by ending, hidden ones and the frames of folders aside."""
    misnamed: list[str] = field(default_factory=list)
    """Videos whose names are not UTF-8: the manifest cannot hold them."""
    odd: list[str] = field(default_factory=list)
    """What is called as a video and is neither file nor folder, but a pipe, a socket, a device."""
    unreadable: list[str] = field(default_factory=list)
    """Folders that cannot be read, each with its reason."""


class VideoTree:
    """The videos below a folder: files with a video's ending, and folders of numbered pictures.

    The folder is walked once, when first needed.
    """

    def __init__(self, root: Path, paths: Iterable[str] | None = None) -> None:
        self.root = root
        self._given = paths

    @cached_property
    def walk(self) -> Walk:
        """All that lies below the root."""
        if self._given is not None:
            return Walk(list(self._given))
        # A list may have the whole file system for its root: that is not walked.
        is_walkable = self.root.resolve() != Path(self.root.resolve().anchor)
        return walk_videos(self.root) if is_walkable else Walk()

    @cached_property
    def paths(self) -> list[str]:
        """Paths relative to the root, with forward slashes, sorted."""
        return sorted(self.walk.paths)

    @cached_property
    def _path_set(self) -> frozenset[str]:
        return frozenset(self.paths)

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        by_name = defaultdict(list)
        for path in self.paths:
            by_name[compose(name_of(path))].append(path)
        return dict(by_name)

    @cached_property
    def _by_composed_path(self) -> dict[str, str]:
        return {compose(path): path for path in self.paths}

    @cached_property
    def _by_lower_name(self) -> dict[str, list[str]]:
        by_name = defaultdict(list)
        for path in self.paths:
            by_name[compose(name_of(path)).lower()].append(path)
        return dict(by_name)

    @cached_property
    def _by_youtube_id(self) -> dict[str, list[tuple[str, str]]]:
        by_name = defaultdict(list)
        for path in self.paths:
            youtube_id, times = split_clip_name(name_of(path))
            by_name[youtube_id].append((times, path))
        return dict(by_name)

    @property
    def is_walked(self) -> bool:
        """Whether what lies below the root has been looked at."""
        return "walk" in self.__dict__

    def holds(self, path: str) -> bool:
        """Whether a file or folder lies at a path relative to the root, whatever its ending.

        What the disk does not let us see is there, as far as is known: the decoder will say more of it.
        """
        # Asking the disk is slow on network drives: what the walk found need not be asked for.
        if self.is_walked and path in self._path_set:
            return path not in self.walk.dangling
        try:
            mode = os.stat(f"{os.fspath(self.root)}/{path}").st_mode  # noqa: PTH116
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return False
        except OSError as error:
            return error.errno not in (errno.ELOOP, errno.ENAMETOOLONG)
        return stat.S_ISREG(mode) or stat.S_ISDIR(mode)

    def find_written(self, path: str) -> str:
        """A path as an annotation file writes it -> as the disk spells it; as good as it can be where it is not there.

        Windows parts folders by a backslash, macOS writes an accent behind its letter.
        """
        if "\\" in path and not self.holds(path):
            path = check_path(path.replace("\\", "/"), root=self.root)
        if path.isascii() or self.holds(path):
            return path
        return self._by_composed_path.get(compose(path), path)

    def find_name(self, name: str, *near: str) -> str | None:
        """The video of this name, whatever its ending and folder; of several the one in the folder `near`."""
        return _best(self._by_name.get(compose(name), ()), near)

    def find_name_in_any_case(self, name: str, *near: str) -> str | None:
        """As `find_name`; where no video has the name, one whose name differs in upper and lower case alone."""
        return self.find_name(name, *near) or _best(self._by_lower_name.get(compose(name).lower(), ()), near)

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
        path = compose(path)
        same_name = self._by_name.get(name_of(path), [])
        folders = path.split("/")[:-1]
        if not folders and len(same_name) == 1:
            return same_name[0]
        for first in range(len(folders) + 1):
            above = "/".join(folders[first:])
            if found := [other for other in same_name if compose(other.rpartition("/")[0]) == above]:
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
        self.annotation_files: set[Path] = set()
        """Those that a reader asked for."""
        self._folders = (*_ANNOTATION_FOLDERS, *folders)

    def require_annotations(self) -> None:
        """Refuse annotations that the user names and that are not there.

        Raises:
            DataNotFoundError: In that case.
        """
        if self.annotations is not None and not self.annotations.exists():
            raise DataNotFoundError(
                f"{self.annotations} is not there (--annotations). {_say_what_is(self.annotations)}: correct the path, "
                "or put the annotations there"
            )

    def require_root(self) -> None:
        """Refuse a root that is not there, where annotation files name videos below it.

        Raises:
            DataNotFoundError: In that case.
        """
        if not self.root.is_dir():
            raise DataNotFoundError(
                f"the folder {self.root} is not there (--root): paths in {self.annotations} are relative to it. "
                f"{_say_what_is(self.root)}: name the folder that holds the videos"
            )

    @property
    def named_file(self) -> Path | None:
        """The one annotation file that the user names, if it is not a folder."""
        return self.annotations if self.annotations is not None and self.annotations.is_file() else None

    def list_annotations(self, *patterns: str) -> list[Path]:
        """Annotation files whose names fit one of the patterns, whatever their case, in order of the patterns.

        They are looked for in the root, and in its folders for annotations; or, where the user names a folder of
        annotations, there. Where the user names a file, there is no other.
        """
        paths = self._list_annotations(patterns)
        self.annotation_files.update(paths)
        return paths

    def _list_annotations(self, patterns: tuple[str, ...]) -> list[Path]:
        if self.named_file is not None:
            return [self.named_file] if _fits(self.named_file, patterns) else []
        base = self.annotations or self.root
        paths: dict[Path, None] = {}
        files = [
            file
            for folder in self._folders
            if (base / folder).is_dir()
            for file in sorted(base.joinpath(folder).iterdir())
            if not file.name.startswith(".") and "." in file.name
        ]
        for pattern in patterns:
            paths.update((file, None) for file in files if _fits(file, (pattern,)))
        return [file for file in paths if file.is_file()]

    def find_annotation(self, *patterns: str) -> Path | None:
        """The first annotation file whose name fits, or None."""
        paths = self.list_annotations(*patterns)
        return paths[0] if paths else None

    def require_annotation(self, *patterns: str) -> Path:
        """The first annotation file whose name fits.

        Raises:
            DataNotFoundError: If there is none.
        """
        path = self.find_annotation(*patterns)
        if path is None:
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
        return path


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


def ending_of(name: str) -> str:
    """A file's ending, in lower case; "" where it has none."""
    ending = name[name.rfind(".") :].lower() if "." in name[1:] else ""
    return ending if 1 < len(ending) <= _LONGEST_ENDING and " " not in ending else ""


def walk_videos(root: Path) -> Walk:
    """Find all videos below a folder, and count what else is there; links are followed, circles of them are not.

    A folder that holds numbered pictures, and neither videos nor folders, is a video. Stores are passed over, and so
    is what is hidden.

    Raises:
        DatasetError: If the folder itself cannot be read.
        EnvironmentFailedError: If the machine fails over a folder below it: what is there is not known.
    """
    walk = Walk()
    identity = _identity(os.stat(root))  # noqa: PTH116
    open_folders = [(os.fspath(root), "", frozenset({identity}))]
    while open_folders:
        folder, prefix, above = open_folders.pop()
        try:
            with os.scandir(folder) as scan:
                entries = list(scan)
        except OSError as error:
            if not prefix:
                raise DatasetError(f"the folder {root} cannot be read: {error.strerror} (--root)") from error
            _note_unreadable(walk, prefix, error)
            continue
        _look_through(walk, entries, prefix, above, open_folders)
    return walk


def _look_through(
    walk: Walk,
    entries: Sequence[os.DirEntry[str]],
    prefix: str,
    above: frozenset[tuple[int, int]],
    open_folders: list[tuple[str, str, frozenset[tuple[int, int]]]],
) -> None:
    """Take the videos of one folder, and remember the folders in it."""
    if any(entry.name == _STORE_MARK for entry in entries):
        return
    others: list[str] = []
    has_films = False
    for entry in entries:
        name = entry.name
        if name.startswith("."):
            continue
        if _is_dir(entry):
            has_films = True
            try:
                identity = _identity(entry.stat())
            except OSError as error:
                _note_unreadable(walk, f"{prefix}{name}/", error)
                continue
            if identity not in above:
                open_folders.append((entry.path, f"{prefix}{name}/", above | {identity}))
        elif is_video_name(name):
            has_films = True
            _take(walk, entry, f"{prefix}{name}")
        else:
            others.append(name)
    # Of four million frames not one is looked at by itself: four letters tell how most of them end.
    is_video = not has_films and prefix != "" and any(is_frame_name(name) for name in others)
    if is_video and _has_good_name(walk, prefix[:-1]):
        walk.paths.append(prefix[:-1])
        walk.picture_folders.add(prefix[:-1])
    if is_video and _PICTURE_TAILS.issuperset(name[-4:].lower() for name in others):
        return
    for name in others:
        ending = ending_of(name)
        if not (is_video and ending in PICTURE_ENDINGS):
            walk.endings[ending] += 1


def _take(walk: Walk, entry: os.DirEntry[str], path: str) -> None:
    """Take a file with a video's ending, unless it cannot be a row."""
    try:
        is_file = entry.is_file()
    except OSError as error:  # a link to itself; or one whose target we may not look at, which the decoder will tell
        is_file = error.errno != errno.ELOOP
    if not is_file and os.path.exists(entry.path):  # noqa: PTH110
        walk.odd.append(path)
    elif _has_good_name(walk, path):
        walk.paths.append(path)
        if not is_file:
            walk.dangling.add(path)


def _has_good_name(walk: Walk, path: str) -> bool:
    # What is not UTF-8 stands in Python's names as halves of surrogate pairs.
    is_good = path.isascii() or not any("\ud800" <= character <= "\udfff" for character in path)
    if not is_good:
        walk.misnamed.append(show_name(path))
    return is_good


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that we may not enter
        return False


def _note_unreadable(walk: Walk, prefix: str, error: OSError) -> None:
    """A folder of others, or one that is gone by now, is told; a failing disk stops the listing.

    Raises:
        EnvironmentFailedError: Of the latter.
    """
    if error.errno not in _NOT_OURS:
        raise EnvironmentFailedError(
            f"the folder {error.filename or prefix} cannot be read: {error.strerror}. What is in it is not known. "
            "Nothing was changed. Run the same command again when the disk answers."
        ) from error
    walk.unreadable.append(f"{show_name(prefix[:-1])} ({error.strerror})")


def _identity(status: os.stat_result) -> tuple[int, int]:
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


def _say_what_is(path: Path) -> str:
    """Of a path that is not there as asked: the last folder of it that is, and the most similar names in that."""
    whole = path.absolute()
    folder = next((one for one in whole.parents if one.is_dir()), Path(whole.anchor))
    missing = whole.relative_to(folder).parts[0]
    place = folder / missing
    if place.is_symlink() and not place.exists():
        return f"{place} is a link to nothing"
    if place.exists():
        return f"{place} is a file"
    try:
        names = sorted(one.name for one in folder.iterdir())
    except OSError:  # a folder that may be passed through and not listed
        names = []
    like = difflib.get_close_matches(missing, names, _MOST_LIKE)
    found = f"{', '.join(map(show_name, like))}, and no" if like else "no"
    return f"{folder} holds {found} {show_name(missing)}"
