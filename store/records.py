"""What is known of a video before and after the work: the manifest's rows as plain dataclasses.

No pyarrow here: the decoder processes import this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

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
class Moment:
    """Where a video shows what a caption says: one row of moments.parquet."""

    query_id: str
    """The data set's own number or text."""
    split: str = ""
    """Of the query; "" is its video's."""
    duration_s: float | None = None
    """Of the video as annotated; None where nobody says, and then it is the file's."""
    windows: tuple[tuple[float, float], ...] | None = None
    """Seconds from the row's beginning, as annotated: start, end. None is not annotated, () is nowhere."""
    clip_s: float | None = None
    """Seconds between the beginnings of labelled clips; None where no clips are labelled."""
    clip_ids: tuple[int, ...] | None = None
    """Labelled clips, from 0: clip i begins at i clip_s."""
    scores: tuple[tuple[int, ...], ...] | None = None
    """For each of these clips a score of each annotator: 0 to 4 beside windows. Without windows 1 to 5, or of a single
    annotator -1, 0, 1."""


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
    moments: tuple[Moment, ...] = ()
    """One for each caption, or none: kept in moments.parquet."""


WHOLE = "whole"
"""The resize that shows all of a frame, and pads the rest of what the backbone sees."""

VIEW_NAMES: dict[str, tuple[str, ...]] = {
    "centre": ("centre",),
    "flip": ("centre", "mirrored centre"),
    "three": ("left", "right", "centre"),
}
"""What each view of a row shows, in their order, by the name that `--views` takes; `name_views` knows all."""

AUGMENTED = "augment:"
"""Begins the name of views that are drawn: `augment:4` is the centre, and four augmented ones behind it."""


def count_augmented(name: str) -> int:
    """How many views of a name are drawn: 4 of `augment:4`, 0 of names that draw nothing."""
    count = name.removeprefix(AUGMENTED)
    return int(count) if name.startswith(AUGMENTED) and count.isdecimal() else 0


def name_views(name: str) -> tuple[str, ...]:
    """What each view of a row shows, in their order; nothing of a name that is not known."""
    if count := count_augmented(name):
        return ("centre", *(f"augmented {number}" for number in range(1, count + 1)))
    return VIEW_NAMES.get(name, ())


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One step of RandAugment, as it was drawn."""

    name: str
    """As timm calls it, such as `Rotate`."""
    argument: float | None = None
    """Degrees, a factor, a share of the side, a threshold or bits; None of operations that take nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """What was drawn for a view beside its box and its mirroring.

    The operations come first, on the whole frame. Then it is resized, the view's box is scaled, and made grey.
    """

    scaled_width: int
    """The box is scaled to this size, bilinearly."""
    scaled_height: int
    grey: bool = False
    operations: tuple[Operation, ...] = ()
    class_name: str | None = None
    """The class that the view shows, where mirroring makes another one of the row's."""


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
    """Of what was drawn; None where nothing was."""
    augmentation: Augmentation | None = None
    """None where nothing was drawn."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> View:
        """One that `asdict` made a dict of."""
        drawn = values.get("augmentation")
        if drawn is None:
            return cls(**values)
        operations = tuple(Operation(**one) for one in drawn["operations"])
        return cls(**{**values, "augmentation": Augmentation(**{**drawn, "operations": operations})})

    def as_dict(self) -> dict[str, Any]:
        """Its fields, and theirs."""
        return asdict(self)


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
