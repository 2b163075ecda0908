"""Done-markers: one small file for each finished shard, with its rows' results, renamed into place after its data.

    _parts/000123.arrows    results as an Arrow IPC stream, and behind it the sha256 of that stream
    _parts/000123.parquet   the same in stores of format 1
    _parts/joined.arrows    which markers the manifest holds already; made anew wherever it does not fit

A marker says which files its shard has and what they hold (`files`): a shard and a marker that do not belong together,
as two writers at once would leave them, are told from each other. A row in it may be pending, with a reason: then its
shard is not done, and the next run does that row.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import StoreDamagedError
from ..files import write_atomic, write_durable
from .manifest import PART_SCHEMA, read_results, read_table, result_table, with_later_columns
from .names import is_known, open_file
from .records import VideoResult

PARTS_NAME = "_parts"
JOINED_NAME = "joined.arrows"

_CODEC_KEY = b"codec_sha256"
_FILES_KEY = b"files"
_MANIFEST_KEY = b"manifest_sha256"
_ARROW, _PARQUET = ".arrows", ".parquet"
_HASH_BYTES = 32
_JOINED_SCHEMA = pa.schema([("shard", pa.int64()), ("inode", pa.uint64()), ("mtime_ns", pa.int64())])

MarkerState = tuple[int, int]
"""Inode and time of the last change: tells one done-marker from another one in its place."""


@dataclass(frozen=True, slots=True)
class Marker:
    """What a done-marker says."""

    results: pa.Table
    """video_id and result columns, one row for each row that the shard had when it was written."""
    files: dict[str, str] | None = field(default=None)
    """Fingerprint by file name, relative to the store; None in markers from before there were any."""

    @property
    def statuses(self) -> list[str]:
        """Of its rows."""
        return self.results["status"].to_pylist()

    def as_results(self) -> list[VideoResult]:
        """Its rows as dataclasses."""
        return read_results(self.results)


def marker_path(root: Path, shard: int, *, parts: str = PARTS_NAME) -> Path:
    """Where the done-marker of a shard lies, or would lie: in the store's folder of them, or in another one."""
    old, new = (root / parts / f"{shard:06d}{ending}" for ending in (_PARQUET, _ARROW))
    return old if not new.exists() and old.exists() else new


def find_markers(root: Path) -> dict[int, MarkerState]:
    """The shards that have a done-marker, ascending, and which one."""
    states: dict[int, MarkerState] = {}
    with suppress(FileNotFoundError), os.scandir(root / PARTS_NAME) as entries:
        for entry in entries:
            stem, dot, ending = entry.name.partition(".")
            if stem.isdecimal() and dot + ending in (_ARROW, _PARQUET):
                with suppress(FileNotFoundError):  # replaced meanwhile
                    stat = entry.stat()
                    states[int(stem)] = stat.st_ino, stat.st_mtime_ns
    return dict(sorted(states.items()))


def read_marker_state(root: Path, shard: int) -> MarkerState | None:
    """Which done-marker a shard has; None where it has none."""
    try:
        state = marker_path(root, shard).stat()
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_mtime_ns


def is_undone(root: Path, shard: int, handed_out: MarkerState | None) -> bool:
    """Whether nobody has finished a shard since it was handed out, with that marker or none."""
    return read_marker_state(root, shard) in (None, handed_out)


def make_marker(
    folder: Path,
    shard: int,
    results: Sequence[VideoResult],
    codec_sha256: str,
    files: Mapping[str, str],
    format_version: int,
) -> Path:
    """Write a done-marker into a folder that is not the store's own, to be renamed into the store.

    Args:
        folder: Where.
        shard: Which.
        results: One for each row of the shard.
        codec_sha256: Of the store.
        files: Fingerprints of the shard's files.
        format_version: Of the store: it keeps the kind of marker that it was begun with.

    Returns:
        The file, durable.
    """
    table = result_table(results)
    hashes = json.dumps(dict(sorted(files.items()))).encode()
    table = table.replace_schema_metadata({_CODEC_KEY: codec_sha256.encode(), _FILES_KEY: hashes})
    if format_version == 1:
        path = folder / f"{shard:06d}{_PARQUET}"
        write_durable(path, lambda file: pq.write_table(table, file, write_page_checksum=True))
        return path
    path = folder / f"{shard:06d}{_ARROW}"
    data = _as_stream(table)
    write_durable(path, lambda file: _write_bytes(file, data))
    return path


def read_marker(root: Path, shard: int, codec_sha256: str, *, parts: str = PARTS_NAME) -> Marker | None:
    """What the done-marker of a shard says; None where there is none.

    Raises:
        StoreDamagedError: If it is unreadable or was written with another codec.
    """
    path = marker_path(root, shard, parts=parts)
    try:
        table = with_later_columns(_read_stream(path)) if path.suffix == _ARROW else read_table(path)
    except FileNotFoundError:
        return None
    metadata = table.schema.metadata or {}
    if metadata.get(_CODEC_KEY) != codec_sha256.encode():
        raise StoreDamagedError(f"{path} was written with another codec than the store's. Extract anew (--overwrite).")
    if not set(PART_SCHEMA.names) <= set(table.column_names):
        raise StoreDamagedError(f"{path} lacks columns of a done-marker. {_MEND}")
    try:
        files = json.loads(metadata[_FILES_KEY]) if _FILES_KEY in metadata else None
        if files is not None and not (isinstance(files, dict) and all(is_known(name) for name in files)):
            raise ValueError("it names other files than a shard has")
        results = table.select(PART_SCHEMA.names).replace_schema_metadata()
        return Marker(results if results.schema.equals(PART_SCHEMA) else results.cast(PART_SCHEMA), files)
    except (ValueError, RecursionError) as error:  # pyarrow's own are ValueErrors
        raise StoreDamagedError(f"{path} is not a done-marker: {error}. {_MEND}") from error


def read_joined(root: Path, manifest_sha256: str | None) -> dict[int, MarkerState]:
    """Which done-markers the manifest holds, as far as that is known of the manifest that has this hash."""
    try:
        table = _read_stream(root / PARTS_NAME / JOINED_NAME)
        columns = [table[name].to_pylist() for name in _JOINED_SCHEMA.names]
    except (StoreDamagedError, OSError, KeyError):
        return {}
    if manifest_sha256 is None or (table.schema.metadata or {}).get(_MANIFEST_KEY) != manifest_sha256.encode():
        return {}
    return {shard: (inode, mtime_ns) for shard, inode, mtime_ns in zip(*columns, strict=True)}


def write_joined(root: Path, markers: Mapping[int, MarkerState], manifest_sha256: str) -> None:
    """Note which done-markers the manifest holds: the next consolidation reads the others alone."""
    columns = [list(markers), [inode for inode, _ in markers.values()], [time for _, time in markers.values()]]
    table = pa.table(columns, schema=_JOINED_SCHEMA)
    data = _as_stream(table.replace_schema_metadata({_MANIFEST_KEY: manifest_sha256.encode()}))
    write_atomic(root / PARTS_NAME / JOINED_NAME, lambda temporary: _write_bytes(temporary, data))


_MEND = "The command that began the store mends it, with --repair."


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _as_stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    data = sink.getvalue().to_pybytes()
    return data + hashlib.sha256(data).digest()


def _read_stream(path: Path) -> pa.Table:
    """Raises FileNotFoundError where there is none."""
    try:
        with os.fdopen(open_file(path), "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreDamagedError(f"{path} cannot be read: {error.strerror}. {_MEND}") from error
    stream = memoryview(data)[:-_HASH_BYTES]
    if len(data) <= _HASH_BYTES or hashlib.sha256(stream).digest() != data[-_HASH_BYTES:]:
        raise StoreDamagedError(f"{path} does not match its checksum. {_MEND}")
    try:
        table: Any = pa.ipc.open_stream(pa.py_buffer(stream)).read_all()
        return table
    except pa.ArrowException as error:
        raise StoreDamagedError(f"{path} is not a done-marker: {error}. {_MEND}") from error
