"""A folder of numbered pictures as a video: which of its files are frames, and in which order."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

PICTURE_FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
"""Endings of frames -> Pillow's name of the one format that such a file may have."""

PICTURE_ENDINGS = frozenset(PICTURE_FORMATS)

_FRAME_NAME = re.compile(
    rf"(?P<series>.*?)(?P<number>\d+)(?P<ending>{'|'.join(map(re.escape, PICTURE_FORMATS))})",
    re.IGNORECASE | re.DOTALL,
)


def is_frame_name(name: str) -> bool:
    """Whether a file's name is that of a numbered picture: `img_00001.jpg`, `00001.png`, `frame-7.webp`."""
    return not name.startswith(".") and _FRAME_NAME.fullmatch(name) is not None


def format_of_frame(file: Path) -> str:
    """Pillow's name of the format that a frame must have, by its ending."""
    return PICTURE_FORMATS[file.suffix.lower()]


def list_frames(folder: Path) -> list[Path]:
    """The frames of a folder, in the order of their numbers: 2 stands before 10.

    Numbers may start anywhere and have gaps. Optical flow beside the frames (`flow_x_00001.jpg`) is left out, and so
    are pictures of another format beside JPEGs: masks, depths.

    Raises:
        ValueError: If the folder holds several series of frames, or a number twice, or may not be read.
        OSError: If the machine fails over it.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if is_frame_name(entry.name))
    except PermissionError as error:
        raise ValueError(f"the folder may not be read: {os.strerror(error.errno or errno.EACCES)}") from error
    # Format and beginning of the name -> number -> name.
    series: dict[tuple[str, str], dict[int, str]] = {}
    for name in names:
        match = _FRAME_NAME.fullmatch(name)
        if match is None:
            continue
        frames = series.setdefault((PICTURE_FORMATS[match["ending"].lower()], match["series"]), {})
        if (other := frames.setdefault(int(match["number"]), name)) != name:
            raise ValueError(f"frames {other} and {name} have one number")
    if any(kind == "JPEG" for kind, _ in series):
        series = {key: frames for key, frames in series.items() if key[0] == "JPEG"}
    if len(series) > 1:
        series = {key: frames for key, frames in series.items() if not key[1].lower().startswith("flow")}
    if len(series) > 1:
        beginnings, kinds = sorted({name for _, name in series}), sorted({kind for kind, _ in series})
        shown = beginnings if len(beginnings) > 1 else kinds
        raise ValueError(f"expected one series of frames, found {', '.join(shown[:5])}")
    return [folder / name for frames in series.values() for _, name in sorted(frames.items())]
