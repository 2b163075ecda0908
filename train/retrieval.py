"""Evaluation of retrieval: every caption of a split against every captioned video of it, both ways."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from ..errors import ConfigError, EnvironmentFailedError, StoreMismatchError
from ..files import write_json
from ..store.manifest import write_table
from ..store.reader import StoreReader
from ..store.texts import TextReader, Texts
from .clips import (
    ClipPlan,
    LabelledRows,
    find_captioned_rows,
    hand_over_texts,
    plan_evaluation,
    resolve_clip_frames,
)
from .evaluate import (
    ALONE,
    Team,
    autocast_as_trained,
    explain_full_device,
    open_run_and_store,
    require_long_clips,
    run_head,
    warn_of_thinned_clips,
)
from .networks.text_interaction import Interaction, MeanInteraction, TextBatch
from .run_folder import Run, load_checkpoint, open_run
from .side_network import RetrievalSideNetwork
from .tasks.retrieval_metrics import measure_retrieval, rank_videos

# Cosines that are compared at once, words and frames counted.
_COSINES_AT_ONCE = 2**25

Compare = Callable[[TextBatch, torch.Tensor], Interaction]

_log = logging.getLogger(__name__)


class TextSource(Protocol):
    """A store's captions, embedded: by the frozen tower (`TextReader`), or by one that a run has brought along."""

    @property
    def num_words(self) -> int:
        """M."""
        ...

    def read(self, captions: np.ndarray, arrays: tuple[str, ...]) -> Texts:
        """Texts by their rows, in the order asked for."""
        ...


@dataclass(frozen=True, slots=True)
class RetrievalEvaluation:
    """Scores of a split's captions and videos."""

    rows: np.ndarray
    """(n,) rows of the store."""
    captions: np.ndarray
    """(q,) rows of the captions."""
    video_of_text: np.ndarray
    """(q,) places in `rows`."""
    scores: np.ndarray
    """(q, n) float32, texts by videos."""

    def describe(self, *, with_dual_softmax: bool = False) -> dict[str, dict[str, float]]:
        """Figures of both directions: queries, r1, r5, r10, median_rank, mean_rank.

        Args:
            with_dual_softmax: Of scores that look at all queries of a direction at once.
        """
        both = measure_retrieval(self.scores, self.video_of_text, with_dual_softmax=with_dual_softmax)
        return {
            direction: {
                "queries": figures.queries,
                **{f"r{k}": share for k, share in figures.recall.items()},
                "median_rank": figures.median_rank,
                "mean_rank": figures.mean_rank,
            }
            for direction, figures in both.items()
        }


def embed_clips(
    head: RetrievalSideNetwork,
    store: StoreReader,
    data: LabelledRows,
    *,
    layers: tuple[int, ...],
    num_frames: int,
    batch_size: int,
    device: torch.device,
    is_backwards: bool = False,
    team: Team = ALONE,
) -> np.ndarray:
    """Embed the first evaluation clip of each video, its first view; the head is put into evaluation mode meanwhile.

    Returns:
        (n, T, E) float32, not normalised, in the order of `data`.

    Raises:
        EnvironmentFailedError: If a number is not finite.
        StoreMismatchError: If a clip holds fewer than T frames.
    """
    require_long_clips(data, num_frames, store, only_first=True)
    plans = _plan_first_clips(data, num_frames, batch_size)
    frames = run_head(head, store, plans, layers=layers, device=device, is_backwards=is_backwards, team=team)
    if not np.isfinite(frames).all():
        raise EnvironmentFailedError("the head's output is not finite: its weights or its input hold NaN or infinity")
    return frames


def read_frozen_clips(store: StoreReader, data: LabelledRows, num_frames: int) -> np.ndarray:
    """What `embed_clips` gives for a network that was never trained: the backbone's own embeddings, (n, T, E)."""
    places = np.concatenate([plan.places for plan in _plan_first_clips(data, num_frames, max(1, len(data)))])
    frames = np.empty((len(data), num_frames, store.layout.embed_dim), dtype=np.float32)
    for shard in range(store.layout.num_shards):
        span = store.layout.shard_rows(shard)
        chosen = np.flatnonzero((data.rows >= span.start) & (data.rows < span.stop))
        if len(chosen):
            embeddings = store.read_embeddings(span)[:, 0]  # (rows, F, E)
            frames[chosen] = embeddings[data.rows[chosen, None] - span.start, places[chosen]]
    return frames


@torch.inference_mode()
def score_texts(
    compare: Compare,
    text_arrays: tuple[str, ...],
    texts: TextSource,
    captions: np.ndarray,
    frames: np.ndarray,
    device: torch.device,
) -> np.ndarray:
    """Compare captions with videos.

    Args:
        compare: A module of train/networks/text_interaction.py on `device`.
        text_arrays: What it reads of a text.
        texts: Of the store's captions.
        captions: (q,) rows.
        frames: (n, T, E), not normalised.
        device: Where to compute.

    Returns:
        (q, n) float32.
    """
    videos = torch.from_numpy(frames).to(device)
    per_text = max(1, videos.shape[0] * videos.shape[1] * (texts.num_words if "tokens" in text_arrays else 1))
    size = max(1, _COSINES_AT_ONCE // per_text)
    scores = [
        compare(hand_over_texts(texts.read(captions[first : first + size], text_arrays), device), videos).similarities
        for first in range(0, len(captions), size)
    ]
    return torch.cat(scores).float().cpu().numpy()


def evaluate_retrieval(
    head: RetrievalSideNetwork,
    store: StoreReader,
    data: LabelledRows,
    *,
    layers: tuple[int, ...],
    num_frames: int,
    batch_size: int,
    device: torch.device,
    is_backwards: bool = False,
    texts: TextSource | None = None,
    team: Team = ALONE,
) -> RetrievalEvaluation:
    """Score captions against videos with a head that sits on `device`.

    Args:
        head: The network.
        store: Where tokens and texts are.
        data: Captioned rows, as `find_captioned_rows` gives them.
        layers: Backbone blocks that the head reads.
        num_frames: T.
        batch_size: Clips in a batch.
        device: Where the head is.
        is_backwards: Show the head every clip from its last frame to its first.
        texts: Captions as the head knows them; None takes those in the store.
        team: Who shares the clips, and in which precision; every process gets the whole result.

    Raises:
        EnvironmentFailedError: If a number is not finite.
        StoreMismatchError: If the store holds no texts of its captions, or a clip holds fewer than T frames.
    """
    videos, video_of_text = _unique_videos(data)
    frames = embed_clips(
        head,
        store,
        videos,
        layers=layers,
        num_frames=num_frames,
        batch_size=batch_size,
        device=device,
        is_backwards=is_backwards,
        team=team,
    )
    interaction = head.interaction
    texts = texts or TextReader(store)
    scores = score_texts(interaction, interaction.text_arrays, texts, data.labels, frames, device)
    return RetrievalEvaluation(videos.rows, data.labels, video_of_text, scores)


def evaluate_frozen_retrieval(store: StoreReader, data: LabelledRows, num_frames: int) -> RetrievalEvaluation:
    """Score captions against videos with the backbone's own embeddings, averaged over the same frames."""
    videos, video_of_text = _unique_videos(data)
    frames, compare = read_frozen_clips(store, videos, num_frames), MeanInteraction()
    scores = score_texts(compare, compare.text_arrays, TextReader(store), data.labels, frames, torch.device("cpu"))
    return RetrievalEvaluation(videos.rows, data.labels, video_of_text, scores)


def evaluate_retrieval_run(
    run_path: str | Path,
    *,
    features: str | Path | None = None,
    split: str = "val",
    checkpoint: str = "best",
    is_backwards: bool = False,
    with_dual_softmax: bool = False,
    device: torch.device | None = None,
    read_tuned_texts: Callable[[Run, StoreReader], TextSource] | None = None,
) -> dict[str, Any]:
    """Evaluate a retrieval run on a split of a store, and leave the figures and every query's rank in its folder.

    Args:
        run_path: The run's folder.
        features: A store; None takes the one that the run was trained on.
        split: Which videos: all good ones with captions, each caption a query.
        checkpoint: `best` or `last`.
        is_backwards: Play every clip backwards.
        with_dual_softmax: Add figures of scores that look at all queries of the split at once, under a name of their
            own.
        device: Where to compute; None takes the CPU.
        read_tuned_texts: Of an imported run, whose text tower is not the store's: `retrieve.tuned_texts.TunedTexts`.
            This module knows no text tower.

    Returns:
        text_to_video and video_to_text of the run; `frozen` with the same of the backbone alone, on the same frames;
        `dual_softmax` with the same of the run where it was asked for; dataset, protocol, split, videos, captions, and
        lost_captions: those whose video failed, which nobody can find.

    Raises:
        StoreMismatchError: If the store does not fit the run, holds no texts, or the split has no captioned video.
        ConfigError: If the run is not of retrieval, or was imported and nothing reads its texts.
    """
    run = open_run(run_path)
    if run.head.task != "retrieval":
        raise ConfigError(f"{run.path} is a recognition run: it knows classes and no texts")
    if run.is_imported and read_tuned_texts is None:
        raise ConfigError(
            f"{run.path} was imported: its text tower was fine-tuned beside it, and a store's texts are the frozen "
            "tower's. `s4v eval` embeds captions with its own; from Python, give read_tuned_texts."
        )
    run, store = open_run_and_store(run_path, features)
    data = find_captioned_rows(store, split)
    if not len(data):
        splits = ", ".join(sorted(set(store.input_columns()["split"].to_pylist())))
        raise StoreMismatchError(f"{store.path} has no good, captioned video in split {split!r}; it has {splits}")
    resolve_clip_frames(run.frames, data.num_cached_frames, store)
    warn_of_thinned_clips(data, run.frames, store, only_first=True)
    device = device or torch.device("cpu")
    with explain_full_device("evaluate with --device cpu"):
        head = load_checkpoint(run, checkpoint).to(device)
        assert isinstance(head, RetrievalSideNetwork)
        result = evaluate_retrieval(
            head,
            store,
            data,
            layers=run.head.layers,
            num_frames=run.frames,
            batch_size=run.config["batch_size"],
            device=device,
            is_backwards=is_backwards,
            texts=read_tuned_texts(run, store) if read_tuned_texts is not None and run.is_imported else None,
            team=Team(autocast=autocast_as_trained(run, device)),
        )
    lost = _count_captions(store, split) - len(data)
    if lost:
        _log.warning("%d captions of %s have no good video: figures leave them out, published ones do not", lost, split)
    figures = {
        "run": str(run.path),
        "store": str(store.path),
        "dataset": store.attributes["dataset"]["name"],
        "protocol": store.attributes["dataset"].get("protocol"),
        "split": split,
        "is_backwards": is_backwards,
        "checkpoint": checkpoint,
        "videos": len(result.rows),
        "captions": len(data),
        "lost_captions": lost,
        **result.describe(),
        "frozen": evaluate_frozen_retrieval(store, data, run.frames).describe(),
    }
    if with_dual_softmax:
        figures["dual_softmax"] = result.describe(with_dual_softmax=True)
    name = f"{split}_backwards" if is_backwards else split
    write_json(run.path / f"eval_{name}.json", figures)
    write_table(run.path / f"ranks_{name}.parquet", _rank_table(result, store))
    return figures


def _plan_first_clips(data: LabelledRows, num_frames: int, batch_size: int) -> list[ClipPlan]:
    first = replace(data, num_views=np.ones_like(data.num_views), eval_clips=[clips[:1] for clips in data.eval_clips])
    plans, _ = plan_evaluation(first, num_frames=num_frames, batch_size=batch_size)
    return plans


def _unique_videos(data: LabelledRows) -> tuple[LabelledRows, np.ndarray]:
    """Each video once, and the place of each caption's video among them."""
    rows, first, video_of_text = np.unique(data.rows, return_index=True, return_inverse=True)
    videos = LabelledRows(
        rows,
        data.labels[first],
        data.num_cached_frames[first],
        data.num_views[first],
        [data.eval_clips[place] for place in first],
    )
    return videos, video_of_text


def _count_captions(store: StoreReader, split: str) -> int:
    """Captions of a split, whatever became of their videos."""
    inputs = store.input_columns()
    of_split = inputs.filter(pa.compute.equal(inputs["split"], split))["video_id"]
    return int(pa.compute.sum(pa.compute.is_in(store.read_captions()["video_id"], of_split.combine_chunks())).as_py())


def _rank_table(result: RetrievalEvaluation, store: StoreReader) -> pa.Table:
    """One row a caption: its text, its video, that video's rank and the video that was found first."""
    captions = store.read_captions().take(result.captions)
    ids = store.read_manifest(["video_id"])["video_id"].take(result.rows)
    best = result.scores.argmax(axis=1)
    return pa.table(
        {
            **{name: captions[name] for name in ("caption_id", "text", "video_id")},
            "rank": rank_videos(result.scores, result.video_of_text),
            "first": ids.take(best),
            "score": np.take_along_axis(result.scores, result.video_of_text[:, None], axis=1)[:, 0],
            "first_score": result.scores.max(axis=1),
        }
    )
