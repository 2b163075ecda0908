"""What is known of a video before and after the work: the manifest's rows as plain dataclasses.

No pyarrow here: the decoder processes import this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "failed", "pending"]

REASONS = {
    "missing-file": "the file is not there",
    "empty-file": "the file has no bytes",
    "unreadable": "no decoder knows the container",
    "no-video-stream": "the container has no video stream",
    "no-frames": "the video stream has no frame, or the segment lies outside the video",
    "too-short": "--sampling fps:X takes its first frame later than the video or segment ends",
    "truncated": "more frames are announced than can be decoded",
    "decode-error": "the decoder reported an error",
    "timeout": "decoding took longer than --decode-timeout allows",
    "crashed": "the decoder process died, and again while no other one ran",
    "too-large": "it takes more memory, pixels or packets than a decoder may have",
    "source-changing": "the file was written to or replaced while it was decoded",
    "io-error": "reading failed, or was not permitted: the machine's trouble, the row is pending",
    "no-memory": "the machine had no memory left, or killed the decoder: its trouble, the row is pending",
}
"""Why a row failed: `reason` is one of these codes, then a colon and a detail that is the same in every run.

A pending row may have a reason too: what the machine did not let happen. The same command tries it again.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoRecord:
    """One row before any work: what the data set's reader knows. These are the manifest's input columns."""

    video_id: str
    """Unique; the path under the root with its ending unless the annotations say otherwise."""
    path: str
    """Relative to the data set's root, with forward slashes."""
    split: str
    class_name: str | None = None
    source_id: str | None = None
    """The data set's own id of the source video."""
    start_s: float | None = None
    end_s: float | None = None
    captions: tuple[str, ...] = ()
    """Kept in captions.parquet, many to one."""


WHOLE = "whole"
"""The resize that shows all of a frame, and pads the rest of what the backbone sees."""

VIEW_NAMES: dict[str, tuple[str, ...]] = {
    "centre": ("centre",),
    "flip": ("centre", "mirrored centre"),
    "three": ("left", "right", "centre"),
}
"""What each view of a row shows, in their order, by the name that `--views` takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """How the pixels of a view were made: resize the frame, take a box of it, mirror it or not.

    A box may reach beyond the resized frame (`x` or `y` below zero, say): what is not there is padded, with the colour
    that normalises to about zero, before mirroring.
    """

    resized_width: int
    resized_height: int
    x: int
    y: int
    width: int
    height: int
    flip: bool = False
    seed: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoResult:
    """One row after the work: the manifest's result columns."""

    video_id: str
    status: Status
    reason: str | None = None
    decoder: str | None = None
    """`decord` or `pyav`; `pillow` for folders of JPEGs."""
    num_frames: int | None = None
    """Frames that the video has (after clamping, see `reason` of an ok row)."""
    fps: float | None = None
    duration_s: float | None = None
    width: int | None = None
    """Of the upright picture."""
    height: int | None = None
    num_cached_frames: int | None = None
    num_views: int | None = None
    frame_indices: list[int] | None = None
    """0-based frames of the file that are cached; null where the row failed."""
    timestamps_s: list[float] | None = None
    views: list[View] | None = None
    eval_clips: list[list[int]] | None = None
    """Places on the axis F that make up each evaluation clip."""
    validation_clip: list[int] | None = None
    """Places of the clip that training validates on, where it is none of those; null in most rows."""
    source_bytes: int | None = None
    """Size of the file that was decoded, or of all frames of a folder; null in rows from before sources were known."""
    source_mtime_ns: int | None = None
    """When it was last changed; of a folder, its latest frame."""
    source_hash: str | None = None
    """How its bytes are told from others, and how they were hashed: see `extract/decode/source.py`."""
