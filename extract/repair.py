"""`--repair`: put back what is damaged of the whole store, and mark damaged rows pending."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ..errors import StoreDamagedError
from ..store import manifest
from ..store.lease import Lease, Scope, hold_lease
from ..store.names import refuse_links
from ..store.reader import StoreReader, open_store
from ..store.repair import repair_store
from ..store.verify import Damage, verify_store
from .codec_fit import make_codecs
from .job import Job

_log = logging.getLogger(__name__)


def mend_store(job: Job, changed: Collection[int]) -> list[Damage]:
    """Mend a store as far as that loses nothing: damaged rows are done anew, all others keep their bytes.

    A shard is left as it is where a damaged row was made of another video than lies there now.

    Args:
        job: The extraction.
        changed: Rows whose video was replaced.

    Returns:
        Damage that stays.

    Raises:
        StoreError: If the store is another command's, or cannot be mended by it; nothing was changed.
    """
    path, advice = job.config.out, "wait for it before repairing its store"
    with hold_lease(path, Scope.all(), purpose="extract --repair", advice=advice) as lease:
        return _mend_store(job, changed, lease)


def _mend_store(job: Job, changed: Collection[int], lease: Lease) -> list[Damage]:
    store = open_store(job.config.out)
    refuse_links(store.path)
    damage = verify_store(store, job.report)
    lost: dict[int, set[int]] = defaultdict(set)
    for one in damage:
        if one.shard is not None and one.where != manifest.MANIFEST_NAME:
            lost[one.shard] |= set(one.rows)
    fixed = set() if job.config.redo_changed else set(changed)
    kept = {shard: rows & fixed for shard, rows in lost.items() if rows & fixed}
    for shard, rows in kept.items():
        ids = [job.records[row].video_id for row in sorted(rows)]
        _log.warning(
            "%s: shard %d is damaged and stays so: %s was made of another video than lies there now, which "
            "--redo-changed takes",
            *(store.path, shard, ", ".join(ids[:3])),
        )
    to_mend = [one for one in damage if one.shard not in kept]
    if to_mend:
        _mend(job, store, to_mend, {shard: rows for shard, rows in lost.items() if shard not in kept}, lease)
    return [one for one in damage if one.shard in kept]


def _mend(
    job: Job, store: StoreReader, damage: Sequence[Damage], lost: Mapping[int, Collection[int]], lease: Lease
) -> None:
    job.load_weights()
    try:
        codec, cls_codec = store.codec, store.cls_codec
    except StoreDamagedError:
        with job.clock.stage("calibration"):
            codec, cls_codec = make_codecs(job)
    repair_store(
        store,
        damage,
        lost_rows=lost,
        spec=replace(job.spec, codec=codec, cls_codec=cls_codec, head=job.backbone.read_head()).filled_from(store),
        lease=lease,
    )
    _log.warning("%s: %d damages; doing %d rows anew", store.path, len(damage), sum(map(len, lost.values())))
