"""Files that are either whole or not there: atomic writes, hashes, and JSON."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .process_identity import make_token

_MOST_OF_A_NAME = 40
"""Characters of a file's name in the name of what is to become it: a name has 255 bytes at most."""

_passed: Counter[str] = Counter()


def kill_point(name: str) -> None:
    """A place where tests kill this process: `S4V_KILL_AT="NAME COUNT"` does, at the COUNT-th passing."""
    if "S4V_KILL_AT" not in os.environ:
        return
    _passed[name] += 1
    if os.environ["S4V_KILL_AT"] == f"{name} {_passed[name]}":
        os.kill(os.getpid(), signal.SIGKILL)


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, make it durable, and rename it to `path`.

    A process killed at any moment leaves the old file or the new one, never a part of either. What it was still filling
    has a name that no one else uses: `scratch.remove_dead_files` knows whose it was.
    """
    temporary = path.with_name(f".{path.name[:_MOST_OF_A_NAME]}.{make_token()}.partial")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        kill_point(f"before rename of {path.name}")
        temporary.replace(path)
        kill_point(f"after rename of {path.name}")
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_durable(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file that nobody else knows of yet, and make it durable."""
    write(path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable; systems without folder handles (Windows) do it by themselves."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read one JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def describe_bytes(size: float) -> str:
    """`4.5 TB`, `12.0 kB`, `7 B`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def parse_bytes(text: str) -> int:
    """`200GB`, `1.5 TiB` or a number of bytes.

    Raises:
        ValueError: If it is none.
    """
    from dask.utils import parse_bytes as parse  # which takes a moment

    try:
        return int(parse(text))
    except (ValueError, OverflowError):
        raise ValueError(f"expected a size such as 200GB, found {text!r}") from None


def hash_file(path: Path) -> str:
    """The sha256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_text(text: str) -> str:
    """The sha256 of a text's UTF-8 bytes, as hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()
