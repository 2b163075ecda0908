"""Copies of shards on a fast disk, in front of a store on a slow one.

    DIR/s4v-cache.json                  says what the folder is: nothing is removed from one without it
    DIR/STORE/store.json                which store the copies are of; STORE is a hash of its path
    DIR/STORE/ARRAY.FILE.FINGERPRINT    a copy, whole; its time of change is that of its last use
    DIR/STORE/.ARRAY....partial         a copy under way, locked by who makes it; a killed process lets go of it

A fingerprint is that of the shard's done-marker, so a shard that was made anew is another file. A copy is renamed to
its place when its chunks' checksums are those of the fingerprint; their bytes are verified whenever they are read, as
the store's own are. Nothing in a cache is worth a backup, and nothing fails for want of room in it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, EnvironmentFailedError
from ..files import describe_bytes, hash_text, kill_point, read_json, write_json
from .fingerprint import fingerprint_shard
from .layout import ArraySpec
from .names import open_file

TAG_NAME = "s4v-cache.json"
_STORE_NAME = "store.json"
_TAG = {"made_by": "s4v", "holds": "copies of shards: remove it whenever you like"}
_STORE_FOLDER = re.compile(r"[0-9a-f]{16}", re.ASCII)
_COPY = re.compile(r"[a-z][a-z0-9]*\.c(\.\d{1,12}){3,7}\.[0-9a-f]{32}", re.ASCII)
_PARTIAL = re.compile(r"\.[a-z][a-z0-9]*\.c(\.\d{1,12}){3,7}\.[0-9a-f]{32}\.partial", re.ASCII)

_GATE_NAME = ".gate"
"""Locked by who evicts and takes room."""
_HELD_NAME = ".held"
"""The bytes of all copies, as far as all processes know; counted anew now and then, for killed ones knew more."""
_RUN_BYTES = 2**25
"""Read at once: to begin to read takes a disk on a network as long as a MB."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MOST_FAILURES = 2
"""Of a copy; then its file is read where it is."""
_SHARE_OF_FULL_DISK = 0.95
_BLOCK_BYTES = 512
"""What st_blocks counts."""
_LOOK_EVERY_S = 10.0
"""What there is is counted so often, and before anything is evicted."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShardCopy:
    """A file of a cache."""

    path: Path
    num_bytes: int
    used_at: float
    """Seconds since 1970."""

    @property
    def is_whole(self) -> bool:
        """Or under way, or left behind."""
        return not self.path.name.startswith(".")


class ShardCache:
    """A folder of copies that is shared by processes and runs, and never larger than it may be; thread-safe.

    Args:
        folder: Made if it is not there.
        most_bytes: Of all copies of all stores in it; None takes half of what is free there or held by it.

    Raises:
        ConfigError: If the folder is something else, or holds something else.
        EnvironmentFailedError: If it cannot be made or written to, or its disk knows no locks.
    """

    def __init__(self, folder: Path, most_bytes: int | None = None) -> None:
        self.folder = folder
        _require_cache(folder, may_be_new=True)
        self._lock = threading.RLock()
        self._looked_at = -_LOOK_EVERY_S
        try:
            with _locked(folder / _GATE_NAME):
                held, free = self._count_bytes(), shutil.disk_usage(folder).free
        except OSError as error:
            raise EnvironmentFailedError(
                f"the cache {folder} cannot be used: {error.strerror}. It must be writable, on a disk that knows file "
                "locks (flock): name another folder with --cache."
            ) from error
        self.most_bytes = (held + free) // 2 if most_bytes is None else most_bytes

    def place_of(self, store: Path) -> Path:
        """The folder of a store's copies, made if it is not there."""
        path = store.resolve()
        folder = self.folder / hash_text(str(path))[:16]
        folder.mkdir(exist_ok=True)
        if not (folder / _STORE_NAME).is_file():
            write_json(folder / _STORE_NAME, {"store": str(path)})
        return folder

    def find(self, copy: Path) -> Path | None:
        """A copy that is there, noted as used; None if it is not."""
        try:
            os.utime(copy, follow_symlinks=False)
        except PermissionError:  # another user's, who alone may note it
            return copy if os.access(copy, os.R_OK) else None
        except OSError:
            return None
        return copy

    def make(
        self, copy: Path, source: Path, spec: ArraySpec, is_stopped: Callable[[], bool] = lambda: False
    ) -> Path | None:
        """The copy of a shard's file, made now unless somebody else has; one under way is waited for.

        Args:
            copy: Its place, whose name ends with the fingerprint that it must have.
            source: The file.
            spec: Of its array.
            is_stopped: Asked now and then whether the copy is wanted any more.

        Returns:
            The copy; None where there is no room for it, or it is not wanted.

        Raises:
            OSError: If the source cannot be read, or the cache not be written to.
            ValueError: If the source is not what it is said to be.
        """
        partial = copy.with_name(f".{copy.name}.partial")
        with _locked(partial) as target:
            if (found := self.find(copy)) is not None:
                return found
            with _opened(source) as handle:
                size = os.fstat(handle).st_size
                if not self._make_room(target, size) or not self._fill(target, handle, size, is_stopped):
                    return None
            _require_fingerprint(partial, spec, copy.name.rpartition(".")[2])
            kill_point("shard copied")
            partial.rename(copy)
            kill_point("shard kept")
        return copy

    def _make_room(self, target: int, num_bytes: int) -> bool:
        """Evict what was not used for longest until a file of so many bytes fits, which it is from then on; or not."""
        if num_bytes > self.most_bytes:
            return False
        with self._lock, _locked(self.folder / _GATE_NAME):
            held = _read_number(self.folder / _HELD_NAME)
            is_old = time.monotonic() - self._looked_at > _LOOK_EVERY_S
            if held is None or is_old or held + num_bytes > self.most_bytes:
                held = self._evict(num_bytes, by=os.fstat(target))
                self._looked_at = time.monotonic()
            fits = held + num_bytes <= self.most_bytes
            try:
                (self.folder / _HELD_NAME).write_text(str(held + num_bytes if fits else held))
            except OSError as error:
                self._looked_at = -_LOOK_EVERY_S  # counted anew next time
                if error.errno in _FULL:
                    self._shrink(str(error.strerror))
                    return False
            if fits:
                os.ftruncate(target, 0)  # what a killed process has left
                os.ftruncate(target, num_bytes)
            return fits

    def _evict(self, num_bytes: int, by: os.stat_result) -> int:
        """The bytes that are left."""
        copies = sorted(self.list_copies(), key=lambda one: one.used_at)
        held = sum(one.num_bytes for one in copies)
        for one in copies:
            if held + num_bytes <= self.most_bytes:
                break
            if not one.is_whole and (_is_same(one.path, by) or _is_locked(one.path)):
                continue
            if _remove(one.path):
                held -= one.num_bytes
        return held

    def _fill(self, target: int, source: int, size: int, is_stopped: Callable[[], bool]) -> bool:
        """Copy a file in long runs; whether the cache's disk took it. One that is full is asked for no more.

        Raises:
            OSError: If the source cannot be read.
        """
        place = 0
        while place < size:
            data = memoryview(os.pread(source, min(_RUN_BYTES, size - place), place))
            if not data or is_stopped():
                return False  # it became shorter, or nobody waits for it
            try:
                while data:
                    written = os.pwrite(target, data, place)
                    data, place = data[written:], place + written
            except OSError as error:
                os.ftruncate(target, 0)
                self._shrink(str(error.strerror))
                return False
        return True

    def _shrink(self, why: str) -> None:
        """Ask the disk for no more than it gave, and a little less."""
        given = sum(one.path.stat().st_blocks * _BLOCK_BYTES for one in self.list_copies() if one.path.exists())
        room = int((given + shutil.disk_usage(self.folder).free) * _SHARE_OF_FULL_DISK)
        with self._lock:
            if room < self.most_bytes:
                self.most_bytes = room
                _log.warning("%s keeps no more than %s: %s", self.folder, describe_bytes(room), why)

    def _count_bytes(self) -> int:
        return sum(one.num_bytes for one in self.list_copies())

    def list_copies(self) -> list[ShardCopy]:
        """All that there are, those under way too."""
        return [copy for folder in _list_store_folders(self.folder) for copy in _list_copies(folder)]


class StoreCopies:
    """The copies of one store: what its reader opens in place of its files.

    Args:
        cache: Holds them.
        store: Its folder.
        find_fingerprint: Of a file, by its shard of rows and its name in the store; None where none is recorded.
        waits: Whether a file is copied before it is read. Else what is not there yet is read from the store.
    """

    def __init__(
        self, cache: ShardCache, store: Path, find_fingerprint: Callable[[int, str], str | None], *, waits: bool
    ) -> None:
        self._cache = cache
        self._store = store
        self._folder = cache.place_of(store)
        self._find_fingerprint = find_fingerprint
        self._waits = waits
        self._bad: set[Path] = set()
        self._failures: Counter[Path] = Counter()
        self._told: set[str] = set()
        self._is_stopped = threading.Event()

    def go_on(self) -> None:
        """Make copies, after a `stop`."""
        self._is_stopped.clear()

    def stop(self) -> None:
        """Make no more copies, give up those under way: whoever waits for one reads the store itself."""
        self._is_stopped.set()

    def find(self, spec: ArraySpec, shard: int, file: str) -> Path | None:
        """What to open in place of a file of an array: a copy, or None for the file itself."""
        if (copy := self._place_of(spec, shard, file)) is None:
            return None
        return self._cache.find(copy) or (self._make(copy, spec, file) if self._waits else None)

    def bring(self, spec: ArraySpec, shard: int, file: str) -> int:
        """See that a file is there before it is read; the bytes of the copy, 0 where there is none."""
        if (copy := self._place_of(spec, shard, file)) is None:
            return 0
        found = self._cache.find(copy) or self._make(copy, spec, file)
        try:
            return 0 if found is None else found.stat().st_size
        except OSError:  # evicted meanwhile
            return 0

    def reject(self, path: Path, why: str) -> bool:
        """Remove a damaged copy, and read the file itself from now on; False where it is no copy."""
        if not self.holds(path):
            return False
        if not path.exists():  # evicted before it was opened: nothing is wrong with it
            return True
        _log.warning("a copy in %s is damaged (%s): the store itself is read", self._cache.folder, why)
        self._bad.add(path)
        with suppress(OSError):  # a disk that is read-only by now keeps it: it is not read again
            path.unlink(missing_ok=True)
        return True

    def holds(self, path: Path) -> bool:
        """Whether a file is one of the copies, there or not."""
        return path.parent == self._folder

    def pass_by(self, copy: Path) -> None:
        """Read the file itself from now on: its copy is evicted faster than it is read."""
        self._bad.add(copy)

    def _place_of(self, spec: ArraySpec, shard: int, file: str) -> Path | None:
        fingerprint = self._find_fingerprint(shard, f"{spec.name}/{file}")
        if fingerprint is None:
            return None
        copy = self._folder / f"{spec.name}.{file}.{fingerprint}"
        return None if copy in self._bad or not _COPY.fullmatch(copy.name) else copy

    def _make(self, copy: Path, spec: ArraySpec, file: str) -> Path | None:
        if self._is_stopped.is_set():
            return None
        source = self._store / spec.name / file
        try:
            return self._cache.make(copy, source, spec, self._is_stopped.is_set)
        except FileNotFoundError:  # the folder was removed meanwhile, or there is no such file
            with suppress(OSError):
                self._cache.place_of(self._store)
        except OSError as error:  # whoever reads the file itself tries again, and says what it is
            self._tell(f"{source}: {error.strerror}", kind=str(error.errno))
        except ValueError as error:
            self._bad.add(copy)
            self._tell(f"{source}: {error}", kind="fingerprint")
        self._failures[copy] += 1
        if self._failures[copy] >= _MOST_FAILURES:
            self._bad.add(copy)
        return None

    def _tell(self, why: str, kind: str) -> None:
        """Say once of each kind of trouble that there is no copy."""
        if kind not in self._told:
            self._told.add(kind)
            _log.warning("no copy in %s of %s; the store itself is read", self._cache.folder, why)


def describe_cache(folder: Path) -> dict[str, Any]:
    """What a cache holds, by store, as JSON has it.

    Raises:
        ConfigError: If the folder is none.
    """
    _require_cache(folder, may_be_new=False)
    stores = []
    for own in _list_store_folders(folder):
        copies = [copy for copy in _list_copies(own) if copy.is_whole]
        stores.append(
            {
                "store": _read_store(own),
                "files": len(copies),
                "bytes": sum(copy.num_bytes for copy in copies),
                "last_used": max((copy.used_at for copy in copies), default=None),
            }
        )
    stores = sorted((one for one in stores if one["files"]), key=lambda one: str(one["store"]))
    return {"cache": str(folder), "bytes": sum(one["bytes"] for one in stores), "stores": stores}


def clear_cache(folder: Path) -> int:
    """Remove all copies; who reads them goes on with the store itself.

    Returns:
        The bytes of what was removed.

    Raises:
        ConfigError: If the folder is none.
    """
    _require_cache(folder, may_be_new=False)
    removed = 0
    for own in _list_store_folders(folder):
        for copy in _list_copies(own):
            if copy.is_whole or not _is_locked(copy.path):
                removed += copy.num_bytes if _remove(copy.path) else 0
    return removed


def render_cache(facts: dict[str, Any]) -> list[str]:
    """The lines of `s4v cache`."""
    lines = [f"{facts['cache']}: {describe_bytes(facts['bytes'])}"]
    for one in facts["stores"]:
        whose, moment = one["store"] or "an unknown store", ""
        if one["last_used"] is not None:
            moment = time.strftime(", used %Y-%m-%d %H:%M", time.localtime(one["last_used"]))
        lines.append(f"  {whose}: {one['files']} files, {describe_bytes(one['bytes'])}{moment}")
    return lines


def _require_cache(folder: Path, *, may_be_new: bool) -> None:
    tag = folder / TAG_NAME
    if tag.is_file():
        with suppress(ValueError, OSError, AttributeError):
            if read_json(tag).get("made_by") == _TAG["made_by"]:
                return
    elif may_be_new and not (folder.is_dir() and any(TAG_NAME not in one.name for one in folder.iterdir())):
        if os.path.lexists(folder) and not folder.is_dir():
            raise ConfigError(f"--cache takes a folder; {folder} is none")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(tag, _TAG)
        except OSError as error:
            raise EnvironmentFailedError(f"the cache {folder} cannot be made: {error.strerror}") from error
        return
    advice = "name a new or an empty folder with --cache" if may_be_new else "name the folder that --cache named"
    found = "there is nothing" if not folder.exists() else f"it holds no {TAG_NAME} of s4v"
    raise ConfigError(f"{folder} is no cache of s4v: {found}. Nothing was changed: {advice}.")


def _list_store_folders(folder: Path) -> list[Path]:
    return sorted(own for own in folder.iterdir() if _STORE_FOLDER.fullmatch(own.name) and own.is_dir())


def _list_copies(folder: Path) -> Iterator[ShardCopy]:
    """Of one store; what has another name is not ours."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if _COPY.fullmatch(entry.name) or _PARTIAL.fullmatch(entry.name):
                with suppress(OSError):  # gone meanwhile
                    facts = entry.stat(follow_symlinks=False)
                    yield ShardCopy(Path(entry.path), facts.st_size, facts.st_mtime)


def _read_store(folder: Path) -> str | None:
    with suppress(ValueError, OSError, LookupError, TypeError):
        return str(read_json(folder / _STORE_NAME)["store"])
    return None


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold a file that is made for that, alone; it is removed in the end, unless it was renamed."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_same(path, os.fstat(handle)):
                break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # whoever held it has renamed or removed it
    try:
        yield handle
    finally:
        with suppress(OSError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                path.unlink()
        os.close(handle)


def _is_locked(path: Path) -> bool:
    """Whether a process is making a copy there."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _remove(path: Path) -> bool:
    """Remove a copy and free its bytes, also while somebody has it open: who finds it cut short reads the store.

    Returns:
        Whether it is gone.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
    except OSError:  # another user's, or gone
        return not path.exists()
    try:
        path.unlink()
        os.ftruncate(handle, 0)
    except OSError:
        return not path.exists()
    finally:
        os.close(handle)
    return True


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = open_file(path)
    try:
        yield handle
    finally:
        os.close(handle)


def _require_fingerprint(path: Path, spec: ArraySpec, fingerprint: str) -> None:
    """Raises ValueError where it is another shard, or none."""
    if fingerprint_shard(path, spec) != fingerprint:
        raise ValueError("it is not what its done-marker says")


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not yet there, or a kill left nothing of it
        return None


def _is_same(path: Path, other: os.stat_result) -> bool:
    with suppress(OSError):
        return os.path.samestat(path.stat(), other)
    return False
