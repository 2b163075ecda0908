"""The demo's retrieval: what captions find, and whether the one with the right motion is closer than its reversal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..backbone.text_tower import load_store_text_tower
from ..retrieve.search import Searcher
from ..retrieve.trained_frames import TrainedFrames
from ..store.reader import StoreReader
from ..train.clips import find_captioned_rows
from ..train.evaluate import evaluate_run
from ..train.tasks.retrieval import read_frozen_clips
from ..vectors import normalise_rows, pool_clips
from .captions import prompt_motion
from .scenes import MOTIONS, REVERSED
from .scores import Share, describe_shares, split_label

_WAYS = ("text_to_video", "video_to_text")


def judge_retrieval(store: StoreReader, run: Path, split: str = "val") -> dict[str, Any]:
    """What captions of held-out videos find, with a trained run and with the frozen model.

    Returns:
        `trained` and `frozen`, each: text_to_video and video_to_text (`evaluate_run`), and of captions that
        differ in nothing but the motion `reversed` (a Share: the video's own is closer than the paired motion's) and
        `motion` (a Share: it is the closest of all).
    """
    # The last checkpoint, not the best: that one was chosen on these very videos.
    figures = evaluate_run(run, split=split, checkpoint="last")
    data = find_captioned_rows(store, split)
    _, first = np.unique(data.rows, return_index=True)
    rows = data.rows[first]
    trained = TrainedFrames(run, store.path, checkpoint="last")
    frames = {
        "trained": trained.embed(rows, [data.eval_clips[place][0] for place in first]).frames,
        "frozen": read_frozen_clips(store, data, trained.run.frames)[first],
    }
    is_normalised = trained.network.normalises_frames
    labels = store.read_manifest(["class_name"])["class_name"].take(rows).to_pylist()
    texts = _embed_prompts(store, [split_label(label)[0] for label in labels])
    return {
        name: {
            **{way: (figures if name == "trained" else figures["frozen"])[way] for way in _WAYS},
            **describe_shares(judge_motions(pool_clips(one, normalises_frames=is_normalised), labels, texts)),
        }
        for name, one in frames.items()
    }


def judge_motions(videos: np.ndarray, labels: list[str], texts: Mapping[str, np.ndarray]) -> dict[str, Share]:
    """Which of the captions that differ in the motion alone is the closest to each video.

    Args:
        videos: (n, E) L2-normalised.
        labels: Shape and motion of each.
        texts: By shape (motions, E), L2-normalised, in the order of `MOTIONS`.
    """
    parts, motions = [split_label(label) for label in labels], list(MOTIONS)
    scores = [texts[shape] @ video for (shape, _), video in zip(parts, videos, strict=True)]
    own = [motions.index(motion) for _, motion in parts]
    paired = [motions.index(REVERSED[motion]) for _, motion in parts]
    return {
        "reversed": Share(sum(bool(s[o] > s[p]) for s, o, p in zip(scores, own, paired, strict=True)), len(own)),
        "motion": Share(sum(int(s.argmax()) == o for s, o in zip(scores, own, strict=True)), len(own)),
    }


def _embed_prompts(store: StoreReader, shapes: list[str]) -> dict[str, np.ndarray]:
    tower, known = load_store_text_tower(store), sorted(set(shapes))
    texts = normalise_rows(tower.encode([prompt_motion(shape, motion) for shape in known for motion in MOTIONS]))
    return dict(zip(known, np.split(texts, len(known)), strict=True))


def ask(store: StoreReader, query: str, asked: str, run: Path, top: int = 6) -> dict[str, list[dict[str, Any]]]:
    """What a query finds among held-out videos: with the frozen model, and with a trained run.

    Args:
        store: Of the world.
        query: In words.
        asked: The label that it means.
        run: Of retrieval.
        top: Answers wanted.

    Returns:
        `frozen` and `trained`: answers with video_id, score, class_name and whether that is what was asked.
    """
    classes = store.read_manifest(["class_name"])["class_name"]
    answers = {}
    for name, one in (("frozen", None), ("trained", run)):
        with Searcher(store, run=one, checkpoint="last", where="split = 'val'") as searcher:
            answers[name] = [
                {
                    "video_id": answer.video_id,
                    "score": answer.score,
                    "class_name": (class_name := classes[answer.row].as_py()),
                    "is_right": class_name == asked,
                }
                for answer in searcher.find_text(query, top)
            ]
    return answers
