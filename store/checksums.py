"""The sha256 of every file of a store that Zarr does not checksum: metadata and Parquet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import StoreDamagedError
from ..files import hash_file, read_json, write_json
from .manifest import CAPTIONS_NAME, MANIFEST_NAME, MOMENTS_NAME
from .markers import PARTS_NAME

CHECKSUMS_NAME = "checksums.json"

APPEND_NAME = "_append"
"""Folder of a store that holds its new metadata while rows are being added."""


def read_recorded_hashes(path: Path) -> dict[str, Any]:
    """The sha256 of every file of a store that Zarr does not checksum, by its name in the store.

    Raises:
        StoreDamagedError: If the list is not readable.
    """
    file = path / CHECKSUMS_NAME
    return read_damageable_json(file) if file.is_file() else {}


def forget_parts(root: Path) -> None:
    """Take all done-markers out of the recorded hashes, where the version before has put some there.

    A marker tells by itself whether it is whole. Its recorded hash would be damage as soon as it is replaced.
    """
    known = read_recorded_hashes(root)
    if any(name.startswith(f"{PARTS_NAME}/") for name in known):
        write_json(root / CHECKSUMS_NAME, {n: v for n, v in known.items() if not n.startswith(f"{PARTS_NAME}/")})


def forget_missing_parts(root: Path) -> None:
    """The same, if a done-marker that was recorded is gone: its shard is pending, and gets another one."""
    names = {name for name in read_recorded_hashes(root) if name.startswith(f"{PARTS_NAME}/")}
    if names and not names <= {f"{PARTS_NAME}/{file.name}" for file in (root / PARTS_NAME).iterdir()}:
        forget_parts(root)


def write_checksums(root: Path, *, without: str | None = None) -> dict[str, str]:
    """Record the hashes of the manifest, captions, moments and all `zarr.json`, where they are not known.

    Args:
        root: The store.
        without: A file to leave out, which is about to change.

    Returns:
        The hashes by file name.
    """
    path = root / CHECKSUMS_NAME
    known = read_json(path) if path.exists() else {}
    # Names with _ or . in front are no part of the store yet, or not any more.
    folders = [folder for folder in root.iterdir() if folder.is_dir() and folder.name[0] not in "_."]
    metadata = [root / "zarr.json"]
    for folder in folders:
        metadata += [folder / "zarr.json", *(below / "zarr.json" for below in _folders_below(folder))]
    hashes = {name: value for name, value in known.items() if name.startswith(f"{PARTS_NAME}/")}
    for file in [*metadata, root / MANIFEST_NAME, root / CAPTIONS_NAME, root / MOMENTS_NAME]:
        name = file.relative_to(root).as_posix()
        if name != without and ".partial" not in name and file.is_file():
            hashes[name] = hash_file(file)
    hashes = dict(sorted(hashes.items()))
    if hashes != known:
        write_json(path, hashes)
    return hashes


def _folders_below(folder: Path) -> list[Path]:
    """Not by a pattern: an array's folder holds a file for each of thousands of shards."""
    with os.scandir(folder) as entries:
        return [Path(entry.path) for entry in entries if entry.is_dir()]


def read_damageable_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file holds something else.

    Raises:
        StoreDamagedError: If it is not JSON.
    """
    try:
        value = read_json(path)
    except ValueError as error:  # not JSON, or not UTF-8
        raise StoreDamagedError(f"{path} is not readable as JSON: {error}. Extract the store anew.") from error
    return value if isinstance(value, dict) else {}
