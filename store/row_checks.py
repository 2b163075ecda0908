"""What rows of a manifest, a done-marker or the captions may say: whole columns at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import StoreDamagedError
from .layout import StoreLayout
from .manifest import INPUT_SCHEMA, RESULT_SCHEMA

_STATUSES = pa.array(["ok", "failed", "pending"])
_TYPES = {field.name: field.type for field in [*INPUT_SCHEMA, *RESULT_SCHEMA]}
_CAPTION_COLUMNS = ("caption_id", "video_id", "text")
_NEVER_NULL = ("video_id", "path", "split", "status")


def check_rows(
    table: pa.Table,
    layout: StoreLayout,
    num_classes: int,
    path: Path,
    num_rows: int,
    columns: list[str] | None = None,
) -> None:
    """Refuse rows that no store has: of other columns or types, or with numbers that the layout does not allow.

    Args:
        table: Some columns of the manifest, or a done-marker.
        layout: The store's.
        num_classes: The store's.
        path: Where the table comes from, for messages.
        num_rows: How many there must be.
        columns: Which were asked for; None for all.

    Raises:
        StoreDamagedError: With what is wrong first.
    """
    if len(table) != num_rows:
        raise _damaged(path, f"it has {len(table)} rows, expected {num_rows}")
    expected = columns if columns is not None else [n for n in RESULT_SCHEMA.names if n in _REQUIRED]
    if missing := [name for name in expected if name not in table.column_names]:
        raise _damaged(path, f"it has no column {', '.join(missing)}")
    for name in table.column_names:
        column = table[name]
        if name in _TYPES and column.type != _TYPES[name]:
            raise _damaged(path, f"its column {name} is of {column.type}, expected {_TYPES[name]}")
        if name in _NEVER_NULL and column.null_count:
            raise _damaged(path, f"its column {name} lacks {column.null_count} values")
    if "status" in table.column_names and not _all(pc.is_in(table["status"], _STATUSES)):
        raise _damaged(path, "a row is neither ok, failed nor pending")
    limits = {
        "label": (0, num_classes - 1),
        "num_cached_frames": (0, layout.num_frames),
        "num_views": (0, layout.num_views),
        "eval_clips": (0, layout.num_frames - 1),
        "validation_clip": (0, layout.num_frames - 1),
    }
    for name, (least, most) in limits.items():
        if name in table.column_names:
            _check_range(table[name], least, most, path, name)
    for name in ("frame_indices", "timestamps_s"):
        if name in table.column_names and "num_cached_frames" in table.column_names:
            _check_lengths(table, name, path)
    if {"views", "augmentations"} <= {*table.column_names}:
        lengths = [pc.list_value_length(table[name]) for name in ("views", "augmentations")]
        if pc.any(pc.not_equal(*lengths)).as_py():
            raise _damaged(path, "its column augmentations has more or fewer entries than a row has views")


def check_captions(table: pa.Table, path: Path, read_ids: Callable[[], Any]) -> None:
    """Refuse captions that are not of a store's rows.

    Args:
        table: The captions.
        path: Where they come from, for messages.
        read_ids: The video ids of the store's rows; not called where there are no captions.

    Raises:
        StoreDamagedError: If columns, types or videos are others.
    """
    for name in _CAPTION_COLUMNS:
        if name not in table.column_names or table[name].type != pa.string() or table[name].null_count:
            raise _damaged(path, f"it must have texts in the column {name}")
    if len(table) and not _all(is_there := pc.is_in(table["video_id"], read_ids().combine_chunks())):
        other = table["video_id"].filter(pc.invert(is_there))[0].as_py()
        raise _damaged(path, f"it has captions of {ascii(other)[:80]}, which is no row of this store")


_REQUIRED = frozenset({"status", "reason", "num_cached_frames", "num_views"})


def _check_range(column: pa.ChunkedArray, least: int, most: int, path: Path, name: str) -> None:
    values = column
    while pa.types.is_list(values.type):
        values = pc.list_flatten(values)
        if values.null_count:
            raise _damaged(path, f"its column {name} lacks {values.null_count} entries")
    extremes = pc.min_max(values).as_py()
    if len(values) and extremes["min"] is not None and not least <= extremes["min"] <= extremes["max"] <= most:
        number = extremes["min"] if extremes["min"] < least else extremes["max"]
        raise _damaged(path, f"its column {name} says {number}, expected {least} to {most}")


def _check_lengths(table: pa.Table, name: str, path: Path) -> None:
    lengths = pc.list_value_length(table[name])
    is_other = pc.not_equal(lengths, table["num_cached_frames"])  # null where either is
    if pc.any(is_other).as_py():
        raise _damaged(path, f"its column {name} has more or fewer entries than a row has frames")


def _all(values: pa.ChunkedArray) -> bool:
    return pc.all(values).as_py() in (True, None)


def _damaged(path: Path, why: str) -> StoreDamagedError:
    return StoreDamagedError(
        f"{path} is not what s4v writes: {why}. Mend it with the command that began the store and --repair, or take "
        "the store from where it came from once more."
    )
