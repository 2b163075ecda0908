"""Two machines that share a store and nothing else: no lock of the kernel's holds between them, and boots differ.

Machine A is stopped in the middle of something, machine B tries everything else: it is refused, it waits, or both go on
side by side. Then A goes on, and nothing is lost.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from s4v import process_identity
from s4v.errors import LeaseLostError, StoreBusyError
from s4v.extract.extraction import extract_dataset
from s4v.retrieve.index_reader import open_index
from s4v.store import append as appending
from s4v.store import merge, swap, texts
from s4v.store.lease import Scope, hold_lease
from s4v.store.merge import merge_stores
from s4v.store.reader import open_store
from s4v.store.texts import Texts, remove_texts, write_texts
from s4v.store.verify import verify_store

BEAT_S = 1.0

ELSEWHERE = """
import fcntl, os, signal
from s4v import process_identity
fcntl.flock = lambda *_: None
process_identity.identify_machine = lambda: process_identity.Machine("node7", "boot of node7", "pid:[1]")
process_identity.BEAT_S = {beat}
from s4v.store import {module} as module
passed = []
def stop(name):
    passed.append(name)
    if passed.count({point!r}) == 2 and name == {point!r}:
        os.kill(os.getpid(), signal.SIGSTOP)
module.kill_point = stop
from s4v.cli import main
main()
"""


@pytest.fixture
def two_machines(monkeypatch):
    """The main thread is machine B, all other threads are machine A; locks do nothing."""
    here = process_identity.identify_machine()

    def identify():
        is_main = threading.current_thread() is threading.main_thread()
        return process_identity.Machine("node-b", "boot of b", "pid:[2]") if is_main else here

    monkeypatch.setattr(process_identity, "identify_machine", identify)
    monkeypatch.setattr(process_identity, "BEAT_S", BEAT_S)
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)


class Stop:
    """Stops whoever comes first to a kill point, until told to go on."""

    def __init__(self, point):
        self.point = point
        self.is_there, self.go_on = threading.Event(), threading.Event()

    def __call__(self, name):
        if name == self.point and not self.is_there.is_set():
            self.is_there.set()
            assert self.go_on.wait(120)


@pytest.fixture(scope="module")
def half_store(captioned_folder, make_captioned_config, tmp_path_factory):
    """A store of which two shards are done; without texts."""
    out = tmp_path_factory.mktemp("half") / "half.zarr"
    extract_dataset(make_captioned_config(captioned_folder, out, limit=2))
    with hold_lease(out, Scope.manifest(), purpose="test") as lease:
        remove_texts(out, lease)
    return out


def write_made_up_texts(store):
    def encode(captions):
        n, width = len(captions), store.layout.embed_dim
        return Texts(np.zeros((n, 4, width), np.float16), np.ones((n, 4), bool), np.zeros((n, width), np.float32))

    write_texts(store, encode, num_words=4)


def name_operations(config, whole):
    """What can be done to a store: by name, a function that does it."""
    more = config.annotations.with_name("more.csv")
    if not more.exists():
        shutil.copy(config.root / "00.mp4", config.root / "new.mp4")
        more.write_text(config.annotations.read_text() + "new.mp4,train,one more\n")
    return {
        "extract": lambda: extract_dataset(config),
        "retry": lambda: extract_dataset(replace(config, retry_failed=True)),
        "append": lambda: extract_dataset(replace(config, append=True, annotations=more)),
        "part 1": lambda: extract_dataset(replace(config, part=(1, 2))),
        "part 2": lambda: extract_dataset(replace(config, part=(2, 2))),
        "merge": lambda: merge_stores([whole], config.out),
        "repair": lambda: extract_dataset(replace(config, repair=True)),
        "texts": lambda: write_made_up_texts(open_store(config.out)),
        "overwrite": lambda: extract_dataset(replace(config, overwrite=True)),
        "index": lambda: open_index(open_store(config.out), config.out.with_name("x.index")),
    }


# What A is at, where it is stopped, and what B may do beside it; all else is refused.
STOPS = {
    "extract": (swap, "shard durable", {"index"}),
    "retry": (swap, "shard durable", {"index"}),
    "part 1": (swap, "shard durable", {"index", "part 2", "texts"}),
    "part 2": (swap, "shard durable", {"index", "part 1", "texts"}),
    "append": (appending, "append prepared", {"index"}),
    "merge": (merge, "shard merged", {"index"}),
    "texts": (texts, "shard of texts written", {"index", "part 1", "part 2"}),
}


@pytest.mark.parametrize(
    "first", [name if name == "merge" else pytest.param(name, marks=pytest.mark.slow) for name in STOPS]
)
def test_what_a_second_machine_does_meanwhile_is_refused_or_side_by_side(  # C4
    first, two_machines, half_store, captioned_store, captioned_folder, make_captioned_config, tmp_path, monkeypatch
):
    root = shutil.copytree(captioned_folder, tmp_path / "videos")
    config = make_captioned_config(root, shutil.copytree(half_store, tmp_path / "x.zarr"))
    operations = name_operations(config, captioned_store)
    module, point, side_by_side = STOPS[first]
    stop = Stop(point)
    errors = []

    def run():
        try:
            operations[first]()
        except Exception as error:
            errors.append(error)
            stop.is_there.set()

    with monkeypatch.context() as patch:
        patch.setattr(module, "kill_point", stop)
        thread = threading.Thread(target=run)
        thread.start()
        assert stop.is_there.wait(120) and not errors, errors
        for name, operation in operations.items():
            if name in side_by_side - ({"part 1", "part 2"} if first == "texts" else set()):
                operation()
            elif name == "texts" and first == "texts":
                continue  # it would wait
            elif first != "texts" or name not in side_by_side:
                with pytest.raises(StoreBusyError, match="another process is writing to"):
                    operation()
        stop.go_on.set()
        thread.join(120)
    assert not thread.is_alive() and not errors, errors
    last = replace(config, annotations=root / "more.csv") if first == "append" else config
    summary = extract_dataset(last)
    assert summary.videos == {"ok": 13 if first == "append" else 12, "failed": 1, "pending": 0}
    assert verify_store(open_store(config.out)) == []
    assert not (config.out / "_leases").exists() and not list(config.out.glob(".*"))


def test_two_parts_begun_at_once_make_one_store(  # C4
    two_machines, video_folder, float_store, make_config, contents, tmp_path
):
    """Both find nothing: one makes the store, the other one finds it there and goes on."""
    out, barrier, errors, summaries = tmp_path / "x.zarr", threading.Barrier(2), [], []

    def report(phase, *_):
        if phase == "calibrating the codec":
            barrier.wait(60)

    def run(part):
        try:
            summaries.append(extract_dataset(make_config(video_folder, out, part=(part, 2)), report))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(part,)) for part in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors, errors
    assert min(summary.videos["pending"] for summary in summaries) == 0, "the last one joins all"
    assert contents(out, "zarr.json") == contents(float_store, "zarr.json")
    assert verify_store(open_store(out)) == []
    assert [path.name for path in tmp_path.iterdir()] == ["x.zarr"]


def test_a_command_begun_twice_at_once_is_refused_once(two_machines, video_folder, make_config, tmp_path):  # C4
    out, barrier, results = tmp_path / "x.zarr", threading.Barrier(2), []
    config = make_config(video_folder, out, splits=("val",))

    def report(phase, *_):
        if phase == "calibrating the codec":
            barrier.wait(60)

    def run():
        try:
            results.append(extract_dataset(config, report).videos["ok"])
        except StoreBusyError:
            results.append("refused")

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results in ([2, "refused"], ["refused", 2], [2, 2]), "refused, or there when the other one had ended"
    assert verify_store(open_store(out)) == []


@pytest.mark.parametrize("point", [pytest.param("shard durable", marks=pytest.mark.slow), "shard written"])
def test_an_owner_that_was_stopped_for_long_leaves_the_store_to_whoever_took_over(  # C4
    point, video_folder, float_store, make_config, contents, tmp_path, monkeypatch
):
    out = tmp_path / "x.zarr"
    module = "swap" if point == "shard durable" else "writer"
    command = [sys.executable, "-c", ELSEWHERE.format(beat=BEAT_S, module=module, point=point), "extract"]
    command += ["--model", "tiny-clip", "--weights", "random", "--dataset", "folder", "--root", str(video_folder)]
    command += ["--out", str(out), "--frames", "train=6,4", "--dtype", "float32", "--device", "cpu", "--decoders", "1"]
    stopped = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert os.WIFSTOPPED(os.waitpid(stopped.pid, os.WUNTRACED)[1])
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    monkeypatch.setattr(process_identity, "BEAT_S", BEAT_S)
    summary = extract_dataset(make_config(video_folder, out))
    assert summary.videos == {"ok": 10, "failed": 1, "pending": 0}
    before = contents(out)
    os.kill(stopped.pid, signal.SIGCONT)
    _, told = stopped.communicate(timeout=120)
    assert stopped.returncode == LeaseLostError.exit_code, told
    assert "is no longer this process's to write to" in told and "Traceback" not in told
    assert contents(out) == before
    assert contents(out, "zarr.json") == contents(float_store, "zarr.json")
    assert verify_store(open_store(out)) == []
