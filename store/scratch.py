"""Scratch folders: names that no one else uses, a tag that says whose they are. What has no such tag is never removed.

    .STEM.TOKEN.partial/            TOKEN: machine, process, its start, chance
        s4v-scratch.json            the tag: made by s4v, for what, by whom; a counter that moves while it is used
        ...                         what is being made, renamed to its place when it is whole

Removed is only what bears a valid tag, still has the name that it was made with, and whose owner is dead. On this
machine that is known at once; of another one's it is known by the lease under which it was made, or after a day.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..files import kill_point
from ..process_identity import BeatingFile, is_token_alive, make_token, read_record
from .lease import LEASES_NAME

TAG_NAME = "s4v-scratch.json"
_SUFFIX = ".partial"
_MADE_BY = "s4v"
_SURELY_DEAD_S = 24 * 3600.0
"""So long after its last beat, a scratch of another machine is nobody's."""
_TOKEN = r"[0-9a-f]{8}-[0-9a-f]+-[0-9a-f]+-[0-9a-f]{8}"


class Scratch:
    """A folder to make something in, of this process alone; `with` removes it in the end, whatever is still in it."""

    def __init__(self, path: Path, tag: BeatingFile) -> None:
        self.path = path
        self._tag = tag
        tag.start()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove it with all that is in it."""
        self._tag.close()
        _remove_tagged(self.path)

    def leave(self) -> None:
        """Leave it to whoever goes on with it (`take_over_scratch`)."""
        self._tag.leave()


def make_scratch(folder: Path, stem: str, purpose: str, *, lease: str | None = None) -> Scratch:
    """Make a scratch folder.

    Args:
        folder: Where: on the file system that its content is to be renamed on.
        stem: What it is for: the name of what will be made.
        purpose: The command, for others to read.
        lease: The nonce of a lease of the store `folder` under which it is made: without that lease it is dead.

    Raises:
        OSError: If the file system refuses.
    """
    token = make_token()
    path = folder / f".{stem}.{token}{_SUFFIX}"
    path.mkdir()
    kill_point("scratch made")
    try:
        return Scratch(path, _tag(path / TAG_NAME, stem, token, purpose, lease))
    except OSError:
        with suppress(OSError):
            path.rmdir()
        raise


def _tag(file: Path, stem: str, token: str, purpose: str, lease: str | None) -> BeatingFile:
    return BeatingFile(file, purpose, {"nonce": token, "made_by": _MADE_BY, "of": stem, "lease": lease})


def take_over_scratch(folder: Path, stem: str, purpose: str, *, lease: str) -> Scratch | None:
    """Go on with what a dead process has left; None where there is nothing.

    Only under a lease that keeps others from doing the same. Of several leftovers the newest is taken.

    Raises:
        OSError: If the file system refuses.
    """
    dead = sorted(_list_dead(folder, stem), key=lambda path: (path / TAG_NAME).stat().st_mtime_ns)
    if not dead:
        return None
    path = dead[-1]
    token = path.name.removeprefix(f".{stem}.").removesuffix(_SUFFIX)
    fresh = path / f"{TAG_NAME}.fresh"
    fresh.unlink(missing_ok=True)
    tag = _tag(fresh, stem, token, purpose, lease)
    try:
        tag.replace(path / TAG_NAME)
    except OSError:
        tag.remove()
        raise
    return Scratch(path, tag)


def remove_dead_scratch(folder: Path, stem: str) -> None:
    """Remove scratch folders of dead processes for one thing; all else that is there stays."""
    for path in list(_list_dead(folder, stem)):
        _remove_tagged(path)
    for path, token in _list_named(folder, stem):  # killed before it was tagged: empty, if it is ours at all
        if is_token_alive(token) is False and not (path / TAG_NAME).exists():
            with suppress(OSError):
                path.rmdir()


def remove_dead_files(folder: Path) -> None:
    """Remove what killed processes were writing in a folder to be renamed there (`write_atomic`)."""
    for name in _list_names(folder):
        match = re.fullmatch(rf"\..+\.({_TOKEN}){re.escape(_SUFFIX)}", name)
        file = folder / name
        with suppress(OSError):
            if match and file.is_file() and not file.is_symlink() and _is_file_dead(file, match[1]):
                file.unlink()


def is_scratch_name(name: str) -> bool:
    """Whether a name in a store is that of something unfinished, or of leases: not of the store itself."""
    return name == LEASES_NAME or (name.startswith(".") and name.endswith(_SUFFIX))


def _is_file_dead(file: Path, token: str) -> bool:
    is_alive = is_token_alive(token)
    return not is_alive and (is_alive is False or time.time() - file.stat().st_mtime > _SURELY_DEAD_S)


def _list_named(folder: Path, stem: str) -> Iterator[tuple[Path, str]]:
    pattern = re.compile(rf"\.{re.escape(stem)}\.({_TOKEN}){re.escape(_SUFFIX)}")
    for name in _list_names(folder):
        path = folder / name
        if (match := pattern.fullmatch(name)) and path.is_dir() and not path.is_symlink():
            yield path, match[1]


def _list_names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _list_dead(folder: Path, stem: str) -> Iterator[Path]:
    for path, token in _list_named(folder, stem):
        record = read_record(path / TAG_NAME)
        if record is None or record.facts.get("made_by") != _MADE_BY:
            continue
        if record.nonce != token or record.facts.get("of") != stem or record.is_alive:
            continue
        if record.is_alive is False or _has_lost_lease(folder, record.facts.get("lease")) or _is_old(path / TAG_NAME):
            yield path


def _has_lost_lease(store: Path, nonce: object) -> bool:
    if not isinstance(nonce, str) or re.fullmatch(r"[0-9a-f]{32}", nonce) is None:
        return False
    return not (store / LEASES_NAME / f"{nonce}.json").exists()


def _is_old(tag: Path) -> bool:
    with suppress(OSError):
        return time.time() - tag.stat().st_mtime > _SURELY_DEAD_S
    return False


def _remove_tagged(path: Path) -> None:
    """Remove a folder, its tag last: killed in between, the rest still says whose it is."""
    for name in _list_names(path):
        child = path / name
        if name == TAG_NAME:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child, ignore_errors=True)
        else:
            with suppress(OSError):
                child.unlink()
    with suppress(OSError):
        if _list_names(path) == [TAG_NAME]:
            (path / TAG_NAME).unlink()
        path.rmdir()
