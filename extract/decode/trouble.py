"""When a video cannot be decoded: whether it is the video's fault or the machine's, in one place."""

from __future__ import annotations

import errno
import mmap
import os
import re
import resource
import sys
from pathlib import Path

import av

_READ_BYTES = 1 << 20

_IO_ERROR_NAMES = (
    "EIO",
    "ESTALE",
    "ETIMEDOUT",
    "EHOSTDOWN",
    "EHOSTUNREACH",
    "ENETDOWN",
    "ENETUNREACH",
    "ECONNRESET",
    "ECONNABORTED",
    "ENOTCONN",
    "ENXIO",
    "ENODEV",
    "EREMOTEIO",
    "ENOLINK",
    "EBADF",
    "ESHUTDOWN",
    "EINTR",
    "EAGAIN",
    "EBUSY",
    "ENOSPC",
    "EDQUOT",
    "ENOLCK",
    "EDEADLK",
    "EUCLEAN",
    "EBADMSG",
)
_IO_ERRORS = frozenset(getattr(errno, name) for name in _IO_ERROR_NAMES if hasattr(errno, name))
_NO_FILE_ERRORS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})


class DecodeFailure(Exception):
    """A video that cannot be decoded; `code` is one of the manifest's reasons."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class DecodeTrouble(DecodeFailure):
    """The machine did not let a video be decoded: nothing is said about the video."""


def as_failure(error: BaseException, path: Path, code: str = "decode-error") -> DecodeFailure:
    """The failure, or the trouble, that an exception stands for.

    Args:
        error: What a library or the system raised.
        path: The file it happened with.
        code: The failure's code, where it is the file's fault.
    """
    if isinstance(error, DecodeFailure):
        return error
    number = getattr(error, "errno", None)
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return memory_failure()
    if number in (errno.EMFILE, errno.ENFILE):
        return DecodeTrouble("io-error", "too many files are open on this machine")
    if isinstance(error, OSError):
        if number in (errno.EACCES, errno.EPERM):
            return DecodeTrouble("io-error", "reading it is not permitted")
        if number == errno.EIO and isinstance(error, av.FFmpegError) and find_read_error(path) is None:
            # Some of FFmpeg's demuxers call it an input/output error where a file ends too early.
            return DecodeFailure(code, "not the start of a video, or damaged")
        if number in _IO_ERRORS:
            return DecodeTrouble("io-error", f"reading it failed: {os.strerror(number or errno.EIO)}")
        if number == errno.ELOOP:
            return DecodeFailure("missing-file", "its links lead round in a circle")
        if number in _NO_FILE_ERRORS:
            return DecodeFailure("missing-file", "")
    return DecodeFailure(code, scrub_message(error, path))


def verdict_of(failure: DecodeFailure, path: Path) -> DecodeFailure:
    """A failure that is final, or the trouble that was behind it: each byte of the file must have been readable.

    Libraries take a disk that fails for a file that ends.
    """
    if isinstance(failure, DecodeTrouble) or failure.code in ("missing-file", "too-large") or not path.is_file():
        return failure
    error = find_read_error(path)
    trouble = failure if error is None else as_failure(error, path)
    return trouble if isinstance(trouble, DecodeTrouble) else failure


def find_read_error(path: Path) -> OSError | None:
    """Read a file from its start to its end; returns what stopped that."""
    try:
        with path.open("rb", buffering=0) as file:
            while file.read(_READ_BYTES):
                pass
    except OSError as error:
        return error
    return None


def unexpected_failure(error: Exception) -> DecodeFailure:
    """What is a fault of ours: it says where, so that it can be reported."""
    trace = error.__traceback__
    place = "?"
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.parent == Path(__file__).parent:
            place = f"{file.name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return DecodeFailure("decode-error", f"the file holds what s4v does not expect (at {place}): please report it")


def scrub_message(error: BaseException, path: Path) -> str:
    """An error's message without clocks, addresses, paths and source lines: the same in every run."""
    text = str(error).replace(str(path), "").strip()
    text = text.splitlines()[0].partition("; last error log")[0] if text else "no message"
    text = re.sub(r"\[(\d\d:\d\d:\d\d|Errno -?\d+)\]", "", text)
    text = re.sub(r"0x[0-9a-f]+", "", text)
    text = re.sub(r"(/[\w.-]+)+(:\d+)?:?", "", text)
    return re.sub(r"\s+", " ", text).strip(" :;'")[:160]


class MemoryLimit:
    """How much address space this process may take beyond what it had when it began."""

    def __init__(self) -> None:
        self._start_bytes: int | None = None
        self._beyond_bytes = 0

    def begin(self, beyond_bytes: int) -> None:
        """Set the limit, relative to what is in use now."""
        self._start_bytes = _address_space_bytes()
        self.set(beyond_bytes)

    def set(self, beyond_bytes: int) -> None:
        """Change the limit; without effect where none was begun, or where the system does not tell what is in use."""
        if self._start_bytes:
            self._beyond_bytes = beyond_bytes
            _limit_address_space(self._start_bytes + beyond_bytes)

    def is_reached(self, num_bytes: int) -> bool:
        """Whether so many bytes more are refused now: libraries may take that for damage of the video."""
        if not self._start_bytes:
            return False
        try:
            with mmap.mmap(-1, max(num_bytes, mmap.PAGESIZE)):
                return False
        except (OSError, MemoryError, ValueError):
            return True

    def has_machine_the_rest(self) -> bool:
        """Whether the machine would have given all that the limit allows: then it was the limit that refused."""
        if not self._start_bytes:
            return False
        allowed = self._start_bytes + self._beyond_bytes
        rest = allowed - _address_space_bytes()
        _limit_address_space(resource.RLIM_INFINITY)
        try:
            with mmap.mmap(-1, max(rest, mmap.PAGESIZE)):
                return True
        except (OSError, MemoryError, ValueError):
            return False
        finally:
            _limit_address_space(allowed)

    def __str__(self) -> str:
        return f"{self._beyond_bytes / 1e9:.1f} GB"


MEMORY_LIMIT = MemoryLimit()
"""Of this process; begun in decoder processes alone."""


def memory_failure() -> DecodeFailure:
    """Out of memory: final where the decoder's own limit refused, trouble where the machine did."""
    if MEMORY_LIMIT.has_machine_the_rest():
        return DecodeFailure("too-large", f"it takes a decoder more than {MEMORY_LIMIT} of memory")
    return DecodeTrouble("no-memory", "the machine has no memory left for a decoder")


def _address_space_bytes() -> int:
    """Of this process; 0 where the system does not tell."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


def _limit_address_space(limit_bytes: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        limit_bytes = hard if limit_bytes == resource.RLIM_INFINITY else min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, hard))
