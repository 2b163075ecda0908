"""Figures of highlights: mAP and HIT@1 of QVHighlights, mAP of TVSum and of YouTube Highlights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import DatasetError
from .grounding_records import GroundingPrediction, GroundingTruth

LEVELS = {"Fair": 2, "Good": 3, "VeryGood": 4}
"""The lowest score of a clip that counts as a highlight."""
CLIP_S = 2.0
"""Seconds of a clip of QVHighlights."""
TVSUM_CLIPS = 5
"""Clips of highest score that TVSum's figure looks at."""


@dataclass(frozen=True, slots=True)
class HighlightFigures:
    """One level."""

    queries: int
    without_saliency: int
    """Of them, those without predicted scores: both figures count them as 0."""
    mean_ap: float
    """Percent, two digits: mean over annotators and queries."""
    hit_1: float
    """Percent, two digits: queries whose clip of highest score is a highlight for any annotator."""


def to_percent(share: float, digits: int = 2) -> float:
    """A share as percent, rounded as printing rounds."""
    return round(100.0 * float(share), digits)


def measure_highlights(
    predictions: Sequence[GroundingPrediction], truths: Sequence[GroundingTruth]
) -> dict[str, HighlightFigures]:
    """Find mAP and HIT@1 at each level; empty where no truth has scores.

    Args:
        predictions: In the order of the truths.
        truths: Those without scores are left out.

    Raises:
        DatasetError: If a clip lies outside its video, or queries have different numbers of annotators.
    """
    pairs = [(one.saliency, truth) for one, truth in zip(predictions, truths, strict=True) if truth.scores is not None]
    if not pairs:
        return {}
    labels, is_clip = _spread_labels([truth for _, truth in pairs])
    scores = np.zeros(is_clip.shape)
    top = np.full(len(pairs), -1)  # -1: there is none, or it lies beyond the clips
    for row, (saliency, _) in enumerate(pairs):
        if saliency is not None and len(saliency):
            count = int(is_clip[row].sum())
            scores[row, : min(count, len(saliency))] = saliency[:count]
            first = int(np.argmax(saliency))
            top[row] = first if first < count else -1
    is_missing = np.array([saliency is None or not len(saliency) for saliency, _ in pairs])
    found = {}
    for name, level in LEVELS.items():
        is_highlight: np.ndarray = labels >= level
        by_query = find_clip_precisions(scores, is_highlight, is_clip).mean(axis=1)
        hits = is_highlight[np.arange(len(pairs)), top].any(axis=1) & (top >= 0)
        mean_ap = np.where(is_missing, 0.0, by_query).mean()
        found[name] = HighlightFigures(
            len(pairs), int(is_missing.sum()), to_percent(float(mean_ap)), to_percent(float(hits.mean()))
        )
    return found


def _spread_labels(truths: Sequence[GroundingTruth]) -> tuple[np.ndarray, np.ndarray]:
    """Labels (Q, clips, annotators), 0 where nobody gave one, and which clips there are (Q, clips)."""
    annotators = {truth.scores.shape[1] for truth in truths if truth.scores is not None}
    if len(annotators) != 1:
        raise DatasetError(f"Clips should have the same number of scores in every query, found {sorted(annotators)}.")
    counts = np.array([int(truth.duration_s / CLIP_S) for truth in truths])
    labels = np.zeros((len(truths), counts.max(), annotators.pop()))
    for row, truth in enumerate(truths):
        ids = np.asarray(truth.clip_ids, dtype=np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < counts[row]:
            raise DatasetError(
                f"Query {truth.query_id!r} has scores of clips {ids.min()} to {ids.max()}, but its "
                f"{truth.duration_s:g} s are {counts[row]} clips of {CLIP_S:g} s. Correct its duration or its clips."
            )
        labels[row, ids] = truth.scores
    return labels, np.arange(counts.max()) < counts[:, None]


def find_clip_precisions(scores: np.ndarray, is_highlight: np.ndarray, is_clip: np.ndarray) -> np.ndarray:
    """Average precision of clips by score, for each annotator: clips of equal score are found together.

    Precision at a score is the greatest there or at any lower one. The mean is over scores at which a highlight is
    found, each counted once however many are found there. 0 without a highlight, 1 where every clip is one.

    Args:
        scores: (Q, clips).
        is_highlight: (Q, clips, annotators).
        is_clip: (Q, clips).

    Returns:
        (Q, annotators) float64.
    """
    order = np.argsort(np.where(is_clip, -scores, np.inf), axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=1)
    is_ranked = np.take_along_axis(is_clip, order, axis=1)  # clips first, then none
    hits = np.take_along_axis(is_highlight, order[..., None], axis=1) & is_ranked[..., None]
    is_last = is_ranked.copy()  # of its score
    is_last[:, :-1] &= ~is_ranked[:, 1:] | (ranked[:, 1:] != ranked[:, :-1])
    total = hits.cumsum(axis=1)  # (Q, clips, annotators)
    precision = np.where(is_last[..., None], total / np.arange(1, total.shape[1] + 1)[:, None], 0.0)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    at_last = np.maximum.accumulate(np.where(is_last[..., None], total, 0), axis=1)
    before = np.concatenate([np.zeros_like(at_last[:, :1]), at_last[:, :-1]], axis=1)
    is_step = is_last[..., None] & (total > before)
    steps = is_step.sum(axis=1)
    means = np.divide((precision * is_step).sum(axis=1), steps, out=np.zeros(steps.shape), where=steps > 0)
    return np.where(total[:, -1] == is_clip.sum(axis=1)[:, None], 1.0, means)


def measure_tvsum(scores: Sequence[np.ndarray], annotations: Sequence[np.ndarray]) -> float:
    """Find mAP of the five clips of highest score of each video; mean over videos and annotators.

    A clip is a highlight for an annotator who gave it more than the lower median of the video.

    Args:
        scores: (clips,) a video; what is longer than its annotations is cut, and the other way round.
        annotations: (clips, annotators) a video, 1 to 5.

    Returns:
        Percent, three digits.
    """
    precisions = []
    for own, marks in zip(scores, annotations, strict=True):
        count = min(len(own), len(marks))
        marks = np.asarray(marks)[:count]
        middle = np.sort(marks, axis=0)[(count - 1) // 2]
        best = np.argsort(-np.asarray(own)[:count], kind="stable")[:TVSUM_CLIPS]
        precisions.append([find_trapezoid_precision(column[best]) for column in (marks > middle).T])
    return to_percent(float(np.mean(precisions)), 3)


def measure_youtube(scores: Sequence[np.ndarray], matches: Sequence[np.ndarray]) -> float:
    """Find mAP of all clips of each video by score; mean over videos.

    A clip is a highlight where its match is above 0.

    Args:
        scores: (clips,) a video.
        matches: (clips,) a video: -1, 0 or 1.

    Returns:
        Percent, three digits.

    Raises:
        DatasetError: If a video's scores are not as many as its matches.
    """
    precisions = []
    for place, (own, marks) in enumerate(zip(scores, matches, strict=True)):
        if len(own) != len(marks):
            raise DatasetError(
                f"Video {place} has {len(own)} scores, but {len(marks)} labelled clips. Sample one frame a label."
            )
        order = np.argsort(-np.asarray(own), kind="stable")
        precisions.append(find_trapezoid_precision(np.asarray(marks)[order] > 0))
    return to_percent(float(np.mean(precisions)), 3)


def find_trapezoid_precision(is_hit: np.ndarray) -> float:
    """The area under precision by recall, in trapezoids, from precision 1 at recall 0; 0 without a hit.

    Args:
        is_hit: (n,) best first. Recall is relative to these, not to what was left out.
    """
    total = int(is_hit.sum())
    if not total:
        return 0.0
    hits = np.concatenate([[0], np.cumsum(is_hit)])
    precision = np.concatenate([[1.0], hits[1:] / np.arange(1, len(hits))])
    return float((np.diff(hits / total) * (precision[:-1] + precision[1:]) / 2).sum())
