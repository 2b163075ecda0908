"""Shards on many workers: Dask hands out runs of them, each worker keeps its backbone, decoders and store open."""

from __future__ import annotations

import atexit
import logging
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

from ..errors import ConfigError, EnvironmentFailedError
from ..store._cores import count_cores
from ..store.writer import MarkerState, is_undone, read_marker_state, resume_store
from .config import ExtractConfig
from .decoding import DecoderPool
from .job import set_up_job
from .pipeline import Pipeline
from .segments import list_rows
from .stats import StageClock

Report = Callable[[int, dict[str, float]], None]
"""Told, for each finished shard, of its number and of seconds by stage that came to an end with it."""

_CONNECT_TIMEOUT_S = 30
_CLOSE_TIMEOUT_S = 30
_LOOK_EVERY_S = 30
_MOST_SHARDS_OF_A_TASK = 16
_TASKS_OF_A_WORKER = 4
"""At least, where there are shards enough: the last ones to finish keep the others waiting."""
_ROUNDS = 3
_STRAGGLER_FACTOR = 10
_STARTED_TOPIC = "s4v-started"

_log = logging.getLogger(__name__)

# Of this process, where it is a worker: the extraction that it is set up for, one at a time.
_open_jobs: dict[str, WorkerJob] = {}
_stopped_runs: set[str] = set()
_one_at_a_time = threading.Lock()
_closing = ExitStack()
atexit.register(_closing.close)


def run_on_workers(config: ExtractConfig, shards: Sequence[int], report: Report) -> None:
    """Have shards done by a local cluster of processes, or by the workers of a scheduler.

    A worker that dies loses the shard in the making, which Dask gives to another with those that were to come after
    it. An error of s4v's own (a full disk, NaN in a layer) stops all.

    Args:
        config: With `num_workers` or `scheduler`; the store exists.
        shards: To do, ascending; those that are done already are done anew.
        report: Told of finished shards.

    Raises:
        ConfigError: If no scheduler answers.
        EnvironmentFailedError: If the scheduler is lost, a shard brought down every worker that took it, or what
            workers say they did is not to be found.
    """
    from distributed import KilledWorker
    from distributed.comm import CommClosedError

    # Workers may run in another folder.
    given = {name: getattr(config, name) for name in ("root", "out", "annotations", "codec_from")}
    task = replace(config, **{name: path.resolve() for name, path in given.items() if path is not None})
    markers = {shard: read_marker_state(task.out, shard) for shard in shards}
    try:
        with _connect(config) as client:
            error = _run_rounds(client, task, markers, report)
    except (CancelledError, CommClosedError, TimeoutError) as lost:
        raise EnvironmentFailedError(
            f"lost the scheduler of the workers ({type(lost).__name__}). Finished shards are kept: start it and its "
            "workers again, and run the same command."
        ) from lost
    if isinstance(error, KilledWorker):
        raise EnvironmentFailedError(
            f"{error}. Finished shards are kept; look into that worker's log (out of memory?), then run the same "
            "command again."
        ) from error
    if error is not None:
        raise error


def _run_rounds(
    client: Any, config: ExtractConfig, markers: Mapping[int, MarkerState | None], report: Report
) -> BaseException | None:
    """Hand out what is undone until nothing is; returns the error of a task that failed."""
    run = uuid.uuid4().hex[:8]
    try:
        for _ in range(_ROUNDS):
            undone = {shard: state for shard, state in markers.items() if is_undone(config.out, shard, state)}
            if not undone:
                return None
            error = _run_tasks(client, config, undone, run, report)
            if error is not None:
                return error
            report = lambda *_: None  # noqa: E731 (each shard is counted once)
    finally:
        with suppress(OSError, TimeoutError, CancelledError):
            if client.status == "running":  # the scheduler is there
                client.run(_stop, run, on_error="ignore", callback_timeout=_CLOSE_TIMEOUT_S)
    left = [shard for shard, state in markers.items() if is_undone(config.out, shard, state)]
    if not left:
        return None
    return EnvironmentFailedError(
        f"workers say that they did shards {_name(left)}, and {config.out} does not have them. Do all workers see that "
        "folder, and the same one? Finished shards are kept: mend that, and the same command continues."
    )


def _run_tasks(
    client: Any, config: ExtractConfig, markers: Mapping[int, MarkerState | None], run: str, report: Report
) -> BaseException | None:
    from distributed import wait

    is_idle = _warn_if_idle(client, was_idle=False)
    tasks = {}
    for shards in split_into_tasks(list(markers), len(client.nthreads())):
        handed_out = {shard: markers[shard] for shard in shards}
        key = f"s4v shards {_name(shards)} of {config.out} ({uuid.uuid4().hex[:8]})"
        tasks[client.submit(process_shards, config, handed_out, run, key=key, pure=False)] = shards
    stragglers = _Stragglers(client, {future.key: shards for future, shards in tasks.items()})
    try:
        while tasks:
            with suppress(TimeoutError):  # not of a lost scheduler: that cancels all futures
                wait(list(tasks), timeout=_LOOK_EVERY_S, return_when="FIRST_COMPLETED")
            for future in [future for future in tasks if future.done()]:
                if future.status == "error":
                    return future.exception()
                done = future.result(timeout=_CONNECT_TIMEOUT_S)
                # Forgotten by the scheduler too: if this worker dies, nobody need do these shards again.
                shards = tasks.pop(future)
                future.release()
                stragglers.finished(future.key, done["wall_s"])
                for place, shard in enumerate(shards):
                    report(shard, {} if place else done["seconds"])
            stragglers.warn()
            is_idle = _warn_if_idle(client, was_idle=is_idle)
        return None
    finally:
        with suppress(OSError, TimeoutError, CancelledError):
            if client.status == "running":
                client.unsubscribe_topic(_STARTED_TOPIC)
                client.cancel(list(tasks), force=True)


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


class _Stragglers:
    """Which tasks run for much longer than others did: a slow disk, a throttled GPU, a frozen machine."""

    def __init__(self, client: Any, shards: Mapping[Any, Sequence[int]]) -> None:
        self._shards = shards
        self._running: dict[Any, tuple[float, str]] = {}
        self._seconds: list[float] = []
        client.subscribe_topic(_STARTED_TOPIC, self._note)

    def _note(self, event: tuple[float, dict[str, Any]]) -> None:
        told = event[1]
        if told["key"] in self._shards:
            self._running[told["key"]] = time.monotonic(), told["worker"]

    def finished(self, key: Any, seconds: float) -> None:
        self._running.pop(key, None)
        self._seconds.append(seconds / len(self._shards[key]))

    def warn(self) -> None:
        """Name each of them once."""
        if not self._seconds:
            return
        median = statistics.median(self._seconds)
        for key, (start, worker) in list(self._running.items()):
            seconds = time.monotonic() - start
            if seconds > max(_LOOK_EVERY_S, _STRAGGLER_FACTOR * median * len(self._shards[key])):
                _log.warning(
                    "shards %s have been with worker %s for %.0f s; others take %.1f s a shard. If it hangs, end that "
                    "worker: another one takes them over.",
                    *(_name(self._shards[key]), worker, seconds, median),
                )
                del self._running[key]


def process_shards(config: ExtractConfig, markers: Mapping[int, MarkerState | None], run: str) -> dict[str, Any]:
    """Do some shards in a worker, which is set up by its first ones.

    Args:
        config: The extraction.
        markers: The shards, with the done-markers that they had when they were handed out.
        run: Of the command that hands them out.

    Returns:
        seconds (by stage), and wall_s.
    """
    from distributed import get_worker

    worker = get_worker()
    with _one_at_a_time:  # a worker with several threads has one backbone
        worker.log_event(_STARTED_TOPIC, {"key": worker.get_current_task(), "worker": worker.address})
        start = time.monotonic()
        try:
            _go_on(run)
            seconds = _open_job(config).process(markers, lambda _: _go_on(run))
        finally:
            if run in _stopped_runs:
                _close_job()
    return {"seconds": seconds, "wall_s": time.monotonic() - start}


def _go_on(run: str) -> None:
    if run in _stopped_runs:
        raise EnvironmentFailedError("the command that handed out these shards has ended")


def _open_job(config: ExtractConfig) -> WorkerJob:
    key = repr(config)
    if key not in _open_jobs:
        _close_job()  # one extraction at a time: a backbone fills a GPU
        _open_jobs[key] = _closing.enter_context(WorkerJob(_for_this_worker(config)))
    return _open_jobs[key]


def _close_job() -> None:
    _open_jobs.clear()
    _closing.close()


def _stop(run: str) -> None:
    """In a worker: do no more shards for a command, and give back what was open for it."""
    _stopped_runs.add(run)
    if _one_at_a_time.acquire(blocking=False):  # else the task under way sees to it, when its shard is written
        try:
            _close_job()
        finally:
            _one_at_a_time.release()


class WorkerJob:
    """An extraction in a worker, which does one run of shards after another; a context manager."""

    def __init__(self, config: ExtractConfig) -> None:
        self._config = config
        self._open = ExitStack()

    def __enter__(self) -> WorkerJob:
        config = self._config
        with ExitStack() as opening:
            pool = opening.enter_context(DecoderPool(config.num_decoders))
            self._clock = StageClock()
            job = set_up_job(config, list_rows(config, pool), pool, self._clock)
            self._writer = opening.enter_context(
                resume_store(
                    config.out, layout=job.layout, attributes=job.attributes, records=job.records, is_worker=True
                )
            )
            job.load_weights()
            self._pipeline = Pipeline(job, self._writer)
            self._open = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        del self._pipeline, self._writer

    def process(
        self, markers: Mapping[int, MarkerState | None], count: Callable[[int], None] = lambda _: None
    ) -> dict[str, float]:
        """Do some shards, one overlapping with the next; those that somebody finished meanwhile are left alone.

        Args:
            markers: The shards, with the done-markers that they had when they were handed out.
            count: Told of each that is done or about to be written.

        Returns:
            Seconds by stage.
        """
        self._writer.expect_markers(markers)
        undone = [shard for shard, state in markers.items() if is_undone(self._config.out, shard, state)]
        if undone:
            self._pipeline.run(undone, count)
        seconds = dict(self._clock.seconds)
        self._clock.seconds.clear()
        return seconds


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


@contextmanager
def _connect(config: ExtractConfig) -> Iterator[Any]:
    import distributed

    if config.scheduler is None:
        with (
            distributed.LocalCluster(
                n_workers=config.num_workers,
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
                memory_limit=0,
            ) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield client
        return
    try:
        client = distributed.Client(config.scheduler, timeout=_CONNECT_TIMEOUT_S)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no Dask scheduler answers at {config.scheduler} (--scheduler): {error}. Start one with `dask scheduler`, "
            "and workers with `dask worker ADDRESS --nthreads 1`."
        ) from error
    with client:
        try:
            yield client
        except (CancelledError, OSError, TimeoutError):
            _silence_dask()
            raise


def _silence_dask() -> None:
    """Its client goes on looking for a lost scheduler, and prints tracebacks when it is told to stop."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _name(shards: Sequence[int]) -> str:
    """`3-7, 9`."""
    runs: list[list[int]] = []
    for shard in shards:
        if runs and runs[-1][-1] == shard - 1:
            runs[-1].append(shard)
        else:
            runs.append([shard])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
