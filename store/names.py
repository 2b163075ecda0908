"""Names that come out of a store: judged as text, then followed without links.

A store may come from anyone. A name in its JSON is a text until this module has looked at it: it is relative, it stays
below the store, and nothing on its way is a link. The store's own folder may be one. Only names that s4v itself gives
(`is_known`) are ever copied, written or deleted.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import StoreDamagedError

_MOST_JSON_BYTES = 256 * 2**20
"""A list of hashes of 100,000 shards takes 10 MB."""
_MOST_NAME_CHARACTERS = 255

_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

_KNOWN = re.compile(
    r"(zarr|checksums|stats|fidelity|redone)\.json"
    r"|(videos|captions|moments)\.parquet"
    r"|_parts/(\d{6,12}\.(parquet|arrows?)|joined\.arrows?)"
    r"|(patches|cls|embedding|pixels|ycbcr420)/(zarr\.json|c(\.\d{1,12}){3,7})"
    r"|(cls_)?codec/(zarr\.json|[a-z][a-z_]{0,31}/(zarr\.json|c(\.0){1,4}))"
    r"|head/(zarr\.json|[a-z][a-z0-9_]{0,63}/(zarr\.json|c(\.0){0,2}))"
    r"|text/(zarr\.json|(tokens|mask|embedding|layers|classes)/(zarr\.json|c(\.\d{1,12}){2,4}))",
    re.ASCII,
)


def judge_name(name: object) -> str | None:
    """What is wrong with a name as text; None if nothing is."""
    if not isinstance(name, str):
        return "is not a text"
    if not name or len(name) > _MOST_NAME_CHARACTERS:
        return f"has {len(name)} characters"
    if _CONTROLS.search(name):
        return "has control characters"
    if "\\" in name or ":" in name:
        return "has a backslash or a colon"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "is not a plain path below the store"
    return None


def is_known(name: object) -> bool:
    """Whether a name, relative to a store, is one that s4v gives to a file of it."""
    return judge_name(name) is None and _KNOWN.fullmatch(str(name)) is not None


def locate(root: Path, name: object) -> Path:
    """The path of a name below a store, which may not exist.

    Raises:
        StoreDamagedError: If the name leaves the store, or something on its way is a link.
    """
    if (problem := judge_name(name)) is not None:
        raise StoreDamagedError(
            f"{root} names {_shorten(name)} as one of its files, and that {problem}. Nothing was changed. s4v did not "
            "write that name: take the store from where it came from once more."
        )
    path = root
    for part in str(name).split("/"):
        path = path / part
        if path.is_symlink():
            raise StoreDamagedError(f"{path} {_LINK}")
    return path


def require_file(root: Path, name: str) -> Path:
    """The path of a plain file of a store.

    Raises:
        StoreDamagedError: If it is missing, is a link, or is anything but a plain file.
    """
    path = locate(root, name)
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise StoreDamagedError(f"{path} is missing: {error.strerror}. {_MEND}") from error
    if not stat.S_ISREG(mode):
        raise StoreDamagedError(f"{path} is {_describe_mode(mode)} where a file should be. {_MEND}")
    return path


def is_plain_file(path: Path) -> bool:
    """Whether there is a file that is neither a link nor a pipe, a device or a folder."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def open_file(path: Path) -> int:
    """Open a plain file for reading, and nothing else: no link is followed, no pipe is waited for.

    Returns:
        Its descriptor.

    Raises:
        OSError: As `os.open` does; also where it is a link or no plain file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        kind = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(kind, f"{_describe_mode(mode)} is in its place", os.fspath(path))
    return handle


def read_json(root: Path, name: str, most_bytes: int = _MOST_JSON_BYTES) -> dict[str, Any]:
    """A JSON object out of a store.

    Raises:
        StoreDamagedError: If it is missing, no plain file, too large, nested too deeply, or no JSON object.
    """
    path = require_file(root, name)
    try:
        with os.fdopen(open_file(path), "rb") as file:
            data = file.read(most_bytes + 1)
        if len(data) > most_bytes:
            raise ValueError(f"it is larger than {most_bytes // 2**20} MiB")
        value = json.loads(data.decode("utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
    except RecursionError as error:
        raise StoreDamagedError(f"{path} is not readable as JSON: it is nested too deeply. {_ANEW}") from error
    except (ValueError, OSError) as error:  # not JSON, or not UTF-8
        raise StoreDamagedError(f"{path} is not readable as JSON: {error}. {_ANEW}") from error
    return value


def refuse_links(root: Path) -> None:
    """Refuse a store that holds a link, a pipe or a device, before anything is written to it.

    Raises:
        StoreDamagedError: With the first one.
    """
    for entry in _walk(os.fspath(root)):
        if entry.is_symlink():
            raise StoreDamagedError(f"{entry.path} {_LINK}")
        if not entry.is_file(follow_symlinks=False):
            mode = entry.stat(follow_symlinks=False).st_mode
            raise StoreDamagedError(f"{entry.path} is {_describe_mode(mode)}: a store holds plain files. Remove it.")


def _walk(folder: str) -> Iterator[os.DirEntry[str]]:
    """All that lies below a folder but folders; no link is followed."""
    folders = [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    yield entry


def _describe_mode(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _shorten(name: object) -> str:
    text = ascii(name)
    return text if len(text) <= 80 else f"{text[:77]}..."


_MEND = "The command that began the store mends it, with --repair."
_ANEW = "Extract the store anew."
_LINK = (
    "is a link: inside a store there are none, and s4v follows none. Nothing was changed. Put the file itself there "
    "(the store's own folder may be a link)."
)
