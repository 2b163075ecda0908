"""Shards on several workers: the same store, whatever happens to them."""

import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from types import SimpleNamespace

import dask
import distributed
import psutil
import pytest
from distributed import KilledWorker

from s4v.device import count_cores
from s4v.errors import ConfigError, EnvironmentFailedError
from s4v.extract import config as config_module
from s4v.extract import kept_rows
from s4v.extract.extraction import extract_dataset
from s4v.extract.pipeline import dask_cluster as workers
from s4v.extract.pipeline.dask_cluster import split_into_tasks
from s4v.store import manifest
from s4v.store.reader import open_store
from s4v.store.verify import verify_store
from s4v.store.writer import StoreWriter, read_marker_state

# Told to all processes that tests start here: others on this machine may extract at the same time.
os.environ["S4V_TESTS_OF"] = str(os.getpid())


def decoders(of=None):
    """Decoder processes, all that come from these tests or those below one process."""
    found = psutil.process_iter() if of is None else psutil.Process(of).children(recursive=True)
    pids = set()
    for process in found:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            is_decoder = "s4v.extract.decode.worker" in process.cmdline()
            if is_decoder and process.environ().get("S4V_TESTS_OF") == str(os.getpid()):
                pids.add(process.pid)
    return pids


def wait_until(is_so, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def markers(store):
    return sorted((store / "_parts").glob("[0-9]*.arrows"))


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
    assert [facts[1] for facts in told if facts[0] == "extracting"] == list(range(12)), "each shard once"
    assert contents(config.out, "zarr.json") == contents(float_store, "zarr.json")
    wait_until(lambda: not decoders() - before, 10)


def test_tasks_are_runs_of_shards_enough_for_all_workers():
    assert split_into_tasks(range(5), 2) == [[0], [1], [2], [3], [4]]
    assert split_into_tasks([*range(10), *range(20, 36)], 2)[:4] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 20, 21]]
    lengths = [len(task) for task in split_into_tasks(range(3757), 8)]
    assert set(lengths[:-1]) == {16} and sum(lengths) == 3757
    assert split_into_tasks(range(3), 0) == [[0], [1], [2]], "a scheduler that has no workers yet"


def test_cores_are_those_that_this_process_may_use():
    code = "from s4v.device import count_cores; print(count_cores())"
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
    assert {name for name in before if after[name] != before[name]} == {"000001.arrows"}, "only what is to be redone"
    assert set(after) - set(before) == {"000003.arrows"}
    assert verify_store(open_store(begun.out)) == []


def test_a_frozen_worker_that_wakes_up_does_not_undo_what_another_one_finished(
    begun, monkeypatch, worker_job, hand_out
):
    """It looks at the marker again when its shard is about to be written."""
    write, seen = StoreWriter.write_shard, []

    def write_late(writer, shard, tokens, results, **options):
        if not seen:
            with worker_job(begun) as other:
                seen.append(shard)
                other.process(hand_out(begun, {shard: None}))
                seen.append(read_marker_state(begun.out, shard))
        write(writer, shard, tokens, results, **options)

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


class Killed(BaseException):
    """What a worker meets when the kernel ends it."""


class FakeFuture:
    def __init__(self, key, outcome):
        self.key, self._outcome = key, outcome
        self.status = "error" if isinstance(outcome, BaseException) else "finished"

    def done(self):
        return True

    def result(self, timeout=None):
        return self._outcome

    def exception(self):
        return self._outcome

    def release(self):
        pass


class FakeCluster:
    """A client whose one worker is this process: a task that meets `Killed` is lost with its worker."""

    status, scheduler, address, name = "running", SimpleNamespace(address="tcp://head:1"), "tcp://gpu:2", "0"

    def __init__(self, monkeypatch, *, deaths_of_a_task=1, tells_what_it_begins=True):
        self.tasks, self.is_worker = [], False
        self._deaths, self._tells, self._note = deaths_of_a_task, tells_what_it_begins, lambda _: None
        monkeypatch.setattr(distributed, "get_worker", lambda: self)
        monkeypatch.setattr(distributed, "wait", lambda *_, **__: None)
        monkeypatch.setattr(workers, "_connect", lambda _: nullcontext(self))

    def nthreads(self):
        return {self.address: 1}

    def subscribe_topic(self, _, handler):
        self._note = handler

    def unsubscribe_topic(self, _):
        self._note = lambda _: None

    def cancel(self, *_, **__):
        pass

    def run(self, function, *args, **_):
        return function(*args)

    def log_event(self, _, told):
        if self._tells:
            self._note((0.0, told))

    def get_current_task(self):
        return self.tasks[-1][0]

    def submit(self, function, *args, key, **_):
        self.tasks.append((key, args))
        for _ in range(self._deaths):
            self.is_worker = True
            try:
                return FakeFuture(key, function(*args))
            except Killed:
                lost = KilledWorker(key, SimpleNamespace(address=self.address), self._deaths - 1)
            except Exception as error:
                return FakeFuture(key, error)
            finally:
                self.is_worker = False
        return FakeFuture(key, lost)

    def shards(self):
        """Of each task that was handed out."""
        return [key.split(" of ")[0].removeprefix("s4v shards ") for key, _ in self.tasks]


@pytest.fixture
def poison(monkeypatch):
    """Shards that end the worker which writes them, and how often one of them did."""
    write, poisoned = StoreWriter.write_shard, Counter()

    def write_or_die(writer, shard, *args, **options):
        if shard in poisoned:
            poisoned[shard] += 1
            raise Killed
        return write(writer, shard, *args, **options)

    monkeypatch.setattr(StoreWriter, "write_shard", write_or_die)
    return poisoned


def extract_on(cluster, config):
    """Statuses of all rows after an extraction, and what it says in the end."""
    message = ""
    try:
        extract_dataset(config)
    except EnvironmentFailedError as error:
        message = str(error)
    return open_store(config.out).read_manifest()["status"].to_pylist(), message


def test_a_shard_that_kills_its_workers_is_set_aside_and_the_rest_goes_on(
    video_folder, make_config, tmp_path, monkeypatch, poison, float_store, contents
):  # B9
    cluster = FakeCluster(monkeypatch)
    config = make_config(video_folder, tmp_path / "poison.zarr", scheduler="tcp://head:1", num_decoders=1)
    poison[3] = 0
    statuses, message = extract_on(cluster, config)
    assert Counter(statuses) == {"ok": 9, "failed": 1, "pending": 1} and statuses[3] == "pending"
    assert verify_store(open_store(config.out)) == []
    assert "shards 3 (train/run/3.mp4)" in message and "tcp://gpu:2" in message and "same command" in message
    assert poison[3] == 4, "once among others, where it is not known to be the one, and three times alone"
    del poison[3]
    assert extract_on(cluster, config) == (["ok"] * 4 + ["ok"] * 4 + ["failed"] + ["ok"] * 2, "")
    assert contents(config.out, "zarr.json") == contents(float_store, "zarr.json")


@pytest.mark.parametrize(("deaths_of_a_task", "tells"), [(4, True), pytest.param(1, False, marks=pytest.mark.slow)])
def test_several_such_shards_are_told_whatever_the_scheduler_allows(
    video_folder, make_config, tmp_path, monkeypatch, poison, deaths_of_a_task, tells
):  # B9
    """Also where a worker dies so soon that no word of the task's beginning comes."""
    cluster = FakeCluster(monkeypatch, deaths_of_a_task=deaths_of_a_task, tells_what_it_begins=tells)
    monkeypatch.setattr(workers, "_MOST_LOSSES", 4, raising=False)
    monkeypatch.setattr(workers, "_MOST_SHARDS_OF_A_TASK", 4)
    monkeypatch.setattr(workers, "_TASKS_OF_A_WORKER", 1)
    config = make_config(video_folder, tmp_path / "poison.zarr", scheduler="tcp://head:1", num_decoders=1)
    poison.update({0: 0, 1: 0, 10: 0})
    statuses, message = extract_on(cluster, config)
    assert [row for row, status in enumerate(statuses) if status == "pending"] == [0, 1, 10]
    assert "shards 0-1, 10 (train/run/0.mp4, train/run/1.mp4, val/walk/0.mp4)" in message
    assert cluster.shards()[:3] == ["0-3", "4-7", "8-10"]
    alone = Counter(cluster.shards()[3:])
    assert set(alone) == {"0", "1", "2", "3", "10"} and alone["2"] == alone["3"] == 1


def test_a_run_on_which_no_worker_stands_is_stopped(video_folder, make_config, tmp_path, monkeypatch, poison):  # B9
    """Each start of a worker loads the model: shards by the thousand are not all tried until they are set aside."""
    cluster = FakeCluster(monkeypatch)
    monkeypatch.setattr(workers, "_MOST_LOSSES_IN_A_ROW", 5, raising=False)
    config = make_config(video_folder, tmp_path / "poison.zarr", scheduler="tcp://head:1", num_decoders=1)
    poison.update(dict.fromkeys(range(11), 0))
    statuses, message = extract_on(cluster, config)
    assert statuses == ["pending"] * 11 and sum(poison.values()) <= 6
    assert "tasks in a row lost their workers, and no shard was finished" in message and "shards 0-10" in message


def test_a_worker_that_dies_with_every_second_shard_ends_nothing(
    video_folder, make_config, tmp_path, monkeypatch, float_store, contents
):  # B9
    """Preempted machines: as long as shards get done, the number of losses does not matter."""
    FakeCluster(monkeypatch)
    write, deaths = StoreWriter.write_shard, []

    def write_or_die(writer, shard, *args, **options):
        if shard not in deaths:
            deaths.append(shard)
            raise Killed
        return write(writer, shard, *args, **options)

    monkeypatch.setattr(StoreWriter, "write_shard", write_or_die)
    config = make_config(video_folder, tmp_path / "s.zarr", scheduler="tcp://head:1", num_decoders=1)
    told = []
    extract_dataset(config, lambda *facts: told.append(facts))
    assert len(deaths) == 11 and contents(config.out, "zarr.json") == contents(float_store, "zarr.json")
    assert [facts[1] for facts in told if facts[0] == "extracting"] == list(range(12)), "each shard once"


def test_an_error_of_our_own_in_a_worker_still_stops_all(video_folder, make_config, tmp_path, monkeypatch):
    cluster = FakeCluster(monkeypatch)

    def refuse(writer, shard, *_, **__):
        raise EnvironmentFailedError(f"shard {shard}: no space left")

    monkeypatch.setattr(StoreWriter, "write_shard", refuse)
    config = make_config(video_folder, tmp_path / "full.zarr", scheduler="tcp://head:1", num_decoders=1)
    assert extract_on(cluster, config) == (["pending"] * 11, "shard 0: no space left")
    assert len(cluster.tasks) <= 2


def test_rows_that_a_machine_leaves_pending_are_tried_once_more(video_folder, make_config, tmp_path, monkeypatch):
    cluster, process = FakeCluster(monkeypatch), workers.process_shards

    def leave(config, store_sha256, shards, *rest):
        done = process(config, store_sha256, shards, *rest)
        return {**done, "pending": [shard for shard in shards if shard in (2, 5)]}

    monkeypatch.setattr(workers, "process_shards", leave)
    config = make_config(video_folder, tmp_path / "s.zarr", scheduler="tcp://head:1", num_decoders=1)
    statuses, message = extract_on(cluster, config)
    assert statuses.count("ok") == 10 and message == ""
    handed_out = Counter(shard for _, args in cluster.tasks for shard in args[2])
    assert handed_out == {shard: 2 if shard in (2, 5) else 1 for shard in range(11)}


def test_shards_that_workers_did_elsewhere_are_missed(video_folder, make_config, tmp_path, monkeypatch):
    cluster = FakeCluster(monkeypatch)
    done = {"seconds": {}, "wall_s": 1.0, "pending": []}
    monkeypatch.setattr(workers, "process_shards", lambda *_: done)
    config = make_config(video_folder, tmp_path / "s.zarr", scheduler="tcp://head:1", num_decoders=1)
    statuses, message = extract_on(cluster, config)
    assert "workers say that they did shards 0-10, and" in message and "Do all workers see that folder" in message
    assert statuses == ["pending"] * 11 and Counter(cluster.shards())["0-1"] == 3


@pytest.fixture
def read_by_workers(monkeypatch):
    """What the worker of a `FakeCluster` reads of the data set and of a store's tables."""
    found = []

    def watch(cluster):
        for module, name in ((config_module, "read_listing"), (manifest, "read_table")):
            monkeypatch.setattr(module, name, _watched(getattr(module, name), name, cluster, found))

        def read_marker(root, shard, *rest):
            if cluster.is_worker:
                found.append(("read_marker", shard))
            return read(root, shard, *rest)

        read = kept_rows.read_marker
        monkeypatch.setattr(kept_rows, "read_marker", read_marker)
        return found

    return watch


def _watched(called, name, cluster, found):
    def call(*args, **kwargs):
        if cluster.is_worker:
            found.append((name, getattr(args[0], "name", args[0])))
        return called(*args, **kwargs)

    return call


def tables(found):
    return [name for called, name in found if called == "read_table" and not name[0].isdigit()]


def test_a_worker_walks_no_root_and_reads_no_table_of_all_rows(
    video_folder, make_config, tmp_path, monkeypatch, read_by_workers
):  # D
    cluster = FakeCluster(monkeypatch)
    found = read_by_workers(cluster)
    config = make_config(video_folder, tmp_path / "s.zarr", scheduler="tcp://head:1", num_decoders=1)
    statuses, _ = extract_on(cluster, config)
    assert statuses.count("ok") == 10 and len(cluster.tasks) > 1
    assert [called for called, _ in found if called == "read_listing"] == [] and tables(found) == []


def test_a_worker_that_retries_reads_the_markers_of_its_shards_alone(
    video_folder, make_config, tmp_path, monkeypatch, read_by_workers
):  # D
    cluster = FakeCluster(monkeypatch)
    found = read_by_workers(cluster)
    config = make_config(video_folder, tmp_path / "s.zarr", scheduler="tcp://head:1", num_decoders=1)
    extract_dataset(config)
    found.clear()
    extract_dataset(replace(config, retry_failed=True))
    assert len(cluster.tasks[-1][1][2]) == 1
    assert {shard for called, shard in found if called == "read_marker"} == {8}
    assert [called for called, _ in found if called == "read_listing"] == [] and tables(found) == []


def test_a_worker_knows_neither_captions_nor_other_shards_rows(
    captioned_folder, make_captioned_config, captioned_store, tmp_path, monkeypatch, read_by_workers, contents
):  # D
    cluster = FakeCluster(monkeypatch)
    found = read_by_workers(cluster)
    config = make_captioned_config(captioned_folder, tmp_path / "s.zarr", scheduler="tcp://head:1", num_decoders=1)
    statuses, _ = extract_on(cluster, config)
    assert statuses.count("ok") == 12 and tables(found) == []
    for _, args in cluster.tasks:
        told = pickle.dumps(args)
        assert b"moves" not in told, "captions"
        names = {f"{number:02d}.mp4" for number in range(12) if f"{number:02d}.mp4".encode() in told}
        assert len(names) <= len(args[2]), "one row a shard here"
    assert contents(config.out, "zarr.json") == contents(captioned_store, "zarr.json")


def test_a_worker_of_a_segmented_store_reads_no_lengths(
    video_folder, make_config, tmp_path, monkeypatch, read_by_workers
):  # D
    cluster = FakeCluster(monkeypatch)
    found = read_by_workers(cluster)
    root = tmp_path / "videos"
    (root / "train/run").mkdir(parents=True)
    for number in range(2):
        shutil.copy(video_folder / f"train/walk/{number}.mp4", root / f"train/run/{number}.mp4")
    config = make_config(root, tmp_path / "s.zarr", scheduler="tcp://head:1", num_decoders=1, segment_s=1.0)
    statuses, _ = extract_on(cluster, config)
    assert statuses == ["ok"] * 4
    assert [called for called, _ in found if called == "read_listing"] == [] and tables(found) == []
    decoded = [args[0] for args in (task[1] for task in cluster.tasks)]
    assert {config.segment_s for config in decoded} == {1.0}


def test_a_worker_refuses_a_store_that_is_not_the_commands(begun, worker_job, float_store, tmp_path):  # D
    job = worker_job(begun)
    begun.out.rename(tmp_path / "elsewhere.zarr")
    with pytest.raises(EnvironmentFailedError, match=r"does not see the command's store at .*: no store is there"):
        job.__enter__()
    shutil.copytree(float_store, begun.out)
    (begun.out / "checksums.json").unlink()
    (begun.out / "zarr.json").write_text((float_store / "zarr.json").read_text() + "\n")  # of another day, say
    with pytest.raises(EnvironmentFailedError, match=r"at .*begun\.zarr: another store is there.*path everywhere"):
        job.__enter__()


def test_no_task_holds_the_rows_of_all_shards_at_once(video_folder, make_config, tmp_path, monkeypatch):  # D
    """The scheduler holds what is handed out: a few tasks for each thread, however many shards there are."""
    cluster, most = FakeCluster(monkeypatch), []
    monkeypatch.setattr(distributed, "wait", lambda running, **_: most.append(len(running)))
    monkeypatch.setattr(workers, "_MOST_SHARDS_OF_A_TASK", 1)
    config = make_config(video_folder, tmp_path / "s.zarr", scheduler="tcp://head:1", num_decoders=1)
    assert extract_on(cluster, config)[0].count("ok") == 10
    assert len(cluster.tasks) == 11 and max(most) == 2


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
            assert client.run(lambda: len(sys.modules["s4v.extract.pipeline.dask_worker"]._open_jobs)) == {
                next(iter(client.nthreads())): 0
            }
    assert contents(config.out, "zarr.json") == contents(float_store, "zarr.json")


@pytest.fixture
def poisoned_workers(tmp_path):
    """Workers that are ended with SIGKILL when they are about to write shard 3, as by the kernel for want of memory."""
    file = tmp_path / "poison.py"
    file.write_text(
        "import os, signal\n"
        "from s4v.store.writer import StoreWriter\n"
        # Dask runs this file twice: what is there the second time is not what is to be called.
        "write = getattr(StoreWriter.write_shard, 'written_by', StoreWriter.write_shard)\n"
        "def write_or_die(writer, shard, *args, **options):\n"
        "    if shard == 3:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(writer, shard, *args, **options)\n"
        "write_or_die.written_by = write\n"
        "StoreWriter.write_shard = write_or_die\n"
    )
    return dask.config.set({"distributed.worker.preload": [str(file)]})


@pytest.mark.slow
@pytest.mark.parametrize("is_own", [True, False])
def test_processes_that_a_shard_kills_cost_that_shard_and_no_more(
    video_folder, make_config, float_store, tmp_path, contents, poisoned_workers, is_own
):  # B9
    config = make_config(video_folder, tmp_path / "poison.zarr", num_decoders=1)
    with poisoned_workers, nullcontext() if is_own else local_cluster(2) as cluster:
        where = {"num_workers": 2} if is_own else {"scheduler": cluster.scheduler_address}
        statuses, message = extract_on(None, replace(config, **where))
    assert Counter(statuses) == {"ok": 9, "failed": 1, "pending": 1} and statuses[3] == "pending"
    assert "shards 3 (train/run/3.mp4)" in message
    assert extract_dataset(config).videos["pending"] == 0
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
def dask_process(*command):
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
    with dask_process(*worker), dask_process(*scheduler) as process:
        extracting = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        wait_until(lambda: len(markers(out)) >= 2, 120)
        process.kill()
        _, err = extracting.communicate(timeout=120)
    assert extracting.returncode == 5, err
    assert "lost the scheduler" in err and "Traceback" not in err, err
    assert 2 <= len(markers(out)) <= 11
    with dask_process(*scheduler), dask_process(*worker):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=120)
    assert contents(out, "zarr.json") == contents(float_store, "zarr.json")


def test_an_error_in_a_worker_is_told_in_one_line(video_folder, make_config, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9 .*dask scheduler"):
        monkeypatch.setattr("s4v.extract.pipeline.dask_cluster._CONNECT_TIMEOUT_S", 1)
        extract_dataset(make_config(video_folder, tmp_path / "none.zarr", scheduler="tcp://127.0.0.1:9"))
    with pytest.raises(ConfigError, match="--workers starts a cluster here, --scheduler joins one"):
        make_config(video_folder, tmp_path / "none.zarr", scheduler="tcp://127.0.0.1:9", num_workers=2)
