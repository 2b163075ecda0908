"""The sha256 of every file of a store that Zarr does not checksum: metadata and Parquet."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import StoreDamagedError
from . import manifest
from ._files import hash_file, read_json, wait_for_folder, write_json

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


def forget_checksums(root: Path, names: Collection[str]) -> None:
    """Take files out of the recorded hashes; workers of a cluster do so one after another."""
    with wait_for_folder(root / manifest.PARTS_NAME):
        path = root / CHECKSUMS_NAME
        known = read_json(path) if path.exists() else {}
        left = {name: value for name, value in known.items() if name not in names}
        if left != known:
            write_json(path, left)


def forget_missing_parts(root: Path) -> None:
    """Take done-markers that are gone out of the recorded hashes: their shards are pending, and get other ones."""
    names = [name for name in read_recorded_hashes(root) if name.startswith(f"{manifest.PARTS_NAME}/")]
    there = {file.name for file in (root / manifest.PARTS_NAME).iterdir()}
    if gone := {name for name in names if name.rpartition("/")[2] not in there}:
        forget_checksums(root, gone)


def write_checksums(root: Path, *, without: str | None = None) -> None:
    """Record the hashes of metadata and Parquet files; a file that is as it was recorded stays as it is."""
    path = root / CHECKSUMS_NAME
    known = read_json(path) if path.exists() else {}
    hashes = {}
    for file in sorted([*root.rglob("zarr.json"), *root.rglob("*.parquet")]):
        name = file.relative_to(root).as_posix()
        if name.startswith(APPEND_NAME) or ".partial" in name:
            continue  # not of the store yet
        # Finished parts never change: only the first consolidation after them reads them.
        is_known_part = name in known and name.startswith(manifest.PARTS_NAME)
        if name != without:
            hashes[name] = known[name] if is_known_part else hash_file(file)
    if hashes != known:
        write_json(path, hashes)


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
