"""A source: the file or folder of frames that a row was made from, and how it is told from others. No torch, no Arrow.

`source_hash` says by itself what was hashed:

    sha256:HEX           all bytes of a file of at most 8 MB
    sha256-samples:HEX   the size of a larger file, its first and last MB, and sixteen pieces of 256 kB between them
    sha256-frames:HEX    names and sizes of a folder's frames, and all bytes or samples of up to 32 of them
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .frame_folder import list_frames

_WHOLE_BYTES = 8 << 20
_END_BYTES = 1 << 20
_PIECE_BYTES = 256 << 10
_NUM_PIECES = 16
_NUM_FRAMES = 32
_FRAME_BYTES = 64 << 10

Fingerprint = tuple[tuple[int, ...], ...]
"""What stat tells of a file, or of each frame of a folder: device, inode, size and time of the last change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFacts:
    """What a row keeps of its source; the names are those of the manifest's columns."""

    source_bytes: int
    """Size of the file, or of all frames of a folder together."""
    source_mtime_ns: int
    """When it was last changed; of a folder, its latest frame."""
    source_hash: str
    """Of its bytes; the part before the colon says of which."""


def read_source(path: Path) -> SourceFacts:
    """Size, time and hash of a file or of a folder of frames.

    Args:
        path: The file or folder; links are followed.

    Raises:
        OSError: If it is not there, or cannot be read.
    """
    if not path.is_dir():
        return _read_file_source(path)
    frames = _frames_of(path)
    stats = [frame.stat() for frame in frames]
    return SourceFacts(
        source_bytes=sum(stat.st_size for stat in stats),
        source_mtime_ns=max((stat.st_mtime_ns for stat in stats), default=path.stat().st_mtime_ns),
        source_hash=_hash_frames(frames, [stat.st_size for stat in stats]),
    )


def is_same_source(
    recorded_bytes: int | None, recorded_mtime_ns: int | None, recorded_hash: str | None, path: Path
) -> bool:
    """Whether a file or folder of frames is still the one that a row was made from.

    Another size says no. Where size and time are the recorded ones, nothing is read. Where the time alone differs (a
    copy, a restored backup), the hash decides.

    Args:
        recorded_bytes: The row's `source_bytes`.
        recorded_mtime_ns: The row's `source_mtime_ns`.
        recorded_hash: The row's `source_hash`.
        path: Where the source is looked for.

    Raises:
        OSError: If nothing is there, or it cannot be read.
        ValueError: If the row knows no source: it was written before sources were recorded.
    """
    if recorded_bytes is None or recorded_hash is None:
        raise ValueError(f"expected a row that knows its source, found one without (for {path}): record it first")
    is_folder = path.is_dir()
    if is_folder != recorded_hash.startswith("sha256-frames:"):
        return False
    if is_folder:
        return read_source(path).source_hash == recorded_hash
    stat = path.stat()
    if stat.st_size != recorded_bytes:
        return False
    return stat.st_mtime_ns == recorded_mtime_ns or _read_file_source(path).source_hash == recorded_hash


def take_fingerprint(path: Path) -> Fingerprint:
    """What stat tells of a file or of a folder's frames: it differs where something wrote to them, or replaced them.

    Raises:
        OSError: If it is not there.
    """
    files = [path, *_frames_of(path)] if path.is_dir() else [path]
    stats = [file.stat() for file in files]
    return tuple((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)


def _frames_of(folder: Path) -> list[Path]:
    """The frames of a folder; where it holds no single series of them, all its files."""
    try:
        return list_frames(folder)
    except ValueError:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_file())


def _read_file_source(path: Path) -> SourceFacts:
    with path.open("rb", buffering=0) as file:
        stat = os.fstat(file.fileno())
        size = stat.st_size
        is_whole = size <= _WHOLE_BYTES
        digest = hashlib.sha256(b"" if is_whole else f"{size}:".encode())
        for start, length in _pieces(size):
            _hash_piece(digest, file.fileno(), start, length)
    kind = "sha256" if is_whole else "sha256-samples"
    return SourceFacts(source_bytes=size, source_mtime_ns=stat.st_mtime_ns, source_hash=f"{kind}:{digest.hexdigest()}")


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    """Start and length of what is hashed of a file, in rising order."""
    if size <= _WHOLE_BYTES:
        yield 0, size
        return
    yield 0, _END_BYTES
    between = size - 2 * _END_BYTES - _PIECE_BYTES
    for number in range(_NUM_PIECES):
        yield _END_BYTES + between * number // (_NUM_PIECES - 1), _PIECE_BYTES
    yield size - _END_BYTES, _END_BYTES


def _hash_piece(digest: hashlib._Hash, descriptor: int, start: int, length: int) -> None:
    end = start + length
    while start < end:
        data = os.pread(descriptor, min(end - start, 1 << 20), start)
        if not data:  # the file became shorter meanwhile: another hash, and another fingerprint
            return
        digest.update(data)
        start += len(data)


def _hash_frames(frames: Sequence[Path], sizes: Sequence[int]) -> str:
    """Hash all names and sizes, and the first bytes of frames that are spread evenly over the folder."""
    digest = hashlib.sha256()
    for frame, size in zip(frames, sizes, strict=True):
        digest.update(os.fsencode(frame.name) + f"\0{size}\0".encode())
    count = min(len(frames), _NUM_FRAMES)
    for number in range(count):
        frame = frames[number * (len(frames) - 1) // max(count - 1, 1)]
        with frame.open("rb", buffering=0) as file:
            _hash_piece(digest, file.fileno(), 0, min(os.fstat(file.fileno()).st_size, _FRAME_BYTES))
    return f"sha256-frames:{digest.hexdigest()}"
