"""Ranks and recalls of text-video retrieval, as papers report them, with ties counted against us."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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


def measure_retrieval(scores: np.ndarray, video_of_text: np.ndarray) -> dict[str, RetrievalFigures]:
    """Both directions of one table of scores.

    Every caption is a query of its own; a video finds any of its captions. Videos without a caption are candidates of
    texts and no queries.

    Args:
        scores: (C, V), texts by videos, higher is closer.
        video_of_text: (C,) the place of each text's video.

    Returns:
        `text_to_video` and `video_to_text`.
    """
    return {
        "text_to_video": describe_ranks(rank_videos(scores, video_of_text)),
        "video_to_text": describe_ranks(rank_texts(scores, video_of_text)),
    }


def rank_videos(scores: np.ndarray, video_of_text: np.ndarray) -> np.ndarray:
    """Rank (C,) of each text's own video, from 1: equal and NaN scores of others stand before it."""
    own = np.take_along_axis(scores, video_of_text[:, None], axis=1)
    return (~(scores < own)).sum(axis=1)  # its own among them


def rank_texts(scores: np.ndarray, video_of_text: np.ndarray) -> np.ndarray:
    """Rank of the best of each captioned video's own texts, from 1, in the order of the videos.

    Its other texts do not stand before the best one; equal and NaN scores of other videos' texts do.
    """
    ranks = []
    for video in np.unique(video_of_text):
        is_own = video_of_text == video
        column = scores[:, video]
        ranks.append(1 + int((~(column[~is_own] < column[is_own].max())).sum()))
    return np.asarray(ranks)


def describe_ranks(ranks: np.ndarray, recalls: Sequence[int] = RECALLS) -> RetrievalFigures:
    """Recalls, median and mean of ranks (Q,)."""
    return RetrievalFigures(
        queries=len(ranks),
        recall={k: float((ranks <= k).mean()) for k in recalls},
        median_rank=float(np.median(ranks)),
        mean_rank=float(ranks.mean()),
    )


def apply_dual_softmax(scores: np.ndarray, temperature: float = 0.01) -> np.ndarray:
    """Scores that a video gives only to texts which want it more than other texts do.

    It looks at all queries of a test set at once, which a search cannot: papers report it apart, and so do we.

    Args:
        scores: (C, V).
        temperature: Of the softmax over texts.

    Returns:
        (C, V): scores times the softmax of each column.

    Source:
        Cheng et al., https://arxiv.org/abs/2109.04290
    """
    logits = scores / temperature
    weights = np.exp(logits - logits.max(axis=0, keepdims=True))
    return scores * weights / weights.sum(axis=0, keepdims=True)
