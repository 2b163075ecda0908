"""The store that an extraction writes to: created with a fitted codec, gone on with or added to; what is to be done."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import StoreExistsError
from ..store.append import append_rows
from ..store.codec import Codec
from ..store.lease import Scope
from ..store.reader import is_store, open_store
from ..store.texts import has_current_texts
from ..store.writer import StoreWriter, create_store, resume_store
from .codec_fit import fit_codec, frames_per_video, gather_sample, group_for_calibration
from .job import Job
from .plan import require_space


def open_writer(job: Job) -> StoreWriter:
    """Go on with the store that is there, or calibrate and create one.

    Raises:
        S4vError: If the store is another command's, or the disk is too small; nothing was changed.
    """
    config = job.config
    if job.goes_on:
        store = open_store(config.out)
        store.require_arrays()
        if config.append and len(job.records) > store.layout.num_rows:
            first = store.layout.num_rows // store.layout.rows_per_shard
            _require_room(job, job.limit_shards(range(first, job.layout.num_shards)))
            append_rows(config.out, layout=job.layout, attributes=job.attributes, records=job.records)
        return _resume(job)
    if not config.prepare:
        _require_room(job, job.limit_shards(range(job.layout.num_shards)), replaces=True)
    job.load_weights()
    with job.clock.stage("calibration"):
        codec = make_codec(job)
    try:
        return create_store(
            config.out,
            layout=job.layout,
            attributes=job.attributes,
            records=job.records,
            codec=codec,
            head=job.backbone.read_head(),
            overwrite=config.overwrite,
            scope=_scope_of(job),
        )
    except StoreExistsError:
        if config.overwrite or not is_store(config.out):
            raise
        return _resume(job)  # another process of the same command was first


def _resume(job: Job) -> StoreWriter:
    return resume_store(
        job.config.out, layout=job.layout, attributes=job.attributes, records=job.records, scope=_scope_of(job)
    )


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


def fits_codec(job: Job) -> bool:
    """Whether a new store's codec is fitted on its own videos, not taken over and not the identity."""
    is_identity = job.layout.patch_dtype != "int8" and job.layout.channels == job.layout.width
    return job.config.codec_from is None and not is_identity


def make_codec(job: Job) -> Codec:
    """The codec of a new store: taken over, the identity, or fitted; the same whenever it is made."""
    config, layout = job.config, job.layout
    if config.codec_from is not None:
        return open_store(config.codec_from).codec
    if not fits_codec(job):
        return Codec(dtype=config.dtype)
    groups = group_for_calibration(job.records, config.seed)
    num_candidates = len(groups[0]) or len(job.records)
    num_videos = min(config.calibration_videos, num_candidates)
    num_frames = frames_per_video(num_candidates, layout, config.calibration_videos)
    decoded = (zip(group, job.decode(group, num_frames), strict=True) for group in groups)

    def count(num_decoded: int) -> None:
        stage = f"decoding for calibration: {num_videos} videos, {num_frames} frames of each"
        job.report(stage, num_decoded, num_videos)

    count(0)
    return fit_codec(
        config.dtype,
        gather_sample(decoded, config.calibration_videos, count),
        job.backbone,
        layout.layers,
        channels=layout.channels,
        batch_size=config.batch_size,
        report=job.report,
    )


def _require_room(job: Job, shards: Sequence[int], *, replaces: bool = False) -> None:
    passes = job.passes
    frames = sum(passes[row] for shard in shards for row in job.layout.shard_rows(shard))
    has_texts = not replaces and has_current_texts(job.config.out)
    num_captions = 0 if has_texts else sum(len(record.captions) for record in job.records)
    require_space(job.layout, frames, job.config.out, num_captions=num_captions, replaces=replaces)
