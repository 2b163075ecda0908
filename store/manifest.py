"""The manifest: one row per video with its status and reason.

`videos.parquet` is written once before any work, with every row pending, and once more at the end. In between,
each finished shard leaves its rows' results in a done-marker: see `markers.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import StoreDamagedError
from ..files import write_atomic
from .records import VideoRecord, VideoResult, View

_VIEW = pa.struct(
    [
        ("resized_width", pa.int32()),
        ("resized_height", pa.int32()),
        ("x", pa.int32()),
        ("y", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("flip", pa.bool_()),
        ("seed", pa.int64()),
    ]
)


def _list_of(type_: pa.DataType) -> pa.DataType:
    """A list as Parquet gives it back: a column that is there from its first row is then written as it was read."""
    return pa.list_(pa.field("element", type_))


_AUGMENTATION = pa.struct(
    [
        ("scaled_width", pa.int32()),
        ("scaled_height", pa.int32()),
        ("grey", pa.bool_()),
        ("operations", _list_of(pa.struct([("name", pa.string()), ("argument", pa.float64())]))),
        ("class_name", pa.string()),
    ]
)
INPUT_SCHEMA = pa.schema(
    [
        ("video_id", pa.string()),
        ("source_id", pa.string()),
        ("path", pa.string()),
        ("split", pa.string()),
        ("label", pa.int32()),
        ("class_name", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
    ]
)
RESULT_SCHEMA = pa.schema(
    [
        ("status", pa.string()),
        ("reason", pa.string()),
        ("decoder", pa.string()),
        ("num_frames", pa.int64()),
        ("fps", pa.float64()),
        ("duration_s", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("num_cached_frames", pa.int32()),
        ("num_views", pa.int32()),
        ("frame_indices", pa.list_(pa.int64())),
        ("timestamps_s", pa.list_(pa.float64())),
        ("views", pa.list_(_VIEW)),
        ("eval_clips", pa.list_(pa.list_(pa.int32()))),
        ("source_bytes", pa.int64()),
        ("source_mtime_ns", pa.int64()),
        ("source_hash", pa.string()),
        ("validation_clip", pa.list_(pa.int32())),
        ("augmentations", _list_of(_AUGMENTATION)),
    ]
)
_OPTIONAL_COLUMNS = frozenset({"augmentations"})
"""Result columns that are written only where a row has something in them."""
_LATER_COLUMNS = frozenset({"source_bytes", "source_mtime_ns", "source_hash", "validation_clip"}) | _OPTIONAL_COLUMNS
"""Result columns that stores from before, or without such rows, do not have."""
PART_SCHEMA = pa.schema([INPUT_SCHEMA.field("video_id"), *RESULT_SCHEMA])
"""Of a shard's results."""
_CAPTION_SCHEMA = pa.schema([("caption_id", pa.string()), ("video_id", pa.string()), ("text", pa.string())])

MANIFEST_NAME = "videos.parquet"
CAPTIONS_NAME = "captions.parquet"
MOMENTS_NAME = "moments.parquet"


@dataclass(frozen=True)
class ClassList:
    """Class names in label order: sorted by name, so that two orderings in the wild give the same labels."""

    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, records: Iterable[VideoRecord]) -> ClassList:
        """The classes that occur in a list of records; where all names are numbers, in the order of the numbers."""
        names = {r.class_name for r in records if r.class_name is not None}
        are_numbers = all(name.isdecimal() for name in names)
        return cls(tuple(sorted(names, key=lambda name: (int(name) if are_numbers else 0, name))))

    def label_of(self, class_name: str | None) -> int | None:
        """The place of a class in the list; None stays None."""
        return None if class_name is None else self.names.index(class_name)


def input_table(records: Sequence[VideoRecord], classes: ClassList) -> pa.Table:
    """The input columns, one row a record, in the given order."""
    label_of: dict[str | None, int | None] = {name: label for label, name in enumerate(classes.names)}
    label_of[None] = None
    # Column by column: a dict for each of a million records takes ten times as long.
    columns = {
        name: [label_of[record.class_name] for record in records]
        if name == "label"
        else [getattr(record, name) for record in records]
        for name in INPUT_SCHEMA.names
    }
    return pa.table(columns, schema=INPUT_SCHEMA)


def result_table(results: Sequence[VideoResult]) -> pa.Table:
    """Results as a done-marker has them, one row each."""
    views = [None if result.views is None else [view.as_dict() for view in result.views] for result in results]
    made = {"augmentations": [None if row is None else _take_augmentations(row) for row in views], "views": views}
    columns = {
        name: made[name] if name in made else [getattr(result, name) for result in results]
        for name in PART_SCHEMA.names
    }
    return _without_empty_columns(pa.table(columns, schema=PART_SCHEMA))


def _take_augmentations(views: list[dict[str, Any]]) -> list[dict[str, Any] | None] | None:
    """What was drawn for each view of a row, taken out of the views; None where nothing was."""
    drawn = [view.pop("augmentation") for view in views]
    return drawn if any(drawn) else None


def _without_empty_columns(table: pa.Table) -> pa.Table:
    """Without the columns that would be written for nothing."""
    empty = [name for name in table.column_names if name in _OPTIONAL_COLUMNS and table[name].null_count == len(table)]
    return table.drop_columns(empty) if empty else table


def read_results(table: pa.Table) -> list[VideoResult]:
    """The rows of a done-marker, or of those columns of a manifest, as dataclasses."""
    results = []
    for row in table.select(PART_SCHEMA.names).to_pylist():
        views = read_views(row.pop("views"), row.pop("augmentations"))
        results.append(VideoResult(**row, views=views))
    return results


def read_views(
    views: Sequence[Mapping[str, Any]] | None, augmentations: Sequence[Mapping[str, Any] | None] | None
) -> list[View] | None:
    """The views of a row, of the manifest's columns `views` and `augmentations`."""
    if views is None:
        return None
    drawn = augmentations or [None] * len(views)
    return [View.from_dict({**view, "augmentation": one}) for view, one in zip(views, drawn, strict=True)]


def caption_table(records: Sequence[VideoRecord]) -> pa.Table:
    """All captions, in row order."""
    rows = [
        {"caption_id": f"{record.video_id}#{place}", "video_id": record.video_id, "text": text}
        for record in records
        for place, text in enumerate(record.captions)
    ]
    return pa.Table.from_pylist(rows, schema=_CAPTION_SCHEMA)


def pending_manifest(inputs: pa.Table) -> pa.Table:
    """The manifest before any work: every row pending, no result."""
    columns = {
        name: pa.array(["pending"] * len(inputs)) if name == "status" else pa.nulls(len(inputs), type_)
        for name, type_ in zip(RESULT_SCHEMA.names, RESULT_SCHEMA.types, strict=True)
    }
    return pa.table({**{n: inputs[n] for n in INPUT_SCHEMA.names}, **columns})


def pending_results(video_ids: pa.ChunkedArray) -> pa.Table:
    """Results of rows that nobody has done, as a done-marker has them."""
    columns = [pa.nulls(len(video_ids), field.type) for field in RESULT_SCHEMA]
    columns[0] = pa.array(["pending"] * len(video_ids))
    return pa.table([video_ids, *columns], schema=PART_SCHEMA)


def replace_results(table: pa.Table, parts: Mapping[int, pa.Table]) -> pa.Table:
    """A manifest with other results in some of its rows.

    Args:
        table: All columns.
        parts: By the number of its first row: video_id and result columns of consecutive rows.

    Raises:
        StoreDamagedError: If a part is of other videos than its rows.
    """
    pieces: list[pa.Table] = []
    done = 0
    for run in _join_neighbours(parts):
        first, results = run
        pieces.append(table.slice(done, first - done))
        chunk = table.select(INPUT_SCHEMA.names).slice(first, len(results))
        if len(chunk) != len(results) or not chunk["video_id"].equals(results["video_id"]):
            raise StoreDamagedError(
                f"a done-marker of rows {first} to {first + len(results) - 1} is of other videos than the manifest "
                "has there. Run the command that began the store with --repair."
            )
        columns = [*chunk.columns, *results.select(RESULT_SCHEMA.names).columns]
        pieces.append(pa.table(columns, schema=table.schema))
        done = first + len(results)
    pieces.append(table.slice(done))
    return pa.concat_tables(pieces).combine_chunks()


def _join_neighbours(parts: Mapping[int, pa.Table]) -> Iterator[tuple[int, pa.Table]]:
    """Parts that follow each other as one table: thousands of small tables take long to put together."""
    run: list[pa.Table] = []
    first = stop = -1
    for start in sorted(parts):
        if start != stop and run:
            yield first, pa.concat_tables(run)
            run = []
        if not run:
            first = start
        run.append(parts[start])
        stop = start + len(parts[start])
    if run:
        yield first, pa.concat_tables(run)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file atomically, with a checksum on every page."""
    table = _without_empty_columns(table)
    write_atomic(path, lambda temporary: pq.write_table(table, temporary, write_page_checksum=True))


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file and verify its page checksums.

    Raises:
        StoreDamagedError: If it is missing, not Parquet, or a checksum does not match.
    """
    try:
        if path.is_dir():  # as a data set of no files it would read as an empty table
            raise IsADirectoryError("a folder is in its place")
        # Opened once: by its path pyarrow opens a file for its schema and again for its pages, and between the two it
        # may have been replaced.
        with path.open("rb") as file:
            there = _columns_there(file, columns)
            file.seek(0)
            table = pq.read_table(file, page_checksum_verification=True, **there)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise StoreDamagedError(f"{path} is missing or damaged: {error}. Extract the store anew.") from error
    return with_later_columns(table, columns)


def _columns_there(file: BinaryIO, columns: list[str] | None) -> dict[str, list[str]]:
    """What to ask a file for: columns that it is too old to have are null."""
    if columns is None or not _LATER_COLUMNS & set(columns):
        return {} if columns is None else {"columns": columns}
    there = set(pq.read_schema(file).names)
    return {"columns": [name for name in columns if name in there or name not in _LATER_COLUMNS]}


def with_later_columns(table: pa.Table, columns: list[str] | None = None) -> pa.Table:
    """A manifest or a part with null columns for what it is too old to have; other tables as they are."""
    there = set(table.column_names)  # asked once: it is made anew each time, and a store has thousands of parts
    if "status" not in there and columns is None:
        return table
    missing = (_LATER_COLUMNS if columns is None else _LATER_COLUMNS & set(columns)) - there
    for field in RESULT_SCHEMA if missing else ():
        if field.name in missing:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table if columns is None else table.select(columns)
