"""The rank of the right answer among all answers, and the answer that is reported: one rule for every figure."""

from __future__ import annotations

import numpy as np


def rank_own(scores: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Rank of each query's own candidate, from 1: equal and NaN scores of others stand before it.

    Args:
        scores: (Q, C), queries by candidates, higher is closer.
        own: (Q,) the place of each query's own candidate.

    Returns:
        (Q,); C + 1 where its own score is NaN.
    """
    value = np.take_along_axis(scores, own[:, None], axis=1)
    ranks = (~(scores < value)).sum(axis=1)  # its own among them
    return np.where(np.isnan(value[:, 0]), scores.shape[1] + 1, ranks)


def find_answers(scores: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The candidate that each query is answered with: its own exactly where it has rank 1.

    Of others that share the highest score the one in the lowest place is taken; NaN counts as the highest.

    Args:
        scores: (Q, C), queries by candidates.
        own: (Q,) the place of each query's own candidate.

    Returns:
        (Q,) places of candidates.
    """
    others = np.nan_to_num(scores.astype(np.float64), nan=np.inf, posinf=np.inf, neginf=np.finfo(np.float64).min)
    np.put_along_axis(others, own[:, None], -np.inf, axis=1)
    return np.where(rank_own(scores, own) == 1, own, others.argmax(axis=1))
