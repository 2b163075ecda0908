"""Shards on several workers: the same store, whatever happens to them."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace

import distributed
import psutil
import pytest

from s4v.errors import ConfigError
from s4v.extract import cluster as workers
from s4v.extract.cluster import split_into_tasks
from s4v.extract.extraction import extract_dataset
from s4v.store._cores import count_cores
from s4v.store.reader import open_store
from s4v.store.verify import verify_store
from s4v.store.writer import StoreWriter, read_marker_state


def decoders(of=None):
    """Decoder processes, all or those below one process."""
    found = psutil.process_iter() if of is None else psutil.Process(of).children(recursive=True)
    pids = set()
    for process in found:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if "s4v.extract._decoder" in process.cmdline():
                pids.add(process.pid)
    return pids


def wait_until(is_so, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def markers(store):
    return sorted((store / "_parts").glob("[0-9]*.parquet"))


@contextmanager
def local_cluster(num_workers=1, threads=1):
    with distributed.LocalCluster(
        n_workers=num_workers, threads_per_worker=threads, dashboard_address=None, memory_limit=0
    ) as cluster:
        yield cluster


def pids(cluster):
    return [worker.pid for worker in cluster.workers.values()]


def test_local_workers_make_the_store_that_one_process_makes(
    video_folder, make_config, float_store, tmp_path, contents
):
    before = decoders()
    told = []
    config = make_config(video_folder, tmp_path / "two.zarr", num_workers=2, num_decoders=1)
    summary = extract_dataset(config, lambda *facts: told.append(facts))
    assert summary.videos == {"ok": 10, "failed": 1, "pending": 0}
    assert [facts[1] for facts in told if facts[0] == "extracting"] == list(range(1, 12)), "each shard once"
    assert contents(config.out, "zarr.json") == contents(float_store, "zarr.json")
    wait_until(lambda: not decoders() - before, 10)


def test_tasks_are_runs_of_shards_enough_for_all_workers():
    assert split_into_tasks(range(5), 2) == [[0], [1], [2], [3], [4]]
    assert split_into_tasks([*range(10), *range(20, 36)], 2)[:4] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 20, 21]]
    lengths = [len(task) for task in split_into_tasks(range(3757), 8)]
    assert set(lengths[:-1]) == {16} and sum(lengths) == 3757
    assert split_into_tasks(range(3), 0) == [[0], [1], [2]], "a scheduler that has no workers yet"


def test_cores_are_those_that_this_process_may_use():
    code = "from s4v.store._cores import count_cores; print(count_cores())"
    ran = subprocess.run(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == "1"
    assert count_cores() == len(os.sched_getaffinity(0))


@pytest.fixture
def begun(video_folder, make_config, tmp_path):
    """A store of which three shards are done."""
    config = make_config(video_folder, tmp_path / "begun.zarr", num_decoders=1, limit=3)
    extract_dataset(config)
    return replace(config, limit=None)


def test_a_worker_leaves_alone_what_was_finished_since_it_was_handed_out(begun, worker_job, hand_out):
    before = {path.name: path.stat().st_mtime_ns for path in markers(begun.out)}
    assert len(before) == 3
    with worker_job(begun) as job:
        job.process(hand_out(begun, {0: None, 1: read_marker_state(begun.out, 1), 3: None}))
    after = {path.name: path.stat().st_mtime_ns for path in markers(begun.out)}
    assert {name for name in before if after[name] != before[name]} == {"000001.parquet"}, "only what is to be redone"
    assert set(after) - set(before) == {"000003.parquet"}
    assert verify_store(open_store(begun.out)) == []


def test_a_frozen_worker_that_wakes_up_does_not_undo_what_another_one_finished(
    begun, monkeypatch, worker_job, hand_out
):
    """It looks at the marker again when its shard is about to be written."""
    write, seen = StoreWriter.write_shard, []

    def write_late(writer, shard, tokens, results):
        if not seen:
            with worker_job(begun) as other:
                seen.append(shard)
                other.process(hand_out(begun, {shard: None}))
                seen.append(read_marker_state(begun.out, shard))
        write(writer, shard, tokens, results)

    monkeypatch.setattr(StoreWriter, "write_shard", write_late)
    with worker_job(begun) as job:
        job.process(hand_out(begun, {5: None}))
    assert seen == [5, read_marker_state(begun.out, 5)] and seen[1] is not None


def test_a_worker_that_is_refused_leaves_no_decoder_behind(begun, worker_job):
    before = decoders(os.getpid())
    with pytest.raises(ValueError, match="was begun with other settings"):
        worker_job(replace(begun, seed=7, frames={"": 3})).__enter__()
    wait_until(lambda: not decoders(os.getpid()) - before, 10)


def test_stragglers_are_named_once(caplog, monkeypatch):
    class Client:
        def subscribe_topic(self, _, handler):
            self.tell = handler

    client = Client()
    stragglers = workers._TasksUnderWay(client)
    for key, shards in {"a": [0], "b": [1], "c": [2, 3]}.items():
        stragglers.add(key, shards)
    now = time.monotonic()
    for key in ("a", "b", "c", "another command's"):
        client.tell((0.0, {"key": key, "worker": "tcp://slow:1"}))
    stragglers.warn()
    stragglers.finish("a", 3.0)
    stragglers.finish("b", 5.0)
    monkeypatch.setattr(workers.time, "monotonic", lambda: now + 79)
    stragglers.warn()
    assert not caplog.messages, "two shards at ten times the median"
    monkeypatch.setattr(workers.time, "monotonic", lambda: now + 82)
    stragglers.warn()
    stragglers.warn()
    assert len(caplog.messages) == 1 and "shards 2-3 have been with worker tcp://slow:1 for 82 s" in caplog.text


def test_a_scheduler_without_workers_is_told_each_time_it_comes_to_that(caplog):
    class Client:
        scheduler = SimpleNamespace(address="tcp://head:8786")
        answers = iter([{}, {}, OSError("lost"), {"tcp://gpu:1": 1}, {}])

        def nthreads(self):
            answer = next(self.answers)
            if isinstance(answer, OSError):
                raise answer
            return answer

    client, is_idle, told = Client(), False, []
    for _ in range(5):
        is_idle = workers._warn_if_idle(client, was_idle=is_idle)
        told.append(len(caplog.messages))
    assert told == [1, 1, 1, 1, 2]
    assert "tcp://head:8786 has no workers: waiting until one joins (`dask worker tcp://head:8786" in caplog.text


@pytest.mark.slow
def test_a_worker_with_several_threads_opens_one_backbone_and_gives_it_back(
    video_folder, make_config, float_store, tmp_path, contents
):
    config = make_config(video_folder, tmp_path / "threads.zarr", num_decoders=1)
    with local_cluster(threads=3) as cluster:
        most = []
        (pid,) = pids(cluster)
        done = threading.Event()

        def watch():
            while not done.wait(0.05):
                most.append(len(decoders(pid)))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        extract_dataset(replace(config, scheduler=cluster.scheduler_address))
        wait_until(lambda: not decoders(pid), 10)  # the worker lives on, its decoders do not
        done.set()
        thread.join()
        assert max(most) == 1
        with distributed.Client(cluster) as client:
            assert client.run(lambda: len(sys.modules["s4v.extract.worker"]._open_jobs)) == {
                next(iter(client.nthreads())): 0
            }
    assert contents(config.out, "zarr.json") == contents(float_store, "zarr.json")


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_costs_its_shard_and_no_more(
    video_folder, make_config, float_store, tmp_path, contents
):
    before = decoders()
    config = make_config(video_folder, tmp_path / "killed.zarr", num_decoders=1)
    with local_cluster(2) as cluster:
        finished = {}

        def kill_one():
            wait_until(lambda: len(markers(config.out)) >= 4)
            os.kill(pids(cluster)[0], signal.SIGKILL)
            finished.update({path: path.stat().st_mtime_ns for path in markers(config.out)})

        thread = threading.Thread(target=kill_one, daemon=True)
        thread.start()
        summary = extract_dataset(replace(config, scheduler=cluster.scheduler_address))
        thread.join()
    assert summary.videos == {"ok": 10, "failed": 1, "pending": 0}
    assert 4 <= len(finished) < 11 and {path: path.stat().st_mtime_ns for path in finished} == finished
    assert contents(config.out, "zarr.json") == contents(float_store, "zarr.json")
    wait_until(lambda: not decoders() - before, 10)


@pytest.mark.slow
def test_a_worker_killed_while_shards_are_redone_does_not_undo_them_again(make_config, make_video, tmp_path, contents):
    root = tmp_path / "videos"
    for number in range(8):
        (root / "train/a").mkdir(parents=True, exist_ok=True)
        (root / f"train/a/{number}.mp4").write_text("no video")
    make_video(root / "train/a/good.mp4")
    config = make_config(root, tmp_path / "redone.zarr", num_decoders=1)
    assert extract_dataset(config).videos == {"ok": 1, "failed": 8, "pending": 0}
    old = {path: path.stat().st_mtime_ns for path in markers(config.out)}
    for number in range(8):
        make_video(root / f"train/a/{number}.mp4", seed=number)
    fresh = replace(config, out=tmp_path / "fresh.zarr")
    extract_dataset(fresh)
    with local_cluster(2) as cluster:
        finished = {}

        def kill_one():
            def redone():
                return {p: p.stat().st_mtime_ns for p in markers(config.out) if p.stat().st_mtime_ns != old[p]}

            wait_until(lambda: len(redone()) >= 3)
            os.kill(pids(cluster)[0], signal.SIGKILL)
            finished.update(redone())

        thread = threading.Thread(target=kill_one, daemon=True)
        thread.start()
        summary = extract_dataset(replace(config, scheduler=cluster.scheduler_address, retry_failed=True))
        thread.join()
    assert summary.videos == {"ok": 9, "failed": 0, "pending": 0}
    assert len(finished) >= 3 and {path: path.stat().st_mtime_ns for path in finished} == finished
    assert contents(config.out, "zarr.json") == contents(fresh.out, "zarr.json")


@contextmanager
def dask(*command):
    environment = {**os.environ, "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "10s"}
    process = subprocess.Popen([sys.executable, "-m", "distributed.cli." + command[0], *command[1:]], env=environment)
    try:
        yield process
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_lost_scheduler_is_told_in_one_line_and_the_same_command_goes_on(
    video_folder, float_store, tmp_path, contents
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, out = f"tcp://127.0.0.1:{port}", tmp_path / "lost.zarr"
    command = [sys.executable, "-m", "s4v", "extract", "--model", "tiny-clip", "--weights", "random", "--decoders", "1"]
    command += ["--dataset", "folder", "--root", str(video_folder), "--out", str(out), "--frames", "train=6,4"]
    command += ["--dtype", "float32", "--device", "cpu", "--scheduler", address]
    scheduler = ("dask_scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard")
    worker = ("dask_worker", address, "--nthreads", "1", "--no-dashboard", "--local-directory", str(tmp_path))
    with dask(*worker), dask(*scheduler) as process:
        extracting = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        wait_until(lambda: len(markers(out)) >= 2, 120)
        process.kill()
        _, err = extracting.communicate(timeout=120)
    assert extracting.returncode == 5, err
    assert "lost the scheduler" in err and "Traceback" not in err, err
    assert 2 <= len(markers(out)) <= 11
    with dask(*scheduler), dask(*worker):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=120)
    assert contents(out, "zarr.json") == contents(float_store, "zarr.json")


def test_an_error_in_a_worker_is_told_in_one_line(video_folder, make_config, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9 .*dask scheduler"):
        monkeypatch.setattr("s4v.extract.cluster._CONNECT_TIMEOUT_S", 1)
        extract_dataset(make_config(video_folder, tmp_path / "none.zarr", scheduler="tcp://127.0.0.1:9"))
    with pytest.raises(ConfigError, match="--workers starts a cluster here, --scheduler joins one"):
        make_config(video_folder, tmp_path / "none.zarr", scheduler="tcp://127.0.0.1:9", num_workers=2)
