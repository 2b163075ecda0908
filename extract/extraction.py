"""`s4v extract`, from its settings to a finished store: list the rows, open the store, do its shards, finish it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pyarrow as pa

from ..errors import EnvironmentFailedError, StoreExistsError
from ..store.append import append_rows
from ..store.lease import Scope
from ..store.moments import write_moments
from ..store.reader import StoreReader
from ..store.redone import note_redone
from ..store.writer import StoreWriter, create_store, refuse_existing, resume_store
from .caption_texts import write_caption_texts
from .changed_rows import find_changed_rows, warn_of_changed
from .class_texts import embed_classes
from .codec_fit import make_codecs
from .codec_report import write_codec_report
from .config import ExtractConfig
from .decode.pool import DecoderPool
from .disk_space import require_space
from .job import Job, set_up_job
from .meter import Meter, ReportProgress, StageClock, write_stats
from .pipeline.dask_cluster import Unfinished, run_on_workers
from .pipeline.stages import Pipeline
from .recipe import describe_recipe, settle_recipe
from .repair import mend_store
from .row_frames import warn_of_repeated_frames
from .segments import list_rows_and_missing
from .summary import ExtractSummary, refuse_damage, refuse_no_good_video, summarise_store
from .target import Target
from .text_needs import count_missing_bytes, require_texts

_MANY_SHARDS = 1000
"""From so many on, joining their results takes long enough to be told."""


def extract_dataset(
    config: ExtractConfig, report: ReportProgress = lambda *_: None, say: Callable[[str], None] = lambda _: None
) -> ExtractSummary:
    """Run the backbone once over a data set's videos and write the store.

    The same call on an unfinished store goes on with it; on a finished one it changes nothing.

    Args:
        config: What to extract, and how.
        report: Told about progress.
        say: Told in a line which recipe a new store takes, or that it goes on as it was begun.

    Returns:
        Counts and failures of the whole store, earlier runs included.

    Raises:
        S4vError: One of `s4v.errors`, before anything is written unless the machine itself fails.
    """
    start = time.perf_counter()
    clock = StageClock()
    target = Target.find(config)
    if target.is_half_appended:
        target = target.finish_append()
    if recipe := describe_recipe(config, target):
        say(recipe)
    config = settle_recipe(config, target)
    if not target.goes_on:
        refuse_existing(config.out, overwrite=config.overwrite)
    with DecoderPool(config.num_decoders) as pool:
        report("listing the videos", 0, 0)
        listing = list_rows_and_missing(config, target, pool, report)
        report("building the backbone", 0, 0)
        job = set_up_job(config, target, listing, pool, clock, report)
        require_texts(job)
        changed = _find_changed(job)
        unmended = mend_store(job, changed) if config.repair and target.goes_on else []
        with open_writer(job) as writer:
            store = writer.store
            shards = [] if config.prepare else undone_shards(job, writer, changed if config.redo_changed else ())
            before = _read_sources(store, changed)
            is_alone = config.num_workers is None and config.scheduler is None
            meter, unfinished = (_run_here if is_alone else _run_on_workers)(job, writer, shards)
            if job.layout.num_shards >= _MANY_SHARDS:
                report("joining the manifest", 0, 0)
            table = writer.consolidate()
            with writer.hold_manifest():
                note_redone(config.out, _count_redone(table, changed, before))
        write_codec_report(job, store, table)
        write_moments(store, job.records)
        write_caption_texts(job, store)
        embed_classes(job, store)
    warn_of_repeated_frames(config, table)
    seconds = time.perf_counter() - start
    still_changed = find_changed_rows(store, config.root) if changed and config.redo_changed else changed
    summary = summarise_store(config.out, table, seconds, warn_of_changed(store, still_changed))
    if meter.rows:  # a run that had nothing to do leaves the last one's figures
        write_stats(config.out, meter, summary.seconds)
    if unfinished is not None:
        raise EnvironmentFailedError(unfinished.message)
    refuse_damage(config.out, unmended)
    refuse_no_good_video(summary, len(listing.records))
    return summary


def open_writer(job: Job) -> StoreWriter:
    """Go on with the store that is there, or calibrate and create one.

    Raises:
        S4vError: If the store is another command's, or the disk is too small; nothing was changed.
    """
    config = job.config
    # Another process of the same command may have begun the store since.
    target = job.target if job.target.goes_on else Target.find(config)
    if target.reader is not None:
        return _go_on(job, target.reader)
    if not config.prepare:
        _require_room(job, job.limit_shards(range(job.layout.num_shards)), replaces=True)
    job.load_weights()
    with job.clock.stage("calibration"):
        codec, cls_codec = make_codecs(job)
    spec = replace(job.spec, codec=codec, cls_codec=cls_codec, head=job.backbone.read_head())
    try:
        return create_store(config.out, spec, overwrite=config.overwrite, scope=_scope_of(job))
    except StoreExistsError:
        reader = Target.find(config).reader
        if reader is None:
            raise
        return resume_store(reader, job.spec, scope=_scope_of(job))


def _go_on(job: Job, store: StoreReader) -> StoreWriter:
    """Go on with a store, which gets the rows that are new, and room for rows that are longer than all before."""
    config = job.config
    store.require_arrays()
    has_new_rows = len(job.records) > store.layout.num_rows
    has_longer_rows = config.is_open_ended and job.layout.num_frames > store.layout.num_frames
    if config.append if has_new_rows else has_longer_rows:
        first = store.layout.num_rows // store.layout.rows_per_shard
        _require_room(job, job.limit_shards(range(first, job.layout.num_shards)))
        append_rows(config.out, job.spec)
    return resume_store(store, job.spec, scope=_scope_of(job))


def _scope_of(job: Job) -> Scope:
    """What this run writes to: other parts may be under way beside it."""
    return Scope.all() if job.part_bounds is None else Scope.shards(*job.part_bounds)


def undone_shards(job: Job, writer: StoreWriter, changed: Sequence[int] = ()) -> list[int]:
    """What this run has to do; there is room for it on the disk.

    Args:
        job: The extraction.
        writer: Of its store.
        changed: Rows to do anew because their videos were replaced.

    Raises:
        ConfigError: If there is not.
    """
    undone = {*writer.pending_shards(), *(writer.failed_shards() if job.config.retry_failed else ())}
    undone |= {row // job.layout.rows_per_shard for row in changed}
    shards = job.limit_shards(sorted(undone))
    _require_room(job, shards)
    if rows := [row for row in changed if row // job.layout.rows_per_shard in set(shards)]:
        writer.set_pending(rows)
    return shards


def _require_room(job: Job, shards: Sequence[int], *, replaces: bool = False) -> None:
    passes = job.passes
    frames = sum(passes[row] for shard in shards for row in job.layout.shard_rows(shard))
    text_bytes = count_missing_bytes(job, replaces=replaces)
    require_space(job.layout, frames, job.config.out, text_bytes=text_bytes, replaces=replaces)


def _run_here(job: Job, writer: StoreWriter, shards: Sequence[int]) -> tuple[Meter, None]:
    if shards:
        job.load_weights()
    meter = job.start_meter(shards)
    if shards:
        job.report("extracting", 0, meter.total)
        Pipeline(job, writer).run(shards, meter.count)
    return meter, None


def _run_on_workers(job: Job, writer: StoreWriter, shards: Sequence[int]) -> tuple[Meter, Unfinished | None]:
    """Have shards done by Dask's workers; the seconds of all of them are counted together."""
    meter = job.start_meter(shards)

    def count(shard: int, seconds: dict[str, float]) -> None:
        job.clock.add(seconds)
        meter.count(shard, worker_seconds=sum(value for stage, value in seconds.items() if stage != "start"))

    if shards:
        job.report("extracting", 0, meter.total)
        job.backbone.free_weights()  # the device is the workers'
        return meter, run_on_workers(job, shards, count, writer)
    return meter, None


def _find_changed(job: Job) -> list[int]:
    """Rows of the store that is there whose video was replaced since."""
    if job.target.reader is None:
        return []
    paths = [record.path for record in job.records] if job.config.repair else None
    return find_changed_rows(job.target.reader, job.config.root, paths=paths)


def _read_sources(store: StoreReader, rows: Sequence[int]) -> list[str | None]:
    if not rows:
        return []
    return store.read_manifest(["source_hash"])["source_hash"].take(list(rows)).to_pylist()


def _count_redone(table: pa.Table, rows: Sequence[int], before: Sequence[str | None]) -> int:
    """How many of some rows are made of another video than before."""
    after = table["source_hash"].take(list(rows)).to_pylist() if rows else []
    return sum(old != new for old, new in zip(before, after, strict=True))
