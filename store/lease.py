"""Leases: which process may write to which shards of a store, also between machines that share nothing but its disk.

    STORE/_leases/NONCE.json   who writes what: host, boot, PID namespace, process, since when; a counter that moves
    STORE/_leases/gate         there while somebody looks who else is there and puts its own lease beside them

A lease is a file of its own, so any number of them that do not meet live side by side. It is taken behind the gate,
which is made by an exclusive create: that is atomic on network file systems too, and needs no lock of the kernel's.

Whether the owner of a lease lives: a process of this machine is asked of the kernel, at once. Elsewhere a lock on the
file that somebody holds says yes. Where neither tells, it is dead when its counter did not move for three beats of the
clock of whoever looks. An owner that was stopped for so long, and goes on, finds its lease gone: it reads it before
each rename that publishes something (`Lease.check`). Finished stores have no `_leases`.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from .. import process_identity
from ..errors import EnvironmentFailedError, LeaseLostError, StoreBusyError, StoreDamagedError
from ..files import kill_point, sync_folder
from ..process_identity import BeatingFile, Record, read_nonce, read_record

LEASES_NAME = "_leases"
_GATE_NAME = "gate"
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}
_SILENT_S = 0.5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scope:
    """What a lease is for; two leases live side by side unless their scopes meet."""

    kind: Literal["all", "shards", "manifest"]
    first: int = 0
    stop: int = 0

    @classmethod
    def all(cls) -> Scope:
        """The whole store: it meets every other scope."""
        return cls("all")

    @classmethod
    def shards(cls, first: int, stop: int) -> Scope:
        """Shards first to stop - 1 alone."""
        return cls("shards", first, stop)

    @classmethod
    def manifest(cls) -> Scope:
        """What belongs to the whole store: joining the manifest, texts. It meets itself and `all`."""
        return cls("manifest")

    def meets(self, other: Scope) -> bool:
        """Whether the two cannot be held at once."""
        if "all" in (self.kind, other.kind):
            return True
        if self.kind != other.kind:
            return False
        return self.kind == "manifest" or max(self.first, other.first) < min(self.stop, other.stop)

    def covers(self, shard: int) -> bool:
        """Whether its holder writes to a shard."""
        return self.kind == "all" or (self.kind == "shards" and self.first <= shard < self.stop)

    def describe(self) -> str:
        """`all of it`, `shards 0 to 11`, `the manifest`."""
        if self.kind == "shards":
            return f"shards {self.first} to {self.stop - 1}" if self.stop > self.first else "no shard"
        return "all of it" if self.kind == "all" else "the manifest"

    def as_facts(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"kind": self.kind, "first": self.first, "stop": self.stop}


def _read_scope(facts: dict[str, Any]) -> Scope:
    """The scope of somebody's lease; one that is not understood is everything."""
    scope = facts.get("scope")
    if isinstance(scope, dict):
        first, stop = scope.get("first"), scope.get("stop")
        if scope.get("kind") == "manifest":
            return Scope.manifest()
        if scope.get("kind") == "shards" and isinstance(first, int) and isinstance(stop, int):
            return Scope.shards(first, stop)
    return Scope.all()


class Lease:
    """The right to write to a part of a store, until `close` or until this process ends; also a context manager.

    `hold_lease` takes one.
    """

    def __init__(self, folder: Path, subject: Path, scope: Scope, file: BeatingFile) -> None:
        self.scope = scope
        self._folder = folder
        self._subject = subject
        self._file = file
        self._mutex = threading.Lock()
        self._is_taken = False
        self._is_lost = False

    @property
    def nonce(self) -> str:
        """What no other lease is called."""
        return self._file.nonce

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self) -> None:
        """See that the lease is still ours: to be called before each rename that publishes something.

        Raises:
            LeaseLostError: If another process took over, because this one was stopped or cut off for too long.
        """
        with self._mutex:
            self._renew_if_late()
            if self._is_lost or not _is_there(self._folder, self.nonce):
                raise _lost(self._subject)

    def moved_to(self, store: Path) -> None:
        """The store was renamed, its leases with it."""
        with self._mutex:
            self._folder = store / LEASES_NAME
            self._subject = store
            self._file.path = self._folder / self._file.path.name

    def close(self) -> None:
        """Let others in; closing twice is fine."""
        with self._mutex:
            self._file.remove()
            with suppress(OSError):
                self._folder.rmdir()

    def _beat(self) -> None:
        with self._mutex:
            if not self._renew_if_late():
                self._file.beat()

    def _renew_if_late(self) -> bool:
        """Beat behind the gate if others may take us for dead by now: whoever removes leases does so there."""
        silent_s = process_identity.now_s() - self._file.last_beat_s
        if not self._is_taken or self._is_lost or silent_s <= process_identity.life_s() - process_identity.BEAT_S:
            return False
        try:
            with _Gate(self._folder, self._file, self._subject) as gate:
                self._file.beat()
                self._is_lost = not (_is_there(self._folder, self.nonce) and gate.is_mine())
        except FileNotFoundError:
            self._is_lost = True
        except (OSError, StoreBusyError):
            return False  # not renewed, and not known to be lost: the next one tries again
        return True


def hold_lease(
    store: Path,
    scope: Scope,
    *,
    purpose: str,
    wait: bool = False,
    advice: str = "wait for it, or end it, then run the same command",
) -> Lease:
    """Take a lease of a store.

    A lease whose owner is dead is taken away, at once where that is known at once. Whether an owner elsewhere lives is
    seen within three beats; meanwhile this waits, and says so.

    Args:
        store: Its folder.
        scope: What is to be written to.
        purpose: The command, for others to read.
        wait: Wait for leases of `Scope.manifest`, which are short; others are refused all the same.
        advice: What to do when somebody else is there.

    Raises:
        StoreBusyError: If somebody holds a lease that meets the scope: who, where, since when.
        StoreDamagedError: If something else stands where leases lie.
        EnvironmentFailedError: If the file system refuses to hold one.
    """
    return _take(store / LEASES_NAME, store, scope, purpose, wait, f"another process is writing to {store}", advice)


def hold_place(path: Path, *, purpose: str, waiting: str) -> Lease:
    """Be the only process that makes something at a place, after whoever does; nothing need be there yet.

    Args:
        path: The place; its folder must be there, and gets a hidden one for the lease.
        purpose: The command, for others to read.
        waiting: What to tell the user if somebody else is at it.

    Raises:
        EnvironmentFailedError: If the file system refuses to hold a lease.
    """
    return _take(path.with_name(f".{path.name}.leases"), path, Scope.manifest(), purpose, True, waiting, "wait")


def lease_new_store(folder: Path, scope: Scope, *, purpose: str) -> Lease:
    """Put a lease into a store that nobody else knows yet; once it is renamed, say so by `Lease.moved_to`.

    Raises:
        OSError: If the file system refuses.
    """
    leases = folder / LEASES_NAME
    leases.mkdir()
    nonce = uuid.uuid4().hex
    lease = _begin(leases, folder, scope, purpose, nonce, leases / f"{nonce}.json")
    lease._is_taken = True
    return lease


def check_lease(store: Path, nonce: str) -> None:
    """What `Lease.check` does, for a worker of the process that holds the lease.

    Raises:
        LeaseLostError: If the lease is gone.
    """
    if not _is_there(store / LEASES_NAME, nonce):
        raise _lost(store)


def _is_there(folder: Path, nonce: str) -> bool:
    return read_nonce(folder / f"{nonce}.json") == nonce


def _lost(subject: Path) -> LeaseLostError:
    limit_s = process_identity.life_s()
    return LeaseLostError(
        f"{subject} is no longer this process's to write to: its lease is gone. It was stopped or cut off for more "
        f"than {limit_s:.0f} s and another process took over, or the store was replaced. What is finished stays: run "
        "the same command when the other one has ended."
    )


def _begin(folder: Path, subject: Path, scope: Scope, purpose: str, nonce: str, path: Path) -> Lease:
    """Write a lease's file; its counter moves from now on."""
    lease: Lease

    def beat() -> None:
        lease._beat()

    file = BeatingFile(path, purpose, {"nonce": nonce, "scope": scope.as_facts()}, beat=beat)
    lease = Lease(folder, subject, scope, file)
    file.start()
    return lease


def _take(folder: Path, subject: Path, scope: Scope, purpose: str, wait: bool, busy: str, advice: str) -> Lease:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise StoreDamagedError(f"{folder} is not a folder of leases, which s4v keeps there. Remove it first.")
    try:
        lease = _announce(folder, subject, scope, purpose)
    except OSError as error:
        raise _refused(folder, error) from error
    try:
        look = _Look(subject, busy, wait=wait, advice=advice)
        while True:
            with _Gate(folder, lease._file, subject) as gate:
                if not look.find_obstacles(folder, lease):
                    kill_point("lease about to be there")
                    lease._file.rename(folder / f"{lease.nonce}.json")
                    sync_folder(folder)
                    kill_point("lease there")
                    lease._file.beat()
                    # A gate that was taken away while this process was stopped: others may not have seen this lease.
                    if gate.is_mine():
                        lease._is_taken = True
                        return lease
                    lease._file.rename(folder / f"{lease.nonce}.tmp")
            look.pause()
    except OSError as error:
        lease.close()
        if isinstance(error, StoreBusyError):
            raise
        if isinstance(error, FileNotFoundError):
            raise StoreBusyError(
                f"{subject} was moved, removed or replaced by another process: look, and try again"
            ) from error
        raise _refused(folder, error) from error
    except BaseException:
        lease.close()
        raise


def _announce(folder: Path, subject: Path, scope: Scope, purpose: str) -> Lease:
    """A lease that nobody minds yet, under the name that it has until it is taken."""
    nonce = uuid.uuid4().hex
    while True:
        with suppress(FileExistsError):
            folder.mkdir()
        with suppress(FileNotFoundError):  # whoever had the last lease took the folder away, or the store is gone
            return _begin(folder, subject, scope, purpose, nonce, folder / f"{nonce}.tmp")


def _refused(folder: Path, error: OSError) -> EnvironmentFailedError:
    return EnvironmentFailedError(
        f"{folder} cannot hold a lease, without which nothing is written there: {error.strerror or error}. "
        "Mend that (write permission, free space), then run the same command."
    )


class _Look:
    """What one that wants a lease has seen of others so far."""

    def __init__(self, subject: Path, busy: str, *, wait: bool, advice: str) -> None:
        self._subject = subject
        self._busy = busy
        self._wait = wait
        self._advice = advice
        self._watches: dict[str, _Watch] = {}
        self._begin_s = time.monotonic()
        self._delay_s = 0.005
        self._has_warned = False

    def find_obstacles(self, folder: Path, lease: Lease) -> bool:
        """Take away what dead owners have left; whether there is a lease to wait for. Behind the gate alone.

        Raises:
            StoreBusyError: If there is one that is not waited for.
        """
        is_obstructed = False
        for path, record in _list_records(folder, lease.nonce):
            is_lease = path.suffix == ".json"
            scope = _read_scope(record.facts)
            if record.is_alive is False or not is_lease:
                if record.is_alive is False or path.suffix == ".gone":
                    path.unlink(missing_ok=True)
                continue
            if not scope.meets(lease.scope):
                continue
            watch = self._watches.setdefault(path.name, _Watch(record.raw))
            is_alive = record.is_alive or watch.look(record.raw)
            if is_alive is False:
                _log.warning("%s: %s no longer answers: taking over", self._subject, record.describe())
                path.unlink(missing_ok=True)
                continue
            if is_alive and not (self._wait and scope.kind == "manifest"):
                raise StoreBusyError(self._refuse(record, scope))
            is_obstructed = True
            self._warn(record, watch, is_known=bool(is_alive))
        return is_obstructed

    def pause(self) -> None:
        """Before the next look."""
        time.sleep(self._delay_s * random.uniform(0.5, 1))
        self._delay_s = min(2 * self._delay_s, 1.0, process_identity.BEAT_S / 10)

    def _refuse(self, record: Record, scope: Scope) -> str:
        until = "It keeps its lease while it runs"
        if not record.is_alive:
            until = f"Its lease lasts until {_clock(process_identity.life_s())}, and longer while it runs"
        return f"{self._busy}: {record.describe()} has a lease on {scope.describe()}. {until}: {self._advice}."

    def _warn(self, record: Record, watch: _Watch, *, is_known: bool) -> None:
        """Once, and of short work not at all."""
        if self._has_warned or (is_known and time.monotonic() - self._begin_s < _SILENT_S):
            return
        self._has_warned = True
        if is_known:
            _log.warning("%s: waiting for %s", self._busy, record.describe())
        else:
            _log.warning(
                "%s, or did: %s. Whether it still runs will be known by %s: waiting",
                *(self._busy, record.describe(), _clock(watch.left_s)),
            )


@dataclass(slots=True)
class _Watch:
    """A counter under observation."""

    raw: bytes
    still_s: float = 0.0
    looked_s: float | None = None

    def look(self, raw: bytes) -> bool | None:
        """Whether the owner lives: True when the counter moved, False when it did not for too long."""
        now = time.monotonic()
        if raw != self.raw:
            self.raw, self.still_s, self.looked_s = raw, 0.0, now
            return True
        if self.looked_s is not None:
            # Capped: while this process was stopped, or the file system did not answer, nobody looked.
            self.still_s += min(now - self.looked_s, process_identity.BEAT_S / 2)
        self.looked_s = now
        return False if self.left_s <= 0 else None

    @property
    def left_s(self) -> float:
        return process_identity.life_s() - self.still_s


def _list_records(folder: Path, own_nonce: str) -> Iterator[tuple[Path, Record]]:
    """Leases of others, and what is on its way to be one."""
    for name in sorted(path.name for path in folder.iterdir()):
        if re.fullmatch(r"[0-9a-f]{32}\.(json|tmp|gone)", name) and not name.startswith(own_nonce):
            record = read_record(folder / name)
            if record is not None:
                yield folder / name, record


class _Gate:
    """Held for the moment in which leases are looked at and one is put beside them.

    It is a hard link to the holder's own file, so it is never there without saying whose it is; where a file system
    has no hard links, a copy.
    """

    def __init__(self, folder: Path, own: BeatingFile, subject: Path) -> None:
        self._path = folder / _GATE_NAME
        self._own = own
        self._subject = subject

    def __enter__(self) -> _Gate:
        begin_s, delay_s, watch = time.monotonic(), 0.001, None
        while not self._try_to_make():
            record = read_record(self._path)
            if record is None:
                continue
            if record.nonce == self._own.nonce:  # made, though the server's answer got lost
                break
            if watch is None or watch[0] != record.nonce:
                watch = (record.nonce, _Watch(record.raw))
            is_alive = watch[1].look(record.raw) if record.is_alive is None else record.is_alive
            if is_alive is False:
                self._take_away(record)
                continue
            if time.monotonic() - begin_s > 4 * process_identity.life_s():
                raise StoreBusyError(f"{self._path} is held by {record.describe()}, which does not go on: end it first")
            time.sleep(delay_s * random.uniform(0.5, 1))
            delay_s = min(2 * delay_s, 0.1)
        kill_point("behind the gate")
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_mine():
            with suppress(OSError):
                self._path.unlink()

    def is_mine(self) -> bool:
        """Whether nobody took it away as a dead process's."""
        record = read_record(self._path)
        return record is not None and record.nonce == self._own.nonce

    def _try_to_make(self) -> bool:
        try:
            os.link(self._own.path, self._path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            try:
                handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                return False
            try:
                os.write(handle, self._own.content)
            finally:
                os.close(handle)
        return True

    def _take_away(self, dead: Record) -> None:
        """Remove a dead process's gate, and no one else's that came into its place meanwhile."""
        gone = self._path.with_name(f"{uuid.uuid4().hex}.gone")
        try:
            self._path.rename(gone)
        except FileNotFoundError:
            return
        record = read_record(gone)
        if record is not None and record.nonce != dead.nonce:
            with suppress(OSError):  # else its owner sees that it is gone, and tries again
                os.link(gone, self._path)
        gone.unlink(missing_ok=True)


def _clock(seconds_from_now: float) -> str:
    return (datetime.now().astimezone() + timedelta(seconds=max(0.0, seconds_from_now))).strftime("%H:%M:%S")
