"""How many frames each row of a store caches: its split's number, or as many as it is long."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import StoreDamagedError
from ..store.reader import StoreReader
from ..store.records import VideoRecord
from .changed_rows import find_changed_rows
from .config import ExtractConfig
from .decode.pool import DecodeRequest, DecoderPool
from .target import Target

_log = logging.getLogger(__name__)


def count_frames(
    config: ExtractConfig,
    records: Sequence[VideoRecord],
    target: Target,
    pool: DecoderPool,
    report: Callable[[str, int, int], None] = lambda *_: None,
) -> list[int]:
    """Cached frames of each row, before anything is decoded.

    Rows that are as long as their videos are read once for that, as packets; good rows of the store that is there are
    not. What cannot be read has none, and fails or waits when its turn comes.

    Args:
        config: The extraction.
        records: Its rows.
        target: What stands at its place.
        pool: Reads the videos.
        report: Told about progress.
    """
    if not config.is_open_ended:
        return [config.frames_of(record.split) for record in records]
    counts = np.zeros(len(records), dtype=np.int64)
    is_open = np.ones(len(records), dtype=bool)
    if target.reader is not None:
        known, is_done = _read_known(config, target.reader)
        counts[: len(known)], is_open[: len(known)] = known, ~is_done
    rows = np.flatnonzero(is_open).tolist()
    requests = (
        replace(
            DecodeRequest.of(records[row], config, num_frames=0, image_size=(1, 1)),
            sampling=config.sampling_of_row(records[row]),
        )
        for row in rows
    )
    for place, (row, video) in enumerate(zip(rows, pool.decode_ahead(requests), strict=True), start=1):
        counts[row] = video.facts.get("count") or 0
        report("counting frames", place, len(rows))
    return counts.tolist()


def _read_known(config: ExtractConfig, store: StoreReader) -> tuple[np.ndarray, np.ndarray]:
    """Frames of a store's rows as far as they are known, and which rows this run does not do."""
    try:
        table = store.read_manifest(["status", "num_cached_frames"])
    except StoreDamagedError:  # about to be repaired, or refused
        return np.zeros(store.layout.num_rows, dtype=np.int64), np.zeros(store.layout.num_rows, dtype=bool)
    statuses = table["status"].to_numpy(zero_copy_only=False)
    is_done = statuses == "ok"
    if not config.retry_failed:
        is_done |= statuses == "failed"
    if config.redo_changed:
        is_done[find_changed_rows(store, config.root)] = False
    part, per_shard = config.find_part(store.layout.num_shards), store.layout.rows_per_shard
    is_done[: part.start * per_shard] = is_done[part.stop * per_shard :] = True
    return table["num_cached_frames"].fill_null(0).to_numpy().astype(np.int64), is_done


def warn_of_repeated_frames(config: ExtractConfig, table: pa.Table) -> None:
    """Tell how many good rows show frames more than once, where a rate was asked for.

    Args:
        config: The extraction.
        table: The store's manifest.
    """
    if not config.is_open_ended:
        return
    indices = table.filter(pc.equal(table["status"], "ok"))["frame_indices"]
    values = pc.list_flatten(indices).to_numpy()
    owners = np.repeat(np.arange(len(indices)), pc.list_value_length(indices).to_numpy())
    is_repeated = (values[1:] == values[:-1]) & (owners[1:] == owners[:-1])
    if num_rows := len(np.unique(owners[1:][is_repeated])):
        _log.warning(
            "%d of %d good rows show frames more than once: %s is above their videos' own rate",
            *(num_rows, len(indices), config.recipe.sampling),
        )
