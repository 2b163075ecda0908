"""From a network's points and levels to moments and saliency; all of it in float32, as R2-Tuning has it.

Letters: T frames, Z points of all levels, z cells of one level, M moments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .grounding_metrics import find_overlaps

MOST_MOMENTS = 50
MOST_FRAMES = 1024
"""Frames that a grounding network looks at together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suppression:
    """What a moment does to the scores of those that overlap it and are worse."""

    kind: Literal["normal", "linear", "gaussian"]
    """`normal`: 0 from an IoU of `threshold` on. `linear`: times 1 - IoU. `gaussian`: times exp(-IoU^2 / `sigma`)."""
    threshold: float = 0.7
    sigma: float = 0.5


def find_moments(
    points: np.ndarray, strides: np.ndarray, offsets: np.ndarray, logits: np.ndarray, fps: float
) -> np.ndarray:
    """The 50 moments of highest score, one a point: ((p - o0 s) / fps, (p + o1 s) / fps, sigmoid(logit)).

    They may begin before the video and end behind it; `clean_moments` sees to that.

    Args:
        points: (Z,) places in frames.
        strides: (Z,) frames between the points of a point's level.
        offsets: (Z, 2) to start and end, in strides.
        logits: (Z,).
        fps: Frames a second.

    Returns:
        (M, 3) float32: start and end in seconds, score; best first.
    """
    points, strides, logits = (np.asarray(one, np.float32) for one in (points, strides, logits))
    reach = np.asarray(offsets, np.float32) * strides[:, None]
    moments = np.stack([points - reach[:, 0], points + reach[:, 1]], axis=1) / np.float32(fps)
    return _sort(np.column_stack([moments, to_probabilities(logits)]))[:MOST_MOMENTS]


def to_probabilities(logits: np.ndarray) -> np.ndarray:
    """Sigmoid in float32, without overflow at either end."""
    small = np.exp(-np.abs(np.asarray(logits, np.float32)))
    return np.where(logits >= 0, np.float32(1), small) / (np.float32(1) + small)


def spread_levels(levels: Sequence[np.ndarray], num_frames: int, cosines: np.ndarray | None = None) -> np.ndarray:
    """Saliency of each frame: the best score of any level there, times the frame's cosine with the query.

    A level of z cells has each of its scores floor(T / z) times, and its last one for the frames behind. It may come
    out negative, and is no probability: it orders the frames of one video.

    Args:
        levels: (z,) scores of each level, sigmoids of its logits.
        num_frames: T.
        cosines: (T,); None for networks that learn saliency alone.

    Returns:
        (T,) float32.
    """
    places = np.arange(num_frames)
    spread = [
        np.asarray(level, np.float32)[np.minimum(places // max(1, num_frames // len(level)), len(level) - 1)]
        for level in levels
    ]
    best = np.max(spread, axis=0)
    return best if cosines is None else best * np.asarray(cosines, np.float32)


def clean_moments(
    moments: np.ndarray, duration_s: float, *, unit_s: float | None = None, suppression: Suppression | None = None
) -> np.ndarray:
    """Moments inside their video, rounded, with those that repeat a better one scored down; best first.

    A moment that reaches the video's end is clamped, not rounded: the end is no multiple of a unit.

    Args:
        moments: (M, 3) start and end in seconds, score.
        duration_s: As annotated.
        unit_s: Seconds to whose multiples both ends are rounded, half to even; None rounds nothing.
        suppression: None lowers no score.

    Returns:
        (M, 3) float32, at most 50 rows. Scores that were suppressed to 0 stand last.
    """
    moments = np.asarray(moments, np.float32).reshape(-1, 3).copy()
    is_inside = moments[:, 1] < np.float32(duration_s)
    windows = moments[:, :2].clip(0, np.float32(duration_s))
    if unit_s is not None:
        rounded = np.rint(windows / np.float32(unit_s)) * np.float32(unit_s)
        windows = np.where(is_inside[:, None], rounded, windows)
    moments[:, :2] = windows
    return _sort(moments if suppression is None else suppress(moments, suppression))[:MOST_MOMENTS]


def suppress(moments: np.ndarray, suppression: Suppression) -> np.ndarray:
    """Moments with the scores of those that overlap a better one lowered; the best of the rest is sought after each.

    Args:
        moments: (M, 3) float32.
        suppression: How far.

    Returns:
        (M, 3) float32, in the order in which they were the best.

    Source:
        Bodla et al., https://arxiv.org/abs/1704.04503
    """
    shares = _find_shares(find_overlaps(moments[:, None, :2], moments[None, :, :2]), suppression)
    scores = moments[:, 2].copy()
    is_left = np.ones(len(moments), dtype=bool)
    order = []
    for _ in moments:
        best = int(np.where(is_left, scores, -np.inf).argmax())
        is_left[best] = False
        order.append(best)
        scores[is_left] *= shares[best, is_left]
    return np.column_stack([moments[:, :2], scores])[np.array(order, dtype=int)]


def _find_shares(overlaps: np.ndarray, suppression: Suppression) -> np.ndarray:
    """What each moment leaves of each other one's score, by their IoU: (M, M) float32."""
    if suppression.kind == "normal":
        return (overlaps < np.float32(suppression.threshold)).astype(np.float32)
    if suppression.kind == "linear":
        return 1 - overlaps
    exponents = -(overlaps**2) / np.float32(suppression.sigma)
    # Rounded once from float64: a library's float32 exponential may differ by the CPU.
    return np.exp(exponents.astype(np.float64)).astype(np.float32)


def _sort(moments: np.ndarray) -> np.ndarray:
    """Best first; equal scores keep their order."""
    return moments[np.argsort(-moments[:, 2], kind="stable")]


def plan_parts(num_frames: int, most: int = MOST_FRAMES) -> list[tuple[int, int]]:
    """Parts of a video that is too long to be looked at together: first frame, and the one behind the last.

    Neighbours overlap by half a part or a little more, so a moment of up to half a part lies in one as a whole. All
    parts are equally long, as length is an input of the network.

    Raises:
        ValueError: If there is no frame, or a part would have fewer than two.
    """
    if num_frames < 1 or most < 2:
        raise ValueError(f"Expected at least 1 frame and parts of at least 2, found {num_frames} and {most}.")
    if num_frames <= most:
        return [(0, num_frames)]
    count = 1 + math.ceil((num_frames - most) / (most // 2))
    starts = [(num_frames - most) * part // (count - 1) for part in range(count)]
    return [(start, start + most) for start in starts]


def merge_moments(
    parts: Sequence[np.ndarray],
    starts_s: Sequence[float],
    duration_s: float,
    *,
    unit_s: float | None = None,
    suppression: Suppression | None = None,
) -> np.ndarray:
    """Moments of a video from those of its parts, suppressed together: an overlap's moments are found twice.

    Args:
        parts: (M, 3) of each part, in seconds from the part's start, not yet cleaned.
        starts_s: Where each part begins.
        duration_s: Of the whole video.
        unit_s: As `clean_moments` has it.
        suppression: As `clean_moments` has it.

    Returns:
        (M, 3) float32, at most 50 rows, best first.
    """
    moved = []
    for moments, start in zip(parts, starts_s, strict=True):
        moved.append(np.asarray(moments, np.float32).reshape(-1, 3) + np.array([start, start, 0], np.float32))
    return clean_moments(np.concatenate(moved), duration_s, unit_s=unit_s, suppression=suppression)


def merge_saliency(parts: Sequence[np.ndarray], starts: Sequence[int], num_frames: int) -> np.ndarray:
    """Saliency of a video from that of its parts: the mean where parts overlap.

    The maximum would favour frames that were looked at twice.

    Args:
        parts: (T,) of each part.
        starts: First frame of each part; together they cover the video.
        num_frames: Of the whole video.

    Returns:
        (frames,) float32.
    """
    total, looks = np.zeros(num_frames), np.zeros(num_frames)
    for saliency, start in zip(parts, starts, strict=True):
        total[start : start + len(saliency)] += saliency
        looks[start : start + len(saliency)] += 1
    assert looks.all(), "a frame lies in no part"
    return (total / looks).astype(np.float32)
