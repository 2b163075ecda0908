"""Which frames of a video are cached, and which of them make an evaluation clip: pure functions of counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from ...errors import ConfigError

_WINDOW = 128
"""Frames of a video that a dense clip spans."""


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
    return [(2 * step + 1) * num_frames // (2 * num_steps) for step in range(num_steps)]


def _sample_uniform_clips(num_frames: int, num_steps: int, num_clips: int) -> list[list[int]]:
    """The middles of equal parts, dealt to the clips in turns."""
    indices = sample_uniform(num_frames, num_steps * num_clips)
    return [indices[clip::num_clips] for clip in range(num_clips)]


def _sample_k400_clips(num_frames: int, num_steps: int, num_clips: int) -> list[list[int]]:
    """Kinetics in the reference: one clip is its validation, several its test, their starts spread over a step.

    Of a video with fewer frames than a clip wants, all starts but the first are -1: NumPy rounds them down. What is
    added to them is cut towards zero.
    """
    tick = num_frames / num_steps
    starts = np.linspace(0, tick - 1, num_clips, dtype=int).tolist()
    return [[int(start + tick * step) % num_frames for step in range(num_steps)] for start in starts]


def _sample_something_clips(num_frames: int, num_steps: int, num_clips: int) -> list[list[int]]:
    """Something-Something in the reference: each clip looks at another place of a step."""
    tick = (num_frames - 1) / num_steps
    shifts = [math.floor(tick / (num_clips + 1) * (clip + 1)) for clip in range(num_clips)]
    return [[round(tick * step) + shift for step in range(num_steps)] for shift in shifts]


def _sample_retrieval_clips(num_frames: int, num_steps: int, num_clips: int) -> list[list[int]]:
    """Retrieval in the reference: a video without more frames than are wanted shows its first one, again and again."""
    if num_clips > 1:
        raise ConfigError(f"--sampling reference-retrieval has one clip; found --clips {num_clips}")
    tick = num_frames / num_steps
    is_long = num_frames > num_steps
    return [[math.floor(tick / 2 + tick * step) if is_long else 0 for step in range(num_steps)]]


def _sample_dense_clips(num_frames: int, num_steps: int, num_clips: int) -> list[list[int]]:
    """Windows of 128 frames, their starts spread over the video; a shorter video begins again.

    Of one clip the reference draws the start; here it is the window in the middle.
    """
    free = max(0, num_frames - _WINDOW)
    starts = [free // 2] if num_clips == 1 else [clip * (free // (num_clips - 1)) for clip in range(num_clips)]
    return [[(start + _WINDOW * step // num_steps) % num_frames for step in range(num_steps)] for start in starts]


def _sample_dist_clips(num_frames: int, num_steps: int, num_clips: int) -> list[list[int]]:
    """DiST: the frames that its backbone sees, those of every second part; each clip at another place of a part.

    Source:
        https://github.com/alibaba-mmai-research/DiST; it computes in float32, exact fractions give the same frames.
    """
    tick = Fraction(num_frames, 2 * num_steps)
    shifts = [Fraction(1, 2)] if num_clips == 1 else [Fraction(clip + 1, num_clips) for clip in range(num_clips)]
    return [
        [round(min(Fraction(num_frames - 1), tick * (2 * step + shift))) for step in range(num_steps)]
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


SAMPLINGS: dict[str, Callable[[int, int, int], list[list[int]]]] = {
    "uniform": _sample_uniform_clips,
    "reference-k400": _sample_k400_clips,
    "reference-sth": _sample_something_clips,
    "reference-retrieval": _sample_retrieval_clips,
    "reference-dist": _sample_dist_clips,
    "dense": _sample_dense_clips,
}
"""By the name that `--sampling` takes: (frames of the video, frames of a clip, clips) -> indices of each clip.

What is cached of training videos is uniform under every name but `dense`: the reference draws their frames anew in each
epoch, and a clip here draws one of each part of what is cached. Of a dense window it then draws such parts.

Source:
    The formulas of https://github.com/HJYao00/Side4Video at 5d72352; Python's rounding is half to even, as NumPy's.
"""


_EVERY_FRAME = "all"
_RATE = "fps:"
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
    if name in SAMPLINGS or name == _EVERY_FRAME:
        return
    if not name.startswith(_RATE):
        raise ConfigError(f"--sampling takes {', '.join(SAMPLINGS)}, all, or fps:X; found {name!r}")
    _parse_rate(name)


def _parse_rate(name: str) -> Fraction:
    try:
        rate = Fraction(name.removeprefix(_RATE))
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= _MOST_FPS:
        raise ConfigError(
            f"--sampling {_RATE}X takes frames a second above 0, at most {_MOST_FPS}: fps:2, fps:0.5, fps:1/3; "
            f"found {name!r}"
        )
    return rate


def sample_open_ended(name: str, times_s: np.ndarray, length_s: float) -> list[int]:
    """The frames of a row that is as long as its video, or as its part of one.

    At a rate, frame k stands at the middle of second k to k + 1 of a clock that ticks X times a second: what ffmpeg's
    filter `fps=X` shows there. Above the video's own rate frames repeat.

    Args:
        name: `all`, or `fps:X`.
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
