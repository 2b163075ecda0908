"""Vectors of frames and videos on the unit sphere."""

from __future__ import annotations

import numpy as np


def pool_frames(frames: np.ndarray) -> np.ndarray:
    """A video's embedding, the mean of its frames' over all views, normalised again.

    Args:
        frames: (V, A, F, E) L2-normalised; NaN where a row has no such frame, at least one frame a row.

    Returns:
        (V, E) L2-normalised.
    """
    return normalise_rows(np.nanmean(frames, axis=(1, 2)))


def pool_clips(frames: np.ndarray, *, normalises_frames: bool) -> np.ndarray:
    """Videos' embeddings from one clip of each, as a network compares their means.

    Args:
        frames: (n, T, E), not normalised.
        normalises_frames: Whether that mean is of directions; else it is of frames as they are.

    Returns:
        (n, E) L2-normalised.
    """
    return normalise_rows((normalise_rows(frames) if normalises_frames else frames).mean(axis=1))


def normalise_rows(vectors: np.ndarray) -> np.ndarray:
    """L2-normalise along the last axis; a zero vector stays zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def score_rows(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """The products (n,) of vectors (n, E) with one (E,): equal vectors get equal ones, whatever stands around them.

    Not `vectors @ query`: BLAS adds in an order that depends on a row's place.
    """
    return (vectors * query).sum(axis=1)


def find_moment(
    scores: np.ndarray, times: np.ndarray, whole: tuple[float, float] | None = None
) -> tuple[int, float | None, float | None]:
    """The best frame of a video, and the time span of those around it that are nearer to it than to the rest.

    Args:
        scores: (f,) of each frame, in the order of time.
        times: (f,) seconds; NaN where not known.
        whole: From when to when the video is, for one of a single frame.

    Returns:
        Place of the best frame (of equal ones the first), start and end of the span: half way to the frames before
        and after it, at the ends of the video the frames' own times. None where times are not known.
    """
    best = int(scores.argmax())
    if np.isnan(times).any():
        return best, None, None
    if len(times) == 1 and whole is not None:
        return best, *whole
    scores = scores.astype(np.float64)  # in float32 the mean of equal scores can be above all of them
    is_near = scores >= (scores[best] + scores.mean()) / 2
    first = last = best
    while first > 0 and is_near[first - 1]:
        first -= 1
    while last + 1 < len(scores) and is_near[last + 1]:
        last += 1
    start = times[first] if first == 0 else (times[first - 1] + times[first]) / 2
    end = times[last] if last + 1 == len(times) else (times[last] + times[last + 1]) / 2
    return best, float(start), float(end)
