"""`s4v extract`, from its settings to a finished store: list the rows, open the store, do its shards, finish it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from ..errors import EnvironmentFailedError, NoGoodVideoError, StoreDamagedError
from ..store.info import count_reasons, count_table
from ..store.reader import is_store, open_store
from ..store.redone import note_redone
from ..store.writer import StoreWriter, refuse_existing
from .changed_rows import find_changed_rows, warn_of_changed
from .config import ExtractConfig
from .decode.pool import DecoderPool
from .finishing import finish_store
from .job import Job, set_up_job
from .meter import Meter, ReportProgress, StageClock, write_stats
from .opening import open_writer, undone_shards
from .pipeline.dask_cluster import Unfinished, run_on_workers
from .pipeline.stages import Pipeline
from .repair import mend_store
from .segments import list_rows_and_missing

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
    changed: list[str] = field(default_factory=list)
    """video_id of every good row whose video was replaced since."""


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
        listing = list_rows_and_missing(config, pool, report)
        records = listing.records
        report("building the backbone", 0, 0)
        job = set_up_job(config, records, pool, clock, report, listing.missing)
        changed = _find_changed(job) if job.goes_on else []
        unmended = mend_store(job, changed) if config.repair and job.goes_on else []
        with open_writer(job) as writer:
            shards = [] if config.prepare else undone_shards(job, writer, changed if config.redo_changed else ())
            before = _sources_of(config.out, changed)
            is_alone = config.num_workers is None and config.scheduler is None
            meter, unfinished = (
                _run_here(job, writer, shards) if is_alone else _run_on_workers(job, shards, writer.lease_nonce)
            )
            if job.layout.num_shards >= _MANY_SHARDS:
                report("joining the manifest", 0, 0)
            table = writer.consolidate()
            with writer.hold_manifest():
                note_redone(config.out, _count_redone(table, changed, before))
        finish_store(job, table)
    summary = _summarise(config.out, table, time.perf_counter() - start)
    store = open_store(config.out)
    still_changed = find_changed_rows(store, config.root) if changed and config.redo_changed else changed
    summary = replace(summary, changed=warn_of_changed(store, still_changed))
    if meter.rows:  # a run that had nothing to do leaves the last one's figures
        write_stats(config.out, meter, summary.seconds)
    if unfinished is not None:
        raise EnvironmentFailedError(unfinished.message)
    if unmended:
        damaged = sorted({one.shard for one in unmended if one.shard is not None})
        raise StoreDamagedError(
            f"{config.out}: damage stays in shards {', '.join(map(str, damaged))}; all else is mended. Their damaged "
            "rows were made of other videos than lie there now: bring those back, or take the new ones with "
            "--redo-changed."
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


def _run_here(job: Job, writer: StoreWriter, shards: Sequence[int]) -> tuple[Meter, None]:
    if shards:
        job.load_weights()
    meter = job.start_meter(shards)
    if shards:
        job.report("extracting", 0, meter.total)
        Pipeline(job, writer).run(shards, meter.count)
    return meter, None


def _run_on_workers(job: Job, shards: Sequence[int], lease_nonce: str | None) -> tuple[Meter, Unfinished | None]:
    """Have shards done by Dask's workers; the seconds of all of them are counted together."""
    meter = job.start_meter(shards)

    def count(shard: int, seconds: dict[str, float]) -> None:
        job.clock.add(seconds)
        meter.count(shard, worker_seconds=sum(value for stage, value in seconds.items() if stage != "start"))

    if shards:
        job.report("extracting", 0, meter.total)
        job.backbone.free_weights()  # the device is the workers'
        return meter, run_on_workers(job, shards, count, lease_nonce)
    return meter, None


def _find_changed(job: Job) -> list[int]:
    paths = [record.path for record in job.records] if job.config.repair else None
    return find_changed_rows(open_store(job.config.out), job.config.root, paths=paths)


def _sources_of(path: Path, rows: Sequence[int]) -> list[str | None]:
    if not rows:
        return []
    return open_store(path).read_manifest(["source_hash"])["source_hash"].take(list(rows)).to_pylist()


def _count_redone(table: pa.Table, rows: Sequence[int], before: Sequence[str | None]) -> int:
    """How many of some rows are made of another video than before."""
    after = table["source_hash"].take(list(rows)).to_pylist() if rows else []
    return sum(old != new for old, new in zip(before, after, strict=True))


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
