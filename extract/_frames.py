"""A folder of numbered pictures as a video: which of its files are frames, and in which order."""

from __future__ import annotations

import os
import re
from pathlib import Path

_FRAME_NAME = re.compile(r"(?P<series>.*?)(?P<number>\d+)\.(?P<ending>jpe?g|png|webp)", re.IGNORECASE)
_KINDS = {"jpg": 0, "jpeg": 0, "png": 1, "webp": 2}
"""Frames are all of one kind, the first of these that a folder holds: depth maps in PNG may lie beside JPEG frames."""


def is_frame_name(name: str) -> bool:
    """Whether a file's name is that of a numbered picture: `img_00001.jpg`, `00001.png`, `frame-7.webp`."""
    return not name.startswith(".") and _FRAME_NAME.fullmatch(name) is not None


def list_frames(folder: Path) -> list[Path]:
    """The frames of a folder, in the order of their numbers: 2 stands before 10.

    Numbers may start anywhere and have gaps. Optical flow beside the frames (`flow_x_00001.jpg`) is left out.

    Raises:
        ValueError: If the folder holds several series of frames, or a number twice.
        OSError: If it cannot be read.
    """
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if is_frame_name(entry.name))
    matches = [match for name in names if (match := _FRAME_NAME.fullmatch(name)) is not None]
    kind = min((_kind_of(match) for match in matches), default=0)
    series: dict[str, dict[int, str]] = {}
    for match in matches:
        if _kind_of(match) != kind:
            continue
        name = match[0]
        frames = series.setdefault(match["series"], {})
        if (other := frames.setdefault(int(match["number"]), name)) != name:
            raise ValueError(f"frames {other} and {name} have one number")
    if len(series) > 1:
        series = {name: frames for name, frames in series.items() if not name.lower().startswith("flow")}
    if len(series) > 1:
        raise ValueError(f"expected one series of frames, found {', '.join(sorted(series)[:5])}")
    return [folder / name for frames in series.values() for _, name in sorted(frames.items())]


def _kind_of(match: re.Match[str]) -> int:
    return _KINDS[match["ending"].lower()]
