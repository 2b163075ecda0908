"""What a store holds, as plain figures: rows, arrays, bytes."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import Any, get_args

import pyarrow as pa

from ..errors import StoreDamagedError
from .fidelity import read_fidelity
from .reader import StoreReader
from .records import Status
from .texts import TEXT_NAME, TextReader, has_current_texts


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Rows of a store, and the files that they are of: segments of one file are rows of their own."""

    rows: dict[str, int]
    """By status: ok, failed, pending."""
    files: dict[str, int]
    """Files with a row of that status."""


def count_rows(store: StoreReader) -> RowCounts:
    """Count the rows of a store, and their files, as it is now."""
    return count_table(store.read_manifest(["path", "status"]))


def try_count_rows(store: StoreReader) -> RowCounts | None:
    """The same; None where the manifest is damaged."""
    try:
        return count_rows(store)
    except StoreDamagedError:
        return None


def count_statuses(store: StoreReader) -> dict[str, int]:
    """Count the rows of a store by status alone, which is less to read."""
    return _by_status(store.read_manifest(["status"]).group_by("status").aggregate([("status", "count")]))


def count_table(table: pa.Table) -> RowCounts:
    """Count rows and files of a manifest's columns path and status."""
    files = table.select(["path", "status"]).group_by("status").aggregate([("path", "count_distinct")])
    rows = table.group_by("status").aggregate([("status", "count")])
    return RowCounts(_by_status(rows), _by_status(files))


def _by_status(counts: pa.Table) -> dict[str, int]:
    """A table of statuses and one count as a dict, with zeros for statuses that no row has."""
    (name,) = set(counts.column_names) - {"status"}
    found = dict(zip(counts["status"].to_pylist(), counts[name].to_pylist(), strict=True))
    return {status: found.get(status, 0) for status in get_args(Status)}


def count_reasons(table: pa.Table, status: Status) -> dict[str, int]:
    """How many rows of a status have a reason, by its code, the most frequent first.

    Args:
        table: A manifest's columns status and reason.
        status: Rows that are pending may have a reason, too: the machine failed, not the video.
    """
    reasons = table.filter(pa.compute.equal(table["status"], status))["reason"].to_pylist()
    return dict(Counter(reason.partition(":")[0] for reason in reasons if reason).most_common())


def describe_store(store: StoreReader) -> dict[str, Any]:
    """Count a store's rows and bytes.

    Returns:
        rows (and files) by status, rows by split, failures and pending rows by reason code, arrays with shape, dtype
        and bytes on disk, bytes of one cached frame, backbone, codec and what it costs (fidelity; None where that is
        not known), layers, frames, sampling, resize, classes, captions.
    """
    table = store.read_manifest(["path", "split", "status", "reason", "num_cached_frames", "num_views"])
    attributes, facts = store.attributes, store.facts
    by_split: dict[str, dict[str, int]] = {}
    for split, status in zip(table["split"].to_pylist(), table["status"].to_pylist(), strict=True):
        counts = by_split.setdefault(split, {"ok": 0, "failed": 0, "pending": 0})
        counts[status] += 1
    totals = count_table(table)
    arrays = {
        spec.name: {
            "shape": list(spec.shape),
            "dtype": spec.dtype,
            "bytes": _folder_bytes(os.fspath(store.path / spec.name)),
        }
        for spec in store.layout.array_specs()
    }
    views = zip(table["num_cached_frames"].to_pylist(), table["num_views"].to_pylist(), strict=True)
    if has_current_texts(store.path):
        for name, array in TextReader(store).describe().items():
            folder = os.fspath(store.path / TEXT_NAME / name)
            arrays[f"{TEXT_NAME}/{name}"] = {**array, "bytes": _folder_bytes(folder)}
    return {
        "store": str(store.path),
        "format_version": facts.format_version,
        "created": facts.created,
        "dataset": attributes["dataset"],
        "videos": totals.rows,
        "files": totals.files,
        "splits": by_split,
        "failures": count_reasons(table, "failed"),
        "pending_reasons": count_reasons(table, "pending"),
        "cached_frames": sum((frames or 0) * (num_views or 0) for frames, num_views in views),
        "arrays": arrays,
        "bytes": _folder_bytes(os.fspath(store.path)),
        "bytes_per_frame": store.layout.bytes_per_frame,
        "backbone": attributes["backbone"],
        "layers": list(store.layout.layers),
        "frames": attributes["frames"],
        "sampling": facts.sampling,
        "resize": facts.resize,
        "codec": {
            **attributes["codec"],
            "channels": store.layout.channels,
            "width": store.layout.width,
            "keep_bits": store.layout.keep_bits,
        },
        "fidelity": read_fidelity(store.path),
        "classes": len(store.classes.names),
        "captions": len(store.read_captions()),
        "libraries": attributes["libraries"],
    }


def _folder_bytes(folder: str) -> int:
    """Bytes of all files below a folder."""
    total = 0
    if not os.path.isdir(folder):  # noqa: PTH112
        raise StoreDamagedError(f"{folder} is missing. Extract the store anew (--overwrite).")
    with os.scandir(folder) as entries:
        for entry in entries:
            is_folder = entry.is_dir(follow_symlinks=False)  # a link to a folder above would never end
            total += _folder_bytes(entry.path) if is_folder else entry.stat(follow_symlinks=False).st_size
    return total
