"""Which process made a file, and whether it runs: of this machine the kernel knows, of another one its beat tells."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

BEAT_S = 20.0
"""Seconds between two beats of a file whose owner is at work."""
BEATS_TO_DIE = 3
"""An owner whose counter did not move for so many beats is dead."""


def life_s() -> float:
    """Seconds without a beat after which an owner counts as dead."""
    return BEATS_TO_DIE * BEAT_S


_MOST_BYTES = 1 << 16
_BEAT_PLACE = len('{"beat": "')
_TOKEN = re.compile(r"([0-9a-f]{8})-([0-9a-f]{1,16})-([0-9a-f]{1,16})-[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a process number means something; numbers of another machine or PID namespace are other processes."""

    host: str
    boot_id: str | None
    """Of the running kernel; None where it does not tell (not Linux)."""
    pid_namespace: str | None

    @property
    def is_known(self) -> bool:
        """Whether two processes that say this are in one place for sure."""
        return self.boot_id is not None and self.pid_namespace is not None


def identify_machine() -> Machine:
    """The machine that this process runs on."""
    boot_id, namespace = None, None
    with suppress(OSError):
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    return Machine(socket.gethostname(), boot_id, namespace)


@lru_cache(maxsize=1)
def _own_start(pid: int) -> int:
    return _read_process(pid)[1] or 0


def _read_process(pid: int) -> tuple[str, int | None]:
    """State and start time (clock ticks since boot) of a process; `gone`, or a time of None where nobody may look."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[19])
    except (OSError, LookupError, ValueError):
        try:  # /proc may hide processes of other users
            os.kill(pid, 0)
        except ProcessLookupError:
            return "gone", None
        except (OSError, OverflowError):
            pass
        return "there", None


def is_running(pid: int, start: int) -> bool | None:
    """Whether a process of this machine that began at that time runs; None where nobody may look."""
    state, found = _read_process(pid)
    if state == "gone" or state in "ZX":  # a zombie holds nothing
        return False
    return None if found is None else found == start


def make_token() -> str:
    """A name that no one else makes, and that tells who made it: machine, process, its start, chance."""
    pid = os.getpid()
    return f"{_hash_machine(identify_machine())}-{pid:x}-{_own_start(pid):x}-{uuid.uuid4().hex[:8]}"


def is_token_alive(token: str) -> bool | None:
    """Whether the process that made a token runs; None where that cannot be known at once, and where it is no token."""
    match = _TOKEN.fullmatch(token)
    machine = identify_machine()
    if match is None or not machine.is_known or match[1] != _hash_machine(machine):
        return None
    return is_running(int(match[2], 16), int(match[3], 16))


def _hash_machine(machine: Machine) -> str:
    return hashlib.sha256("\n".join(map(str, asdict(machine).values())).encode()).hexdigest()[:8]


@dataclass(frozen=True, slots=True)
class Record:
    """What a file says of its owner; a file that says nothing readable has no facts."""

    raw: bytes
    """The counter is in it: of an owner at work it changes with every beat."""
    facts: dict[str, Any]
    is_alive: bool | None
    """None where it cannot be known at once: its counter tells, in time."""

    @property
    def nonce(self) -> str | None:
        """Of this file, in the sense that another file has another one."""
        nonce = self.facts.get("nonce")
        return nonce if isinstance(nonce, str) else None

    def describe(self) -> str:
        """``s4v extract` (process 123 on node7, since 2026-01-02T03:04:05+00:00)`."""
        owner = _owner_facts(self.facts)
        if not owner:
            return "a process that did not say which"
        command, pid, host, since = (_as_line(owner.get(key)) for key in ("command", "pid", "host", "since"))
        return f"`s4v {command}` (process {pid} on {host}, since {since})"


def read_record(path: Path) -> Record | None:
    """Read the file of an owner; None where there is none."""
    try:
        # Not through a link, and not waiting for the other end of a pipe: it may be anybody's file.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ESTALE, errno.ENOTDIR):
            return None
        return Record(b"", {}, None)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return Record(b"", {}, None)
        raw = os.read(handle, _MOST_BYTES)
        facts = _parse(raw)
        return Record(raw, facts, _is_alive(handle, facts))
    finally:
        os.close(handle)


def read_nonce(path: Path) -> str | None:
    """The nonce in the file of an owner, whether it lives or not; None where there is none."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        nonce = _parse(os.read(handle, _MOST_BYTES)).get("nonce") if stat.S_ISREG(os.fstat(handle).st_mode) else None
    finally:
        os.close(handle)
    return nonce if isinstance(nonce, str) else None


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _owner_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    owner = facts.get("owner")
    return owner if isinstance(owner, dict) else {}


def _is_alive(handle: int, facts: Mapping[str, Any]) -> bool | None:
    if facts.get("left") is True:
        return False
    owner, here = _owner_facts(facts), identify_machine()
    is_same_kernel = here.boot_id is not None and owner.get("boot_id") == here.boot_id
    if is_same_kernel and here.is_known and owner.get("pid_namespace") == here.pid_namespace:
        pid, start = owner.get("pid"), owner.get("start")
        if isinstance(pid, int) and isinstance(start, int) and pid > 0:
            is_there = is_running(pid, start)
            if is_there is not None:
                return is_there
    is_held = _is_locked(handle)
    if is_held:
        return True
    # In another container of this machine: one kernel and one mount have one table of locks.
    is_told = is_held is False and facts.get("has_lock") is True and facts.get("device") == os.fstat(handle).st_dev
    return False if is_same_kernel and is_told else None


def _is_locked(handle: int) -> bool | None:
    """Whether somebody else holds the lock of an open file; None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


class BeatingFile:
    """A file that says who made it, and that its owner is at work: locked, with a counter that a thread moves.

    Args:
        path: Where; nothing may be there.
        command: What the owner is at, for others to read.
        facts: What else to say, as JSON has it.
        beat: What the thread calls in place of `beat`, if anything.

    Raises:
        OSError: If the file system refuses.
    """

    def __init__(
        self, path: Path, command: str, facts: Mapping[str, Any], *, beat: Callable[[], None] | None = None
    ) -> None:
        self.path = path
        self.nonce = str(facts["nonce"])
        self._count = 0
        self._ended = threading.Event()
        self._mutex = threading.Lock()
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            has_lock = _lock(self._handle, path)
            record = {
                "beat": f"{self._count:012d}",
                **facts,
                "owner": _describe_self(command),
                "has_lock": has_lock,
                "device": os.fstat(self._handle).st_dev,
            }
            self.content = json.dumps(record, ensure_ascii=True).encode() + b"\n"
            os.write(self._handle, self.content)
            os.fsync(self._handle)
        except BaseException:
            self.remove()
            raise
        self.last_beat_s = now_s()
        self._thread = threading.Thread(target=self._run, args=(beat or self.beat,), daemon=True, name="s4v-beat")

    def start(self) -> None:
        """Beat from now on."""
        self._thread.start()

    def beat(self) -> None:
        """Move the counter, and make that durable; a file system that does not answer is waited for."""
        with self._mutex:
            if self._handle < 0:
                return
            with suppress(OSError):  # who looks at it judges by what arrives
                os.pwrite(self._handle, f"{(self._count + 1) % 10**12:012d}".encode(), _BEAT_PLACE)
                os.fsync(self._handle)
                self._count += 1
                self.last_beat_s = now_s()

    def rename(self, path: Path) -> None:
        """Give the file another name in its folder."""
        self.path.rename(path)
        self.path = path

    def replace(self, path: Path) -> None:
        """Put the file over another one in its folder."""
        self.path.replace(path)
        self.path = path

    def leave(self) -> None:
        """Close it, and have it say that its owner has left, though this process runs on."""
        with self._mutex, suppress(OSError):
            if self._handle >= 0:
                left = b'"left": true, "beat": "'
                content = b"{" + left + self.content[_BEAT_PLACE:]
                os.pwrite(self._handle, content, 0)
                os.fsync(self._handle)
        self.close()

    def close(self) -> None:
        """Beat no more, and let the lock go; closing twice is fine."""
        self._ended.set()
        with self._mutex:
            if self._handle >= 0:
                os.close(self._handle)
                self._handle = -1

    def remove(self) -> None:
        """Close it and take it away."""
        self.close()  # first: network file systems keep what is open under another name
        with suppress(OSError):
            self.path.unlink()

    def _run(self, beat: Callable[[], None]) -> None:
        while not self._ended.wait(BEAT_S):
            beat()


def now_s() -> float:
    """Seconds of a clock that also counts while this machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _describe_self(command: str) -> dict[str, Any]:
    pid = os.getpid()
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {**asdict(identify_machine()), "pid": pid, "start": _own_start(pid), "since": since, "command": command}


def _lock(handle: int, path: Path) -> bool:
    """Lock a file of our own; returns whether that keeps others out: a second handle is tried."""
    for _ in range(20):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:  # somebody looks whether it is locked
            time.sleep(0.001)
        except OSError:
            return False
    second = os.open(path, os.O_RDONLY)
    try:
        return _is_locked(second) is True
    finally:
        os.close(second)


def _as_line(value: Any) -> str:
    """What a file of somebody else says, fit for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(value)[:80])
