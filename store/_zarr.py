"""Zarr v3 nodes on disk: arrays through tensorstore, group metadata as JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from ..errors import EnvironmentFailedError, StoreDamagedError
from ..files import describe_bytes, write_json
from . import names
from ._shard_file import DamagedChunkError, read_chunk_file
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
    try:
        return ts.open(
            {"driver": "zarr3", "kvstore": _kvstore(root / spec.name), "metadata": array_metadata(spec), **_WRITE},
            create=True,
            context=_CONTEXT,
        ).result()
    except ValueError as error:
        raise refused_write(root / spec.name, error) from error


def array_metadata(spec: ArraySpec) -> dict[str, Any]:
    """What an array's `zarr.json` says of it."""
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
    return metadata


def require_metadata(root: Path, spec: ArraySpec) -> None:
    """Refuse an array whose `zarr.json` says anything else than the store's layout, before anything is made of it.

    Args:
        root: The store.
        spec: The array as the layout has it; its name is a path below the store.

    Raises:
        StoreDamagedError: If it is missing or unreadable, or its sizes, type, chunks or codecs are others; all named.
    """
    metadata = names.read_json(root, f"{spec.name}/zarr.json", _MOST_METADATA_BYTES)
    expected = {"zarr_format": 3, "node_type": "array", **array_metadata(spec)}
    problems = [
        f"{name} {_shorten(metadata.get(name))}, expected {_shorten(value)}"
        for name, value in expected.items()
        if name != "dimension_names" and _normalise(name, metadata.get(name)) != _normalise(name, value)
    ]
    if metadata.get("storage_transformers"):
        problems.append("storage transformers, which s4v does not read")
    if problems:
        raise StoreDamagedError(
            f"{root / spec.name / 'zarr.json'} is not the array of this store's layout: {'; '.join(problems)}. {_MEND}"
        )


def _normalise(name: str, value: Any) -> Any:
    """A value of an array's metadata with the defaults of the specification written out."""
    if name == "shape":
        return value if isinstance(value, list) and all(type(size) is int for size in value) else None
    if name != "codecs" or not isinstance(value, list):
        return value
    return [_normalise_codec(codec) for codec in value]


def _normalise_codec(codec: Any) -> Any:
    if not isinstance(codec, dict) or not isinstance(codec.get("configuration", {}), dict):
        return None
    configuration = dict(codec.get("configuration", {}))
    if codec.get("name") == "bytes":
        configuration = {"endian": configuration.get("endian", "little")}
    if codec.get("name") == "sharding_indexed":
        configuration.setdefault("index_location", "end")
        for part in ("codecs", "index_codecs"):
            configuration[part] = _normalise("codecs", configuration.get(part))
    return {"name": codec.get("name"), "configuration": configuration}


def _shorten(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def open_array(root: Path, array: str | ArraySpec, *, write: bool = False) -> ts.TensorStore:
    """Open an array below a store's root.

    Args:
        root: The store.
        array: As its layout has it, which is compared with what is there; a name alone opens whatever is there.
        write: Whether to write to it.

    Raises:
        StoreDamagedError: If its metadata is missing, unreadable, or not what the layout says.
    """
    name = array if isinstance(array, str) else array.name
    if isinstance(array, ArraySpec):
        require_metadata(root, array)
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


def describe_small_array(root: Path, name: str, is_possible: Callable[[tuple[int, ...]], bool]) -> ArraySpec:
    """A float32 array of one chunk as its `zarr.json` has it, which is all that tells its shape.

    Args:
        root: The store.
        name: Of the array, a path below the store.
        is_possible: Whether the store's layout allows a shape.

    Raises:
        StoreDamagedError: If it has another shape, type or layout.
    """
    shape = names.read_json(root, f"{name}/zarr.json", _MOST_METADATA_BYTES).get("shape")
    if not isinstance(shape, list) or not all(type(size) is int for size in shape) or not is_possible(tuple(shape)):
        raise StoreDamagedError(
            f"{root / name / 'zarr.json'} has shape {_shorten(shape)}, which the store's layout does not allow. {_MEND}"
        )
    spec = ArraySpec(name=name, shape=tuple(shape), dtype="float32", shard_shape=tuple(max(1, size) for size in shape))
    require_metadata(root, spec)
    return spec


def name_only_chunk(spec: ArraySpec) -> str:
    """The file, relative to the store, of an array that is one chunk."""
    return f"{spec.name}/{'.'.join(['c', *['0'] * len(spec.shape)])}"


def read_small_array(root: Path, name: str, is_possible: Callable[[tuple[int, ...]], bool]) -> np.ndarray:
    """Read a float32 array of one chunk whole.

    Args:
        root: The store.
        name: Of the array, a path below the store.
        is_possible: Whether the store's layout allows a shape.

    Raises:
        StoreDamagedError: If it has another shape or layout, or its bytes do not match their checksum.
    """
    spec = describe_small_array(root, name, is_possible)
    file = names.locate(root, name_only_chunk(spec))
    if not file.exists():
        raise StoreDamagedError(f"{root / name} has lost its chunk. {_MEND}")
    try:
        values = read_chunk_file(file, spec.shape, np.dtype(spec.dtype))
    except DamagedChunkError as error:
        raise StoreDamagedError(f"{root / name} is damaged: {error}. {_MEND}") from error
    if np.isnan(values).any():
        raise StoreDamagedError(f"{root / name} is damaged: it holds NaN. {_MEND}")
    return values


def write_group(folder: Path, attributes: dict[str, Any] | None = None) -> None:
    """Make a folder a Zarr group."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}})


_MOST_METADATA_BYTES = 2**20
_MEND = "The command that began the store mends it, with --repair."

# Chunks equal to the fill value would be dropped: a black frame would look like a missing one.
_WRITE = {"store_data_equal_to_fill_value": True}


def _kvstore(folder: Path) -> dict[str, str]:
    return {"driver": "file", "path": f"{folder.resolve()}/"}


def _bytes_codec(dtype: str) -> dict[str, Any]:
    if np.dtype(dtype).itemsize == 1:
        return {"name": "bytes"}
    return {"name": "bytes", "configuration": {"endian": "little"}}
