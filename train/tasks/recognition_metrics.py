"""Figures of recognition: accuracy, calibration, intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .ranks import find_answers, rank_own


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of the videos of one split."""

    rows: np.ndarray
    """(n,) rows of the store."""
    labels: np.ndarray
    """(n,)."""
    probabilities: np.ndarray
    """(n, classes) float32, averaged over clips."""
    loss: float
    """Mean negative log-likelihood of the averaged probabilities."""

    @property
    def predictions(self) -> np.ndarray:
        """(n,) the likeliest label of each video; where its own is not alone at the top, the first other one there."""
        return find_answers(self.probabilities, self.labels)

    def top(self, k: int) -> float:
        """Share of videos whose label is among the k likeliest; ties and NaN count against us."""
        return float((rank_own(self.probabilities, self.labels) <= k).mean())

    def confusion(self) -> np.ndarray:
        """(classes, classes) counts: rows are labels, columns predictions."""
        size = self.probabilities.shape[1]
        return np.bincount(self.labels * size + self.predictions, minlength=size * size).reshape(size, size)


def accuracy_figures(result: Evaluation) -> dict[str, float]:
    """top1, and top5 where there are more than 5 classes."""
    figures = {"top1": result.top(1)}
    if result.probabilities.shape[1] > 5:
        figures["top5"] = result.top(5)
    return figures


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Answers of about the same probability."""

    count: int
    confidence: float
    """Their mean probability."""
    accuracy: float
    """The share of them that is right."""


def find_calibration(result: Evaluation, num_bins: int = 15) -> list[CalibrationBin]:
    """Answers in bins of equal width by the probability that they were given with; empty ones left out."""
    confidence = result.probabilities.max(axis=1).astype(np.float64)
    right = result.predictions == result.labels
    places = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    members = (places == place for place in np.unique(places))
    return [CalibrationBin(int(c.sum()), float(confidence[c].mean()), float(right[c].mean())) for c in members]


def find_calibration_error(result: Evaluation) -> float:
    """How far, on average over answers, a bin's accuracy is from its confidence.

    Source:
        Expected calibration error: Guo et al., https://arxiv.org/abs/1706.04599, 15 bins.
    """
    bins = find_calibration(result)
    return sum(one.count * abs(one.confidence - one.accuracy) for one in bins) / len(result.labels)


def describe_classes(result: Evaluation, names: Sequence[str]) -> list[dict[str, Any]]:
    """Of each class that has a video: class, videos, accuracy (recall), precision (None where it was never said)."""
    counts = result.confusion()
    said = counts.sum(axis=0)
    return [
        {
            "class": names[place],
            "videos": int(own.sum()),
            "accuracy": float(own[place] / own.sum()),
            "precision": float(own[place] / said[place]) if said[place] else None,
        }
        for place, own in enumerate(counts)
        if own.sum()
    ]


def find_interval(share: float, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of so many.

    Source:
        Wilson, 1927, https://doi.org/10.1080/01621459.1927.10502953
    """
    if not total:
        return 0.0, 1.0
    z = 1.96
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    reach = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - reach), min(1.0, middle + reach)
