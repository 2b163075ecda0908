"""`s4v extract`, from its settings to a finished store: list the rows, open the store, do its shards, finish it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from ..errors import NoGoodVideoError, StoreDamagedError
from ..store.info import count_reasons, count_table
from ..store.reader import is_store
from ..store.writer import StoreWriter, refuse_existing
from .cluster import run_on_workers
from .config import ExtractConfig
from .decoding import DecoderPool
from .finishing import finish_store
from .job import Job, set_up_job
from .opening import open_writer, undone_shards
from .pipeline import Pipeline
from .repairing import mend_store
from .segments import list_rows
from .stats import Meter, ReportProgress, StageClock, write_stats

_MANY_SHARDS = 1000
"""From so many on, joining their results takes long enough to be told."""


@dataclass(frozen=True, slots=True)
class ExtractSummary:
    """What an extraction left behind."""

    store: Path
    videos: dict[str, int]
    """Rows by status: ok, failed, pending."""
    failed: list[dict[str, str]]
    """video_id, path and reason of every failed row."""
    seconds: float
    files: dict[str, int]
    """Files with a row of that status: a file's segments are rows of their own."""
    pending: list[dict[str, str]]
    """The same as `failed`, of rows that the machine kept from being done."""
    pending_reasons: dict[str, int]
    """How many of them, by the code of their reason."""


def extract_dataset(config: ExtractConfig, report: ReportProgress = lambda *_: None) -> ExtractSummary:
    """Run the backbone once over a data set's videos and write the store.

    The same call on an unfinished store goes on with it; on a finished one it changes nothing.

    Args:
        config: What to extract, and how.
        report: Told about progress.

    Returns:
        Counts and failures of the whole store, earlier runs included.

    Raises:
        S4vError: One of `s4v.errors`, before anything is written unless the machine itself fails.
    """
    start = time.perf_counter()
    clock = StageClock()
    if not is_store(config.out):
        refuse_existing(config.out, overwrite=config.overwrite)
    with DecoderPool(config.num_decoders) as pool:
        report("listing the videos", 0, 0)
        records = list_rows(config, pool, report)
        report("building the backbone", 0, 0)
        job = set_up_job(config, records, pool, clock, report)
        unmended = mend_store(job) if config.repair and job.goes_on else []
        with open_writer(job) as writer:
            shards = [] if config.prepare else undone_shards(job, writer)
            is_alone = config.num_workers is None and config.scheduler is None
            meter = _run_here(job, writer, shards) if is_alone else _run_on_workers(job, shards)
            if job.layout.num_shards >= _MANY_SHARDS:
                report("joining the manifest", 0, 0)
            table = writer.consolidate()
        finish_store(job, table)
    summary = _summarise(config.out, table, time.perf_counter() - start)
    if meter.rows:  # a run that had nothing to do leaves the last one's figures
        write_stats(config.out, meter, summary.seconds)
    if unmended:
        damaged = sorted({one.shard for one in unmended if one.shard is not None})
        raise StoreDamagedError(
            f"{config.out}: damage stays in shards {', '.join(map(str, damaged))}; all else is mended. Doing them anew "
            f"would lose good rows whose videos are no longer below {config.root}: bring the videos back and run the "
            "same command again."
        )
    if summary.videos["ok"] == 0 and summary.videos["pending"] == 0:
        reasons = "; ".join(sorted({row["reason"] for row in summary.failed})[:3])
        num_files = summary.files["failed"]
        rows = f"{len(records)} videos" if num_files == len(records) else f"{len(records)} rows of {num_files} files"
        raise NoGoodVideoError(
            f"not one of {rows} decodes. First reasons: {reasons}. {config.out} keeps every reason, nothing to train "
            "on or to search: mend the files and run the same command with --retry-failed, or remove it."
        )
    return summary


def _run_here(job: Job, writer: StoreWriter, shards: Sequence[int]) -> Meter:
    if shards:
        job.load_weights()
    meter = job.start_meter(shards)
    if shards:
        job.report("extracting", 0, meter.total)
        Pipeline(job, writer).run(shards, meter.count)
    return meter


def _run_on_workers(job: Job, shards: Sequence[int]) -> Meter:
    """Have shards done by Dask's workers; the seconds of all of them are counted together."""
    meter = job.start_meter(shards)

    def count(shard: int, seconds: dict[str, float]) -> None:
        job.clock.add(seconds)
        meter.count(shard, sum(value for stage, value in seconds.items() if stage != "start"))

    if shards:
        job.report("extracting", 0, meter.total)
        job.backbone.free_weights()  # the device is the workers'
        run_on_workers(job.config, shards, count)
    return meter


def _summarise(path: Path, table: pa.Table, seconds: float) -> ExtractSummary:
    counts = count_table(table)
    failed = _select(table, pa.compute.equal(table["status"], "failed"))
    is_kept_off = pa.compute.and_(pa.compute.equal(table["status"], "pending"), pa.compute.is_valid(table["reason"]))
    return ExtractSummary(
        store=path,
        videos=counts.rows,
        failed=failed,
        seconds=round(seconds, 3),
        files=counts.files,
        pending=_select(table, is_kept_off),
        pending_reasons=count_reasons(table, "pending"),
    )


def _select(table: pa.Table, chosen: pa.ChunkedArray) -> list[dict[str, str]]:
    return table.filter(chosen).select(["video_id", "path", "reason"]).to_pylist()
