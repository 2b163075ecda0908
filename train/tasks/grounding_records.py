"""Predictions and truths of temporal grounding, and the files of QVHighlights that hold them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ...errors import DataNotFoundError, DatasetError

QueryId = int | str
"""Some data sets number their queries, others name them; 7 and "7" are two queries."""


@dataclass(frozen=True, slots=True, eq=False)
class GroundingPrediction:
    """What was found for one query."""

    query_id: QueryId
    moments: np.ndarray
    """(M, 3) start and end in seconds, score. R1 takes the first row, so the best stands first."""
    saliency: np.ndarray | None = None
    """(clips,) of any scale, one a clip; None where only moments are asked for."""
    query: str = ""
    video_id: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class GroundingTruth:
    """What people marked for one query."""

    query_id: QueryId
    duration_s: float
    windows: np.ndarray | None
    """(W, 2) start and end in seconds. None: nobody marked any; no row: it is not in the video."""
    clip_ids: np.ndarray | None = None
    """(n,) 0-based clips that have scores."""
    scores: np.ndarray | None = None
    """(n, annotators) whole numbers from 0 to 4."""
    query: str = ""
    video_id: str = ""


Record = TypeVar("Record", GroundingPrediction, GroundingTruth)


def match_queries(
    predictions: Sequence[GroundingPrediction], truths: Sequence[GroundingTruth]
) -> list[GroundingPrediction]:
    """The prediction of each truth, in the order of the truths; an empty one where there is none.

    Raises:
        DatasetError: If a query stands twice, or a prediction's is not among the truths.
    """
    by_query, known = _index(predictions, "predictions"), _index(truths, "truths")
    strangers = sorted(map(repr, by_query.keys() - known.keys()))
    if strangers:
        raise DatasetError(
            f"Predictions of {len(strangers)} queries that are not among the {len(known)} truths, the first is "
            f"{strangers[0]}. Compare with the truths of the split that was predicted; a number and a text differ."
        )
    nothing = np.zeros((0, 3))
    return [by_query.get(truth.query_id) or GroundingPrediction(truth.query_id, nothing) for truth in truths]


def _index(records: Sequence[Record], kind: str) -> dict[QueryId, Record]:
    by_query = {record.query_id: record for record in records}
    if len(by_query) < len(records):
        seen: set[QueryId] = set()
        twice = next(one.query_id for one in records if one.query_id in seen or seen.add(one.query_id))  # type: ignore[func-returns-value]
        raise DatasetError(f"Query {twice!r} stands twice among the {kind}. Keep one row of each query.")
    return by_query


def write_submission(path: Path, predictions: Iterable[GroundingPrediction]) -> None:
    """Write predictions as QVHighlights wants them: one JSON object a line.

    Numbers are written in full, so that figures of the file are those of the arrays.
    """
    with path.open("w", encoding="utf-8") as file:
        for one in predictions:
            row: dict[str, Any] = {"qid": one.query_id, "query": one.query, "vid": one.video_id}
            row["pred_relevant_windows"] = one.moments.tolist()
            if one.saliency is not None:
                row["pred_saliency_scores"] = one.saliency.tolist()
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_submission(path: Path) -> list[GroundingPrediction]:
    """Predictions of a file in QVHighlights' format; keys that it does not name are ignored.

    Raises:
        DatasetError: If a line is no such row; the message names it.
    """
    return [parse_prediction(row, f"{path}, line {number}") for number, row in _read_lines(path)]


def read_truths(path: Path) -> list[GroundingTruth]:
    """Truths of an annotation file in QVHighlights' format; keys that it does not name are ignored.

    Raises:
        DatasetError: If a line is no such row; the message names it.
    """
    return [parse_truth(row, f"{path}, line {number}") for number, row in _read_lines(path)]


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    if not path.is_file():
        raise DataNotFoundError(f"{path} is not there. Give a file with one JSON object a line.")
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DatasetError(f"{path}, line {number}: no JSON ({error}). Write one JSON object a line.") from None


def parse_prediction(row: Mapping[str, Any], place: str) -> GroundingPrediction:
    """One row of a submission; `place` says where it stands, for the message.

    Raises:
        DatasetError: If it has no query, or its windows or scores are not numbers.
    """
    saliency = row.get("pred_saliency_scores") if isinstance(row, Mapping) else None
    return GroundingPrediction(
        query_id=_find_query_id(row, place),
        moments=_parse_table(row, "pred_relevant_windows", 3, place),
        saliency=None if saliency is None else _parse_table(row, "pred_saliency_scores", None, place),
        query=str(row.get("query", "")),
        video_id=str(row.get("vid", "")),
    )


def parse_truth(row: Mapping[str, Any], place: str) -> GroundingTruth:
    """One row of an annotation file; `place` says where it stands, for the message.

    Raises:
        DatasetError: If query or duration are missing, or windows or scores are not numbers.
    """
    query_id = _find_query_id(row, place)
    duration = row.get("duration")
    if not isinstance(duration, int | float) or isinstance(duration, bool) or not duration > 0:
        raise DatasetError(f"{place}: `duration` should be seconds above 0, found {duration!r}.")
    clip_ids = scores = None
    if row.get("saliency_scores") is not None and row.get("relevant_clip_ids") is not None:
        clip_ids = _parse_table(row, "relevant_clip_ids", None, place).astype(np.int64)
        scores = np.asarray(row["saliency_scores"])
        if scores.ndim != 2 or len(scores) != len(clip_ids):
            raise DatasetError(f"{place}: {len(clip_ids)} clips, but scores of shape {scores.shape}: one row a clip.")
    return GroundingTruth(
        query_id=query_id,
        duration_s=float(duration),
        windows=None if row.get("relevant_windows") is None else _parse_table(row, "relevant_windows", 2, place),
        clip_ids=clip_ids,
        scores=scores,
        query=str(row.get("query", "")),
        video_id=str(row.get("vid", "")),
    )


def _find_query_id(row: object, place: str) -> QueryId:
    query_id = row.get("qid") if isinstance(row, Mapping) else None
    if not isinstance(query_id, int | str):
        raise DatasetError(f"{place}: `qid` should be a number or a text, found {query_id!r}.")
    return query_id


def _parse_table(row: Mapping[str, Any], key: str, columns: int | None, place: str) -> np.ndarray:
    """(n, columns) float64, or (n,) where `columns` is None."""
    shape = "one number each" if columns is None else f"{columns} numbers each"
    rows = row.get(key)
    try:
        table = np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError):
        table = np.full((), np.nan)
    if columns is not None and table.shape == (0,):
        table = table.reshape(0, columns)
    if table.shape[1:] != (() if columns is None else (columns,)) or not table.ndim or not np.isfinite(table).all():
        raise DatasetError(f"{place}: `{key}` should be a list of rows, {shape}, found {str(rows)[:80]}.")
    return table
