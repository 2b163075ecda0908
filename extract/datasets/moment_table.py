"""`table` with a column `query`: where videos show what queries say, in JSON lines, CSV, TSV or Parquet.

query              the text; what makes a table one of moments
vid or path        the video: by name, in any folder, or below the root
qid                a number or text; without it the row's number
relevant_windows   [[start, end], ..] in seconds; or
start, end         one window a row: rows of one query are joined
relevant_clip_ids, saliency_scores, clip_s      scored clips, 0 to 4; clips of 2 s where nobody says
duration, split    of the video
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import DatasetError
from ...store.records import Moment, VideoRecord
from ._files import VideoTree
from ._names import check_name, check_text, fold_split, list_bases, relative_path
from ._queries import CLIP_S, QueryList, check_clip_s, place_by_name, read_json_lines, read_moment
from ._rows import MalformedRows, read_csv, read_lines, read_text, shorten, sniff_csv

QUERY = "query"
"""The column that makes a table one of moments."""
_VIDEO = ("vid", "video_id")
_QUERY_IDS = ("qid", "query_id")
_DURATIONS = ("duration", "duration_s")
_LINES = (".jsonl", ".ndjson")


@dataclass(slots=True)
class _Query:
    """One query, of one row or of several that have a window each."""

    line: int
    video_id: str
    text: str
    split: str
    moment: Moment
    is_of_spans: bool


def read_query_rows(table: Path, malformed: MalformedRows) -> list[tuple[int, dict[str, Any]]] | None:
    """The rows of a table of moments, with the numbers of their lines; None where it is no such table.

    Args:
        table: Any table.
        malformed: Takes lines that are no JSON objects.

    Raises:
        DatasetError: If it is no text.
    """
    ending = table.suffix.lower()
    if ending in _LINES:
        return _read_lines(table, malformed)
    if ending in (".csv", ".tsv"):
        default = "\t" if ending == ".tsv" else ","
        delimiter = sniff_csv(read_text(table), (QUERY, *_VIDEO, "path", "start", "end", "split"), default)
        rows = read_csv(table, delimiter)
        header = [name.strip() for name in next(rows, (1, []))[1]]
        return list(_as_entries(table, header, rows, delimiter, malformed)) if QUERY in header else None
    if ending == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        try:
            if QUERY not in pa.parquet.read_schema(table).names:
                return None
            return list(enumerate(pa.parquet.read_table(table).to_pylist(), start=1))
        except pa.ArrowException as error:
            raise DatasetError(f"{table} does not read as PARQUET: {error}") from error
    return None


def _read_lines(table: Path, malformed: MalformedRows) -> list[tuple[int, dict[str, Any]]] | None:
    try:
        first = json.loads(next(iter(read_lines(table)), (0, "null"))[1])
    except (ValueError, RecursionError):
        return None
    if not isinstance(first, dict) or QUERY not in first:
        return None
    entries: list[tuple[int, dict[str, Any]]] = []
    for line, entry in read_json_lines(table, malformed):
        if isinstance(entry, dict):
            entries.append((line, entry))
        else:
            malformed.add(table, line, f"expected an object with {QUERY!r}, found {shorten(entry)}")
    return entries


def _as_entries(
    table: Path, header: Sequence[str], rows: Iterator[tuple[int, list[str]]], delimiter: str, malformed: MalformedRows
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of text as objects, numbers read as such; what is empty is not there."""
    for line, values in rows:
        if len(values) != len(header):
            malformed.add(table, line, f"expected {len(header)} columns, found {len(values)}: {shorten(values)}")
            continue
        cells = zip(header, (value.strip() for value in values), strict=True)
        yield (
            line,
            {
                name: value.replace(",", ".") if delimiter == ";" and name != QUERY else value
                for name, value in cells
                if value
            },
        )


def read_moments_of_rows(
    table: Path,
    rows: Sequence[tuple[int, dict[str, Any]]],
    tree: VideoTree,
    roles: Mapping[str, Sequence[str]],
    malformed: MalformedRows,
) -> list[VideoRecord]:
    """Videos with their queries.

    Args:
        table: For messages.
        rows: Of it, with the numbers of their lines.
        tree: The videos.
        roles: Names of the columns `path`, `id`, `split`, `start` and `end`: the first that a row has counts.
        malformed: Takes the rows that are not.
    """
    bases = list_bases(tree.root)
    paths: dict[str, str | None] = {}
    queries: dict[Any, _Query] = {}
    for number, (line, row) in enumerate(rows, start=1):
        try:
            query = _read_row(row, str(number), line, roles)
            path = _take(row, roles["path"])
            place = None if path is None else tree.find_written(relative_path(str(path), tree.root, bases))
            if paths.setdefault(query.video_id, place) != place:
                raise ValueError(f"{query.video_id} is another file here, {place}, than in a row before")
            _join(queries, query, has_id=_take(row, _QUERY_IDS) is not None)
        except ValueError as error:
            malformed.add(table, line, error)
    return _as_records(table, queries.values(), paths, tree, malformed)


def _read_row(row: dict[str, Any], number: str, line: int, roles: Mapping[str, Sequence[str]]) -> _Query:
    text = row.get(QUERY)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"expected {QUERY!r} with a text, found {shorten(row)}")
    name, path = _take(row, (*roles["id"], *_VIDEO)), _take(row, roles["path"])
    if name is None and path is None:
        raise ValueError(f"expected vid or path, found {shorten(row)}")
    entry = {key: row.get(key) for key in ("relevant_windows", "relevant_clip_ids", "saliency_scores")}
    entry["qid"] = _take(row, _QUERY_IDS)
    entry["duration"] = _number(row, _DURATIONS)
    span = tuple(_number(row, roles[end]) for end in ("start", "end"))
    if (span[0] is None) != (span[1] is None):
        raise ValueError(f"expected a window's start with its end, found {shorten(row)}")
    if span[0] is not None and entry["relevant_windows"] is not None:
        raise ValueError("expected relevant_windows, or start and end: found both")
    clip_s = check_clip_s(_number(row, ("clip_s",)) or CLIP_S)
    moment = read_moment(entry, number, clip_s=clip_s)
    if moment.scores is not None and moment.windows is None:
        raise ValueError("expected relevant_windows beside saliency_scores, found none")
    if span[0] is not None and span[1] is not None:
        moment = replace(moment, windows=((span[0], span[1]),))
    return _Query(
        line=line,
        video_id=check_text(str(name)) if name is not None else check_text(str(path)),
        text=check_text(text.strip()),
        split=fold_split(str(_take(row, roles["split"]) or "")),
        moment=moment,
        is_of_spans=span[0] is not None,
    )


def _join(queries: dict[Any, _Query], query: _Query, *, has_id: bool) -> None:
    """Take a query; one whose rows have a window each gets one window more."""
    key: Any = (query.split, query.moment.query_id) if has_id else (query.split, query.video_id, query.text, query.line)
    if query.is_of_spans and not has_id:
        key = query.split, query.video_id, query.text
    known = queries.setdefault(key, query)
    if known is query:
        return
    if (known.video_id, known.text) != (query.video_id, query.text):
        raise ValueError(
            f"query id {query.moment.query_id!r} is another query here than in line {known.line}: {known.text!r} of "
            f"{known.video_id}"
        )
    if not (known.is_of_spans and query.is_of_spans):
        raise ValueError(f"query id {query.moment.query_id!r} occurs a second time: it was in line {known.line}")
    known.moment = replace(known.moment, windows=(*(known.moment.windows or ()), *(query.moment.windows or ())))


def _as_records(
    table: Path,
    queries: Any,
    paths: Mapping[str, str | None],
    tree: VideoTree,
    malformed: MalformedRows,
) -> list[VideoRecord]:
    gathered = QueryList()
    for query in queries:
        try:
            if paths[query.video_id] is None:
                check_name(query.video_id)
            gathered.add(query.video_id, query.text, query.moment, split=query.split)
        except ValueError as error:
            malformed.add(table, query.line, error)
    place = place_by_name(tree)

    def place_video(video_id: str) -> VideoRecord:
        path = paths[video_id]
        if path is not None:
            return VideoRecord(video_id=video_id, source_id=None, path=path, split="")
        return place(video_id)

    return gathered.as_records(place_video)


def _take(row: dict[str, Any], names: Sequence[str]) -> Any:
    """The first of some columns that a row has a text or number in."""
    for name in names:
        if (value := row.get(name)) not in (None, ""):
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise ValueError(f"expected {name!r} with a text, found {shorten(value)}")
            return value
    return None


def _number(row: dict[str, Any], names: Sequence[str]) -> float | None:
    for name in names:
        if (value := row.get(name)) is None:
            continue
        try:
            number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
        except ValueError:
            number = None
        if number is None or not abs(number) < float("inf"):
            raise ValueError(f"expected seconds in {name}, found {shorten(value)}")
        return number
    return None
