"""What a grounding network must beat: one window for every query, and runs of frames that are like the query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .grounding_metrics import find_best_overlaps, pad_rows

JUDGED_OVERLAP = 0.7
"""Both baselines are chosen by R1 at this IoU, on training videos."""


@dataclass(frozen=True, slots=True)
class ConstantWindow:
    """One window, relative to each video's duration."""

    start: float
    end: float
    recall: float
    """R1 on what it was chosen on, as a share."""

    def predict(self, duration_s: float) -> np.ndarray:
        """(1, 3) start and end in seconds, score 1."""
        return np.array([[self.start * duration_s, self.end * duration_s, 1.0]])


def find_constant_window(
    windows: Sequence[np.ndarray], durations_s: Sequence[float], steps: int = 20
) -> ConstantWindow:
    """The window that is right for most queries: every start and end on a grid of `steps` equal parts is tried.

    Of windows that are right as often, the one with the higher mean IoU is taken, then the one that starts first,
    then the one that ends first.

    Args:
        windows: (W, 2) seconds of each query, W at least 1.
        durations_s: Of each query's video.
        steps: Parts of a video; 20 tries 210 windows.

    Raises:
        ValueError: If there is no query.
    """
    if not len(windows):
        raise ValueError("A constant window is chosen on training queries with windows, found none.")
    relative = [np.asarray(own) / duration for own, duration in zip(windows, durations_s, strict=True)]
    padded, is_window = pad_rows(relative, 2)
    candidates = [(start / steps, end / steps) for start in range(steps) for end in range(start + 1, steps + 1)]
    is_one = np.ones((len(padded), 1), dtype=bool)
    figures = []
    for start, end in candidates:
        one = np.broadcast_to([start, end], (len(padded), 1, 2))
        overlaps = find_best_overlaps(one, is_one, padded, is_window)[:, 0]
        figures.append((float((overlaps >= JUDGED_OVERLAP).mean()), float(overlaps.mean())))
    best = max(range(len(candidates)), key=lambda place: (figures[place], -place))
    return ConstantWindow(*candidates[best], recall=figures[best][0])


@dataclass(frozen=True, slots=True)
class SimilarityThreshold:
    """Frames above a similarity with the query make a moment where they follow one another."""

    value: float
    is_relative: bool
    """0 is the least similar frame of the video and 1 the most; else a similarity itself."""
    recall: float
    """R1 on what it was chosen on, as a share."""

    def predict(self, similarities: np.ndarray, fps: float) -> np.ndarray:
        """Moments (M, 3) of one query: see `find_runs`."""
        similarities = np.asarray(similarities, np.float64)
        return find_runs(similarities, _find_level(similarities, self.value, self.is_relative), fps)


def find_runs(similarities: np.ndarray, threshold: float, fps: float) -> np.ndarray:
    """Moments of frames in a row that are at least as similar as a threshold; frame t lasts from t / fps on.

    Args:
        similarities: (T,) of one query with the frames of one video.
        threshold: A similarity.
        fps: Frames a second.

    Returns:
        (M, 3) start and end in seconds, the similarity of the best frame. Best first; none where no frame is above.
    """
    is_above = np.concatenate([[False], similarities >= threshold, [False]])
    edges = np.flatnonzero(is_above[1:] != is_above[:-1]).reshape(-1, 2)
    best = np.array([similarities[start:end].max() for start, end in edges])
    moments = np.column_stack([edges / fps, best]) if len(edges) else np.zeros((0, 3))
    return moments[np.argsort(-moments[:, 2], kind="stable")]


def find_similarity_threshold(
    similarities: Sequence[np.ndarray], windows: Sequence[np.ndarray], fps: Sequence[float], steps: int = 40
) -> SimilarityThreshold:
    """The threshold whose first moment is right for most queries.

    Two kinds are tried: `steps` relative ones, and as many quantiles of all similarities. Of thresholds that are right
    as often, the one with the higher mean IoU is taken, then a relative one, then the lowest.

    Args:
        similarities: (T,) of each query with the frames of its video: cosines of a frozen backbone.
        windows: (W, 2) seconds of each query, W at least 1.
        fps: Frames a second of each query's video.
        steps: Thresholds of a kind.

    Raises:
        ValueError: If there is no query.
    """
    if not len(similarities):
        raise ValueError("A threshold is chosen on training queries with windows, found none.")
    padded, is_window = pad_rows(windows, 2)
    quantiles = np.quantile(
        np.concatenate([np.asarray(own, np.float64) for own in similarities]), np.arange(steps) / steps
    )
    candidates = [(place / steps, True) for place in range(1, steps + 1)]
    candidates += [(float(value), False) for value in quantiles]
    curves, is_frame = pad_rows([np.asarray(own).reshape(-1, 1) for own in similarities], 1)
    frames = np.where(is_frame, curves[..., 0], -np.inf)  # (Q, T)
    low, high = np.where(is_frame, curves[..., 0], np.inf).min(axis=1), frames.max(axis=1)
    figures = []
    for value, is_relative in candidates:
        levels = np.minimum(high, low + value * (high - low)) if is_relative else np.full(len(frames), value)
        first = _find_first_runs(frames, levels) / np.asarray(fps)[:, None, None]
        overlaps = find_best_overlaps(first, (high >= levels)[:, None], padded, is_window)[:, 0]
        figures.append((float((overlaps >= JUDGED_OVERLAP).mean()), float(overlaps.mean())))
    best = max(range(len(candidates)), key=lambda place: (figures[place], -place))
    return SimilarityThreshold(*candidates[best], recall=figures[best][0])


def _find_level(similarities: np.ndarray, value: float, is_relative: bool) -> float:
    low, high = float(similarities.min()), float(similarities.max())
    # min: adding up must not lift the most similar frame's own level above it.
    return min(high, low + value * (high - low)) if is_relative else value


def _find_first_runs(frames: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The first row of `find_runs` for every query: the run of its best frame, (Q, 1, 2) in frames."""
    places = np.arange(frames.shape[1])
    best = frames.argmax(axis=1)[:, None]
    is_below = frames < levels[:, None]
    start = np.where(is_below & (places < best), places + 1, 0).max(axis=1)
    end = np.where(is_below & (places > best), places, len(places)).min(axis=1)
    return np.stack([start, end], axis=1)[:, None]
