"""Shards on many workers: Dask hands out their numbers, each worker keeps its backbone, decoders and store open."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from ..errors import ConfigError, EnvironmentFailedError
from .config import ExtractConfig

_CONNECT_TIMEOUT_S = 30
# Of this process, where it is a worker: the extraction it is set up for.
_open_jobs: dict[str, Any] = {}
_closing = ExitStack()
atexit.register(_closing.close)


def run_on_workers(
    config: ExtractConfig, shards: Sequence[int], report: Callable[[int, dict[str, float]], None]
) -> None:
    """Have shards done by a local cluster of processes, or by the workers of a scheduler.

    A worker that dies loses its shard in the making, which Dask gives to another. An error of s4v's own (a full disk,
    NaN in a layer) stops all.

    Args:
        config: With `num_workers` or `scheduler`; the store exists.
        shards: To do, in any order.
        report: Told, for each finished shard, of its number and its seconds by stage.

    Raises:
        ConfigError: If no scheduler answers.
        EnvironmentFailedError: If a shard brought down every worker that took it.
    """
    import distributed

    # Workers may run in another folder.
    given = {name: getattr(config, name) for name in ("root", "out", "annotations", "codec_from")}
    task = replace(config, **{name: path.resolve() for name, path in given.items() if path is not None})
    with _connect(config) as client:
        futures = [client.submit(process_shard, task, shard, key=f"{task.out}-{shard}", pure=False) for shard in shards]
        try:
            for future in distributed.as_completed(futures):
                done = future.result()
                report(done["shard"], done["seconds"])
        except distributed.KilledWorker as error:
            raise EnvironmentFailedError(
                f"{error}. Finished shards are kept; look into that worker's log (out of memory?), then run the same "
                "command again."
            ) from error
        finally:
            client.cancel(futures, force=True)


def process_shard(config: ExtractConfig, shard: int) -> dict[str, Any]:
    """Do one shard in a worker, which is set up by its first one.

    Returns:
        shard, and seconds by stage.
    """
    from .pipeline import WorkerJob

    key = repr(config)
    if key not in _open_jobs:
        _closing.close()  # one extraction at a time: a backbone fills a GPU
        _open_jobs.clear()
        _open_jobs[key] = _closing.enter_context(WorkerJob(_for_this_worker(config)))
    return {"shard": shard, "seconds": _open_jobs[key].process(shard)}


def _for_this_worker(config: ExtractConfig) -> ExtractConfig:
    """A share of the cores, and one GPU where a machine has several."""
    import torch
    from distributed import get_worker

    name = get_worker().name
    if config.num_workers is None:
        return config  # a cluster's own configuration says what a worker gets
    cores = max(1, (os.cpu_count() or 1) // config.num_workers)
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
        yield client
