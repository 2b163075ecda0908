"""Which frames of a video are cached, and which of them make an evaluation clip: pure functions of counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

from ...errors import ConfigError
from ...store.offsets import DEFAULT_PIXEL_EDGE, PixelOffset

_WINDOW = 128
"""Frames of a video that a dense clip spans."""

PIXEL_EDGES = (DEFAULT_PIXEL_EDGE, "wrap")
"""What stands before the first frame of a row: the first again, or (`wrap`) the last ones. Behind the last one it is
the last again."""


def sample_uniform(num_frames: int, num_steps: int) -> list[int]:
    """Pick the middle frame of each of `num_steps` equal parts of a video.

    A video with fewer frames than steps repeats frames; it is not padded.

    Args:
        num_frames: Frames of the video, at least 1.
        num_steps: Frames wanted, at least 1.

    Returns:
        `num_steps` indices in [0, num_frames), never decreasing.

    Raises:
        ValueError: If either count is below 1.

    Source:
        Sparse sampling of Temporal Segment Networks, https://arxiv.org/abs/1608.00859
    """
    if num_frames < 1 or num_steps < 1:
        raise ValueError(f"both counts must be at least 1; found {num_frames} frames, {num_steps} steps")
    return _sample_uniform_clips(num_frames, num_steps, 1)[0]


def _sample_uniform_clips(
    num_frames: int, num_steps: int, num_clips: int, after: Fraction = Fraction()
) -> list[list[int]]:
    """The middles of equal parts, dealt to the clips in turns."""
    parts, beyond = num_steps * num_clips, num_clips * after
    return [
        [int((2 * (part + beyond) + 1) * num_frames // (2 * parts)) for part in range(clip, parts, num_clips)]
        for clip in range(num_clips)
    ]


def _sample_k400_clips(
    num_frames: int, num_steps: int, num_clips: int, after: Fraction = Fraction()
) -> list[list[int]]:
    """Kinetics in the reference: one clip is its validation, several its test, their starts spread over a step.

    Of a video with fewer frames than a clip wants, all starts but the first are -1: NumPy rounds them down. What is
    added to them is cut towards zero.
    """
    tick = num_frames / num_steps
    starts = np.linspace(0, tick - 1, num_clips, dtype=int).tolist()
    clips = [[int(start + tick * (step + float(after))) for step in range(num_steps)] for start in starts]
    return clips if after else [[place % num_frames for place in clip] for clip in clips]


def _sample_something_clips(
    num_frames: int, num_steps: int, num_clips: int, after: Fraction = Fraction()
) -> list[list[int]]:
    """Something-Something in the reference: each clip looks at another place of a step."""
    tick = (num_frames - 1) / num_steps
    shifts = [math.floor(tick / (num_clips + 1) * (clip + 1)) for clip in range(num_clips)]
    return [[round(tick * (step + float(after))) + shift for step in range(num_steps)] for shift in shifts]


def _sample_retrieval_clips(
    num_frames: int, num_steps: int, num_clips: int, after: Fraction = Fraction()
) -> list[list[int]]:
    """Retrieval in the reference: a video without more frames than are wanted shows its first one, again and again."""
    if num_clips > 1:
        raise ConfigError(f"--sampling reference-retrieval has one clip; found --clips {num_clips}")
    tick = num_frames / num_steps
    is_long = num_frames > num_steps
    return [[math.floor(tick / 2 + tick * (step + float(after))) if is_long else 0 for step in range(num_steps)]]


def _sample_dense_clips(
    num_frames: int, num_steps: int, num_clips: int, after: Fraction = Fraction()
) -> list[list[int]]:
    """Windows of 128 frames, their starts spread over the video; a shorter video begins again.

    Of one clip the reference draws the start; here it is the window in the middle.
    """
    free = max(0, num_frames - _WINDOW)
    starts = [free // 2] if num_clips == 1 else [clip * (free // (num_clips - 1)) for clip in range(num_clips)]
    clips = [[start + int(_WINDOW * (step + after) // num_steps) for step in range(num_steps)] for start in starts]
    return clips if num_frames >= _WINDOW else [[place % num_frames for place in clip] for clip in clips]


def _sample_dist_clips(
    num_frames: int, num_steps: int, num_clips: int, after: Fraction = Fraction()
) -> list[list[int]]:
    """DiST: the frames that its backbone sees, those of every second part; each clip at another place of a part.

    Source:
        https://github.com/alibaba-mmai-research/DiST; it computes in float32, exact fractions give the same frames.
    """
    tick = Fraction(num_frames, 2 * num_steps)
    shifts = [Fraction(1, 2)] if num_clips == 1 else [Fraction(clip + 1, num_clips) for clip in range(num_clips)]
    return [
        [round(min(Fraction(num_frames - 1), tick * (2 * (step + after) + shift))) for step in range(num_steps)]
        for shift in shifts
    ]


def sample_clips(
    name: str, num_frames: int, num_steps: int, num_clips: int, *, holds_validation_clip: bool = False
) -> list[list[int]]:
    """The frames of each evaluation clip, and behind them those of the clip that training validates on, if it is held.

    Args:
        name: In `SAMPLINGS`.
        num_frames: Of the video.
        num_steps: Frames of a clip.
        num_clips: Evaluation clips.
        holds_validation_clip: Whether there is one clip more: what the rule makes one clip of.
    """
    sample = SAMPLINGS[name]
    return sample(num_frames, num_steps, num_clips) + sample(num_frames, num_steps, 1) * holds_validation_clip


def pick_offset_frames(
    name: str,
    num_frames: int,
    num_steps: int,
    num_clips: int,
    offsets: Sequence[PixelOffset],
    *,
    edge: str = DEFAULT_PIXEL_EDGE,
    holds_validation_clip: bool = False,
) -> list[list[int]]:
    """The frames of `sample_clips`, clip after clip, each with its pixel frames: (cached frames, O) indices.

    An offset in frames is added to the cached frame. One in steps moves the place at which the rule looks by that
    share of the distance between a clip's frames, before it rounds: the partner of a frame is never off by one.

    Args:
        name: As for `sample_clips`, and so are the counts; in `STEPPED_SAMPLINGS` where an offset counts steps.
        num_frames: Of the row: what lies outside of it is not looked at, and is what `edge` says.
        num_steps: Frames of a clip.
        num_clips: Evaluation clips.
        offsets: In the order wanted.
        edge: In `PIXEL_EDGES`.
        holds_validation_clip: As for `sample_clips`.

    Source:
        Neighbours and `wrap`: https://github.com/BBYL9413/TDS-CLIP, whose Kinetics reader asks decord for frames below
        zero. Half steps: https://github.com/alibaba-mmai-research/DiST.
    """

    def flatten(clips: list[list[int]]) -> list[int]:
        return [index for clip in clips for index in clip]

    sample = SAMPLINGS[name]
    cached = flatten(sample_clips(name, num_frames, num_steps, num_clips, holds_validation_clip=holds_validation_clip))
    columns = []
    for offset in offsets:
        if offset.unit == "frame":
            places = [index + int(offset.distance) for index in cached]
        else:
            counts = [num_clips, *([1] if holds_validation_clip else [])]
            moved = [sample(num_frames, num_steps, count, offset.distance) for count in counts]
            places = flatten([clip for clips in moved for clip in clips])
        columns.append([_resolve_place(place, num_frames, edge) for place in places])
    return [list(row) for row in zip(*columns, strict=True)]


def pick_neighbours(
    cached: Sequence[int], row: range, offsets: Sequence[PixelOffset], *, edge: str = DEFAULT_PIXEL_EDGE
) -> list[list[int]]:
    """Frames of any rule, each with its pixel frames: (cached frames, O) indices.

    Args:
        cached: Indices of the frames that the backbone sees.
        row: Those of the row: what lies outside of it is not looked at, and is what `edge` says.
        offsets: In frames, in the order wanted.
        edge: In `PIXEL_EDGES`.
    """
    places = ((index - row.start + int(offset.distance) for offset in offsets) for index in cached)
    return [[row.start + _resolve_place(place, len(row), edge) for place in own] for own in places]


def _resolve_place(place: int, num_frames: int, edge: str) -> int:
    if place < 0:
        return place % num_frames if edge == "wrap" else 0
    return min(place, num_frames - 1)


SAMPLINGS: dict[str, Callable[..., list[list[int]]]] = {
    "uniform": _sample_uniform_clips,
    "reference-k400": _sample_k400_clips,
    "reference-sth": _sample_something_clips,
    "reference-retrieval": _sample_retrieval_clips,
    "reference-dist": _sample_dist_clips,
    "dense": _sample_dense_clips,
}
"""By the name that `--sampling` takes: (frames of the video, frames of a clip, clips) -> indices of each clip.

Those of `STEPPED_SAMPLINGS` take a fourth, the share of a step by which they look later: then a place may lie outside.

What is cached of training videos is uniform under every name but `dense`: the reference draws their frames anew in each
epoch, and a clip here draws one of each part of what is cached. Of a dense window it then draws such parts.

Source:
    The formulas of https://github.com/HJYao00/Side4Video at 5d72352; Python's rounding is half to even, as NumPy's.
"""


_EVERY_FRAME = "all"
_RATE = "fps:"
_LABELS = f"{_RATE}labels"
_MOST_FPS = 1000
_ROUNDING = 1e-6
"""Of a frame: times are floats, and a frame in the middle between two steps belongs to the later one."""


def is_open_ended(name: str) -> bool:
    """Whether a sampling takes as many frames as a row is long: `all` and `fps:X`."""
    return name == _EVERY_FRAME or name.startswith(_RATE)


def check_sampling(name: str) -> None:
    """Refuse a name that is no sampling.

    Raises:
        ConfigError: With the names that are.
    """
    if name in SAMPLINGS or name in (_EVERY_FRAME, _LABELS):
        return
    if not name.startswith(_RATE):
        raise ConfigError(f"--sampling takes {', '.join(SAMPLINGS)}, all, or fps:X; found {name!r}")
    _parse_rate(name)


def resolve_rate(name: str, video_id: str, clip_s: float | None) -> str:
    """The sampling of one row: of `fps:labels` a rate of its own, which gives a frame for each of its labelled clips.

    Args:
        name: Any sampling.
        video_id: Of the row.
        clip_s: Seconds between the beginnings of its labelled clips; None where no clips are labelled.

    Raises:
        ConfigError: If a frame for each labelled clip is asked for and no clips are labelled.
    """
    if name != _LABELS:
        return name
    if clip_s is None:
        raise ConfigError(
            f"--sampling {_LABELS} takes a frame for each labelled clip of a video, and {video_id} has none: name a "
            "rate, such as fps:0.5, or leave the video out"
        )
    return f"{_RATE}{1 / clip_s!r}"


def _parse_rate(name: str) -> Fraction:
    try:
        rate = Fraction(name.removeprefix(_RATE))
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= _MOST_FPS:
        raise ConfigError(
            f"--sampling {_RATE}X takes frames a second above 0, at most {_MOST_FPS}: fps:2, fps:0.5, fps:1/3, or "
            f"{_LABELS}; "
            f"found {name!r}"
        )
    return rate


def sample_open_ended(name: str, times_s: np.ndarray, length_s: float) -> list[int]:
    """The frames of a row that is as long as its video, or as its part of one.

    At a rate, frame k stands at the middle of second k to k + 1 of a clock that ticks X times a second: what ffmpeg's
    filter `fps=X` shows there. Above the video's own rate frames repeat.

    Args:
        name: `all`, or `fps:X` with a number.
        times_s: (n,) of its frames from its beginning, rising; what stands before it is below zero.
        length_s: Of the row.

    Returns:
        Places among the frames, never falling; none where the row is shorter than half a tick.

    Source:
        https://ffmpeg.org/ffmpeg-filters.html#fps, at its defaults (round=near).
    """
    if name == _EVERY_FRAME:
        return np.flatnonzero(times_s >= 0).tolist()
    rate = float(_parse_rate(name))
    ticks = np.floor(times_s * rate + 0.5 + _ROUNDING)
    steps = np.arange(math.floor(length_s * rate + 0.5 + _ROUNDING))
    return np.maximum(np.searchsorted(ticks, steps, side="right") - 1, 0).tolist()


STEPPED_SAMPLINGS = frozenset(SAMPLINGS)
"""Rules whose clips have frames at equal distances, of which `--pixel-offsets` can take shares. A rule by the second,
or one that takes every frame, has no such distance: it stays out."""


def parse_frames(text: str) -> dict[str, int]:
    """Read `--frames`: one number for all splits, or `train=16,val=8`.

    Returns:
        Frames by split; the key "" holds the number for splits that are not named.

    Raises:
        ConfigError: If it is neither.
    """
    return _parse_counts("--frames", text, "a number (8) or one for each split (train=16,val=8)")


def parse_clips(text: str) -> dict[str, int]:
    """Read `--clips`: evaluation clips, one number for all splits, or `test=4,1`; see `parse_frames`."""
    return _parse_counts("--clips", text, "a number (1) or one for each split (test=4,1)")


def parse_views(text: str) -> dict[str, str]:
    """Read `--views`: a name for all splits, or `test=three,centre`; see `parse_frames`."""
    return _parse_by_split("--views", text, "a name (centre) or one for each split (test=three,centre)")


def _parse_counts(option: str, text: str, expected: str) -> dict[str, int]:
    by_split = _parse_by_split(option, text, expected)
    if not all(count.isdecimal() and int(count) >= 1 for count in by_split.values()):
        raise ConfigError(f"{option} takes {expected}; found {text!r}")
    return {split: int(count) for split, count in by_split.items()}


def _parse_by_split(option: str, text: str, expected: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for part in text.split(","):
        split, _, value = part.strip().rpartition("=")
        if not value or split in values or "=" in split:
            raise ConfigError(f"{option} takes {expected}; found {text!r}")
        values[split] = value
    return values
