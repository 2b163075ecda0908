"""`s4v retrieve`: rank a store's videos by the similarity of their stored embeddings to a text's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import ConfigError, StoreMismatchError, StoreNotFoundError
from ..extract.backbone import TextTower, load_text_tower
from ..store.reader import StoreReader, open_store


@dataclass(frozen=True, slots=True)
class Answer:
    """One video that a query found."""

    rank: int
    """From 1."""
    score: float
    """Cosine of the text's embedding and the video's."""
    video_id: str
    path: str
    """Relative to the root that the store records."""
    time_s: float | None
    """Time of the cached frame that fits best; None in a folder of frames whose rate is not known."""
    frame_score: float
    """That frame's own cosine."""


def find_newest_store(folder: Path = Path("store")) -> Path:
    """The store in a folder whose manifest was written last.

    Raises:
        StoreNotFoundError: If there is none.
    """
    stores = sorted(folder.glob("*.zarr/videos.parquet"), key=lambda p: p.stat().st_mtime)
    if not stores:
        raise StoreNotFoundError(
            f"no store in {folder.resolve()}: name one with --features, or make one with `s4v extract`"
        )
    return stores[-1].parent


def search_store(
    store: StoreReader | str | Path,
    query: str,
    *,
    top: int = 10,
    weights: str | None = None,
    device: torch.device | None = None,
) -> list[Answer]:
    """Find the videos of a store that fit a text best, with the frozen backbone alone.

    A video's embedding is the mean of its frames' normalised embeddings, over all views, normalised again.

    Args:
        store: An open store or its path.
        query: What to look for; cut at the text tower's context length.
        top: Answers wanted, fewer where the store has fewer good videos.
        weights: Where the backbone's weights are now; None takes what the store recorded.
        device: Where the text tower runs; None takes the CPU.

    Returns:
        Answers, best first; equal scores in row order.

    Raises:
        ConfigError: If the query is empty or `top` below 1.
        StoreMismatchError: If the store has no good video.
        WeightsError: If the weights cannot be had, or are not those that the store was made with.
    """
    if not query.strip():
        raise ConfigError("--query is empty: say what to look for")
    if top < 1:
        raise ConfigError(f"--top must be at least 1; found {top}")
    if not isinstance(store, StoreReader):
        store = open_store(store)
    table = store.read_manifest(["video_id", "path", "status", "timestamps_s"])
    good = np.flatnonzero(np.asarray(table["status"].to_pylist()) == "ok")
    if not len(good):
        raise StoreMismatchError(f"{store.path} holds no good video: finish its extraction first")
    text = embed_query(store, query, weights=weights, device=device)
    scores, best_frames, frame_scores = score_videos(store.read_embeddings()[good], text)
    order = np.argsort(-scores, kind="stable")[:top]
    chosen = table.take(good[order]).to_pylist()
    return [
        Answer(
            rank=rank,
            score=float(scores[place]),
            video_id=row["video_id"],
            path=row["path"],
            time_s=_known(row["timestamps_s"][best_frames[place]]),
            frame_score=float(frame_scores[place]),
        )
        for rank, (place, row) in enumerate(zip(order, chosen, strict=True), start=1)
    ]


def _known(time_s: float) -> float | None:
    return None if math.isnan(time_s) else time_s


def embed_query(
    store: StoreReader, query: str, *, weights: str | None = None, device: torch.device | None = None
) -> np.ndarray:
    """The L2-normalised embedding (E,) of a text, by the text tower of the store's backbone."""
    return normalise_rows(load_store_text_tower(store, weights=weights, device=device).encode([query]))[0]


def load_store_text_tower(
    store: StoreReader, *, weights: str | None = None, device: torch.device | None = None
) -> TextTower:
    """The text tower that belongs to a store's embeddings.

    Raises:
        WeightsError: If the weights cannot be had, or are not those that the store was made with.
    """
    backbone = store.attributes["backbone"]
    return load_text_tower(
        backbone["name"],
        weights=weights or backbone["weights"],
        device=device or torch.device("cpu"),
        expected_sha256=backbone["weights_sha256"],
    )


def score_videos(embeddings: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compare videos with a text.

    Args:
        embeddings: (V, A, F, E), not normalised; NaN where a row has no such frame, at least one frame a row.
        text: (E,) L2-normalised.

    Returns:
        Cosine of each video, place on F of its best frame, that frame's cosine; (V,) each.
    """
    frames = normalise_rows(embeddings)
    videos = pool_frames(frames)
    by_frame = np.nan_to_num(frames @ text, nan=-np.inf).max(axis=1)  # (V, F), best view of each frame
    best = by_frame.argmax(axis=1)
    return videos @ text, best, by_frame[np.arange(len(best)), best]


def pool_frames(frames: np.ndarray) -> np.ndarray:
    """A video's embedding, the mean of its frames' over all views, normalised again.

    Args:
        frames: (V, A, F, E) L2-normalised; NaN where a row has no such frame, at least one frame a row.

    Returns:
        (V, E) L2-normalised.
    """
    return normalise_rows(np.nanmean(frames, axis=(1, 2)))


def normalise_rows(vectors: np.ndarray) -> np.ndarray:
    """L2-normalise along the last axis; a zero vector stays zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)
