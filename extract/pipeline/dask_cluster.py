"""Shards on many workers: Dask hands out runs of them, and what brings workers down is found and set aside."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from ...errors import ConfigError, EnvironmentFailedError
from ...files import hash_file
from ...store.writer import StoreWriter, is_undone, read_marker_state
from ..config import ExtractConfig
from ..job import Job
from ..kept_rows import KeptRows
from .dask_worker import STARTED_TOPIC, HandedOut, process_shards, stop_run

Report = Callable[[int, dict[str, float]], None]
"""Told, for each finished shard, of its number and of seconds by stage that came to an end with it."""

_CONNECT_TIMEOUT_S = 30
_CLOSE_TIMEOUT_S = 30
_LOOK_EVERY_S = 30
_MOST_SHARDS_OF_A_TASK = 16
_TASKS_OF_A_WORKER = 4
"""At least, where there are shards enough: the last ones to finish keep the others waiting."""
_TASKS_AHEAD = 2
"""For each thread of a worker, the one under way among them: a task brings its rows, and the scheduler holds them."""
_ROUNDS = 3
_STRAGGLER_FACTOR = 10
_MOST_FALLS = 3
"""Workers that a shard may bring down, alone in its task, before it is set aside."""
_MOST_LOSSES = 10
"""Times that a shard may be lost, alone in its task, where no word came that a worker had begun it."""
_MOST_LOSSES_IN_A_ROW = 20
"""Tasks, no shard finished in between, after which it is not the shards: no worker stands."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What workers could not do, though nothing stopped them."""

    shards: tuple[int, ...]
    message: str
    """For an `EnvironmentFailedError`, when all else is in the manifest."""


def run_on_workers(job: Job, shards: Sequence[int], report: Report, writer: StoreWriter) -> Unfinished | None:
    """Have shards done by a local cluster of processes, or by the workers of a scheduler.

    A worker that dies loses the shard in the making. What is left of its task is handed out again, each shard alone,
    so that one which brings its workers down is found; it is set aside, and the rest goes on. An error of s4v's own
    (a full disk, NaN in a layer) stops all.

    Args:
        job: With `num_workers` or `scheduler`; the store exists.
        shards: To do, ascending; those that are done already are done anew.
        report: Told of finished shards, of each once.
        writer: Of the store, which holds its lease.

    Returns:
        The shards that were set aside; None where there is none.

    Raises:
        ConfigError: If no scheduler answers.
        EnvironmentFailedError: If the scheduler is lost, or what workers say they did is not to be found.
    """
    from distributed.comm import CommClosedError

    try:
        with _connect(job.config) as client:
            handing_out = _HandingOut(client, job, shards, report, writer)
            error = handing_out.run()
    except (CancelledError, CommClosedError, TimeoutError) as lost:
        raise EnvironmentFailedError(
            f"lost the scheduler of the workers ({type(lost).__name__}). Finished shards are kept: start it and its "
            "workers again, and run the same command."
        ) from lost
    if error is not None:
        raise error
    return handing_out.unfinished()


class _HandingOut:
    """The shards of one command on their way to workers and back."""

    def __init__(self, client: Any, job: Job, shards: Sequence[int], report: Report, writer: StoreWriter) -> None:
        # Workers may run in another folder.
        given = {name: getattr(job.config, name) for name in ("root", "out", "annotations", "codec_from")}
        self._config = replace(job.config, **{name: path.resolve() for name, path in given.items() if path is not None})
        self._client = client
        self._job = job
        self._run = uuid.uuid4().hex[:8]
        self._store_sha256 = hash_file(self._config.out / "zarr.json")
        self._lease_nonce = writer.lease_nonce
        self._kept_rows = KeptRows(writer.store, self._config, job.records)
        self._markers = {shard: read_marker_state(self._config.out, shard) for shard in shards}
        self._report = report
        self._reported: set[int] = set()
        self._times_pending: Counter[int] = Counter()
        self._falls: Counter[int] = Counter()
        self._losses: Counter[int] = Counter()
        self._losses_in_a_row = 0
        self._num_threads = 1
        self._set_aside: list[int] = []
        self._last_lost = ""

    def run(self) -> BaseException | None:
        """Hand out what is undone until nothing is; returns the error of a task that failed."""
        try:
            for _ in range(_ROUNDS):
                undone = self._undone()
                if not undone or self._is_hopeless():
                    return None
                error = self._run_tasks(undone)
                if error is not None:
                    return error
        finally:
            with suppress(OSError, TimeoutError, CancelledError):
                if self._client.status == "running":  # the scheduler is there
                    self._client.run(stop_run, self._run, on_error="ignore", callback_timeout=_CLOSE_TIMEOUT_S)
        left = self._undone()
        if not left or self._is_hopeless():
            return None
        return EnvironmentFailedError(
            f"workers say that they did shards {_name(left)}, and {self._config.out} does not have them. Do all "
            "workers see that folder, and the same one? Finished shards are kept: mend that, and the same command "
            "continues."
        )

    def unfinished(self) -> Unfinished | None:
        """What was set aside, and what was not begun any more because no worker stood."""
        shards = sorted({*self._set_aside, *(self._undone() if self._is_hopeless() else ())})
        if not shards:
            return None
        rows = [row for shard in shards[:3] for row in self._job.layout.shard_rows(shard)]
        what = (
            f"{self._losses_in_a_row} tasks in a row lost their workers, and no shard was finished in between"
            if self._is_hopeless()
            else "shards brought down every worker that took them"
        )
        return Unfinished(
            tuple(shards),
            f"{what}. Left undone: shards {_name(shards)} ({_name_videos(self._job, rows)}); all else is in the "
            f"manifest. Look into the log of the last worker, {self._last_lost} (out of memory?): fewer --workers or "
            "--decoders take less. The same command tries them again.",
        )

    def _undone(self) -> list[int]:
        """What is still to be handed out; of what the machine did not let happen, a worker tries a second time."""
        return [
            shard
            for shard in self._markers
            if self._is_undone(shard) and shard not in self._set_aside and self._times_pending[shard] < 2
        ]

    def _is_undone(self, shard: int) -> bool:
        return is_undone(self._config.out, shard, self._markers[shard])

    def _is_hopeless(self) -> bool:
        return self._losses_in_a_row >= max(_MOST_LOSSES_IN_A_ROW, 4 * self._num_threads)

    def _run_tasks(self, undone: Sequence[int]) -> BaseException | None:
        from distributed import KilledWorker, wait

        is_idle = self._warn_if_idle(was_idle=False)
        self._count_threads()
        waiting = deque(split_into_tasks(undone, self._num_threads))
        running: dict[Any, list[int]] = {}
        tasks = _TasksUnderWay(self._client)
        try:
            while running or waiting:
                while waiting and len(running) < _TASKS_AHEAD * max(1, self._num_threads):
                    shards = waiting.popleft()
                    running[self._submit(shards, tasks)] = shards
                with suppress(TimeoutError):  # not of a lost scheduler: that cancels all futures
                    wait(list(running), timeout=_LOOK_EVERY_S, return_when="FIRST_COMPLETED")
                for future in [future for future in running if future.done()]:
                    if future.status != "error":
                        done = future.result(timeout=_CONNECT_TIMEOUT_S)
                        tasks.finish(future.key, done["wall_s"])
                        self._note_result(running[future], done)
                    elif isinstance(error := future.exception(), KilledWorker):
                        address = getattr(error.last_worker, "address", str(error.last_worker))
                        waiting.extend(self._note_loss(running[future], tasks.drop(future.key), address))
                    else:
                        return error
                    # Forgotten by the scheduler too: if this worker dies, nobody need do these shards again.
                    del running[future]
                    future.release()
                if self._is_hopeless():
                    return None
                tasks.warn()
                is_idle = self._warn_if_idle(was_idle=is_idle)
                self._count_threads()
            return None
        finally:
            with suppress(OSError, TimeoutError, CancelledError):
                if self._client.status == "running":
                    self._client.unsubscribe_topic(STARTED_TOPIC)
                    self._client.cancel(list(running), force=True)

    def _submit(self, shards: Sequence[int], tasks: _TasksUnderWay) -> Any:
        handed_out = {shard: self._hand_out(shard) for shard in shards}
        key = f"s4v shards {_name(shards)} of {self._config.out} ({uuid.uuid4().hex[:8]})"
        tasks.add(key, shards)
        return self._client.submit(
            *(process_shards, self._config, self._store_sha256, handed_out, self._run, self._lease_nonce),
            key=key,
            pure=False,
        )

    def _hand_out(self, shard: int) -> HandedOut:
        # Captions are the command's: no worker need hold them.
        rows = self._job.layout.shard_rows(shard)
        records = [replace(self._job.records[row], captions=()) for row in rows]
        num_frames = [self._job.num_frames[row] for row in rows]
        known = () if self._markers[shard] is not None else tuple(self._kept_rows.of_manifest(shard))
        return HandedOut(marker=self._markers[shard], records=records, num_frames=num_frames, known=known)

    def _note_result(self, shards: Sequence[int], done: dict[str, Any]) -> None:
        self._losses_in_a_row = 0
        for shard in done["pending"]:
            self._times_pending[shard] += 1
            self._markers[shard] = read_marker_state(self._config.out, shard)
        for place, shard in enumerate(shards):
            self._tell(shard, {} if place else done["seconds"])

    def _note_loss(self, shards: Sequence[int], num_begun: int, worker: str) -> list[list[int]]:
        """A worker died with a task, or several did, one after the other; returns what is to be handed out again.

        A task that waited for its turn there is lost too, though it was not at fault: only one that was begun counts.
        """
        undone = [shard for shard in shards if self._is_undone(shard)]
        for shard in sorted({*shards} - {*undone}):
            self._tell(shard, {})
        if len(undone) < len(shards):
            self._losses_in_a_row = 0
        elif num_begun:
            self._losses_in_a_row += 1
        self._last_lost = worker
        if len(shards) == 1:
            for shard in undone:
                self._falls[shard] += num_begun
                self._losses[shard] += 1
        again = [shard for shard in undone if not self._must_set_aside(shard)]
        for shard in sorted({*undone} - {*again}):
            self._set_aside.append(shard)
            _log.warning("shard %d brought down every worker that took it, %s last: set aside", shard, worker)
        return [[shard] for shard in again]

    def _must_set_aside(self, shard: int) -> bool:
        return self._falls[shard] >= _MOST_FALLS or self._losses[shard] >= _MOST_LOSSES

    def _tell(self, shard: int, seconds: dict[str, float]) -> None:
        if shard not in self._reported:
            self._reported.add(shard)
            self._report(shard, seconds)

    def _count_threads(self) -> None:
        with suppress(OSError, TimeoutError):  # a lost scheduler is seen by the tasks
            self._num_threads = sum(self._client.nthreads().values())

    def _warn_if_idle(self, *, was_idle: bool) -> bool:
        # A cluster of our own starts new workers by itself.
        return self._config.scheduler is not None and _warn_if_idle(self._client, was_idle=was_idle)


def split_into_tasks(shards: Sequence[int], num_workers: int) -> list[list[int]]:
    """Cut shards into runs for workers: in a run, decoding one overlaps with writing the one before.

    Args:
        shards: Ascending.
        num_workers: Who will share them; none yet counts as one.

    Returns:
        The shards in their order, in runs of one length, the last perhaps shorter.
    """
    size = len(shards) // (_TASKS_OF_A_WORKER * max(1, num_workers))
    size = min(_MOST_SHARDS_OF_A_TASK, max(1, size))
    return [list(shards[first : first + size]) for first in range(0, len(shards), size)]


def _warn_if_idle(client: Any, *, was_idle: bool) -> bool:
    """Whether there is no worker; told each time it comes to that, for a queue may hold them for hours."""
    with suppress(OSError, TimeoutError):  # a lost scheduler is seen by the tasks
        is_idle = not client.nthreads()
        if is_idle and not was_idle:
            _log.warning(
                "%(address)s has no workers: waiting until one joins (`dask worker %(address)s --nthreads 1`). "
                "Ctrl-C loses nothing.",
                {"address": client.scheduler.address},
            )
        return is_idle
    return was_idle


class _TasksUnderWay:
    """Which tasks workers have begun, and which run for much longer than others did: a slow disk, a frozen machine."""

    def __init__(self, client: Any) -> None:
        self._tasks: dict[Any, Sequence[int]] = {}
        self._begun: Counter[Any] = Counter()
        self._running: dict[Any, tuple[float, str]] = {}
        self._seconds: list[float] = []
        client.subscribe_topic(STARTED_TOPIC, self._note)

    def _note(self, event: tuple[float, dict[str, Any]]) -> None:
        task = event[1]
        if task["key"] in self._tasks:  # not of another command's
            self._begun[task["key"]] += 1
            self._running[task["key"]] = time.monotonic(), task["worker"]

    def add(self, key: Any, shards: Sequence[int]) -> None:
        """Look out for a task that is about to be handed out."""
        self._tasks[key] = shards

    def finish(self, key: Any, seconds: float) -> None:
        """It is done, after so many seconds in a worker."""
        self._seconds.append(seconds / len(self._tasks[key]))
        self.drop(key)

    def drop(self, key: Any) -> int:
        """It is no longer under way; returns how often a worker has begun it."""
        self._running.pop(key, None)
        self._tasks.pop(key, None)
        return self._begun.pop(key, 0)

    def warn(self) -> None:
        """Name each that is late once."""
        if not self._seconds:
            return
        median = statistics.median(self._seconds)
        for key, (start, worker) in list(self._running.items()):
            shards = self._tasks[key]
            seconds = time.monotonic() - start
            if seconds > max(_LOOK_EVERY_S, _STRAGGLER_FACTOR * median * len(shards)):
                _log.warning(
                    "shards %s have been with worker %s for %.0f s; others take %.1f s a shard. If it hangs, end that "
                    "worker: another one takes them over.",
                    *(_name(shards), worker, seconds, median),
                )
                del self._running[key]


@contextmanager
def _connect(config: ExtractConfig) -> Iterator[Any]:
    import distributed

    if config.num_workers is not None:
        with _private_cluster(config.num_workers) as cluster, distributed.Client(cluster) as client:
            yield client
        return
    try:
        client = distributed.Client(config.scheduler, timeout=_CONNECT_TIMEOUT_S)
    except (OSError, ValueError, TypeError) as error:  # a TypeError where tls:// finds no certificates
        raise ConfigError(
            f"no Dask scheduler answers at {config.scheduler} (--scheduler): {error}. Start one with `dask scheduler`, "
            "and workers with `dask worker ADDRESS --nthreads 1`; for tls:// Dask's configuration names the "
            "certificates (docs/scale.md)."
        ) from error
    with client:
        try:
            yield client
        except (CancelledError, OSError, TimeoutError):
            _silence_dask()
            raise


@contextmanager
def _private_cluster(num_workers: int) -> Iterator[Any]:
    """Processes on this machine that take work from this one alone.

    A scheduler runs whatever code it is sent. So all must show a certificate that is made here, for this cluster, and
    is held in memory by its processes. Dask's web servers cannot be left out: they serve nothing.
    """
    import dask
    import distributed

    no_pages: dict[str, list[str]] = {f"distributed.{role}.http.routes": [] for role in ("scheduler", "worker")}
    with (
        # A folder that others may have made before, by its known name, is no place for workers.
        tempfile.TemporaryDirectory(prefix="s4v-workers-", ignore_cleanup_errors=True) as folder,
        dask.config.set(no_pages),
        distributed.LocalCluster(
            n_workers=num_workers,
            threads_per_worker=1,
            processes=True,
            security=distributed.Security.temporary(),
            protocol="tls://",
            host="127.0.0.1",
            dashboard_address=None,
            # Each loss of a worker is told at once. Port 0: Dask warns where its usual one is taken.
            scheduler_kwargs={"allowed_failures": 0, "dashboard_address": "127.0.0.1:0"},
            memory_limit=0,
            local_directory=folder,
        ) as cluster,
    ):
        yield cluster


def _silence_dask() -> None:
    """Its client goes on looking for a lost scheduler, and prints tracebacks when it is told to stop."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _name_videos(job: Job, rows: Sequence[int], most: int = 3) -> str:
    """`a.mp4, b.mp4 and 4 more`."""
    paths = list(dict.fromkeys(job.records[row].path for row in rows))  # segments share a file
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")


def _name(shards: Sequence[int]) -> str:
    """`3-7, 9`."""
    runs: list[list[int]] = []
    for shard in shards:
        if runs and runs[-1][-1] == shard - 1:
            runs[-1].append(shard)
        else:
            runs.append([shard])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
