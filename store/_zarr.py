"""Zarr v3 nodes on disk: arrays through tensorstore, group metadata as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from ..errors import EnvironmentFailedError, StoreDamagedError
from ._files import describe_bytes, write_json
from .layout import ArraySpec

# tensorstore's default takes a lock file, leaves it behind when killed, and later reuses it without truncating:
# a corrupt shard then gets renamed into place without an error. Shards are disjoint, no lock is needed.
_CONTEXT = ts.Context({"file_io_locking": {"mode": "none"}})

_CHECKSUM = {"name": "crc32c"}
# First and second bytes of all values apart: a fifth smaller and more than plain zstd (docs/decisions.md).
_COMPRESSION = {
    "float16": {
        "name": "blosc",
        "configuration": {"cname": "zstd", "clevel": 3, "shuffle": "shuffle", "typesize": 2, "blocksize": 0},
    }
}


def fill_value_of(dtype: str) -> Any:
    """What a missing chunk reads as: a value that no written token has (pixels have no such value)."""
    if dtype == "int8":
        return -128
    if dtype == "bool":
        return False
    return "NaN" if dtype.startswith("float") else 0


def create_array(root: Path, spec: ArraySpec) -> ts.TensorStore:
    """Create an empty array below a store's root."""
    plain = [_bytes_codec(spec.dtype), _CHECKSUM]
    chunk_codecs = [plain[0], _COMPRESSION[spec.dtype], _CHECKSUM] if spec.is_compressed else plain
    codecs: list[dict[str, Any]] = chunk_codecs
    if spec.chunk_shape is not None:
        codecs = [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": list(spec.chunk_shape),
                    "codecs": chunk_codecs,
                    "index_codecs": [_bytes_codec("uint64"), _CHECKSUM],
                    "index_location": "end",
                },
            }
        ]
    metadata: dict[str, Any] = {
        "shape": list(spec.shape),
        "data_type": spec.dtype,
        "fill_value": fill_value_of(spec.dtype),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(spec.shard_shape)}},
        # With "." an array is one folder, not five nested ones for each shard.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": codecs,
    }
    if spec.dimension_names:
        metadata["dimension_names"] = list(spec.dimension_names)
    try:
        return ts.open(
            {"driver": "zarr3", "kvstore": _kvstore(root / spec.name), "metadata": metadata, **_WRITE},
            create=True,
            context=_CONTEXT,
        ).result()
    except ValueError as error:
        raise refused_write(root / spec.name, error) from error


def open_array(root: Path, name: str, *, write: bool = False) -> ts.TensorStore:
    """Open an array below a store's root.

    Raises:
        StoreDamagedError: If its metadata is missing or unreadable.
    """
    spec = {"driver": "zarr3", "kvstore": _kvstore(root / name), **(_WRITE if write else {})}
    try:
        return ts.open(spec, open=True, read=True, write=write, context=_CONTEXT).result()
    except ValueError as error:
        raise StoreDamagedError(
            f"{root / name} does not open as a Zarr array: {error}. Extract the store anew (--overwrite)."
        ) from error


def write_small_array(root: Path, name: str, values: np.ndarray) -> None:
    """Write an array of one chunk, with its checksum."""
    values = np.asarray(values)
    shape = tuple(max(1, size) for size in values.shape)
    array = create_array(root, ArraySpec(name=name, shape=values.shape, dtype=values.dtype.name, shard_shape=shape))
    try:
        array.write(values).result()
    except ValueError as error:
        raise refused_write(root / name, error) from error


def refused_write(path: Path, error: ValueError | OSError, *, needed: int | None = None) -> EnvironmentFailedError:
    """What the file system refused, itself or through tensorstore, in one clear line; `needed` bytes were to come."""
    why = str(error)
    for said, short in (("No space left", "no space left"), ("quota exceeded", "the disk quota is used up")):
        if said in why:
            why = short if needed is None else f"{short}; it needs {describe_bytes(needed)}"
    return EnvironmentFailedError(
        f"{path} could not be written: {why}. Finished shards are kept: mend that, and the same command continues."
    )


def read_small_array(root: Path, name: str) -> np.ndarray:
    """Read an array whole.

    Raises:
        StoreDamagedError: If its bytes do not match their checksum.
    """
    try:
        values = open_array(root, name).read().result()
    except ValueError as error:
        raise StoreDamagedError(f"{root / name} is damaged: {error}. Extract the store anew.") from error
    if np.isnan(values).any():
        raise StoreDamagedError(f"{root / name} has lost its chunk. Extract the store anew (--overwrite).")
    return values


def write_group(folder: Path, attributes: dict[str, Any] | None = None) -> None:
    """Make a folder a Zarr group."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}})


# Chunks equal to the fill value would be dropped: a black frame would look like a missing one.
_WRITE = {"store_data_equal_to_fill_value": True}


def _kvstore(folder: Path) -> dict[str, str]:
    return {"driver": "file", "path": f"{folder.resolve()}/"}


def _bytes_codec(dtype: str) -> dict[str, Any]:
    if np.dtype(dtype).itemsize == 1:
        return {"name": "bytes"}
    return {"name": "bytes", "configuration": {"endian": "little"}}
