"""The rows of a store to be: a data set's videos or, with `--segment`, pieces of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..errors import ConfigError, StoreDamagedError
from ..store.append import order_records
from ..store.reader import StoreReader
from ..store.records import VideoRecord
from .config import ExtractConfig
from .datasets import Listing
from .decode.pool import DecodeRequest, DecoderPool
from .target import Target

Span = tuple[float | None, float | None]
"""Seconds of the file, from and to; None is its start or end."""


def list_rows(
    config: ExtractConfig,
    target: Target,
    pool: DecoderPool,
    report: Callable[[str, int, int], None] = lambda *_: None,
) -> list[VideoRecord]:
    """The rows that an extraction makes: the records of `list_rows_and_missing`."""
    return list_rows_and_missing(config, target, pool, report).records


def list_rows_and_missing(
    config: ExtractConfig,
    target: Target,
    pool: DecoderPool,
    report: Callable[[str, int, int], None] = lambda *_: None,
) -> Listing:
    """The rows that an extraction makes, in the order of the store that is there, if one is. Nothing is written.

    Where the store's videos are cut is read from the store; other videos are read once, for their lengths. Rows of the
    store keep its splits where the data set says none.

    Args:
        config: The extraction.
        target: What there is at its place; a store that is half appended to plays no part.
        pool: Reads the lengths of videos that are to be cut.
        report: Told about progress.

    Returns:
        The rows, and the paths that were not on the disk.

    Raises:
        DatasetError: If the data set's files are not what a reader takes.
        ConfigError: If videos with captions are to be cut.
    """
    store = target.reader
    listing = config.read_listing(None if store is None else _read_splits(store, target.segment_s))
    records = listing.records
    # A store that is cut in another way refuses these rows, and says why: no need to read the videos for that.
    if config.segment_s is not None and (store is None or target.segment_s == config.segment_s):
        records = _cut(records, config, {} if store is None else _read_spans(store), pool, report)
    return Listing(records if store is None else order_records(store, records), listing.missing)


def cut_span(span: Span, length_s: float | None, segment_s: float) -> list[Span]:
    """Cut a video, or the part of it that is annotated, into segments.

    Args:
        span: The part.
        length_s: Of the whole file; None where it is not known, and nothing is cut.
        segment_s: Of a segment. A rest of less than half of it goes to the last one.

    Returns:
        Spans that follow each other without a gap; first and last bound are the part's own.
    """
    start, end = span
    begin = start or 0.0
    stops = [bound for bound in (end, length_s) if bound is not None]
    if length_s is None or not stops:
        return [span]
    count = max(1, math.floor((min(stops) - begin) / segment_s + 0.5))
    cuts = [begin + place * segment_s for place in range(1, count)]
    return list(zip([start, *cuts], [*cuts, end], strict=True))


def name_segment(video_id: str, start_s: float | None) -> str:
    """The id of a segment: `talk.mp4@00:01:30`, so that a video's segments stand in their order."""
    seconds, thousandths = divmod(round(1000 * (start_s or 0.0)), 1000)
    clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return f"{video_id}@{clock}" + (f".{thousandths:03d}" if thousandths else "")


def _cut(
    records: Sequence[VideoRecord],
    config: ExtractConfig,
    known: Mapping[str, list[Span]],
    pool: DecoderPool,
    report: Callable[[str, int, int], None],
) -> list[VideoRecord]:
    assert config.segment_s is not None
    if captioned := next((record for record in records if record.captions), None):
        raise ConfigError(
            f"--segment would give each piece of a video all of its captions, and {captioned.video_id} has some: name "
            "the captioned parts in a table (--dataset table, columns start and end), or leave the caption column out"
        )
    new = [record for record in records if record.video_id not in known]
    requests = (DecodeRequest.of(record, config, num_frames=0, image_size=(1, 1)) for record in new)
    spans = dict(known)
    for place, (record, video) in enumerate(zip(new, pool.decode_ahead(requests), strict=True), start=1):
        length_s = video.facts.get("duration_s")
        spans[record.video_id] = cut_span((record.start_s, record.end_s), length_s, config.segment_s)
        report("reading lengths", place, len(new))
    rows = [
        replace(
            record,
            video_id=name_segment(record.video_id, start_s),
            source_id=record.source_id or record.video_id,
            start_s=start_s,
            end_s=end_s,
        )
        for record in records
        for start_s, end_s in spans[record.video_id]
    ]
    return sorted(rows, key=lambda row: row.video_id.encode())


def _read_splits(store: StoreReader, segment_s: float | None) -> dict[str, str]:
    """The splits of a store's videos, by the id of the whole video."""
    try:
        columns = store.input_columns()
    except StoreDamagedError:
        return {}  # about to be repaired, or refused
    video_ids = columns["video_id"].to_pylist()
    if segment_s is not None:
        video_ids = [video_id.rpartition("@")[0] for video_id in video_ids]
    return dict(zip(video_ids, columns["split"].to_pylist(), strict=True))


def _read_spans(store: StoreReader) -> dict[str, list[Span]]:
    """The segments of a store's videos, by the id of the whole video."""
    spans: dict[str, list[Span]] = {}
    try:
        columns = store.input_columns()
    except StoreDamagedError:
        return {}  # about to be repaired, or refused
    for row in columns.select(["video_id", "start_s", "end_s"]).to_pylist():
        spans.setdefault(row["video_id"].rpartition("@")[0], []).append((row["start_s"], row["end_s"]))
    return spans
