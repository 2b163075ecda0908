"""What a network of temporal grounding learns from: annotated moments on the cached frames of their video.

Letters: T cached frames at `fps` a second, so that frame t is the t-th 1/fps seconds of the video; n windows.

Source:
    https://github.com/yeliudev/R2-Tuning at 03fbcf6: its data sets. All figures are float32, as there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...errors import StoreMismatchError
from ...store.records import Moment

MOST_MISSING = 5
"""From so many on, frames and labels that differ in number are of two different videos."""
_MOST_GRADE = 4
_IMPORTANCE = (1, 5)
_HIGHLIGHT = 0.5
_ROUNDING = 1e-6
"""Of a frame's middle in clips: what lies on a border belongs to the later clip."""


@dataclass(frozen=True, slots=True)
class GroundingTarget:
    """A query's moments on T frames."""

    windows: np.ndarray
    """(n, 2) float32, seconds: start, end; n is 0 where none is annotated."""
    saliency: np.ndarray
    """(T,) float32, 0 to 1. Without windows it ends where labels end, if frames go on: the video is cut to it."""
    positives: np.ndarray
    """Ascending frames of which the positive one is drawn; none where nothing is shown anywhere."""


def make_target(moment: Moment, *, fps: float, num_frames: int, name: str = "") -> GroundingTarget:
    """An annotated query as a target.

    Saliency comes of the scores of clips where there are any: sums of three annotators' 0 to 4 over 12, beside windows;
    without windows importances of 1 to 5 (TVSum), or a match of -1, 0, 1 (YouTube Highlights). Else a frame in a window
    has 1.

    Args:
        moment: Annotated: with windows, scored clips, or both.
        fps: Cached frames a second.
        num_frames: T.
        name: Of the query, for messages.

    Raises:
        StoreMismatchError: If it is not annotated, or frames and labels are not of one video.
    """
    if moment.windows is None and moment.scores is None:
        raise StoreMismatchError(
            f"query {name or moment.query_id} has neither windows nor scored clips: nothing can be learned from it"
        )
    windows = fix_windows(moment.windows or (), fps=fps, num_frames=num_frames)
    if moment.scores is None:
        saliency = _mark_windows(windows, fps, num_frames)
    else:
        saliency = _spread_scores(moment, fps, num_frames, name)
    threshold = _find_threshold(moment, saliency)
    return GroundingTarget(windows, saliency, np.flatnonzero(saliency > threshold))


def fix_windows(windows: object, *, fps: float, num_frames: int) -> np.ndarray:
    """Windows as far as there are frames: clamped, start before end, and at least a frame long.

    Args:
        windows: n pairs of seconds.
        fps: Cached frames a second.
        num_frames: T.

    Returns:
        (n, 2) float32. A window shorter than 1/fps is as long as that, around its middle; the middle stays half a frame
        away from both ends of the video.
    """
    fixed = np.asarray(windows, dtype=np.float32).reshape(-1, 2)
    fixed = np.sort(np.clip(fixed, 0, np.float32(num_frames / fps)), axis=1)
    half = np.float32(0.5 / fps)
    is_short = fixed[:, 1] - fixed[:, 0] < np.float32(1 / fps)
    middles = np.clip(fixed.sum(axis=1) / 2, half, np.float32(num_frames / fps) - half)
    widened = np.stack([middles - half, middles + half], axis=1)
    return np.where(is_short[:, None], widened, fixed).astype(np.float32)


def _mark_windows(windows: np.ndarray, fps: float, num_frames: int) -> np.ndarray:
    """1 on frames from ceil(start fps) to before ceil(end fps)."""
    saliency = np.zeros(num_frames, dtype=np.float32)
    bounds = np.ceil(windows * np.float32(fps)).astype(np.int64)
    for start, stop in bounds.tolist():
        saliency[start:stop] = 1
    return saliency


def _spread_scores(moment: Moment, fps: float, num_frames: int, name: str) -> np.ndarray:
    """The shares that clips have of the highest score, on the frames whose middles lie in them."""
    assert moment.scores is not None and moment.clip_ids is not None and moment.clip_s is not None
    shares = _as_shares(moment)
    num_labelled = max(moment.clip_ids) + 1
    if moment.windows is None:
        num_clips = num_labelled
    elif moment.duration_s is None:
        num_clips = max(num_labelled, math.floor(num_frames / (fps * moment.clip_s) + 0.5))
    else:
        num_clips = max(1, int(moment.duration_s / moment.clip_s))
    num_expected = num_clips * moment.clip_s * fps  # in frames
    if abs(num_expected - num_frames) >= MOST_MISSING:
        raise StoreMismatchError(
            f"query {name or moment.query_id} has labels for {num_clips} clips of {moment.clip_s:g} s, and its video "
            f"has {num_frames} frames at {fps:g} a second: these are two different videos, or another rate"
        )
    by_clip = np.zeros(max(num_clips, num_labelled), dtype=np.float32)
    by_clip[list(moment.clip_ids)] = shares
    middles = (np.arange(num_frames) + 0.5) / (fps * moment.clip_s)
    clips = np.floor(middles + _ROUNDING).astype(np.int64)
    if moment.windows is None:
        clips = clips[clips < len(by_clip)]
    saliency = np.zeros(len(clips), dtype=np.float32)
    is_labelled = clips < len(by_clip)
    saliency[is_labelled] = by_clip[clips[is_labelled]]
    return saliency


def _as_shares(moment: Moment) -> np.ndarray:
    """(clips,) float32, 0 to 1: what a clip has of the highest score."""
    scores = np.asarray(moment.scores, dtype=np.float32)
    totals, num_annotators = scores.sum(axis=1), scores.shape[1]
    if moment.windows is not None:
        return totals / np.float32(_MOST_GRADE * num_annotators)
    if num_annotators == 1:
        return (totals + 1) / 2
    least, most = (limit * num_annotators for limit in _IMPORTANCE)
    return (totals - least) / np.float32(most - least)


def _find_threshold(moment: Moment, saliency: np.ndarray) -> float:
    """Above which a frame may be the positive one: nothing beside windows, half a match, the lower median."""
    if moment.windows is not None or moment.scores is None:
        return 0.0
    if len(moment.scores[0]) == 1:
        return _HIGHLIGHT
    return float(np.sort(saliency)[(len(saliency) - 1) // 2])
