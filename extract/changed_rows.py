"""Rows whose video is not the one any more that they were made of."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from ..errors import DataNotFoundError, StoreDamagedError
from ..store.markers import find_markers, read_marker
from ..store.reader import StoreReader
from ..store.writer import StoreWriter
from .decode.source import SourceFacts, is_same_source, read_source

_THREADS = 16
"""A network disk answers many questions at once, and each of them slowly."""

_log = logging.getLogger(__name__)

_MAX_LINES = 50


@dataclass(frozen=True, slots=True)
class SourceReport:
    """The rows of a store beside the files that lie there now, by row number."""

    same: list[int] = field(default_factory=list)
    changed: list[int] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)
    """Good rows from before sources were known."""
    split: list[str] = field(default_factory=list)
    """Files whose segments were made of different versions of them."""


def find_changed_rows(store: StoreReader, root: Path, *, paths: Sequence[str] | None = None) -> list[int]:
    """Good rows whose file is there and another one by size or, where its time of change is another, by its bytes.

    Args:
        store: What was extracted.
        root: Folder below which the videos lie.
        paths: Of all rows, where the manifest may be damaged: then done-markers are asked, as far as they are whole.

    Returns:
        Row numbers, ascending.
    """
    rows = _read_manifest(store) if paths is None else _read_markers(store, paths)
    return _compare(rows, root, is_same_source).changed


def compare_sources(store: StoreReader, root: Path) -> SourceReport:
    """The same for every good row, and by the bytes of every file."""

    def is_same(num_bytes: int, _: int, recorded: str, path: Path) -> bool:
        facts = read_source(path)
        return (facts.source_bytes, facts.source_hash) == (num_bytes, recorded)

    return _compare(_read_manifest(store), root, is_same)


def record_sources(store: StoreReader, root: Path, rows: Sequence[int]) -> int:
    """Take what lies there now for the source of rows from before sources were known.

    Args:
        store: What was extracted.
        root: Folder below which the videos lie.
        rows: Good rows without a source.

    Returns:
        How many rows have one now; files that cannot be read leave theirs as they are.

    Raises:
        StoreBusyError: If another process writes to the store.
    """
    paths = store.input_columns()["path"].take(list(rows)).to_pylist()
    facts: dict[str, SourceFacts | None] = {}
    with ThreadPoolExecutor(_THREADS) as threads:
        unique = list(dict.fromkeys(paths))
        facts.update(zip(unique, threads.map(lambda path: _read_if_there(root / path), unique), strict=True))
    sources = {
        row: (known.source_bytes, known.source_mtime_ns, known.source_hash)
        for row, path in zip(rows, paths, strict=True)
        if (known := facts[path]) is not None
    }
    with StoreWriter(store, store.input_columns()) as writer:
        writer.set_sources(sources)
        writer.consolidate()
    return len(sources)


def warn_of_changed(store: StoreReader, rows: Sequence[int]) -> list[str]:
    """Tell of changed rows, in one line; returns their ids."""
    if not rows:
        return []
    table = store.input_columns().take(list(rows))
    files = list(dict.fromkeys(table["path"].to_pylist()))
    shown = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    _log.warning(
        "%s: %d rows were made of other videos than lie there now (%s). They keep what they have; --redo-changed does "
        "them anew.",
        *(store.path, len(rows), shown),
    )
    return table["video_id"].to_pylist()


_Row = tuple[int, str, int | None, int | None, str | None]
"""Row number, path, bytes, time of the last change, hash."""


def _read_manifest(store: StoreReader) -> Iterator[_Row]:
    """All good rows."""
    columns = ["path", "source_bytes", "source_mtime_ns", "source_hash"]
    table = store.read_manifest([*columns, "status"])
    good = pc.indices_nonzero(pc.equal(table["status"], "ok"))
    table = table.take(good)
    return zip(good.to_pylist(), *(table[name].to_pylist() for name in columns), strict=True)


def _read_markers(store: StoreReader, paths: Sequence[str]) -> Iterator[_Row]:
    """Good rows of shards whose done-marker is whole."""
    for shard in find_markers(store.path):
        first = store.layout.shard_rows(shard).start
        with suppress(StoreDamagedError):
            marker = read_marker(store.path, shard, store.facts.codecs_sha256)
            for row, one in enumerate(marker.as_results() if marker else (), start=first):
                if one.status == "ok" and row < len(paths):
                    yield row, paths[row], one.source_bytes, one.source_mtime_ns, one.source_hash


def _compare(rows: Iterable[_Row], root: Path, is_same: Callable[[int, int, str, Path], bool]) -> SourceReport:
    report = SourceReport()
    by_source: dict[tuple[str, int, int, str], list[int]] = defaultdict(list)
    for row, path, num_bytes, mtime_ns, source_hash in rows:
        if num_bytes is None or mtime_ns is None or source_hash is None:
            report.unknown.append(row)
        else:
            by_source[path, num_bytes, mtime_ns, source_hash].append(row)

    def judge(source: tuple[str, int, int, str]) -> bool | None:
        path, num_bytes, mtime_ns, source_hash = source
        try:
            return is_same(num_bytes, mtime_ns, source_hash, root / path)
        except OSError:
            return None

    with ThreadPoolExecutor(_THREADS) as threads:
        for of_source, verdict in zip(by_source.values(), threads.map(judge, by_source), strict=True):
            (report.gone if verdict is None else report.same if verdict else report.changed).extend(of_source)
    hashes = {(path, source_hash) for path, _, _, source_hash in by_source}
    report.split.extend(sorted(path for path, count in Counter(path for path, _ in hashes).items() if count > 1))
    for found in (report.same, report.changed, report.gone):
        found.sort()
    return report


def _read_if_there(path: Path) -> SourceFacts | None:
    try:
        return read_source(path)
    except OSError:
        return None


def verify_sources(
    store: StoreReader,
    root: Path | None,
    report: Callable[[str, int, int], None] = lambda *_: None,
    *,
    with_record: bool = False,
) -> dict[str, Any]:
    """Compare the good rows of a store with the videos that they were made of, by their bytes.

    Args:
        store: The store.
        root: Folder of the videos; None takes the one that the extraction read.
        report: Told about progress.
        with_record: Note what lies there as the source of rows that know none.

    Returns:
        `changed`: ids of the rows whose video was replaced; `split`: files whose segments were made of two versions of
        them; counts of rows that are the `same`, `gone`, `unknown` or were `recorded`; and the `root`.

    Raises:
        DataNotFoundError: If there is no such folder.
    """
    root = root or Path(store.attributes["dataset"]["root"])
    if not root.is_dir():
        raise DataNotFoundError(
            f"the videos of {store.path} were in {root}: no such folder. Say where they are (--root)"
        )
    report("comparing videos", 0, 0)
    sources = compare_sources(store, root)
    recorded = record_sources(store, root, sources.unknown) if with_record and sources.unknown else 0
    ids = store.input_columns()["video_id"].take(sources.changed).to_pylist() if sources.changed else []
    return {
        "root": str(root),
        "same": len(sources.same),
        "changed": ids,
        "gone": len(sources.gone),
        "unknown": len(sources.unknown) - recorded,
        "recorded": recorded,
        "split": sources.split,
    }


def render_sources(store: Path, facts: Mapping[str, Any]) -> list[str]:
    """What `verify_sources` found, in lines."""
    lines = [
        f"{store}: of the good rows {facts['same']} are of the videos in {facts['root']}, {len(facts['changed'])} of "
        f"others than lie there now, {facts['gone']} of videos that are not there, {facts['unknown']} know no source"
    ]
    lines += [f"  replaced: {video_id}" for video_id in facts["changed"][:_MAX_LINES]]
    if len(facts["changed"]) > _MAX_LINES:
        lines.append(f"  and {len(facts['changed']) - _MAX_LINES} more: see --json")
    lines += [f"  made of two versions of one file: {path}" for path in facts["split"][:_MAX_LINES]]
    if facts["changed"]:
        lines.append("`s4v extract ... --redo-changed` does replaced rows anew; without it they keep what they have")
    if facts["recorded"]:
        lines.append(f"{facts['recorded']} rows know their source now")
    elif facts["unknown"]:
        lines.append("--record notes what lies there now as the source of rows that know none")
    return lines
