"""The store that an extraction writes to: created with a fitted codec, gone on with or added to; what is to be done."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..errors import DataNotFoundError
from ..store.appending import append_rows
from ..store.codec import Codec
from ..store.reader import StoreReader, open_store
from ..store.texts import has_current_texts
from ..store.writer import StoreWriter, create_store, resume_store
from .calibration import fit_codec, frames_per_video, gather_sample, group_for_calibration
from .job import Job
from .keeping import GoodRows, name_videos
from .planning import require_space

_log = logging.getLogger(__name__)


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
            _require_appendable(job, store)
            append_rows(config.out, layout=job.layout, attributes=job.attributes, records=job.records)
        return resume_store(config.out, layout=job.layout, attributes=job.attributes, records=job.records)
    if not config.prepare:
        _require_room(job, job.limit_shards(range(job.layout.num_shards)), replaces=True)
    job.load_weights()
    job.report("calibrating the codec", 0, len(job.records))
    with job.clock.stage("calibration"):
        codec = make_codec(job)
    return create_store(
        config.out,
        layout=job.layout,
        attributes=job.attributes,
        records=job.records,
        codec=codec,
        head=job.backbone.read_head(),
        overwrite=config.overwrite,
    )


def undone_shards(job: Job, writer: StoreWriter) -> list[int]:
    """What this run has to do; there is room for it on the disk.

    Raises:
        ConfigError: If there is not.
    """
    undone = {*writer.pending_shards(), *(_retried_shards(job, writer) if job.config.retry_failed else ())}
    shards = job.limit_shards(sorted(undone))
    _require_room(job, shards)
    return shards


def _retried_shards(job: Job, writer: StoreWriter) -> list[int]:
    """Shards with a failed row, but for those that would lose a good one."""
    good, retried = GoodRows(open_store(job.config.out)), []
    for shard in writer.failed_shards():
        if gone := good.without_video(job, shard):
            _log.warning(
                "%s: shard %d with its failed rows is not done anew: it would lose %s, good there and gone from %s",
                *(job.config.out, shard, name_videos(job, gone), job.config.root),
            )
        else:
            retried.append(shard)
    return retried


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
    num_frames = frames_per_video(len(groups[0]) or len(job.records))
    decoded = (zip(group, job.decode(group, num_frames), strict=True) for group in groups)
    return fit_codec(
        config.dtype,
        gather_sample(decoded, config.calibration_videos),
        job.backbone,
        layout.layers,
        channels=layout.channels,
        batch_size=config.batch_size,
    )


def _require_appendable(job: Job, store: StoreReader) -> None:
    """Refuse new rows that do not fit on the disk, and old ones of a last shard that cannot be done again."""
    first = store.layout.num_rows // store.layout.rows_per_shard
    _require_room(job, job.limit_shards(range(first, job.layout.num_shards)))
    if gone := GoodRows(store).without_video(job, first) if first < store.layout.num_shards else []:
        begun = store.layout.num_rows - first * store.layout.rows_per_shard
        raise DataNotFoundError(
            f"the last shard of {store.path} is not full: with new rows its {begun} old ones are done again, "
            f"and {name_videos(job, gone)} {'are' if len(gone) > 1 else 'is'} no longer below {job.config.root}. "
            "Nothing was changed: bring them back, or extract the new videos into a store of their own."
        )


def _require_room(job: Job, shards: Sequence[int], *, replaces: bool = False) -> None:
    passes = job.passes
    frames = sum(passes[row] for shard in shards for row in job.layout.shard_rows(shard))
    has_texts = not replaces and has_current_texts(job.config.out)
    num_captions = 0 if has_texts else sum(len(record.captions) for record in job.records)
    require_space(job.layout, frames, job.config.out, num_captions=num_captions, replaces=replaces)
