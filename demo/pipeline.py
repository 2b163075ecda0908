"""`s4v demo`: generate, extract, train, evaluate, search, report; through the same functions that a user calls."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import RunExistsError
from ..extract.config import ExtractConfig
from ..extract.pipeline import extract_dataset
from ..retrieve.search import search_store
from ..store._files import read_json, write_json
from ..store.info import describe_store
from ..store.reader import open_store
from ..train.config import TrainConfig
from ..train.evaluate import evaluate_run
from ..train.loop import train_run
from ..train.run import open_run, read_metrics
from .motions import MOTIONS, write_motion_videos
from .report import write_report

_MARKER = "demo.json"
_SIGNATURE = "s4v_demo"
_QUERY = "a red arrow moves left"

Say = Callable[[str], None]


def run_demo(
    out: Path,
    say: Say = lambda _: None,
    *,
    train_per_class: int = 100,
    val_per_class: int = 25,
    epochs: int = 12,
    seed: int = 0,
) -> dict[str, Any]:
    """Run the whole pipeline on generated videos.

    Args:
        out: Folder for everything; an earlier demo there is replaced, anything else refused.
        say: Told what is under way.
        train_per_class: Training videos of each motion.
        val_per_class: Held-out videos of each motion.
        epochs: Of the side network.
        seed: Of videos, backbone and training.

    Returns:
        side4video and linear (their figures), chance, seconds by stage, store_bytes, report (its path).

    Raises:
        RunExistsError: If `out` holds something that is not an earlier demo.
    """
    _clear(out)
    seconds: dict[str, float] = {}
    videos, store_path = out / "videos", out / "motions.zarr"

    say("generating videos")
    with _Timed(seconds, "generate"):
        count = write_motion_videos(videos, train_per_class=train_per_class, val_per_class=val_per_class, seed=seed)

    say(f"extracting tokens of {count} videos with a small untrained ViT")
    with _Timed(seconds, "extract"):
        extract_dataset(
            ExtractConfig(
                model="tiny-clip",
                weights="random",
                dataset="folder",
                root=videos,
                out=store_path,
                resize="224",
                layers="1,3,5",
                batch_size=32,
                seed=seed,
            )
        )

    recipes: dict[str, dict[str, Any]] = {
        "linear": {"epochs": 30, "learning_rate": 1e-3},
        "side4video": {
            "epochs": epochs,
            "learning_rate": 6e-4,
            "batch_size": 8,
            "warmup_epochs": 1.0,
            "side_width": 64,
        },
    }
    figures: dict[str, dict[str, Any]] = {}
    curves: dict[str, list[dict[str, Any]]] = {}
    for head, recipe in recipes.items():
        run_path = out / "runs" / head
        say(f"training {head} for {recipe['epochs']} epochs")

        def report_epoch(metrics: dict[str, Any], num_epochs: int, head: str = head) -> None:
            if head == "side4video":
                say(f"  epoch {metrics['epoch']}/{num_epochs}: held-out top1 {metrics['val_top1']:.1%}")

        with _Timed(seconds, f"train {head}"):
            train_run(TrainConfig(features=store_path, out=run_path, head=head, seed=seed, **recipe), report_epoch)
        with _Timed(seconds, f"evaluate {head}"):
            # The last checkpoint, not the best: that one was chosen on these very videos.
            figures[head] = evaluate_run(run_path, checkpoint="last")
        curves[head] = read_metrics(open_run(run_path))

    say("searching")
    with _Timed(seconds, "retrieve"):
        answers = search_store(store_path, _QUERY, top=5)

    store = open_store(store_path)
    result: dict[str, Any] = {
        **{head: {k: v for k, v in f.items() if k in ("top1", "top5", "videos")} for head, f in figures.items()},
        "chance": 1 / len(MOTIONS),
        "videos": count,
        "store_bytes": describe_store(store)["bytes"],
        "seconds_by_stage": {name: round(value, 1) for name, value in seconds.items()},
        "report": str(out / "report.html"),
    }
    write_report(
        out / "report.html",
        result=result,
        figures=figures,
        curves=curves,
        store=store,
        extract_stats=read_json(store_path / "stats.json"),
        predictions=out / "runs" / "side4video" / "predictions_val.parquet",
        query=_QUERY,
        answers=[asdict(answer) for answer in answers],
    )
    write_json(out / _MARKER, {_SIGNATURE: 1, "finished": True, **result})
    return result


class _Timed:
    """Adds the seconds of a block to a dict."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds = seconds
        self._name = name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = time.perf_counter() - self._start


def _clear(out: Path) -> None:
    """Make room: remove what an earlier demo wrote, refuse anything else."""
    if out.exists() and any(out.iterdir()):
        if not _is_demo(out):
            raise RunExistsError(f"{out} holds something that is not an earlier demo: choose another --out")
        for name in ("videos", "motions.zarr", "runs"):
            shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    # From here on the folder is a demo's, finished or not.
    write_json(out / _MARKER, {_SIGNATURE: 1, "finished": False})


def _is_demo(out: Path) -> bool:
    """Whether the marker in a folder is one that a demo wrote."""
    try:
        marker = read_json(out / _MARKER)
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and _SIGNATURE in marker
