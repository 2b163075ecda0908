"""Shards in a worker of Dask: a task brings what there is to know of its rows; model, decoders and store stay open."""

from __future__ import annotations

import atexit
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...device import count_cores
from ...errors import EnvironmentFailedError, StoreNotFoundError
from ...files import hash_file
from ...store.markers import read_marker
from ...store.reader import StoreReader, open_store
from ...store.records import VideoRecord, VideoResult
from ...store.writer import MarkerState, is_undone, join_store
from ..config import ExtractConfig
from ..decode.pool import DecoderPool
from ..decode.views import count_views
from ..job import RowsAtHand, join_job
from ..kept_rows import KeptRows
from ..meter import StageClock
from .stages import Pipeline

STARTED_TOPIC = "s4v-started"
"""Of events by which workers tell that they begin a task: its key, and the worker's address."""

# Of this process, where it is a worker: the extraction that it is set up for, one at a time.
_open_jobs: dict[tuple[str, str, str | None], WorkerJob] = {}
_stopped_runs: set[str] = set()
_one_at_a_time = threading.Lock()
_closing = ExitStack()
atexit.register(_closing.close)


@dataclass(frozen=True, kw_only=True, slots=True)
class HandedOut:
    """A shard as a worker gets it: with all that it need know of its rows."""

    marker: MarkerState | None
    """The done-marker that it had when it was handed out."""
    records: Sequence[VideoRecord]
    """Of its rows, without captions."""
    num_frames: Sequence[int]
    """Cached frames of its rows."""
    known: Sequence[VideoResult] = ()
    """What the manifest has of them, where the done-marker is gone."""


def process_shards(
    config: ExtractConfig,
    store_sha256: str,
    shards: Mapping[int, HandedOut],
    run: str,
    lease_nonce: str | None = None,
) -> dict[str, Any]:
    """Do some shards in a worker, which is set up by its first ones.

    Args:
        config: The extraction.
        store_sha256: Of the store's `zarr.json`, as the command that hands them out sees it.
        shards: By number.
        run: Of the command that hands them out.
        lease_nonce: Of the lease under which it does.

    Returns:
        seconds (by stage), wall_s, and pending: the shards that are left with pending rows.
    """
    from distributed import get_worker

    worker = get_worker()
    with _one_at_a_time:  # a worker with several threads has one backbone
        worker.log_event(STARTED_TOPIC, {"key": worker.get_current_task(), "worker": worker.address})
        start = time.monotonic()
        try:
            _go_on(run)
            job = _open_job(config, store_sha256, lease_nonce)
            seconds = job.process(shards, lambda *_: _go_on(run))
            pending = job.find_pending(shards)
        finally:
            if run in _stopped_runs:
                _close_job()
    return {"seconds": seconds, "wall_s": time.monotonic() - start, "pending": pending}


def _go_on(run: str) -> None:
    if run in _stopped_runs:
        raise EnvironmentFailedError("the command that handed out these shards has ended")


def _open_job(config: ExtractConfig, store_sha256: str, lease_nonce: str | None) -> WorkerJob:
    key = (repr(config), store_sha256, lease_nonce)
    if key not in _open_jobs:
        _close_job()  # one extraction at a time: a backbone fills a GPU
        _open_jobs[key] = _closing.enter_context(WorkerJob(_for_this_worker(config), store_sha256, lease_nonce))
    return _open_jobs[key]


def _close_job() -> None:
    _open_jobs.clear()
    _closing.close()


def stop_run(run: str) -> None:
    """In a worker: do no more shards for a command, and give back what was open for it."""
    _stopped_runs.add(run)
    if _one_at_a_time.acquire(blocking=False):  # else the task under way sees to it, when its shard is written
        try:
            _close_job()
        finally:
            _one_at_a_time.release()


def open_handed_out(path: Path, store_sha256: str) -> StoreReader:
    """Open the store whose shards a command hands out, by its metadata: whatever its size, rows are not looked at.

    Args:
        path: Where the command has it.
        store_sha256: Of its `zarr.json`, as the command sees it.

    Raises:
        EnvironmentFailedError: If there is no store here, or another one.
    """
    try:
        store = open_store(path)
        reason = None if hash_file(path / "zarr.json") == store_sha256 else "another store is there"
    except StoreNotFoundError:
        reason = "no store is there"
    if reason is None:
        return store
    raise EnvironmentFailedError(
        f"a worker on {socket.gethostname()} does not see the command's store at {path}: {reason}. Do all workers see "
        "that folder, and the same one? Mount it at one path everywhere; then the same command continues."
    )


class WorkerJob:
    """An extraction in a worker, which does one run of shards after another; a context manager.

    Args:
        config: The extraction.
        store_sha256: As for `open_handed_out`.
        lease_nonce: Of the lease under which the command hands out.
    """

    def __init__(self, config: ExtractConfig, store_sha256: str, lease_nonce: str | None = None) -> None:
        self._config = config
        self._store_sha256 = store_sha256
        self._lease_nonce = lease_nonce
        self._known: dict[int, Sequence[VideoResult]] = {}
        self._open = ExitStack()

    def __enter__(self) -> WorkerJob:
        config = self._config
        store = open_handed_out(config.out, self._store_sha256)
        with ExitStack() as opening:
            pool = opening.enter_context(DecoderPool(config.num_decoders))
            self._clock = StageClock()
            self._job = join_job(config, store, pool, self._clock)
            self._writer = opening.enter_context(join_store(store, self._job.spec, lease_nonce=self._lease_nonce))
            self._job.load_weights()
            kept_rows = KeptRows(store, config, self._job.records, self._known)
            self._pipeline = Pipeline(self._job, self._writer, kept_rows)
            self._open = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        del self._pipeline, self._writer, self._job

    def process(
        self, shards: Mapping[int, HandedOut], count: Callable[[int, Collection[int]], None] = lambda *_: None
    ) -> dict[str, float]:
        """Do some shards, one overlapping with the next; those that somebody finished meanwhile are left alone.

        Args:
            shards: By number.
            count: Told of each that is done or about to be written.

        Returns:
            Seconds by stage.
        """
        markers = {shard: task.marker for shard, task in shards.items()}
        self._writer.expect_markers(markers)
        self._hold(shards)
        undone = [shard for shard, state in markers.items() if is_undone(self._config.out, shard, state)]
        if undone:
            self._pipeline.run(undone, count)
        seconds = dict(self._clock.seconds)
        self._clock.seconds.clear()
        return seconds

    def find_pending(self, shards: Iterable[int]) -> list[int]:
        """Those of some shards that have a row which the machine did not let happen."""
        unfinished = []
        for shard in shards:
            marker = read_marker(self._config.out, shard, self._writer.codecs_sha256)
            if marker is not None and "pending" in marker.statuses:
                unfinished.append(shard)
        return unfinished

    def _hold(self, shards: Mapping[int, HandedOut]) -> None:
        """Know the rows of these shards alone."""
        job, config = self._job, self._config
        records, num_frames = {}, {}
        for shard, task in shards.items():
            for row, record, frames in zip(job.layout.shard_rows(shard), task.records, task.num_frames, strict=True):
                records[row], num_frames[row] = record, frames
        for rows, values in (
            (job.records, records),
            (job.num_frames, num_frames),
            (job.num_views, {row: count_views(config.views_of(record.split)) for row, record in records.items()}),
        ):
            assert isinstance(rows, RowsAtHand)
            rows.hold(values)
        self._known.clear()
        self._known.update({shard: task.known for shard, task in shards.items()})


def _for_this_worker(config: ExtractConfig) -> ExtractConfig:
    """A share of the cores, and one GPU where a machine has several."""
    import torch
    from distributed import get_worker

    name = get_worker().name
    if config.num_workers is None:
        return config  # a cluster's own configuration says what a worker gets
    cores = max(1, count_cores() // config.num_workers)
    torch.set_num_threads(cores)
    num_gpus = torch.cuda.device_count()
    device = f"cuda:{int(name) % num_gpus}" if num_gpus > 1 and config.device in ("auto", "cuda") else config.device
    return replace(config, num_decoders=config.num_decoders or cores, device=device)
