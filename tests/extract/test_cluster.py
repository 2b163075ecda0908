"""Shards on several workers: the same store, whatever happens to them."""

import os
import signal
import threading
import time
from dataclasses import replace

import distributed
import psutil
import pytest

from s4v.errors import ConfigError
from s4v.extract.pipeline import extract_dataset


def decoders():
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "s4v.extract._decoder" in (process.info["cmdline"] or ()):
            found.append(process.pid)
    return set(found)


def test_local_workers_make_the_store_that_one_process_makes(
    video_folder, make_config, float_store, tmp_path, contents
):
    before = decoders()
    config = make_config(video_folder, tmp_path / "two.zarr", num_workers=2, num_decoders=1)
    summary = extract_dataset(config)
    assert summary.videos == {"ok": 10, "failed": 1, "pending": 0}
    assert contents(config.out, "zarr.json") == contents(float_store, "zarr.json")
    deadline = time.monotonic() + 10
    while decoders() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not decoders() - before, "no decoder process is left behind"


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_costs_its_shard_and_no_more(
    video_folder, make_config, float_store, tmp_path, contents
):
    config = make_config(video_folder, tmp_path / "killed.zarr", num_decoders=1)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=0) as cluster:
        killed = []

        def kill_one():
            while not list((config.out / "_parts").glob("[0-9]*.parquet")):
                time.sleep(0.01)
            killed.append(cluster.workers[0].pid)
            os.kill(killed[0], signal.SIGKILL)

        thread = threading.Thread(target=kill_one)
        thread.start()
        summary = extract_dataset(replace(config, scheduler=cluster.scheduler_address))
        thread.join()
    assert killed and summary.videos == {"ok": 10, "failed": 1, "pending": 0}
    assert contents(config.out, "zarr.json") == contents(float_store, "zarr.json")


def test_an_error_in_a_worker_is_told_in_one_line(video_folder, make_config, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9 .*dask scheduler"):
        monkeypatch.setattr("s4v.extract.cluster._CONNECT_TIMEOUT_S", 1)
        extract_dataset(make_config(video_folder, tmp_path / "none.zarr", scheduler="tcp://127.0.0.1:9"))
    with pytest.raises(ConfigError, match="--workers starts a cluster here, --scheduler joins one"):
        make_config(video_folder, tmp_path / "none.zarr", scheduler="tcp://127.0.0.1:9", num_workers=2)
