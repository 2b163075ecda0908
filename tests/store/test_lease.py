"""Leases: between threads, processes, and machines that share nothing but a folder."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from s4v import process_identity
from s4v.errors import EnvironmentFailedError, LeaseLostError, StoreBusyError, StoreDamagedError
from s4v.store import lease
from s4v.store.lease import Scope, check_lease, hold_lease, hold_place

ALL = Scope.all()

# What another machine on which locks of the kernel do nothing would be: in a process of its own.
ELSEWHERE = """
import fcntl, os, sys
from pathlib import Path
from s4v import process_identity; from s4v.store import lease
fcntl.flock = lambda *_: None
process_identity.identify_machine = lambda: process_identity.Machine("node7", "another boot", "pid:[1]")
process_identity.BEAT_S = {beat}
store = Path(sys.argv[1])
held = lease.hold_lease(store, lease.Scope.all(), purpose="extract")
print(held.nonce, flush=True)
"""
HOLD = ELSEWHERE + "sys.stdin.readline()\n"


@pytest.fixture
def store(tmp_path):
    (tmp_path / "s.zarr").mkdir()
    return tmp_path / "s.zarr"


@pytest.fixture
def quick(monkeypatch):
    """Beats that a test can wait for."""
    monkeypatch.setattr(process_identity, "BEAT_S", 0.1)


@pytest.fixture
def without_locks(monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)


@pytest.fixture
def start():
    """Start a process that holds all of a store, and have it ended."""
    processes = []

    def run(script, store, **values):
        process = subprocess.Popen(
            [sys.executable, "-c", script.format(**values), str(store)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process, process.stdout.readline().strip()

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def move_elsewhere(monkeypatch, host="node8"):
    """Be another machine from now on."""
    monkeypatch.setattr(
        process_identity, "identify_machine", lambda: process_identity.Machine(host, f"boot of {host}", "pid:[7]")
    )


def test_a_lease_is_there_while_it_is_held(store):
    with hold_lease(store, ALL, purpose="extract") as held:
        told = json.loads((store / "_leases" / f"{held.nonce}.json").read_text())
        assert told["owner"]["pid"] == os.getpid() and told["owner"]["command"] == "extract"
        assert [path.name for path in (store / "_leases").iterdir()] == [f"{held.nonce}.json"], "the gate is open again"
        held.check()
        check_lease(store, held.nonce)
    assert list(store.iterdir()) == [], "a finished store has none"


def test_a_refusal_says_who_where_since_when_and_what_to_do(store):
    with hold_lease(store, Scope.shards(0, 12), purpose="extract"), pytest.raises(StoreBusyError) as caught:
        hold_lease(store, ALL, purpose="merge", advice="wait for it")
    told = str(caught.value)
    assert "\n" not in told
    for part in (f"another process is writing to {store}", f"process {os.getpid()} on ", "since 20", "shards 0 to 11"):
        assert part in told
    assert told.endswith("It keeps its lease while it runs: wait for it.")


@pytest.mark.parametrize(
    ("first", "second", "meet"),
    [
        (ALL, ALL, True),
        (ALL, Scope.manifest(), True),
        (ALL, Scope.shards(3, 4), True),
        (Scope.shards(0, 3), Scope.shards(3, 6), False),
        (Scope.shards(0, 4), Scope.shards(3, 6), True),
        (Scope.shards(2, 2), Scope.shards(0, 6), False),
        (Scope.shards(0, 3), Scope.manifest(), False),
        (Scope.manifest(), Scope.manifest(), True),
    ],
)
def test_leases_live_side_by_side_unless_their_scopes_meet(first, second, meet, store):
    for one, other in ((first, second), (second, first)):
        assert one.meets(other) == meet
        with hold_lease(store, one, purpose="extract"):
            if meet:
                with pytest.raises(StoreBusyError):
                    hold_lease(store, other, purpose="extract")
            else:
                hold_lease(store, other, purpose="extract").close()
    assert not (store / "_leases").exists()


def test_short_work_is_waited_for_and_long_work_is_not(store):
    first = hold_lease(store, Scope.manifest(), purpose="extract")
    taken = []
    second = threading.Thread(
        target=lambda: taken.append(hold_lease(store, Scope.manifest(), purpose="extract", wait=True))
    )
    second.start()
    second.join(0.1)
    assert second.is_alive() and not taken
    first.close()
    second.join(30)
    taken[0].close()
    with hold_lease(store, ALL, purpose="extract"), pytest.raises(StoreBusyError):
        hold_lease(store, Scope.manifest(), purpose="extract", wait=True)


@pytest.mark.parametrize("has_hard_links", [True, False])
@pytest.mark.parametrize("has_locks", [True, False])
def test_of_two_that_race_exactly_one_has_the_lease(has_locks, has_hard_links, store, monkeypatch):  # C4
    """50 times in each of four worlds."""
    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    if not has_hard_links:

        def refuse(*_, **__):
            raise OSError(errno.EPERM, "no hard links")

        monkeypatch.setattr(os, "link", refuse)
    for _ in range(50):
        barrier, results = threading.Barrier(2), []

        def race(barrier=barrier, results=results):
            barrier.wait()
            try:
                results.append(hold_lease(store, ALL, purpose="extract"))
            except StoreBusyError:
                results.append(None)

        threads = [threading.Thread(target=race) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        winners = [one for one in results if one is not None]
        assert len(results) == 2 and len(winners) == 1
        winners[0].check()
        winners[0].close()
    assert not (store / "_leases").exists()


COUNT = """
import fcntl, sys
from pathlib import Path
from s4v import process_identity
from s4v.store.lease import Scope, hold_lease
fcntl.flock = lambda *_: None
name = sys.argv[2]
process_identity.identify_machine = lambda: process_identity.Machine(name, name, "pid:[1]")
store, counter = Path(sys.argv[1]), Path(sys.argv[1]) / "counter"
for _ in range(50):
    with hold_lease(store, Scope.manifest(), purpose="extract", wait=True) as lease:
        value = int(counter.read_text())
        lease.check()
        counter.write_text(str(value + 1))
"""


def test_machines_without_locks_take_turns(store):  # C4
    """Four processes on machines of their own add to one number, read and written back, 50 times each."""
    (store / "counter").write_text("0")
    commands = [[sys.executable, "-c", COUNT, str(store), f"node{number}"] for number in range(4)]
    assert [process.wait(120) for process in [subprocess.Popen(command) for command in commands]] == [0] * 4
    assert (store / "counter").read_text() == "200"


def test_a_lease_of_a_killed_process_of_this_machine_is_taken_over_at_once(store, start):
    script = HOLD.replace("fcntl.flock =", "_ =").replace("process_identity.identify_machine =", "_ =")
    process, nonce = start(script, store, beat=20)
    with pytest.raises(StoreBusyError, match=rf"process {process.pid} on .*It keeps its lease while it runs"):
        hold_lease(store, ALL, purpose="extract")
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie: nobody has asked for its exit code
    begin = time.monotonic()
    with hold_lease(store, ALL, purpose="extract") as held:
        assert time.monotonic() - begin < 5, "a beat is 20 s here"
        assert held.nonce != nonce
    with pytest.raises(LeaseLostError, match="no longer this process's to write to"):
        check_lease(store, nonce)


@pytest.mark.parametrize("point", ["behind the gate 1", "lease about to be there 1", "lease there 1"])
def test_a_process_killed_while_it_takes_a_lease_is_in_nobodys_way(point, store):
    script = (
        "import sys; from pathlib import Path; from s4v.store.lease import *\n"
        "hold_lease(Path(sys.argv[1]), Scope.all(), purpose='extract')"
    )
    environment = {**os.environ, "S4V_KILL_AT": point}
    process = subprocess.run([sys.executable, "-c", script, str(store)], env=environment)
    assert process.returncode == -signal.SIGKILL and (store / "_leases/gate").exists()
    begin = time.monotonic()
    hold_lease(store, ALL, purpose="extract").close()
    assert time.monotonic() - begin < 5
    assert not (store / "_leases").exists()


def test_a_process_that_has_another_ones_number_is_not_taken_for_it(store):
    held = hold_lease(store, ALL, purpose="extract")
    file = store / "_leases" / f"{held.nonce}.json"
    told = json.loads(file.read_text())
    told["owner"]["start"] -= 1  # the process that had our number before us
    held.close()
    (store / "_leases").mkdir()
    file.write_text(json.dumps(told))
    hold_lease(store, ALL, purpose="extract").close()


def test_another_machine_at_work_is_seen_by_its_beat(store, start, without_locks, monkeypatch, caplog):  # C4
    monkeypatch.setattr(process_identity, "BEAT_S", 0.5)
    process, _ = start(HOLD, store, beat=0.5)
    with pytest.raises(StoreBusyError, match=rf"process {process.pid} on node7.*Its lease lasts until \d\d:\d\d:\d\d"):
        hold_lease(store, ALL, purpose="extract")
    assert "Whether it still runs will be known by" in caplog.text
    assert caplog.text.count("waiting") == 1


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_another_machine_that_fell_silent_is_dead_after_three_beats(end, store, start, without_locks, quick):  # C4
    process, nonce = start(HOLD, store, beat=0.1)
    os.kill(process.pid, end)
    begin = time.monotonic()
    with hold_lease(store, ALL, purpose="extract"):
        assert time.monotonic() - begin > 0.3
        with pytest.raises(LeaseLostError):
            check_lease(store, nonce)


CONTINUE = """
print("checking", flush=True)
sys.stdin.readline()
from s4v.errors import LeaseLostError
try:
    held.check()
    print("held", flush=True)
except LeaseLostError:
    print("lost", flush=True)
held.close()
"""


@pytest.mark.parametrize("is_taken_over", [True, False])
def test_an_owner_stopped_past_its_expiry_knows_when_it_goes_on(
    is_taken_over, store, start, without_locks, quick
):  # C4
    process, _ = start(ELSEWHERE + CONTINUE, store, beat=0.1)
    os.kill(process.pid, signal.SIGSTOP)
    held = None
    if is_taken_over:
        held = hold_lease(store, ALL, purpose="extract")
    else:
        time.sleep(0.35)
    os.kill(process.pid, signal.SIGCONT)
    assert process.stdout.readline() == "checking\n"
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == ("lost\n" if is_taken_over else "held\n")
    process.wait(30)
    if held is not None:
        held.check()
        held.close()


def test_a_stopped_owner_cannot_slip_in_between_the_judgement_and_the_taking(store, quick, monkeypatch, without_locks):
    """It renews behind the gate, where leases are judged: whoever judged it dead before has taken it by then."""
    move_elsewhere(monkeypatch)
    held = hold_lease(store, ALL, purpose="extract")
    held._file._ended.set()  # as if stopped: no beat any more
    time.sleep(0.25)
    taken = []
    move_elsewhere(monkeypatch, "node9")
    second = threading.Thread(target=lambda: taken.append(hold_lease(store, ALL, purpose="extract")))
    second.start()
    second.join(30)
    with pytest.raises(LeaseLostError):
        held.check()
    taken[0].check()
    taken[0].close()
    held.close()


def test_a_container_of_the_same_machine_is_known_by_its_lock(store, start, monkeypatch):
    """Another PID namespace, the same kernel and mount: a lock that is held says yes, one that is free says no."""
    script = HOLD.replace("fcntl.flock =", "_ =").replace(
        'process_identity.Machine("node7", "another boot", "pid:[1]")',
        f"process_identity.Machine('node7', {process_identity.identify_machine().boot_id!r}, 'pid:[1]')",
    )
    process, _ = start(script, store, beat=20)
    with pytest.raises(StoreBusyError, match="on node7"):
        hold_lease(store, ALL, purpose="extract")
    process.kill()
    process.wait()
    begin = time.monotonic()
    hold_lease(store, ALL, purpose="extract").close()
    assert time.monotonic() - begin < 5, "a beat is 20 s here"


def test_a_gate_that_was_taken_away_is_noticed(store, quick, monkeypatch):
    """As if stopped behind it for long: what was put there meanwhile was not seen by who took it away."""
    passed, rivals = [], []

    def stop_once(name):
        passed.append(name)
        if passed.count("lease about to be there") == 1 and not rivals:
            (store / "_leases/gate").unlink()
            rivals.append(None)
            rivals[0] = hold_lease(store, ALL, purpose="merge")

    monkeypatch.setattr(lease, "kill_point", stop_once)
    with pytest.raises(StoreBusyError, match="`s4v merge`"):
        hold_lease(store, ALL, purpose="extract")
    rivals[0].check()
    rivals[0].close()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b'{"owner": 3, "nonce": {}}', b'{"owner": {"pid": -1, "host": "a\\u001b[2J\\nb"}}'],
)
def test_a_lease_that_cannot_be_read_is_waited_for_and_goes(content, store, quick, caplog):
    (store / "_leases").mkdir()
    (store / "_leases" / f"{'0' * 32}.json").write_bytes(content)
    (store / "_leases/notes.txt").write_text("mine")
    hold_lease(store, ALL, purpose="extract").close()
    assert [path.name for path in (store / "_leases").iterdir()] == ["notes.txt"], "nothing of anyone else's"
    assert "\x1b" not in caplog.text


def test_what_stands_in_the_place_of_leases_is_refused(store, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (store / "_leases").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreDamagedError, match="is not a folder of leases"):
        hold_lease(store, ALL, purpose="extract")
    (store / "_leases").unlink()
    (store / "_leases").write_text("x")
    with pytest.raises(StoreDamagedError, match="is not a folder of leases"):
        hold_lease(store, ALL, purpose="extract")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_file_system_that_holds_no_lease_is_told(code, store, monkeypatch):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(EnvironmentFailedError, match=f"_leases cannot hold a lease.*{os.strerror(code)}.*write permis"):
        hold_lease(store, ALL, purpose="extract")


def test_two_makers_of_one_place_take_turns(tmp_path):
    place, running, most = tmp_path / "s.index", [], []

    def make():
        with hold_place(place, purpose="index", waiting="another process builds s.index"):
            running.append(1)
            most.append(len(running))
            time.sleep(0.01)
            running.pop()

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [1] * 4 and list(tmp_path.iterdir()) == []
