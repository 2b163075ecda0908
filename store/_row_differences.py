"""How the videos of a command differ from those of a store, in words: new, gone, moved, changed."""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..errors import StoreDamagedError
from .reader import StoreReader

_Row = Mapping[str, Any]

_MAX_SHOWN = 3
_MAX_LOOKED_AT = 1000
"""Files whose sizes are asked for: of more, the names must do."""


def list_video_differences(store: StoreReader, inputs: pa.Table, root: str | None = None) -> list[str]:
    """What differs between the rows of a store and those of a command.

    Args:
        store: The store.
        inputs: The input columns of the command's rows.
        root: The folder of its videos, to compare sizes of those that seem to have moved; None compares names alone.

    Returns:
        A part of a message for each kind of difference, with examples.
    """
    old = store.input_columns()
    if old.equals(inputs):
        return []
    here, there = (dict(zip(t["video_id"].to_pylist(), t.to_pylist(), strict=True)) for t in (inputs, old))
    new, gone = here.keys() - there.keys(), there.keys() - here.keys()
    moved = pair_moved({i: there[i] for i in gone}, {i: here[i] for i in new})
    if root is not None:
        moved = _without_other_sizes(moved, here, _read_sizes(store), Path(root))
    parts = []
    if moved:
        shown = ", ".join(f"{before} is {after} now" for before, after in sorted(moved.items())[:_MAX_SHOWN])
        parts.append(
            f"{len(moved)} videos have moved ({shown}): put them back, or links to them (--append would add them a "
            "second time)"
        )
    if new := new - {*moved.values()}:
        parts.append(f"{_count(new)} videos are new (--append adds them)")
    if gone := gone - {*moved}:
        parts.append(f"{_count(gone)} videos are gone")
    return parts + _list_changes(here, there)


def pair_moved(gone: Mapping[str, _Row], new: Mapping[str, _Row]) -> dict[str, str]:
    """Which rows are gone from one path and new at another: the same name of a file, and the same segment of it.

    Args:
        gone: Rows that are in the store alone, by id.
        new: Rows that are in the command alone, by id.

    Returns:
        New ids by old ones. Where several files have one name, those with the most folders in common are a pair; what
        stays ambiguous is none.
    """
    pairs: dict[str, str] = {}
    left, right = dict(gone), dict(new)
    deepest = max((row["path"].count("/") + 1 for row in left.values()), default=0)
    for depth in range(deepest, 0, -1):  # each time over all: linear in rows, also where all have one name
        ids_by_end = [_by_end(rows, depth) for rows in (left, right)]
        for end in ids_by_end[0].keys() & ids_by_end[1].keys():
            before, after = ids_by_end[0][end], ids_by_end[1][end]
            if len(before) == len(after) == 1:
                pairs[before[0]] = after[0]
                del left[before[0]], right[after[0]]
        if not left or not right:
            break
    return pairs


def _by_end(rows: Mapping[str, _Row], depth: int) -> dict[tuple[Any, ...], list[str]]:
    """Ids by the last parts of their path and their segment; paths with fewer parts are left out."""
    ids_by_end = defaultdict(list)
    for video_id, row in rows.items():
        parts = row["path"].rsplit("/", depth)[-depth:]
        if len(parts) == depth:
            ids_by_end[(*parts, row["start_s"], row["end_s"])].append(video_id)
    return ids_by_end


def _read_sizes(store: StoreReader) -> dict[str, int]:
    """Bytes of the files that were decoded, by id, where the store has recorded them."""
    try:
        table = store.read_manifest(["video_id", "source_bytes"])
    except StoreDamagedError:
        return {}
    rows = zip(table["video_id"].to_pylist(), table["source_bytes"].to_pylist(), strict=True)
    return {video_id: size for video_id, size in rows if size is not None}


def _without_other_sizes(
    moved: Mapping[str, str], here: Mapping[str, _Row], sizes: Mapping[str, int], root: Path
) -> dict[str, str]:
    """Without pairs whose file is not as large as the one that was decoded."""
    looked_at = sorted(before for before in moved if before in sizes)[:_MAX_LOOKED_AT]
    others = {
        before
        for before in looked_at
        if (size := _size_of(root / here[moved[before]]["path"])) is not None and size != sizes[before]
    }
    return {before: after for before, after in moved.items() if before not in others}


def _size_of(path: Path) -> int | None:
    """Bytes of a file; None of a folder, and where there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _list_changes(here: Mapping[str, _Row], there: Mapping[str, _Row]) -> list[str]:
    """Rows of both whose columns differ, by the columns."""
    changed: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for video_id in here.keys() & there.keys():
        if here[video_id] != there[video_id]:
            columns = [name for name, value in here[video_id].items() if value != there[video_id][name]]
            # The number of a class changes with every new class: the name is what counts.
            changed[tuple([name for name in columns if name != "label"] or columns)].append(video_id)
    parts = []
    for names, video_ids in sorted(changed.items()):
        first = min(video_ids)
        example = "; ".join(f"{n} {there[first][n]} there, {here[first][n]} here" for n in names[:_MAX_SHOWN])
        parts.append(f"{_count(video_ids)} videos have another {', '.join(names)} ({first}: {example})")
    return parts


def _count(ids: Iterable[str]) -> str:
    ids = sorted(ids)
    return f"{len(ids)} ({', '.join(ids[:_MAX_SHOWN])})"
