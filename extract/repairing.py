"""`--repair`: put back what is damaged of the whole store, and mark damaged shards undone."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..errors import StoreDamagedError
from ..store import manifest
from ..store._files import FolderLock
from ..store.names import refuse_links
from ..store.reader import StoreReader, open_store
from ..store.records import VideoResult
from ..store.verify import Damage, find_lost_rows, verify_store
from ..store.writer import repair_store
from .job import Job
from .keeping import GoodRows, name_videos
from .opening import make_codec

_log = logging.getLogger(__name__)


def mend_store(job: Job) -> list[Damage]:
    """Mend a store as far as that loses nothing.

    A shard is left as it is where a good row of it would be lost: one that is whole, and whose video is gone.

    Returns:
        Damage that stays.

    Raises:
        StoreError: If the store is another command's, or cannot be mended by it; nothing was changed.
    """
    store = open_store(job.config.out)
    refuse_links(store.path)
    damage = verify_store(store, job.report)
    kept = _find_kept_shards(job, store, damage)
    to_mend = [one for one in damage if one.shard not in kept]
    if to_mend:
        _mend(job, store, to_mend)
    # The manifest is joined from the done-markers at the end of every run.
    mended = {manifest.MANIFEST_NAME}
    for shard in sorted(kept):
        name = f"{manifest.PARTS_NAME}/{manifest.part_path(store.path, shard).name}"
        if any(one.where == name for one in damage) and _restore_marker(store, shard):
            mended.add(name)
    return [one for one in damage if one.shard in kept and one.where not in mended]


def _mend(job: Job, store: StoreReader, damage: Sequence[Damage]) -> None:
    job.load_weights()
    try:
        codec = store.codec
    except StoreDamagedError:
        with job.clock.stage("calibration"):
            codec = make_codec(job)
    repair_store(
        store.path,
        damage,
        layout=job.layout,
        attributes={**job.attributes, "created": store.attributes["created"]},
        records=job.records,
        codec=codec,
        head=job.backbone.read_head(),
    )
    shards = sorted({one.shard for one in damage if one.shard is not None})
    _log.warning("%s: %d damages; doing %d shards anew", store.path, len(damage), len(shards))


def _find_kept_shards(job: Job, store: StoreReader, damage: Sequence[Damage]) -> set[int]:
    """Damaged shards with a whole row whose video is gone."""
    if store.layout.num_rows != len(job.records):
        return set()  # another command's store: it is refused as that
    good, kept = GoodRows(store), set()
    for shard in sorted({one.shard for one in damage if one.shard is not None}):
        gone = good.without_video(job, shard)
        if not gone:
            continue
        hit = {row for one in damage if one.shard == shard for row in find_lost_rows(store, one)}
        if whole := [row for row in gone if row not in hit]:
            kept.add(shard)
            _log.warning(
                "%s: shard %d is damaged and stays so: done anew it would lose %s, good there and gone from %s",
                *(store.path, shard, name_videos(job, whole), job.config.root),
            )
    return kept


def _restore_marker(store: StoreReader, shard: int) -> bool:
    """Write a done-marker as the manifest has its rows; returns whether it has them."""
    rows = store.layout.shard_rows(shard)
    table = manifest.read_table(store.path / manifest.MANIFEST_NAME, ["video_id", *manifest.RESULT_SCHEMA.names])
    results = [VideoResult(**row) for row in table.slice(rows.start, len(rows)).to_pylist()]
    if any(result.status == "pending" for result in results):
        return False
    with FolderLock(store.path, f"another process is writing to {store.path}: wait for it before repairing its store"):
        manifest.write_part(store.path, shard, results, store.attributes["codec"]["sha256"])
    return True
