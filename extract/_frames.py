"""A folder of numbered JPEG files as a video: which of its files are frames, and in which order."""

from __future__ import annotations

import os
import re
from pathlib import Path

_FRAME_NAME = re.compile(r"(?P<series>.*?)(?P<number>\d+)\.jpe?g", re.IGNORECASE)


def is_frame_name(name: str) -> bool:
    """Whether a file's name is that of a numbered JPEG: `img_00001.jpg`, `00001.jpg`, `frame-7.jpeg`."""
    return not name.startswith(".") and _FRAME_NAME.fullmatch(name) is not None


def list_frames(folder: Path) -> list[Path]:
    """The frames of a folder, in the order of their numbers: 2 stands before 10.

    Numbers may start anywhere and have gaps. Optical flow beside the frames (`flow_x_00001.jpg`) is left out.

    Raises:
        ValueError: If the folder holds several series of frames, or a number twice.
    """
    series: dict[str, dict[int, str]] = {}
    for name in sorted(entry.name for entry in os.scandir(folder)):
        match = None if name.startswith(".") else _FRAME_NAME.fullmatch(name)
        if match is None:
            continue
        frames = series.setdefault(match["series"], {})
        if (other := frames.setdefault(int(match["number"]), name)) != name:
            raise ValueError(f"frames {other} and {name} have one number")
    if len(series) > 1:
        series = {name: frames for name, frames in series.items() if not name.lower().startswith("flow")}
    if len(series) > 1:
        raise ValueError(f"expected one series of frames, found {', '.join(sorted(series)[:5])}")
    return [folder / name for frames in series.values() for _, name in sorted(frames.items())]
