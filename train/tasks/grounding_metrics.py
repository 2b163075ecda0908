"""Figures of temporal grounding: R1, R5, mIoU and mAP, by the rules of s4v and by those of published evaluators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .grounding_records import GroundingPrediction, GroundingTruth, match_queries
from .highlight_metrics import HighlightFigures, measure_highlights, to_percent

THRESHOLDS = tuple(round(0.05 * place, 2) for place in range(6, 20))
"""0.3 to 0.95: of R1 and R5."""
MAP_THRESHOLDS = tuple(one for one in THRESHOLDS if one >= 0.5)
LENGTHS = {"short": (0.0, 10.0), "middle": (10.0, 30.0), "long": (30.0, math.inf)}
"""Seconds of a window: above the first, up to the second."""
COUNTED_MOMENTS = 10
"""Rows of a prediction that count for mAP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """What an evaluator does where the formulas leave a choice."""

    counts_missing: bool
    """A query without predictions counts 0. Else mAP leaves it out, and R1, R5 and mIoU have no figure."""
    empty_is_full: bool
    """Where no window is of a range of lengths, the range is judged by all windows. Else it has no figures."""
    thresholds: tuple[float, ...] = THRESHOLDS
    has_means: bool = True
    """R5 and mIoU are among its figures."""


PROTOCOLS = {
    "s4v": Protocol(counts_missing=True, empty_is_full=False),
    "reference": Protocol(counts_missing=False, empty_is_full=True),
    "moment_detr": Protocol(counts_missing=False, empty_is_full=False, thresholds=MAP_THRESHOLDS, has_means=False),
}
"""`reference` is R2-Tuning's evaluator, which is UniVTG's; `moment_detr` is QVHighlights' own, which stops altogether
where a range of lengths has no figures."""


@dataclass(frozen=True, slots=True)
class MomentFigures:
    """Queries whose windows are of one range of lengths."""

    queries: int
    without_predictions: int
    """Of them, those that have no predicted moment."""
    figures: dict[str, float | None]
    """R1@0.5, R5@0.5, mIoU, mAP@0.5, mAP (the mean over its thresholds) and so on: percent, two digits."""


@dataclass(frozen=True, slots=True)
class GroundingFigures:
    """One set of predictions, by one protocol."""

    moments: dict[str, MomentFigures | None]
    """By range of lengths, and `full`: all windows. None where no query has such a window."""
    highlights: dict[str, HighlightFigures]
    """By level; empty where the truths have no scores of clips."""

    def list_figures(self) -> dict[str, float | None]:
        """All of them by name: `R1@0.7`, `short mAP`, `HL mAP VeryGood`, `HL HIT@1 VeryGood`."""
        figures: dict[str, float | None] = {}
        for name, one in self.moments.items():
            own = {} if one is None else one.figures
            prefix = "" if name == "full" else f"{name} "
            figures |= {prefix + figure: value for figure, value in own.items()}
        for level, highlight in self.highlights.items():
            figures |= {f"HL mAP {level}": highlight.mean_ap, f"HL HIT@1 {level}": highlight.hit_1}
        return figures


def measure_grounding(
    predictions: Sequence[GroundingPrediction], truths: Sequence[GroundingTruth], protocol: str = "s4v"
) -> GroundingFigures:
    """Every figure of a set of predictions.

    Args:
        predictions: One for each query at most.
        truths: Of the whole split. Queries without windows are not judged by moments, those without scores not by
            highlights.
        protocol: One of `PROTOCOLS`.

    Raises:
        DatasetError: If a query stands twice, a prediction has no truth, or a clip lies outside its video.
    """
    matched = match_queries(predictions, truths)
    return GroundingFigures(_measure_moments(matched, truths, PROTOCOLS[protocol]), measure_highlights(matched, truths))


def _measure_moments(
    predictions: Sequence[GroundingPrediction], truths: Sequence[GroundingTruth], protocol: Protocol
) -> dict[str, MomentFigures | None]:
    pairs = [
        (one.moments, truth.windows)
        for one, truth in zip(predictions, truths, strict=True)
        if truth.windows is not None and len(truth.windows)
    ]
    if not pairs:
        return dict.fromkeys(("full", *LENGTHS))
    predicted, is_predicted = pad_rows([moments[:COUNTED_MOMENTS] for moments, _ in pairs], 3)
    windows, is_window = pad_rows([windows for _, windows in pairs], 2)
    lengths = windows[..., 1] - windows[..., 0]
    found: dict[str, MomentFigures | None] = {
        "full": _measure_range(predicted, is_predicted, windows, is_window, protocol)
    }
    for name, (low, high) in LENGTHS.items():
        is_inside = is_window & (lengths > low) & (lengths <= high)
        rows = is_inside.any(axis=1)
        if rows.any():
            found[name] = _measure_range(predicted[rows], is_predicted[rows], windows[rows], is_inside[rows], protocol)
        else:
            found[name] = found["full"] if protocol.empty_is_full else None
    return found


def pad_rows(tables: Sequence[np.ndarray], columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Tables (n, columns) as one (Q, most, columns) float64 with zeros behind, and which rows are theirs (Q, most)."""
    counts = np.array([len(table) for table in tables])
    is_row = np.arange(max(1, counts.max())) < counts[:, None]
    padded = np.zeros((*is_row.shape, columns))
    padded[is_row] = np.concatenate([np.asarray(table, np.float64).reshape(-1, columns) for table in tables])
    return padded, is_row


def _measure_range(
    predicted: np.ndarray, is_predicted: np.ndarray, windows: np.ndarray, is_window: np.ndarray, protocol: Protocol
) -> MomentFigures:
    """Figures of queries (Q), all of which have a window.

    Args:
        predicted: (Q, M, 3), as submitted.
        is_predicted: (Q, M).
        windows: (Q, W, 2) seconds.
        is_window: (Q, W).
        protocol: Which figures there are.
    """
    is_missing = ~is_predicted.any(axis=1)
    best = find_best_overlaps(predicted[:, :5], is_predicted[:, :5], windows, is_window)
    shares: dict[str, float | None] = {}
    for name, overlaps in (("R1", best[:, 0]), ("R5", best.max(axis=1))):
        if name == "R1" or protocol.has_means:
            shares |= {f"{name}@{one}": float((overlaps >= one).mean()) for one in protocol.thresholds}
    if protocol.has_means:
        shares["mIoU"] = float(best[:, 0].mean())
    if is_missing.any() and not protocol.counts_missing:
        shares = dict.fromkeys(shares)
    counted = ~is_missing | protocol.counts_missing
    if counted.any():
        by_query = find_average_precisions(*(one[counted] for one in (predicted, is_predicted, windows, is_window)))
        by_threshold = by_query.mean(axis=0)
        shares |= {f"mAP@{one}": float(ap) for one, ap in zip(MAP_THRESHOLDS, by_threshold, strict=True)}
        shares["mAP"] = float(by_threshold.mean())
    else:
        shares |= dict.fromkeys([*(f"mAP@{one}" for one in MAP_THRESHOLDS), "mAP"])
    figures = {name: None if share is None else to_percent(share) for name, share in shares.items()}
    return MomentFigures(len(predicted), int(is_missing.sum()), figures)


def find_overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU of windows (..., 2) and (..., 2), which are broadcast: length in common through length of both together.

    Windows that touch have 0, and so have two of no length. It is computed in the windows' own precision.

    Returns:
        (...).
    """
    common = np.minimum(first[..., 1], second[..., 1]) - np.maximum(first[..., 0], second[..., 0])
    common = np.maximum(common, 0)
    union = (first[..., 1] - first[..., 0]) + (second[..., 1] - second[..., 0]) - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def find_best_overlaps(
    predicted: np.ndarray, is_predicted: np.ndarray, windows: np.ndarray, is_window: np.ndarray
) -> np.ndarray:
    """IoU of each predicted moment with the window that it overlaps most; 0 where there is no moment.

    The union is the hull here, as evaluators of R1 have it. It is the union wherever two windows meet, but the last
    bit may differ, and a threshold may stand right there.

    Args:
        predicted: (Q, M, 2 or more).
        is_predicted: (Q, M).
        windows: (Q, W, 2).
        is_window: (Q, W).

    Returns:
        (Q, M).
    """
    first, second = predicted[:, :, None], windows[:, None]
    common = np.minimum(first[..., 1], second[..., 1]) - np.maximum(first[..., 0], second[..., 0])
    hull = np.maximum(first[..., 1], second[..., 1]) - np.minimum(first[..., 0], second[..., 0])
    is_met = (common > 0) & is_predicted[:, :, None] & is_window[:, None]
    return np.divide(common, hull, out=np.zeros_like(common), where=is_met).max(axis=2)


def find_average_precisions(
    predicted: np.ndarray, is_predicted: np.ndarray, windows: np.ndarray, is_window: np.ndarray
) -> np.ndarray:
    """Average precision of each query at each of `MAP_THRESHOLDS`, as VOC 2010 has it.

    Arguments are those of `find_best_overlaps`; a query without moments has 0.

    Returns:
        (Q, thresholds).

    Source:
        Everingham et al., https://doi.org/10.1007/s11263-009-0275-4, interpolated at every recall.
    """
    scores = np.where(is_predicted, predicted[..., 2], -np.inf)
    order = np.argsort(-scores, axis=1, kind="stable")
    hits = _match_windows(np.take_along_axis(predicted, order[..., None], 1), is_predicted, windows, is_window)
    precision = hits.cumsum(axis=2) / np.arange(1, hits.shape[2] + 1)
    precision = np.maximum.accumulate(precision[..., ::-1], axis=2)[..., ::-1]
    return (precision * hits).sum(axis=2) / is_window.sum(axis=1)[:, None]


def _match_windows(
    predicted: np.ndarray, is_predicted: np.ndarray, windows: np.ndarray, is_window: np.ndarray
) -> np.ndarray:
    """Which moments find a window that none before has taken: (Q, thresholds, M), best score first.

    Of equal overlaps the last window is taken, as in the evaluators.
    """
    thresholds = np.array(MAP_THRESHOLDS)[:, None]
    is_free = np.repeat(is_window[:, None, ::-1], len(thresholds), axis=1)  # (Q, thresholds, W), last window first
    hits = np.zeros((*is_free.shape[:2], predicted.shape[1]), dtype=bool)
    queries, places = np.ogrid[: is_free.shape[0], : is_free.shape[1]]
    for rank in range(predicted.shape[1]):
        overlaps = find_overlaps(predicted[:, None, rank], windows)[:, None, ::-1]  # (Q, 1, W)
        is_open = is_free & (overlaps >= thresholds) & is_predicted[:, None, None, rank]
        best = np.where(is_open, overlaps, -1.0).argmax(axis=2)
        hits[..., rank] = is_open[queries, places, best]
        is_free[queries, places, best] &= ~hits[..., rank]
    return hits


@dataclass(frozen=True, slots=True)
class ProtocolDifferences:
    """Where two protocols disagree about one set of predictions."""

    figures: dict[str, tuple[float | None, float | None]]
    """The first protocol's figure and the second's, where they differ; None: it has none."""
    without_predictions: int
    """Queries that have windows and no predicted moment: they count 0, or nothing."""
    empty_lengths: tuple[str, ...]
    """Ranges of lengths that hold no window: no figures, or those of all windows."""
    undefined_overlaps: int
    """Queries with a predicted moment and a window that have no length: 0 divided by 0, which is 0 here."""


def compare_protocols(
    predictions: Sequence[GroundingPrediction],
    truths: Sequence[GroundingTruth],
    protocols: tuple[str, str] = ("s4v", "reference"),
) -> ProtocolDifferences:
    """Figures of two protocols side by side, where they differ, and why they do.

    An IoU of 0/0 is 0 in both: what an evaluator makes of its NaN is chance. Such queries are counted.
    """
    one, other = (measure_grounding(predictions, truths, name).list_figures() for name in protocols)
    names = dict.fromkeys([*one, *other])
    moments = _measure_moments(match_queries(predictions, truths), truths, PROTOCOLS["s4v"])
    full = moments["full"]
    return ProtocolDifferences(
        figures={name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)},
        without_predictions=0 if full is None else full.without_predictions,
        empty_lengths=tuple(name for name in LENGTHS if moments[name] is None),
        undefined_overlaps=sum(
            truth.windows is not None and _has_no_length(prediction.moments) and _has_no_length(truth.windows)
            for prediction, truth in zip(match_queries(predictions, truths), truths, strict=True)
        ),
    )


def _has_no_length(windows: np.ndarray) -> bool:
    return bool((windows[:, 0] == windows[:, 1]).any())
