"""The networks of one store side by side: what each learns from the same cached tokens of the small world.

    python benchmarks/comparison.py [--only side4video] [--minutes 60] [--workers 2] [--folder runs/comparison]
    python benchmarks/comparison.py --steps      step time and memory alone, on an idle machine

Every network reads the same tokens, of 4 frames of each video. Its rate is the best of three, by the top-1 of a tenth
of the training videos that is held out. Then it is trained on all of them, with three seeds. Each training is a line of
results.jsonl in --folder as it ends. Run again, it goes on with those that are missing; a training that was stopped
goes on where it was.

Frames lie symmetrically in time, so that a bag of them tells no direction; those of DiST do not. For each set of
frames that a network sees, a probe that is blind to order says what such a bag tells: direction counts above that.

Two stores beside the networks' own hold what those probes read: all 20 frames of each video, and DiST's 8. DiST is
played backwards from the latter, which has tokens of each of them. All three take 40 GB.
"""

from __future__ import annotations

import argparse
import base64
import csv
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import describe_machine, format_table, keep
from _stores import change_store
from _trainings import Lines

from s4v.demo.captions import prompt_motion
from s4v.demo.pipeline import EXTRACTION
from s4v.demo.scenes import MOTIONS, SHAPES
from s4v.demo.scores import judge_answers, judge_reversal, reverse_label, split_label
from s4v.demo.world import ANNOTATIONS_NAME, NUM_FRAMES, WorldConfig, write_world
from s4v.extract.config import ExtractConfig
from s4v.extract.decode.sampling import pick_offset_frames
from s4v.extract.extraction import extract_dataset
from s4v.store.manifest import read_table
from s4v.store.offsets import PixelOffset
from s4v.store.reader import StoreReader, open_store
from s4v.store.writer import RowTokens
from s4v.train.allocator import keep_freed_memory
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run
from s4v.train.networks.zero_shot import classify_zero_shot
from s4v.train.paired import Answers, average_answers, find_difference
from s4v.train.step_log import read_steps

FRAMES = 4
SEEDS = 3
REFERENCE = "side4video"
"""What the others are compared with."""

HELD_OUT_SHARE = 0.1
CHOICE_SHARE = 0.4
"""Of an arm's epochs, in which its rate is chosen: the rate's cosine ends with them."""

_OWN, _DENSE, _WHOLE = "own", "dense", "whole"
"""The three stores: that of the networks, DiST's frames with tokens of each, and all frames."""

_AROUND = (-2, -1, 0, 1, 2, "0.5step")
_DISTS_OFFSETS = (0, "0.5step")
_DRAWS = 10_000

BATCH = 32
STEP_ROUNDS = 3
STEPS_A_LINE = 5


@dataclass(frozen=True)
class Arm:
    """One line of the table."""

    name: str
    head: str
    rates: tuple[float, ...]
    epochs: int
    recipe: dict[str, Any] = field(default_factory=dict)
    store: str = _OWN
    frames: int = FRAMES
    sees: int = FRAMES
    """Frames of the source whose pixels or tokens it reads."""
    probe: str = "order-blind, 4 frames"
    """Which arm is blind to order and sees the same frames."""


_SIDE = {"side_width": 64}
_SIDE_RATES = (1.5e-3, 5e-3, 1.5e-2)
_PROBE_RATES = (1e-3, 3e-3, 1e-2)
_PROBE: dict[str, Any] = {"weight_decay": None, "label_smoothing": None}  # its own

ARMS = (
    Arm("side4video", "side4video", _SIDE_RATES, 10, _SIDE),
    Arm("side4video, light", "side4video", _SIDE_RATES, 10, {**_SIDE, "layers": (1, 3, 5)}),
    Arm("tds-clip", "tds-clip", _SIDE_RATES, 10, _SIDE, sees=20, probe="order-blind, 20 frames"),
    Arm(
        "dist",
        "dist",
        (5e-4, 1.5e-3, 5e-3),
        10,
        {**_SIDE, "set": ("temporal_width=24",)},
        sees=8,
        probe="order-blind, 8 frames of DiST",
    ),
    Arm("attentive", "attentive", (5e-4, 1.5e-3, 5e-3), 10),
    Arm("order-blind, 4 frames", "linear", _PROBE_RATES, 30, _PROBE),
    Arm("order-blind, 8 frames of DiST", "linear", _PROBE_RATES, 30, _PROBE, store=_DENSE, frames=8, sees=8),
    Arm("order-blind, 20 frames", "linear", _PROBE_RATES, 30, _PROBE, store=_WHOLE, frames=NUM_FRAMES, sees=NUM_FRAMES),
)
ZERO_SHOT = "zero-shot"


LABELS = {prompt_motion(shape, motion): f"{shape} {motion}" for shape in SHAPES for motion in MOTIONS}
"""The world's label of each class, by its sentence."""


def make_stores(folder: Path, world: WorldConfig, device: str, wanted: set[str]) -> None:
    """The world and those of its three stores that are wanted, unless they are there."""
    annotations = folder / "sentences.csv"
    if not annotations.is_file():
        write_world(folder / "world", world)
        write_sentences(folder / "world" / ANNOTATIONS_NAME, annotations)
    shared = {
        **EXTRACTION,
        "root": folder / "world",
        "annotations": annotations,
        "columns": {"label": "sentence"},
        "layers": "all",
        "dtype": "float16",
        "device": device,
    }
    own = {"out": name_store(folder, _OWN), "pixel_offsets": _AROUND, "class_template": "{}"}
    extract_dataset(ExtractConfig(**{**shared, **own}))
    if wanted & {_WHOLE, _DENSE}:
        extract_dataset(ExtractConfig(**{**shared, "out": name_store(folder, _WHOLE), "frames": {"": NUM_FRAMES}}))
    if _DENSE in wanted:
        thin_store(open_store(name_store(folder, _WHOLE)), name_store(folder, _DENSE), find_dense_frames())


def thin_store(whole: StoreReader, out: Path, picked: list[int]) -> None:
    """A store of some frames of each row of another, which holds all of them."""
    layout = replace(whole.layout, num_frames=len(picked), rows_per_shard=0, frames_per_block=len(picked))
    change_store(
        whole,
        out,
        layout,
        whole.codec,
        partial(take_frames, whole, picked),
        lambda result: replace(
            result,
            num_cached_frames=len(picked),
            frame_indices=picked,
            timestamps_s=[(result.timestamps_s or [])[place] for place in picked],
            eval_clips=[list(range(len(picked)))],
        ),
    )


def write_sentences(annotations: Path, out: Path) -> None:
    """The world's table with classes as sentences: the text tower knows captions' words, and not those of labels."""
    with annotations.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with out.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["video_id", "path", "split", "caption", "sentence"], extrasaction="ignore")
        table.writeheader()
        table.writerows({**row, "sentence": prompt_motion(*split_label(row["shape_motion"]))} for row in rows)


def find_stores(arms: Sequence[Arm], options: argparse.Namespace) -> set[str]:
    """What arms read; DiST is played backwards from a store of its own."""
    if options.steps or options.step_of:
        return {_OWN}
    return {arm.store for arm in arms} | {_DENSE for arm in arms if arm.head == "dist"}


def name_store(folder: Path, store: str) -> Path:
    """Where a store lies."""
    return folder / f"{store}.zarr"


def find_dense_frames() -> list[int]:
    """DiST's: each cached frame and the one half a step behind it."""
    offsets = [PixelOffset.of(offset) for offset in _DISTS_OFFSETS]
    return [place for pair in pick_offset_frames("uniform", NUM_FRAMES, FRAMES, 1, offsets) for place in pair]


def take_frames(store: StoreReader, picked: Sequence[int], row: int) -> RowTokens:
    """Some frames of a row."""
    return RowTokens(**{name: values[:, picked] for name, values in store.read_row(row, 1, NUM_FRAMES).items()})


@dataclass(frozen=True)
class Job:
    """One training: of a rate, on nine tenths, or of a seed, on all."""

    arm: Arm
    folder: Path
    device: str
    rate: float
    seed: int | None
    """None chooses."""
    epochs: int

    @property
    def key(self) -> tuple[str, float | None, int | None]:
        """What tells it from others; a seed has one rate alone."""
        return self.arm.name, self.rate if self.seed is None else None, self.seed

    @property
    def run(self) -> Path:
        """Its folder."""
        stem = self.arm.name.replace(",", "").replace(" ", "-")
        return self.folder / "runs" / (f"{stem}-rate-{self.rate:g}" if self.seed is None else f"{stem}-{self.seed}")

    def configure(self) -> TrainConfig:
        """As a training takes it."""
        recipe: dict[str, Any] = {
            "warmup_epochs": 1.0,
            "weight_decay": 0.05,
            "label_smoothing": 0.0,
            "batch_size": BATCH,
        }
        return TrainConfig(
            features=name_store(self.folder, self.arm.store),
            out=self.run,
            head=self.arm.head,
            frames=self.arm.frames,
            epochs=self.epochs,
            validate_every=self.epochs,
            learning_rate=self.rate,
            seed=self.seed or 0,
            hold_out=HELD_OUT_SHARE if self.seed is None else None,
            batch_size=BATCH,
            device=self.device,
            resume=True,
            **{**recipe, **self.arm.recipe},
        )


def do(job: Job) -> dict[str, Any]:
    """Train, and evaluate what was trained on all."""
    trained = train_run(job.configure())
    line: dict[str, Any] = {
        "arm": job.arm.name,
        "seed": job.seed,
        "rate": job.rate,
        "seconds": trained["seconds"],
        "parameters": trained["parameters"],
        "top1": trained["last"]["val_top1"],
    }
    if job.seed is None:
        return line
    answers = {split: evaluate(job, split) for split in ("val", "novel")}
    answers["backwards"] = evaluate(job, "val", is_backwards=True)
    return {**line, "answers": {name: pack(own) for name, own in answers.items()}}


def evaluate(job: Job, split: str, *, is_backwards: bool = False) -> list[str]:
    """What the last checkpoint answers for each video of a split, in row order."""
    store = _DENSE if is_backwards and job.arm.head == "dist" else job.arm.store
    features = name_store(job.folder, store)
    evaluate_run(job.run, features=features, split=split, checkpoint="last", is_backwards=is_backwards)
    name = f"{split}_backwards" if is_backwards else split
    answers: list[str] = read_table(job.run / f"predictions_{name}.parquet", ["predicted"])["predicted"].to_pylist()
    return answers


def pack(answers: Sequence[str]) -> str:
    """Answers as text, a byte each: the place of the class."""
    return base64.b64encode(bytes(list_classes().index(answer) for answer in answers)).decode()


def unpack(text: str) -> list[str]:
    """What `pack` packed, as labels of the world."""
    return [LABELS[list_classes()[place]] for place in base64.b64decode(text)]


def list_classes() -> list[str]:
    """Every shape in every motion, as sentences, sorted: the classes of the stores."""
    return sorted(LABELS)


class Results(Lines):
    """Lines of three kinds: a rate that was tried, a seed that was trained, how long steps took."""

    def add_training(self, found: dict[str, Any]) -> None:
        """Keep a training's figures, and say them."""
        self.append(found)
        what = f"rate {found['rate']:g}" if found["seed"] is None else f"seed {found['seed']}"
        print(f"{found['arm']}, {what}: {found['top1']:.1%} in {found['seconds']:.0f} s", flush=True)

    def add_step(self, found: dict[str, Any]) -> None:
        """Keep how long a step took, and say it."""
        self.append(found)
        print(f"{found['arm']}: {1e3 * found['step_s']:.0f} ms, {found['memory_bytes'] / 1e9:.2f} GB", flush=True)

    def list_steps(self, arm: str) -> list[dict[str, Any]]:
        """Of an arm, round after round."""
        return [line for line in self.done if line["arm"] == arm and "step_s" in line]

    def list_choices(self, arm: str) -> dict[float, float]:
        """Top-1 of held-out training videos, by rate."""
        return {line["rate"]: line["top1"] for line in self.done if (line["arm"], line.get("seed", 0)) == (arm, None)}

    def list_seeds(self, arm: str) -> list[dict[str, Any]]:
        """Of an arm, in their order."""
        own = [line for line in self.done if line["arm"] == arm and line.get("seed") is not None]
        return sorted(own, key=lambda line: line["seed"])


def plan_jobs(lines: Results, arms: Sequence[Arm], options: argparse.Namespace) -> list[Job]:
    """What can be trained now: an arm's seeds once its rate is chosen, and seed after seed of all arms."""
    jobs: list[tuple[int, Job]] = []
    for arm in arms:
        make = partial(Job, arm, options.folder, options.device)
        choices, seeds = lines.list_choices(arm.name), {line["seed"] for line in lines.list_seeds(arm.name)}
        missing = [rate for rate in arm.rates if rate not in choices]
        epochs = max(1, round(arm.epochs * options.share))
        shorter = max(1, round(epochs * CHOICE_SHARE))
        jobs += [(-1, make(rate=rate, seed=None, epochs=shorter)) for rate in missing]
        if not missing:
            rate = max(arm.rates, key=lambda rate: choices[rate])
            jobs += [(seed, make(rate=rate, seed=seed, epochs=epochs)) for seed in range(SEEDS) if seed not in seeds]
    return [job for _, job in sorted(jobs, key=lambda pair: pair[0])]


def work(lines: Results, arms: Sequence[Arm], options: argparse.Namespace) -> None:
    """Train what is missing, several trainings side by side; none begins when the minutes are over."""
    ends = time.monotonic() + 60 * options.minutes
    context = multiprocessing.get_context("spawn")
    threads = max(1, (torch.get_num_threads()) // options.workers)
    running: dict[Future[dict[str, Any]], Job] = {}
    with ProcessPoolExecutor(options.workers, mp_context=context, initializer=prepare, initargs=(threads,)) as pool:
        while True:
            busy = {job.key for job in running.values()}
            waiting = [job for job in plan_jobs(lines, arms, options) if job.key not in busy]
            while waiting and len(running) < options.workers and time.monotonic() < ends:
                job = waiting.pop(0)
                running[pool.submit(do, job)] = job
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                lines.add_training(future.result())


def prepare(threads: int) -> None:
    """A worker: its share of the cores."""
    keep_freed_memory()
    torch.set_num_threads(threads)


def ask_frozen_model(folder: Path) -> dict[str, str]:
    """What the backbone answers, asked with captions of all classes; packed, by split."""
    store = open_store(name_store(folder, _OWN))
    prompts = {sentence: [sentence] for sentence in list_classes()}
    return {split: pack(classify_zero_shot(store, prompts, split=split).answers) for split in ("val", "novel")}


def summarise(lines: Results, folder: Path) -> list[dict[str, Any]]:
    """A line of the table for each arm that was trained with a seed, and one of what is not trained."""
    labels = read_labels(folder)
    arms = {arm.name: arm for arm in ARMS}
    trained = {name: lines.list_seeds(name) for name in arms if lines.list_seeds(name)}
    answers = {
        name: [{k: unpack(v) for k, v in one["answers"].items()} for one in own] for name, own in trained.items()
    }
    answers[ZERO_SHOT] = [{split: unpack(text) for split, text in ask_frozen_model(folder).items()}]
    summaries = []
    for name, own in answers.items():
        arm, found = arms.get(name), trained.get(name, [])
        one = {"arm": name, "seeds": len(found), "sees": arm.sees if arm else FRAMES, **judge(labels, own)}
        if arm is not None:
            one |= describe_choice(arm, lines.list_choices(name))
            if steps := lines.list_steps(name):
                one["step_s"] = statistics.median(step["step_s"] for step in steps)
                one["memory_bytes"] = statistics.median(step["memory_bytes"] for step in steps)
            one |= {"parameters": found[0]["parameters"], "epochs": arm.epochs, "probe": arm.probe}
            if arm.probe in answers and arm.probe != name:
                one["above_probe"] = compare_directions(labels["val"], own, answers[arm.probe])
        if name != REFERENCE and REFERENCE in answers:
            one["difference"] = asdict(compare_top1(labels["val"], own, answers[REFERENCE]))
        summaries.append(one)
    return summaries


def read_labels(folder: Path) -> dict[str, list[str]]:
    """Of the videos of each split, in row order."""
    table = open_store(name_store(folder, _OWN)).read_manifest(["split", "class_name", "status"]).to_pylist()
    return {
        split: [LABELS[row["class_name"]] for row in table if row["split"] == split and row["status"] == "ok"]
        for split in ("val", "novel")
    }


def judge(labels: dict[str, list[str]], seeds: Sequence[dict[str, list[str]]]) -> dict[str, Any]:
    """Shares of all seeds together, and the deviation of top-1 between them."""
    every = [judge_answers(labels["val"], own["val"]) for own in seeds]
    top1 = [one["both"].value for one in every]
    shares = {
        name: sum(one[name].hits for one in every) / sum(one[name].total for one in every)
        for name in ("both", "shape", "motion", "direction")
    }
    found: dict[str, Any] = {
        **shares,
        "top1_of_seeds": top1,
        "deviation": statistics.stdev(top1) if len(top1) > 1 else None,
        "novel": statistics.mean(judge_answers(labels["novel"], own["novel"])["both"].value for own in seeds),
    }
    if all("backwards" in own for own in seeds):
        reversed_labels = [reverse_label(label) for label in labels["val"]]
        shown = [judge_answers(reversed_labels, own["backwards"])["both"].value for own in seeds]
        turned = [judge_reversal(labels["val"], own["val"], own["backwards"]) for own in seeds]
        found["backwards"] = statistics.mean(shown)
        found["turned"] = sum(one.hits for one in turned) / max(1, sum(one.total for one in turned))
    return found


def describe_choice(arm: Arm, choices: dict[float, float]) -> dict[str, Any]:
    """The rate that was chosen, what all came to, and whether it is the lowest or the highest of them."""
    best = max(arm.rates, key=lambda rate: choices[rate])
    return {"rate": best, "choices": choices, "is_at_edge": best in (min(arm.rates), max(arm.rates))}


def compare_top1(labels: Sequence[str], ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> Any:
    """Top-1 of two arms, each averaged over its seeds, with a paired interval over videos."""

    def average(seeds: Sequence[dict[str, Any]]) -> Answers:
        names = tuple(map(str, range(len(labels))))
        return average_answers(
            [Answers("top1", names, (np.array(own["val"]) == np.array(labels)).astype(np.float64)) for own in seeds]
        )

    return find_difference(average(ours), average(theirs), REFERENCE)


def compare_directions(
    labels: Sequence[str], ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]
) -> tuple[float, float, float]:
    """How far the direction within pairs is above another arm's, and its 95 % interval: a bootstrap over videos."""

    def count(seeds: Sequence[dict[str, Any]]) -> np.ndarray:
        """Of each video (hits, answers that name the right pair), over the seeds."""
        counted = [
            [judge_answers([label], [said])["direction"] for label, said in zip(labels, own["val"], strict=True)]
            for own in seeds
        ]
        return np.array([[(one.hits, one.total) for one in own] for own in counted]).sum(axis=0)

    hits = np.concatenate([count(ours), count(theirs)], axis=1)

    def tell(sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]

    generator = np.random.default_rng(0)
    draws = np.stack(
        [generator.multinomial(len(hits), np.full(len(hits), 1 / len(hits))) @ hits for _ in range(_DRAWS)]
    )
    low, high = np.percentile(tell(draws), [2.5, 97.5])
    return float(tell(hits.sum(axis=0))), float(low), float(high)


def tabulate(summaries: Sequence[dict[str, Any]]) -> str:
    """Markdown."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    rows = []
    for one in summaries:
        spread = "" if one["deviation"] is None else f" ± {100 * one['deviation']:.1f}"
        beside = "" if "difference" not in one else tell_interval(
            one["difference"]["difference"], *one["difference"]["interval"]
        )  # fmt: skip
        above = tell_interval(*one["above_probe"]) if "above_probe" in one else ""
        rate = f"{one['rate']:g}{' (edge)' if one['is_at_edge'] else ''}" if "rate" in one else ""
        rows.append(
            [one["arm"], one["sees"], f"{one['parameters']:,}" if "parameters" in one else 0, rate, one["seeds"],
             percent(one["both"]) + spread, beside, percent(one["shape"]), percent(one["direction"]), above,
             percent(one.get("backwards")), percent(one["novel"]),
             f"{1e3 * one['step_s']:.0f} ms" if "step_s" in one else "",
             f"{one['memory_bytes'] / 1e9:.2f} GB" if "step_s" in one else ""]
        )  # fmt: skip
    heads = ["network", "frames seen", "trained weights", "rate", "seeds", "top-1, deviation of seeds",
             f"points from {REFERENCE}, paired 95 %", "shape", "direction within pairs",
             "points above its order-blind probe, 95 %", "played backwards", "novel", "step", "memory"]  # fmt: skip
    return format_table(heads, rows)


def tell_interval(value: float, low: float, high: float) -> str:
    """`+1.2 [-0.3, 2.8]`, in points."""
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def time_steps(lines: Results, arms: Sequence[Arm], options: argparse.Namespace) -> None:
    """A training of one epoch of each arm in a process of its own, in turns, with all cores."""
    for number in range(STEP_ROUNDS):
        for arm in arms:
            if (arm.name, number) in {(line["arm"], line.get("round")) for line in lines.done}:
                continue
            command = [sys.executable, "-P", *sys.argv, "--step-of", arm.name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(output.splitlines()[-1])
            lines.add_step({"arm": arm.name, "round": number, **found})


def time_one(arm: Arm, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step of 32 clips, without waiting for them, the median of an epoch's; and the most memory."""
    job = Job(arm, options.folder, options.device, arm.rates[0], -1, 1)
    shutil.rmtree(job.run, ignore_errors=True)
    train_run(replace(job.configure(), log_every=STEPS_A_LINE))
    steps = read_steps(job.run)[1:]
    seconds = [BATCH / one["clips_per_s"] * (1 - one["data_wait_share"]) for one in steps]
    return {"step_s": statistics.median(seconds), "memory_bytes": steps[-1]["memory_bytes"]}


def main() -> None:
    """Train what is missing within the minutes, and write the table of what is there; or time steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--train", type=int, default=WorldConfig().num_train)
    parser.add_argument("--val", type=int, default=2400)
    parser.add_argument("--novel", type=int, default=600)
    parser.add_argument("--share", type=float, default=1.0, help="of all epochs, for a short try")
    parser.add_argument("--minutes", type=float, default=60, help="no training begins after so many")
    parser.add_argument("--workers", type=int, default=2, help="trainings side by side")
    parser.add_argument("--only", action="append", help="arms, by name; repeatable")
    parser.add_argument("--known", type=Path, help="a comparison.json, whose trainings are done already")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--step-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    world = WorldConfig(num_train=options.train, num_val=options.val, num_novel=options.novel)
    arms = [arm for arm in ARMS if not options.only or arm.name in options.only]
    make_stores(options.folder, world, options.device, find_stores(arms, options))
    settings = {name: getattr(options, name) for name in ("train", "val", "novel", "share")}
    lines = Results(options.folder / "results.jsonl", settings, options.known)
    if options.step_of:
        print(json.dumps(time_one(next(arm for arm in ARMS if arm.name == options.step_of), options)))
        return
    if options.steps:
        time_steps(lines, [arm for arm in arms if arm.store == _OWN], options)
    else:
        work(lines, arms, options)
    summaries = summarise(lines, options.folder)
    result = {"machine": describe_machine("torch"), "world": asdict(world), "summaries": summaries, "runs": lines.done}
    keep("comparison", result, tabulate(summaries))


if __name__ == "__main__":
    main()
