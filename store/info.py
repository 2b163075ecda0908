"""What a store holds, as plain figures: rows, arrays, bytes."""

from __future__ import annotations

import os
from typing import Any

from ..errors import StoreDamagedError
from .fidelity import read_fidelity
from .reader import StoreReader
from .texts import TEXT_NAME, TextReader, has_current_texts


def describe_store(store: StoreReader) -> dict[str, Any]:
    """Count a store's rows and bytes.

    Returns:
        rows by status and by split, failures by reason code, arrays with shape, dtype and bytes on disk, bytes of one
        cached frame, backbone, codec and what it costs (fidelity; None where that is not known), layers, frames,
        sampling, resize, classes, captions.
    """
    table = store.read_manifest(["split", "status", "reason", "num_cached_frames", "num_views"])
    attributes = store.attributes
    by_split: dict[str, dict[str, int]] = {}
    for split, status in zip(table["split"].to_pylist(), table["status"].to_pylist(), strict=True):
        counts = by_split.setdefault(split, {"ok": 0, "failed": 0, "pending": 0})
        counts[status] += 1
    failures: dict[str, int] = {}
    for status, reason in zip(table["status"].to_pylist(), table["reason"].to_pylist(), strict=True):
        if status == "failed":
            code = (reason or "unknown").partition(":")[0]
            failures[code] = failures.get(code, 0) + 1
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
        "format_version": attributes["format_version"],
        "created": attributes["created"],
        "dataset": attributes["dataset"],
        "videos": {status: sum(c[status] for c in by_split.values()) for status in ("ok", "failed", "pending")},
        "splits": by_split,
        "failures": dict(sorted(failures.items(), key=lambda item: -item[1])),
        "cached_frames": sum((frames or 0) * (num_views or 0) for frames, num_views in views),
        "arrays": arrays,
        "bytes": _folder_bytes(os.fspath(store.path)),
        "bytes_per_frame": store.layout.bytes_per_frame,
        "backbone": attributes["backbone"],
        "layers": list(store.layout.layers),
        "frames": attributes["frames"],
        "sampling": attributes["sampling"],
        "resize": attributes["resize"],
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
