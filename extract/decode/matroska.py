"""Whether a Matroska or WebM file is whole: readers skip what is damaged without a word, with the frames in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_MASTERS = frozenset({0x1A45DFA3, 0x18538067, 0x1F43B675})
"""EBML header, segment and cluster: what stands in them is looked at."""
_ELEMENTS = frozenset(
    {
        *(0x4286, 0x42F7, 0x42F2, 0x42F3, 0x4282, 0x4287, 0x4285, 0x4281),  # of the EBML header
        *(0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367),  # of the segment
        *(0xE7, 0xA3, 0xA0, 0xAB, 0xA7, 0xAF, 0x5854),  # of a cluster
        *(0xEC, 0xBF),  # void and checksum, anywhere
    }
)
_TRACKS, _TRACK, _TRACK_NUMBER, _SIMPLE_BLOCK = 0x1654AE6B, 0xAE, 0xD7, 0xA3
_HEADER_BYTES = 20
_MOST_TRACKS_BYTES = 4 << 20


def is_matroska_whole(path: Path) -> bool:
    """Whether each element follows the one before it from the first to the file's end, and each block has a track.

    Raises:
        OSError: If the file cannot be read.
    """
    tracks: set[int] = set()
    with path.open("rb", buffering=0) as file:
        descriptor = file.fileno()
        size, place = os.fstat(descriptor).st_size, 0
        while place < size:
            header = os.pread(descriptor, _HEADER_BYTES, place)
            parsed = _parse_header(header)
            if parsed is None:
                return False
            element, length, num_bytes = parsed
            place += num_bytes
            if element in _MASTERS:
                continue
            if element not in _ELEMENTS:
                return False
            if element == _TRACKS:
                tracks |= set(_list_tracks(os.pread(descriptor, min(length, _MOST_TRACKS_BYTES), place)))
            elif element == _SIMPLE_BLOCK and tracks:
                number = _parse_number(header, num_bytes, keeps_marker=False)
                if number is None or number[0] not in tracks:
                    return False
            place += length
        return place == size


def _list_tracks(data: bytes) -> Iterator[int]:
    """Numbers of the tracks that the element of all tracks names."""
    for element, body in _children(data):
        if element == _TRACK:
            yield from (int.from_bytes(value, "big") for inner, value in _children(body) if inner == _TRACK_NUMBER)


def _children(data: bytes) -> Iterator[tuple[int, bytes]]:
    place = 0
    while (parsed := _parse_header(data[place : place + _HEADER_BYTES])) is not None:
        element, length, num_bytes = parsed
        yield element, data[place + num_bytes : place + num_bytes + length]
        place += num_bytes + length


def _parse_header(data: bytes) -> tuple[int, int, int] | None:
    """Identifier, length of the content and length of both; None where no element begins."""
    name = _parse_number(data, 0, keeps_marker=True)
    if name is None or name[1] > 4:
        return None
    length = _parse_number(data, name[1], keeps_marker=False)
    return None if length is None else (name[0], length[0], name[1] + length[1])


def _parse_number(data: bytes, place: int, *, keeps_marker: bool) -> tuple[int, int] | None:
    """A number of variable length, and its length in bytes."""
    if place >= len(data) or not data[place]:
        return None
    num_bytes = 9 - data[place].bit_length()
    if place + num_bytes > len(data):
        return None
    value = int.from_bytes(data[place : place + num_bytes], "big")
    return value if keeps_marker else value - (1 << 7 * num_bytes), num_bytes
