"""Where videos show what their captions say: `moments.parquet`, one row for each row of captions.parquet, in its order.

    caption_id   the caption's
    query_id     the data set's own number of the query, as text
    split        of the query
    duration_s   of the video, as annotated; null where nobody says
    windows      (start, end) in seconds; null is not annotated, an empty list is nowhere
    clip_s       seconds between the beginnings of labelled clips; null where there are none
    clip_ids     labelled clips, from 0
    scores       for each of these clips a score of each annotator

The store's version does not tell of it: a reader that does not know the file reads all else. A store that is there gets
it from the command that began it, and gets it anew where the annotations say more by now. With other captions than its
own it is void.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..errors import StoreDamagedError, StoreMismatchError
from ..files import kill_point
from . import manifest, names
from .checksums import read_recorded_hashes, write_checksums
from .lease import Scope, hold_lease
from .manifest import CAPTIONS_NAME, MOMENTS_NAME
from .records import Moment, VideoRecord

if TYPE_CHECKING:
    from pathlib import Path

    from .reader import StoreReader


def _list_of(type_: pa.DataType) -> pa.DataType:
    """A list as Parquet gives it back."""
    return pa.list_(pa.field("element", type_))


MOMENT_SCHEMA = pa.schema(
    [
        ("caption_id", pa.string()),
        ("query_id", pa.string()),
        ("split", pa.string()),
        ("duration_s", pa.float64()),
        ("windows", _list_of(pa.list_(pa.field("element", pa.float64()), 2))),
        ("clip_s", pa.float64()),
        ("clip_ids", _list_of(pa.int32())),
        ("scores", _list_of(_list_of(pa.int8()))),
    ]
)

_NEVER_NULL = ("caption_id", "query_id", "split")
_MEND = "The command that began the store mends it, with --repair."


class Moments(Sequence[Moment]):
    """What a store knows of the moments of its captions: entry c is caption c.

    Args:
        table: Of `MOMENT_SCHEMA`.
    """

    def __init__(self, table: pa.Table) -> None:
        self._columns: dict[str, list[Any]] = {name: table[name].to_pylist() for name in MOMENT_SCHEMA.names}

    def __len__(self) -> int:
        return len(self._columns["query_id"])

    def __getitem__(self, caption: Any) -> Any:
        windows, scores = (self._columns[name][caption] for name in ("windows", "scores"))
        ids = self._columns["clip_ids"][caption]
        return Moment(
            **{name: self._columns[name][caption] for name in ("query_id", "split", "duration_s", "clip_s")},
            windows=None if windows is None else tuple((start, end) for start, end in windows),
            clip_ids=None if ids is None else tuple(ids),
            scores=None if scores is None else tuple(map(tuple, scores)),
        )

    def __iter__(self) -> Iterator[Moment]:
        return (self[caption] for caption in range(len(self)))

    @property
    def caption_ids(self) -> list[str]:
        """Of each caption."""
        return self._columns["caption_id"]

    @property
    def query_ids(self) -> list[str]:
        """The data set's own number of each query, as text."""
        return self._columns["query_id"]

    @property
    def splits(self) -> list[str]:
        """Of each query."""
        return self._columns["split"]

    @property
    def has_windows(self) -> np.ndarray:
        """(C,) bool: which queries have windows annotated, if only none at all."""
        return np.asarray([windows is not None for windows in self._columns["windows"]], dtype=bool)

    @property
    def has_scores(self) -> np.ndarray:
        """(C,) bool: of which queries clips are scored."""
        return np.asarray([scores is not None for scores in self._columns["scores"]], dtype=bool)


def moment_table(records: Sequence[VideoRecord]) -> pa.Table | None:
    """The moments of all captions, in the order of `caption_table`; None where no record has any.

    A caption without one is not annotated; its query has the id of the caption.
    """
    if not any(record.moments for record in records):
        return None
    columns: dict[str, list[Any]] = {name: [] for name in MOMENT_SCHEMA.names}
    for record in records:
        assert len(record.moments) in (0, len(record.captions))
        for place in range(len(record.captions)):
            caption_id = f"{record.video_id}#{place}"
            moment = record.moments[place] if record.moments else Moment(query_id=caption_id)
            columns["caption_id"].append(caption_id)
            columns["split"].append(moment.split or record.split)
            for name in ("query_id", "duration_s", "windows", "clip_s", "clip_ids", "scores"):
                columns[name].append(getattr(moment, name))
    return pa.table(columns, schema=MOMENT_SCHEMA)


def require_moments(root: Path) -> None:
    """Refuse a store without moments.

    Raises:
        StoreMismatchError: If it never had any.
        StoreDamagedError: If it has lost them.
    """
    if os.path.lexists(root / MOMENTS_NAME):
        return
    if MOMENTS_NAME in read_recorded_hashes(root):
        raise StoreDamagedError(f"{root / MOMENTS_NAME} is missing. {_MEND}")
    raise StoreMismatchError(
        f"{root} does not say where its videos show what its captions say: it has no {MOMENTS_NAME}. Extract a data "
        "set with moments (s4v datasets lists some), or run the command that began this store once more, which adds "
        "them"
    )


def read_moment_table(store: StoreReader) -> pa.Table:
    """The moments of a store's captions, checked.

    Raises:
        StoreMismatchError: If there are none, or those of other captions.
        StoreDamagedError: If they are not as they were written.
    """
    require_moments(store.path)
    path = names.require_file(store.path, MOMENTS_NAME)
    table = manifest.read_table(path)
    _check_columns(table, path)
    if table["caption_id"].to_pylist() != store.read_captions()["caption_id"].to_pylist():
        raise StoreMismatchError(
            f"{path} is of other captions than {CAPTIONS_NAME} has: run the command that began this store once more, "
            "which writes it anew"
        )
    return table


def _check_columns(table: pa.Table, path: Path) -> None:
    if table.schema.names != MOMENT_SCHEMA.names:
        raise StoreDamagedError(
            f"{path} has the columns {', '.join(table.schema.names)[:200]}, expected {', '.join(MOMENT_SCHEMA.names)}. "
            f"{_MEND}"
        )
    for field in MOMENT_SCHEMA:
        if table[field.name].type != field.type:
            raise StoreDamagedError(
                f"{path} holds {table[field.name].type} in its column {field.name}, expected {field.type}. {_MEND}"
            )
    for name in _NEVER_NULL:
        if table[name].null_count:
            raise StoreDamagedError(f"{path} lacks entries in its column {name}. {_MEND}")
    counts = [None if ids is None else len(ids) for ids in table["clip_ids"].to_pylist()]
    scores = [None if rows is None else len(rows) for rows in table["scores"].to_pylist()]
    if counts != scores:
        raise StoreDamagedError(f"{path} has more or fewer scores of a query than labelled clips. {_MEND}")


def list_moment_files(store: StoreReader) -> list[str]:
    """The name, relative to a store, of its moments; none where it has none of the captions that it has now.

    Raises:
        StoreDamagedError: If they are not as they were written.
    """
    try:
        store.read_moments()
    except StoreMismatchError:
        return []
    return [MOMENTS_NAME]


def write_moments(store: StoreReader, records: Sequence[VideoRecord]) -> bool:
    """Leave the moments of all captions in a store, where the data set has some and the store has them not, or others.

    Args:
        store: With the captions of these records.
        records: In the order of its rows.

    Another process that writes to the whole store is waited for; shards may be written meanwhile.

    Returns:
        Whether anything was written.

    Raises:
        StoreBusyError: If another process writes to the whole store.
        LeaseLostError: If another process took over meanwhile.
    """
    table = moment_table(records)
    if table is None or _has(store, table):
        return False
    advice = "run the command again in a moment"
    with hold_lease(store.path, Scope.manifest(), purpose="extract", wait=True, advice=advice) as lease:
        if _has(store, table):  # of whom we waited for
            return False
        names.refuse_links(store.path)
        lease.check()
        write_checksums(store.path, without=MOMENTS_NAME)  # else a reader would take the new file for a damaged one
        kill_point("moments void")
        manifest.write_table(store.path / MOMENTS_NAME, table)
        kill_point("moments in place")
        write_checksums(store.path)
    return True


def _has(store: StoreReader, table: pa.Table) -> bool:
    try:
        return read_moment_table(store).equals(table)
    except (StoreMismatchError, StoreDamagedError):
        return False
