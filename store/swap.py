"""How the files of a shard get to their places, so that nobody ever reads half of a change.

A writer fills them in a scratch folder of its own. A shard that has no done-marker is moved file by file, its marker
last: without one, nobody reads it. A shard that has one is replaced through a journal:

    _swaps/000123/ARRAY/c.123.0...    the new files, durable; the folder was renamed into place whole
    _swaps/000123/before/000123.*     the old results, rows that get other tokens pending; only if there are such rows
    _swaps/000123/000123.*            the new done-marker: it tells which files the shard has then

From the moment on that this folder is there the change takes place, if need be by the next writer (`finish_swap`). A
reader has the old file or the new one, both whole; a row whose tokens become others is pending meanwhile.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from ..files import kill_point, sync_folder
from .layout import ArraySpec
from .markers import PARTS_NAME, marker_path, read_marker

SWAPS_NAME = "_swaps"
_BEFORE = "before"

Check = Callable[[], None]
"""Raises where another process has taken the store over: called before each change that others see."""


def publish_shard(
    root: Path, scratch: Path, specs: Sequence[ArraySpec], shard: int, marker: Path, files: Sequence[str], check: Check
) -> None:
    """Move the files of a shard that is not marked done to their places, its marker last.

    Args:
        root: The store.
        scratch: Where they were written; durable.
        specs: Of all arrays.
        shard: Which.
        marker: The done-marker, somewhere below `scratch`.
        files: Their names, relative to `scratch` and to the store alike.
        check: See `Check`.
    """
    check()
    for name in shard_files(specs, shard):
        if name in files:
            (scratch / name).replace(root / name)
        else:  # a killed writer, or an earlier state of the shard, has left it
            (root / name).unlink(missing_ok=True)
    for spec in specs:
        sync_folder(root / spec.name)
    kill_point("shard durable")
    check()
    place_marker(root, shard, marker)


def swap_shard(
    root: Path,
    scratch: Path,
    specs: Sequence[ArraySpec],
    shard: int,
    marker: Path,
    files: Sequence[str],
    check: Check,
    *,
    codec_sha256: str,
    before: Path | None = None,
) -> None:
    """Replace a shard that is marked done.

    Args:
        root: The store.
        scratch: Where its new files were written; durable.
        specs: Of all arrays.
        shard: Which.
        marker: The new done-marker, somewhere below `scratch`.
        files: Names of the new files.
        check: See `Check`.
        codec_sha256: Of the store.
        before: A marker with the old results, in which rows that get other tokens are pending.
    """
    folder = scratch / f"{shard:06d}"
    shutil.rmtree(folder, ignore_errors=True)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).replace(folder / name)
    folder.mkdir(exist_ok=True)
    if before is not None:
        (folder / _BEFORE).mkdir()
        before.replace(folder / _BEFORE / before.name)
        sync_folder(folder / _BEFORE)
    marker.replace(folder / marker.name)
    for below in folder.iterdir():
        if below.is_dir():
            sync_folder(below)
    sync_folder(folder)
    kill_point("swap prepared")
    check()
    (root / SWAPS_NAME).mkdir(exist_ok=True)
    folder.rename(root / SWAPS_NAME / folder.name)
    sync_folder(root / SWAPS_NAME)
    kill_point("swap begun")
    _take_places(root, specs, shard, root / SWAPS_NAME / folder.name, files, check)


def find_swaps(root: Path) -> list[int]:
    """Shards whose change has begun and has not ended, ascending."""
    if not (root / SWAPS_NAME).is_dir():
        return []
    return sorted(int(folder.name) for folder in (root / SWAPS_NAME).iterdir() if folder.name.isdecimal())


def finish_swap(root: Path, specs: Sequence[ArraySpec], shard: int, codec_sha256: str, check: Check) -> None:
    """Complete the change of a shard: done again from any point, it comes to the same.

    Raises:
        StoreDamagedError: If the journal's done-marker cannot be read; nothing was changed.
    """
    folder = root / SWAPS_NAME / f"{shard:06d}"
    files: Collection[str] = ()
    if _find_marker(folder, shard) is not None:
        marker = read_marker(folder, shard, codec_sha256, parts="")
        assert marker is not None
        files = marker.files or ()
    _take_places(root, specs, shard, folder, files, check)


def _take_places(
    root: Path, specs: Sequence[ArraySpec], shard: int, folder: Path, files: Collection[str], check: Check
) -> None:
    """Move what a journal holds to its places: old results, files, the new done-marker. Then the journal goes."""
    journal = _find_marker(folder, shard)
    if journal is not None:
        before = _find_marker(folder / _BEFORE, shard)
        if before is not None:
            check()
            place_marker(root, shard, before)
            kill_point("swap pending")
        check()
        for name in shard_files(specs, shard):
            if (folder / name).exists():
                check()
                (folder / name).replace(root / name)
                kill_point("swap moved")
            elif name not in files:
                (root / name).unlink(missing_ok=True)
        for spec in specs:
            sync_folder(root / spec.name)
        check()
        place_marker(root, shard, journal)
    kill_point("swap done")
    shutil.rmtree(folder)
    sync_folder(root / SWAPS_NAME)


def shard_files(specs: Sequence[ArraySpec], shard: int) -> list[str]:
    """Names of all files that a shard may have, relative to the store."""
    return [f"{spec.name}/{key}" for spec in specs for key in spec.shard_keys(shard)]


def place_marker(root: Path, shard: int, marker: Path) -> None:
    """Rename a marker over the one that is there, whatever its kind."""
    old = marker_path(root, shard)
    kill_point(f"before rename of {marker.name}")
    marker.replace(root / PARTS_NAME / marker.name)
    if old.name != marker.name:
        old.unlink(missing_ok=True)
    sync_folder(root / PARTS_NAME)
    kill_point(f"after rename of {marker.name}")


def _find_marker(folder: Path, shard: int) -> Path | None:
    return next((file for file in folder.glob(f"{shard:06d}.*") if file.is_file()), None)
