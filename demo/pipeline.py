"""`s4v demo`: the small world through the whole pipeline, by the same functions that a user calls, and a report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ConfigError, RunExistsError
from ..extract.config import ExtractConfig
from ..extract.extraction import extract_dataset
from ..files import read_json, write_json
from ..store.info import describe_store
from ..store.manifest import read_table
from ..store.reader import StoreReader, open_store
from ..train.config import TrainConfig
from ..train.evaluate import evaluate_run
from ..train.loop import train_run
from ..train.networks.zero_shot import classify_zero_shot
from ..train.run_folder import open_run, read_metrics
from .captions import prompt_motion
from .report import write_report
from .retrieval import ask, judge_retrieval
from .scores import Share, describe_shares, judge_answers, judge_reversal, split_label
from .world import ANNOTATIONS_NAME, WorldConfig, write_world

_MARKER = "demo.json"
_SIGNATURE = "s4v_demo"

# The query: its shape shows in every frame of an answer, its motion in none.
_ASKED = "ring left"
_QUERY = prompt_motion(*split_label(_ASKED))

EXTRACTION: dict[str, Any] = {
    "model": "tiny-clip",
    "dataset": "table",
    "columns": {"label": "shape_motion"},
    "resize": "224",
    "frames": {"": 4},
    "layers": "3,5",
    "batch_size": 32,
}
"""How the world is extracted, here and in benchmarks; places aside."""

_SIDE_RECIPE: dict[str, Any] = {
    "head": "side4video",
    "epochs": 14,
    "learning_rate": 5e-3,
    "batch_size": 32,
    "warmup_epochs": 1.0,
    "weight_decay": 0.05,
    "label_smoothing": 0.0,
    "side_width": 64,
}
RECIPES: dict[str, dict[str, Any]] = {
    "side network": _SIDE_RECIPE,
    "linear probe": {"head": "linear", "epochs": 30, "learning_rate": 1e-3},
    "pixels only": {**_SIDE_RECIPE, "inputs": "pixels"},
    "tokens only": {**_SIDE_RECIPE, "inputs": "tokens"},
}
"""What is trained, by the name it has in the report."""

USUAL = ("side network", "linear probe")
"""Without `full`: each of the others is as long a training as the side network's."""

RETRIEVAL_RECIPE: dict[str, Any] = {
    "task": "retrieval",
    "epochs": 3,
    "validate_every": 3,
    "learning_rate": 5e-3,
    "batch_size": 32,
    "weight_decay": 0.05,
    "side_width": 64,
    "negatives": "all",
    "optimizer": "adamw",
    "undecayed": "vectors",
    "set": ("normalises_frames=true", "trains_end=false", "trains_logit_scale=false"),
}
"""How retrieval is trained, from the side network that learned the classes; an epoch has each caption once.

Not by the reference's recipe, which is for fine-tuning giants: these are the settings that README's figures are of.
"""

Say = Callable[[str], None]
Answers = list[tuple[str, str]]
"""Label and answer of each video."""


def run_demo(
    out: Path,
    say: Say = lambda _: None,
    *,
    world: WorldConfig | None = None,
    epochs: int | None = None,
    seeds: int = 1,
    full: bool = False,
) -> dict[str, Any]:
    """Run the whole pipeline on the small world.

    Args:
        out: Folder for everything; an earlier demo there is replaced, anything else refused.
        say: Told what is under way.
        world: The videos; None takes the usual ones.
        epochs: Of the side networks; None takes the recipe's.
        seeds: Trainings of each kind, from seed 0 up, all on the same store.
        full: Train on pixels alone and on tokens alone too, and ask the frozen model without training.

    Returns:
        methods (their shares, by name, for the first seed, and top1 of every seed), retrieval (figures of `trained`
        and `frozen`), reversal, zero_shot_frames (the
        share of single frames; None unless `full`), novel, chance, seconds by stage, store_bytes, report (its path).

    Raises:
        ConfigError: If `seeds` is below 1, or the world has no held-out video or fewer than two to learn from.
        RunExistsError: If `out` holds something that is not an earlier demo.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds must be at least 1; found {seeds}")
    world = world or WorldConfig()
    if world.num_val < 1 or world.num_train < 2:
        raise ConfigError(
            f"the demo needs 2 training videos and 1 held-out one; found {world.num_train} and {world.num_val}"
        )
    _clear(out)
    seconds: dict[str, float] = {}
    store_path = out / "world.zarr"

    say(f"generating {world.num_train + world.num_val + world.num_novel} videos")
    with _timed(seconds, "generate"):
        videos = write_world(out / "world", world)

    say("extracting their tokens with tiny-clip")
    with _timed(seconds, "extract"):
        extract_dataset(
            ExtractConfig(
                root=out / "world", annotations=out / "world" / ANNOTATIONS_NAME, out=store_path, **EXTRACTION
            )
        )
    store = open_store(store_path)

    methods = {name: recipe for name, recipe in RECIPES.items() if full or name in USUAL}
    answers: dict[str, Answers] = {}
    top1: dict[str, list[float]] = {name: [] for name in methods}
    for seed in range(seeds):
        for name, recipe in methods.items():
            run_path = out / "runs" / f"{name.replace(' ', '-')}-{seed}"
            if epochs is not None and recipe["head"] == "side4video":
                recipe = {**recipe, "epochs": epochs}
            config = TrainConfig(features=store_path, out=run_path, seed=seed, **recipe)
            say(f"training {name}, {config.epochs} epochs{f', seed {seed}' if seeds > 1 else ''}")
            with _timed(seconds, f"train {name}"):
                train_run(config, _epoch_reporter(say, name))
            with _timed(seconds, "evaluate"):
                pairs = _evaluate(run_path)
            answers.setdefault(name, pairs)
            top1[name].append(Share(sum(label == answer for label, answer in pairs), len(pairs)).value)

    side_run = out / "runs" / "side-network-0"
    with _timed(seconds, "evaluate"):
        backwards = _evaluate(side_run, is_backwards=True)
        novel = {
            name: _evaluate(out / "runs" / f"{name.replace(' ', '-')}-0", split="novel")
            for name in methods
            if world.num_novel
        }
    zero_shot_frames = None
    if full:
        say("asking the frozen model")
        with _timed(seconds, "zero-shot"):
            answers["zero-shot"], zero_shot_frames = _ask_frozen_model(store)
            if world.num_novel:
                novel["zero-shot"], _ = _ask_frozen_model(store, "novel")
        top1["zero-shot"] = [judge_answers(*zip(*answers["zero-shot"], strict=True))["both"].value]

    say(f"training retrieval, {RETRIEVAL_RECIPE['epochs']} epochs")
    retrieval_run = out / "runs" / "retrieval-0"
    with _timed(seconds, "train retrieval"):
        recipe = RETRIEVAL_RECIPE if epochs is None else {**RETRIEVAL_RECIPE, "epochs": epochs}
        config = TrainConfig(features=store_path, out=retrieval_run, init=side_run, **recipe)
        train_run(config, _epoch_reporter(say, "retrieval"))
    say("searching")
    with _timed(seconds, "retrieve"):
        retrieval = judge_retrieval(store, retrieval_run)
        search_answers = ask(store, _QUERY, _ASKED, retrieval_run)

    labels, forwards = zip(*answers["side network"], strict=True)
    result: dict[str, Any] = {
        "methods": {
            name: {"top1_by_seed": top1[name], **describe_shares(judge_answers(*zip(*pairs, strict=True)))}
            for name, pairs in answers.items()
        },
        "reversal": judge_reversal(labels, forwards, [answer for _, answer in backwards]).describe(),
        "zero_shot_frames": zero_shot_frames,
        "novel": {name: describe_shares(judge_answers(*zip(*pairs, strict=True))) for name, pairs in novel.items()},
        "retrieval": retrieval,
        "chance": 1 / len(store.classes.names),
        "videos": videos,
        "world": asdict(world),
        "epochs": epochs or _SIDE_RECIPE["epochs"],
        "store_bytes": describe_store(store)["bytes"],
        "seconds_by_stage": {name: round(value, 1) for name, value in seconds.items()},
        "report": str(out / "report.html"),
    }
    write_report(
        out / "report.html",
        result=result,
        answers=answers,
        curves={name: read_metrics(open_run(out / "runs" / f"{name.replace(' ', '-')}-0")) for name in methods},
        store=store,
        extract_stats=read_json(store_path / "stats.json"),
        predictions=side_run / "predictions_val.parquet",
        query=_QUERY,
        found=search_answers,
    )
    write_json(out / _MARKER, {_SIGNATURE: 1, "finished": True, **result})
    return result


def _epoch_reporter(say: Say, name: str) -> Callable[[dict[str, Any], int], None]:
    def report(metrics: dict[str, Any], num_epochs: int) -> None:
        figure, what = ("val_r1", "R@1") if name == "retrieval" else ("val_top1", "top1")
        if name != "linear probe" and figure in metrics:
            say(f"  epoch {metrics['epoch']}/{num_epochs}: held-out {what} {metrics[figure]:.1%}")

    return report


def _evaluate(run_path: Path, *, split: str = "val", is_backwards: bool = False) -> Answers:
    """What a run answers for each video of a split, in row order."""
    # The last checkpoint, not the best: that one was chosen on these very videos.
    evaluate_run(run_path, split=split, checkpoint="last", is_backwards=is_backwards)
    name = f"{split}_backwards" if is_backwards else split
    predictions = read_table(run_path / f"predictions_{name}.parquet", ["class_name", "predicted"])
    return list(zip(predictions["class_name"].to_pylist(), predictions["predicted"].to_pylist(), strict=True))


def _ask_frozen_model(store: StoreReader, split: str = "val") -> tuple[Answers, float]:
    """What tiny-clip's own embeddings answer, averaged over frames; and the share of single frames answered right."""
    prompts = {name: [prompt_motion(*split_label(name))] for name in store.classes.names}
    asked = classify_zero_shot(store, prompts, split=split)
    labels = store.read_manifest(["class_name"])["class_name"].take(asked.rows).to_pylist()
    by_frame = [
        [asked.names[place] == label for place in scores.argmax(axis=1)]
        for label, scores in zip(labels, asked.frame_scores, strict=True)
    ]
    return list(zip(labels, asked.answers, strict=True)), sum(map(sum, by_frame)) / sum(map(len, by_frame))


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of a block to those of its name."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def _clear(out: Path) -> None:
    """Make room: remove what an earlier demo wrote, refuse anything else."""
    if out.exists() and any(out.iterdir()):
        if not _is_demo(out):
            raise RunExistsError(f"{out} holds something that is not an earlier demo: choose another --out")
        (out / "report.html").unlink(missing_ok=True)
        for name in ("world", "world.zarr", "runs"):
            if (out / name).is_dir():
                shutil.rmtree(out / name)
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
