"""`table`: one row per video (or segment) in CSV, TSV, JSON lines or Parquet, with column names of the user's own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, DataNotFoundError, DatasetError
from ...store.records import VideoRecord
from ._files import DatasetFiles, VideoTree
from ._names import check_path, check_text, list_bases, relative_path
from ._rows import MalformedRows, cut_excel_hint, read_text, sniff_csv
from .contract import DatasetReader, ReadOptions
from .kinetics import has_kinetics_columns, name_options
from .moment_table import QUERY, read_moments_of_rows, read_query_rows

if TYPE_CHECKING:
    import pyarrow as pa

COLUMN_ROLES: dict[str, tuple[str, ...]] = {
    "path": ("path", "video_path", "video", "file", "filename", "filepath"),
    "label": ("label", "class_name", "class", "category", "action"),
    "caption": ("caption", "text", "sentence", "description"),
    "split": ("split", "subset"),
    "id": ("video_id", "id"),
    "start": ("start_s", "start", "start_time", "time_start"),
    "end": ("end_s", "end", "end_time", "time_end"),
}
"""What a column can be for, and the names looked for when the user names none."""


_TEXT_ENDINGS = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".ndjson": ""}
"""Of tables that are text: what usually parts their columns."""

_DECIMAL_COMMA = re.compile(r"\d+,\d+")


def read_table_file(files: DatasetFiles, options: ReadOptions) -> list[VideoRecord]:
    """Read a table of videos.

    Columns of a CSV file may be parted by commas, semicolons, tabs or bars, and its text may be UTF-8 or UTF-16.

    A row with the id of an earlier one must describe the same video: it adds its caption. Rows that name a
    segment and no id get the id PATH#t=START,END.

    A table with a column `query` is one of moments: there a video is a row of the store, `start` and `end` are windows
    of a query, and rows of one query are joined. See `moment_table.py`.

    Args:
        files: Its annotations are the table, whose ending tells the format; paths in it are relative to its root.
        options: Columns: role in `COLUMN_ROLES` -> column name; roles left out are looked for under their usual names.

    Raises:
        ConfigError: If no table is named, or a role is unknown.
        DataNotFoundError: If the table or the root is not there.
        DatasetError: If a column is missing or rows are malformed: all of them in one message, up to 20.
    """
    table, tree, columns = files.annotations, files.tree, options.columns
    if table is None:
        raise ConfigError("--dataset table needs --annotations, a file ending in .csv, .tsv, .jsonl or .parquet")
    files.require_annotations()
    if table.is_dir():
        raise DataNotFoundError(f"expected a table, found the folder {table} (--annotations): name a file in it")
    files.require_root()
    if (records := _read_moments(table, tree, columns)) is not None:
        return records
    data, delimiter, first_line = _load(table, columns)
    if repeated := sorted({name for name in data.column_names if data.column_names.count(name) > 1}):
        raise DatasetError(f"{table} has more than one column {', '.join(repeated)}: rename or remove all but one")
    matches = _match_columns(table, data.column_names, columns)
    names = list(matches.values())
    rows = data.select(names).rename_columns(list(matches)).to_pylist()
    if delimiter == ";":  # where the comma is the decimal point
        for row in rows:
            row.update((role, _with_point(row[role])) for role in ("start", "end") if role in row)
    bases = list_bases(tree.root)
    videos: dict[str, VideoRecord] = {}
    malformed = MalformedRows()
    for line, row in enumerate(rows, start=first_line):
        try:
            _add_row(videos, row, tree, bases)
        except ValueError as error:
            malformed.add(table, line, error)
    malformed.refuse()
    if not videos:
        raise DatasetError(f"{table} has a header and no rows: expected one row per video")
    return list(videos.values())


def _read_moments(table: Path, tree: VideoTree, columns: Mapping[str, str]) -> list[VideoRecord] | None:
    """The videos of a table of moments; None where it is none, or its column `query` was said to be something else.

    A table with classes is one of classes, whatever else it has.
    """
    if {"caption", "label"} & set(columns) or QUERY in columns.values():
        return None
    malformed = MalformedRows()
    rows = read_query_rows(table, malformed)
    if rows is None or any(name in row for _, row in rows for name in COLUMN_ROLES["label"]):
        return None
    if unknown := sorted(set(columns) - set(COLUMN_ROLES)):
        raise ConfigError(f"--column knows the roles {', '.join(COLUMN_ROLES)}; found {', '.join(unknown)}")
    roles = {role: (columns[role],) if role in columns else names for role, names in COLUMN_ROLES.items()}
    roles["id"] = (columns["id"],) if "id" in columns else ()  # else `vid`: an id alone may be the query's
    records = read_moments_of_rows(table, rows, tree, roles, malformed)
    malformed.refuse()
    if not records:
        raise DatasetError(f"{table} has a header and no rows: expected one row for each query")
    return records


def _load(table: Path, columns: Mapping[str, str]) -> tuple[pa.Table, str, int]:
    """The rows of a table, what parted its columns ("" where nothing did), and the number of the first row.

    The header is line 1 of CSV and TSV; JSON lines have none, Parquet counts rows.
    """
    # Not above: what lists data sets and checks options does so before it is needed.
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    ending = table.suffix.lower()
    try:
        if ending == ".parquet":
            return pa.parquet.read_table(table), "", 1
        if ending not in _TEXT_ENDINGS:
            hint = ": save it as CSV" if ending in (".xlsx", ".xls", ".ods") else ""
            raise ConfigError(f"--annotations takes .csv, .tsv, .jsonl or .parquet; found {table.name}{hint}")
        text, skipped = cut_excel_hint(read_text(table))
        if not _TEXT_ENDINGS[ending]:
            return pa.json.read_json(pa.BufferReader(text.encode())), "", 1
        names = {name.lower() for name in [*columns.values(), *(n for names in COLUMN_ROLES.values() for n in names)]}
        delimiter = sniff_csv(text, names, _TEXT_ENDINGS[ending])
        # Everything as text: an id "007" or a class "1" must not become a number.
        parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
        source = pa.BufferReader(text.encode())
        header = pa.csv.open_csv(source, parse_options=parse).schema.names
        as_text = pa.csv.ConvertOptions(
            column_types={name: pa.string() for name in header}, strings_can_be_null=True, null_values=[""]
        )
        source.seek(0)
        data = pa.csv.read_csv(source, parse_options=parse, convert_options=as_text)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DatasetError(f"{table} does not read as {ending[1:].upper()}: {error}") from error
    return data.rename_columns([name.strip() for name in data.column_names]), delimiter, 2 + skipped


def _match_columns(table: Path, found: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    if unknown := sorted(set(columns) - set(COLUMN_ROLES)):
        raise ConfigError(f"--column knows the roles {', '.join(COLUMN_ROLES)}; found {', '.join(unknown)}")
    if missing := sorted(name for name in columns.values() if name not in found):
        raise DatasetError(
            f"{table} has the columns {', '.join(found)}: no {', '.join(missing)}. Name one that is there (--column)."
        )
    matched = dict(columns)
    for role, names in COLUMN_ROLES.items():
        usual = next((name for name in names if name in found and name not in matched.values()), None)
        if role not in matched and usual is not None:
            matched[role] = usual
    if "path" not in matched and has_kinetics_columns(found):
        raise DatasetError(
            f"{table} has no column with paths: it is an official list of Kinetics. Read it as what it is: "
            f"{name_options(table)}"
        )
    if "path" not in matched:
        raise DatasetError(
            f"{table} has the columns {', '.join(found)}: none of {', '.join(COLUMN_ROLES['path'])}. "
            "Say which one holds the path: --column path=NAME."
        )
    return matched


def _add_row(videos: dict[str, VideoRecord], row: dict[str, Any], tree: VideoTree, bases: Sequence[str]) -> None:
    given = _text(row.get("path"))
    if given is None:
        raise ValueError("the path is empty")
    written = relative_path(given, tree.root, bases)
    path = tree.find_written(written)
    start_s, end_s = _seconds(row, "start"), _seconds(row, "end")
    if start_s is not None and end_s is not None and end_s <= start_s:
        raise ValueError(f"the segment ends at {end_s:g} s, before or at its start {start_s:g} s")
    is_segment = start_s is not None or end_s is not None
    segment = f"#t={_shortest(start_s or 0)}" + ("" if end_s is None else f",{_shortest(end_s)}")
    own_id = _text(row.get("id"))
    # As the table writes it, however the disk spells it: a row's id does not change when its file arrives.
    name = check_path(written.replace("\\", "/")) if "\\" in written and "\\" not in path else written
    video_id = own_id or (name + segment if is_segment else name)
    captions = _captions(row.get("caption"))
    record = VideoRecord(
        video_id=video_id,
        source_id=own_id,
        path=path,
        split=_text(row.get("split")) or "",
        class_name=_text(row.get("label")),
        start_s=start_s,
        end_s=end_s,
        captions=captions,
    )
    if (known := videos.get(video_id)) is not None:
        if not captions:
            raise ValueError(f"id {video_id!r} occurs a second time, without a caption to add")
        if replace(known, captions=()) != replace(record, captions=()):
            raise ValueError(f"id {video_id!r} occurs a second time, with another path, label, split or segment")
        record = replace(known, captions=known.captions + record.captions)
    videos[video_id] = record


def _captions(value: Any) -> tuple[str, ...]:
    """One caption, or a list of them."""
    texts = [_text(text) for text in value] if isinstance(value, list) else [_text(value)]
    return tuple(text for text in texts if text is not None)


def _text(value: Any) -> str | None:
    if isinstance(value, dict | list | bytes):
        raise ValueError(f"expected text or a number, found {value!r}")
    if isinstance(value, float):
        value = None if math.isnan(value) else _shortest(value)  # pandas writes NaN where it means nothing
    text = "" if value is None else str(value).strip()
    return check_text(text) or None


def _with_point(value: Any) -> Any:
    is_decimal = isinstance(value, str) and _DECIMAL_COMMA.fullmatch(value.strip())
    return value.replace(",", ".") if is_decimal else value


def _shortest(number: float) -> str:
    """A number as people write it: 10 for 10.0, 20.5 for 20.5."""
    return str(int(number)) if float(number).is_integer() else repr(float(number))


def _seconds(row: dict[str, Any], role: str) -> float | None:
    text = _text(row.get(role))
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError(f"expected seconds for the segment's {role}, found {text!r}") from None
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"expected seconds from 0 up for the segment's {role}, found {text!r}")
    return seconds


READER = DatasetReader(name="table", read=read_table_file, takes_columns=True, names_files=True)
