"""Ranks and recalls of text-video retrieval, as papers report them, with ties counted against us."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .ranks import rank_own


@dataclass(frozen=True, slots=True)
class RetrievalFigures:
    """One direction."""

    queries: int
    recall: dict[int, float]
    """Share of queries whose own candidate is among the first K, by K."""
    median_rank: float
    mean_rank: float
    """Ranks count from 1."""


RECALLS = (1, 5, 10)


def measure_retrieval(
    scores: np.ndarray, video_of_text: np.ndarray, *, with_dual_softmax: bool = False
) -> dict[str, RetrievalFigures]:
    """Both directions of one table of scores.

    Every caption is a query of its own; a video finds any of its captions. Videos without a caption are candidates of
    texts and no queries.

    Args:
        scores: (C, V), texts by videos, higher is closer.
        video_of_text: (C,) the place of each text's video.
        with_dual_softmax: Each direction by scores that look at all of its queries at once (`apply_dual_softmax`).

    Returns:
        `text_to_video` and `video_to_text`.
    """
    of_texts = of_videos = scores
    if with_dual_softmax:
        of_texts, of_videos = (apply_dual_softmax(scores, queries=one) for one in ("texts", "videos"))
    return {
        "text_to_video": describe_ranks(rank_videos(of_texts, video_of_text)),
        "video_to_text": describe_ranks(rank_texts(of_videos, video_of_text)),
    }


def rank_videos(scores: np.ndarray, video_of_text: np.ndarray) -> np.ndarray:
    """Rank (C,) of each text's own video, from 1: equal and NaN scores of others stand before it."""
    return rank_own(scores, video_of_text)


def rank_texts(scores: np.ndarray, video_of_text: np.ndarray) -> np.ndarray:
    """Rank of the best of each captioned video's own texts, from 1, in the order of the videos.

    Its other texts do not stand before the best one; equal and NaN scores of other videos' texts do.
    """
    ranks = []
    for video in np.unique(video_of_text):
        is_own = video_of_text == video
        column = scores[:, video]
        best = column[is_own].max()
        ranks.append(len(column) + 1 if np.isnan(best) else 1 + int((~(column[~is_own] < best)).sum()))
    return np.asarray(ranks)


def describe_ranks(ranks: np.ndarray, recalls: Sequence[int] = RECALLS) -> RetrievalFigures:
    """Recalls, median and mean of ranks (Q,)."""
    return RetrievalFigures(
        queries=len(ranks),
        recall={k: float((ranks <= k).mean()) for k in recalls},
        median_rank=float(np.median(ranks)),
        mean_rank=float(ranks.mean()),
    )


def apply_dual_softmax(scores: np.ndarray, *, queries: Literal["texts", "videos"], scale: float = 100.0) -> np.ndarray:
    """Scores by which a candidate is found only by queries that want it more than other queries do.

    It looks at all queries of a test set at once, which a search cannot: papers report it apart, and so do we.

    Args:
        scores: (C, V), texts by videos.
        queries: Which of them look for the others: the two directions have scores of their own.
        scale: Scores are multiplied by it before the softmax.

    Returns:
        (C, V) float64: score + log(softmax(scale * scores over all queries)).

    Source:
        Cheng et al., https://arxiv.org/abs/2109.04290. There a score is multiplied by the softmax, which turns the
        order of negative ones around; this is the logarithm of exp(score) times the softmax, which does not.
    """
    axis = 0 if queries == "texts" else 1
    logits = scale * scores.astype(np.float64)
    logits -= logits.max(axis=axis, keepdims=True)
    return scores + logits - np.log(np.exp(logits).sum(axis=axis, keepdims=True))
