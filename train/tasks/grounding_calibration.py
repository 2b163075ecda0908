"""When a query is not in a video: the score below which nothing was found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class AnswerThreshold:
    """A moment counts as found where its score is above `score`."""

    score: float
    """-inf where every moment may count."""
    false_alarms: float
    """Share of (query, another video) pairs that are above it: at most the rate asked for."""
    kept: float
    """Share of (query, its own video) pairs that are above it."""
    own_pairs: int
    other_pairs: int


def find_answer_threshold(own: np.ndarray, others: np.ndarray, rate: float = 0.05) -> AnswerThreshold:
    """The lowest score that no more than `rate` of other videos' queries exceed.

    Only what is above it counts, so a tie at the threshold is no answer: scores that are equal on both sides cost
    true answers, never false alarms. Choose it on one split and report it on another.

    Args:
        own: (P,) best score of each (query, its own video).
        others: (N,) best score of each (query of another video, this video).
        rate: Share of `others` that may be above, 0 to 1.

    Raises:
        ValueError: If there are no pairs, a score is NaN, or the rate is no share.
    """
    own, others = np.asarray(own, np.float64), np.asarray(others, np.float64)
    if not len(own) or not len(others) or np.isnan(own).any() or np.isnan(others).any():
        raise ValueError(
            f"Expected scores of own and of other videos without NaN, found {len(own)} and {len(others)} with "
            f"{int(np.isnan(own).sum() + np.isnan(others).sum())} NaN. Score at least two videos with queries."
        )
    if not 0 <= rate <= 1:
        raise ValueError(f"The rate of false alarms should be between 0 and 1, found {rate}.")
    count = len(others)
    allowed = int(np.flatnonzero(np.arange(count + 1) / count <= rate)[-1])
    score = -np.inf if allowed == count else float(np.sort(others)[::-1][allowed])
    return AnswerThreshold(
        score=score,
        false_alarms=float((others > score).mean()),
        kept=float((own > score).mean()),
        own_pairs=len(own),
        other_pairs=count,
    )
