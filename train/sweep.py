"""`s4v sweep`: rates, decays and initialisations side by side in one read of the store, and a run of the best."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..device import is_first_process
from ..errors import ConfigError, EnvironmentFailedError, RunExistsError
from ..files import read_json, write_json
from ..store.reader import StoreReader, open_store
from .config import TrainConfig
from .fabric import resolve_device
from .loop import ReportEpoch, ReportHeads, train_heads, train_run
from .networks import find_network
from .run_folder import CONFIG_NAME, open_run
from .settings import plan_network, resolve_preset, take_recorded
from .tasks import find_task

SWEEP_NAME = "sweep.json"
WINNER_NAME = "winner"
"""The folder of the run on all of the training videos."""

HELD_OUT_SHARE = 0.1
"""Of the training videos, on which is chosen."""

# Weights, gradients and AdamW's two moments, in float32.
_BYTES_A_PARAMETER = 16

# Of a device's memory: the rest is for activations and batches.
_MEMORY_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class SweptHead:
    """One line of a sweep's table."""

    learning_rate: float
    weight_decay: float
    seed: int
    run: str
    epochs: int
    """Finished ones."""
    top: float | None
    """The task's figure of the last epoch, on the held-out videos: what is chosen by. None of a head without one."""
    best_epoch: int | None
    """With the highest figure."""
    best: float | None
    """That figure."""
    stopped: str | None
    """Why it stopped alone."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep came to."""

    out: Path
    figure: str
    heads: list[SweptHead]
    winner: SweptHead
    training_videos: int
    """That the heads were trained on."""
    held_out_videos: int
    reads: int
    """Of the store: heads of one read share its batches."""

    def describe(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "out": str(self.out)}


def sweep_heads(
    base: TrainConfig,
    *,
    learning_rates: Sequence[float] | None = None,
    weight_decays: Sequence[float] | None = None,
    seeds: Sequence[int] = (0,),
    heads_per_read: int | None = None,
    say: Callable[[str], None] = lambda _: None,
    report: ReportHeads = lambda *_: None,
) -> Sweep:
    """Train every combination on nine tenths of the training videos, and choose one on the tenth that is held out.

    Heads of one read share batches, in the order of the first seed. What decides is the figure of the last epoch: the
    winner is trained as long. Of equal ones the one with the lower loss wins, then the first. Run again, it goes on
    where it was.

    Args:
        base: What all share; `out` is the folder of the sweep, and rate, decay, seed and what is held out are set here.
        learning_rates: None takes the one that `base` comes to.
        weight_decays: The same.
        seeds: Of initialisations.
        heads_per_read: At most so many are trained together; None takes as many as half of the memory holds.
        say: Told what is under way.
        report: Told about each epoch.

    Raises:
        ConfigError: If a list is empty, or an option has no effect here.
        RunExistsError: If the folder holds another sweep, or something else.
        EnvironmentFailedError: If no head was left.
    """
    for option, values in {
        "--learning-rate": learning_rates,
        "--weight-decay": weight_decays,
        "--seeds": seeds,
    }.items():
        if values is not None and len(set(values)) != max(1, len(values)):
            raise ConfigError(f"{option} takes one or several different values; found {list(values)}")
    if base.wandb is not None:
        raise ConfigError("--wandb has no effect on a sweep: its heads leave metrics.jsonl alone")
    if heads_per_read is not None and heads_per_read < 1:
        raise ConfigError(f"--heads-per-read must be at least 1; found {heads_per_read}")
    store = open_store(base.features)
    share = base.hold_out if base.hold_out is not None else HELD_OUT_SHARE
    base = replace(base, order_seed=seeds[0], hold_out=share, resume=True)
    rates: Sequence[float | None] = learning_rates or [None]
    decays: Sequence[float | None] = weight_decays or [None]
    combinations = list(itertools.product(rates, decays, seeds))
    configs = [
        replace(base, learning_rate=rate, weight_decay=decay, seed=seed, out=base.out / "heads" / f"{place:03d}")
        for place, (rate, decay, seed) in enumerate(combinations)
    ]
    configs = _settle(configs, store)
    base = replace(base, min_video_frames=configs[0].min_video_frames)
    task = find_task(base.task)(base, store)
    per_read = _begin(base, configs, task.validation.rows, store, heads_per_read)
    summaries: list[dict[str, Any]] = []
    for number, first in enumerate(range(0, len(configs), per_read)):
        part = configs[first : first + per_read]
        say(f"training heads {first + 1} to {first + len(part)} of {len(configs)} in one read")
        summaries += train_heads(part, base.out / f"state-{number}.safetensors", report)
    heads = [_describe(config, one, task.figure) for config, one in zip(configs, summaries, strict=True)]
    winner = _choose(heads, summaries)
    sweep = Sweep(
        out=base.out,
        figure=task.figure,
        heads=heads,
        winner=winner,
        training_videos=len(np.unique(task.training.rows)),
        held_out_videos=len(np.unique(task.validation.rows)),
        reads=-(-len(configs) // per_read),
    )
    if is_first_process():
        saved = read_json(base.out / SWEEP_NAME)
        write_json(base.out / SWEEP_NAME, {**saved, **sweep.describe()})
    return sweep


def train_winner(base: TrainConfig, sweep: Sweep, report: ReportEpoch = lambda *_: None) -> dict[str, Any]:
    """Train the best of a sweep on all of the training videos: an ordinary run, in the order of its own seed."""
    best = sweep.winner
    config = replace(
        base,
        learning_rate=best.learning_rate,
        weight_decay=best.weight_decay,
        seed=best.seed,
        hold_out=None,
        order_seed=None,
        resume=True,
        out=sweep.out / WINNER_NAME,
    )
    return train_run(config, report)


def render_sweep(sweep: Sweep) -> list[str]:
    """A Markdown table, line by line, and what it means."""
    figure = sweep.figure.removeprefix("val_")
    header = ("rate", "decay", "seed", "epochs", f"held-out {figure}", "best epoch", f"its {figure}", "")
    rows = [
        (
            f"{head.learning_rate:g}",
            f"{head.weight_decay:g}",
            head.seed,
            head.epochs,
            "" if head.top is None else f"{head.top:.1%}",
            "" if head.best_epoch is None else head.best_epoch,
            "" if head.best is None else f"{head.best:.1%}",
            "not finite" if head.stopped is not None else "chosen" if head == sweep.winner else "",
        )
        for head in sweep.heads
    ]
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (header, ("---",) * len(header), *rows)]
    reads = "one read" if sweep.reads == 1 else f"each of {sweep.reads} reads"
    return [
        *lines,
        f"Heads in {reads} share batches: they are no independent trainings. Each was trained on "
        f"{sweep.training_videos} training videos; the last epoch's {figure} on {sweep.held_out_videos} others chose.",
    ]


def _settle(configs: Sequence[TrainConfig], store: StoreReader) -> list[TrainConfig]:
    """Heads with rate, decay and shortest video as the first one was begun, else as their options come to."""
    first = configs[0].out
    begun = open_run(first) if (first / CONFIG_NAME).is_file() else None
    settled = []
    for config in configs:
        full = resolve_preset(config if begun is None else take_recorded(config, begun), store)
        names = ("learning_rate", "weight_decay", "min_video_frames")
        settled.append(replace(config, **{name: getattr(full, name) for name in names}))
    return settled


def _begin(
    base: TrainConfig,
    configs: Sequence[TrainConfig],
    held_rows: np.ndarray,
    store: StoreReader,
    heads_per_read: int | None,
) -> int:
    """Make the folder, or see that it holds this sweep; how many heads go into a read, which the folder remembers."""
    heads = [{"learning_rate": c.learning_rate, "weight_decay": c.weight_decay, "seed": c.seed} for c in configs]
    ids = store.read_manifest(["video_id"])["video_id"]
    held_out = ids.take(np.unique(held_rows)).to_pylist()
    settings: dict[str, Any] = {"grid": heads, "held_out": held_out, "head": base.head, "task": base.task}
    path = base.out / SWEEP_NAME
    if path.is_file():
        saved = read_json(path)
        differences = [
            f"{name} {saved.get(name)} there, {value} here"
            for name, value in settings.items()
            if saved.get(name) != value
        ]
        if differences:
            raise RunExistsError(
                f"{base.out} holds a sweep that was begun with other settings: {'; '.join(differences)[:2000]}. "
                "Run the command that began it, or choose another --out."
            )
        return int(saved["heads_per_read"])
    per_read = heads_per_read or min(len(configs), count_heads_in_memory(configs[0], store))
    if is_first_process():
        if base.out.exists() and (not base.out.is_dir() or any(base.out.iterdir())):
            raise RunExistsError(f"{base.out} exists and holds no sweep: choose another --out, or remove it.")
        base.out.mkdir(parents=True, exist_ok=True)
        write_json(path, {**settings, "heads_per_read": per_read})
    return per_read


def count_heads_in_memory(config: TrainConfig, store: StoreReader) -> int:
    """How many heads' weights, gradients and moments half of the device's memory holds; at least 1.

    Activations are not counted: a batch's are freed before the next head sees it, but for heads of one stack, which
    keep little.
    """
    config = resolve_preset(config, store)
    network = find_network(config.head).build(plan_network(config, store))
    size = _BYTES_A_PARAMETER * sum(parameter.numel() for parameter in network.parameters())
    device_type, _ = resolve_device(config)
    if device_type == "cuda" and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, int(memory * _MEMORY_SHARE) // size)


def _describe(config: TrainConfig, summary: Mapping[str, Any], figure: str) -> SweptHead:
    best, last = summary["best"] or {}, summary["last"]
    assert config.learning_rate is not None and config.weight_decay is not None
    return SweptHead(
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        seed=config.seed,
        run=str(config.out),
        epochs=summary["epochs"],
        top=None if summary["stopped"] is not None else last.get(figure),
        best_epoch=best.get("epoch") if figure in best else None,
        best=best.get(figure),
        stopped=summary["stopped"],
    )


def _choose(heads: Sequence[SweptHead], summaries: Sequence[Mapping[str, Any]]) -> SweptHead:
    def rank(place: int) -> tuple[float, float]:
        top, loss = heads[place].top, summaries[place]["last"].get("val_loss", 0.0)
        assert top is not None
        return -top, loss

    candidates = [place for place, head in enumerate(heads) if head.top is not None]
    if not candidates:
        raise EnvironmentFailedError(f"no head of the sweep is left: {heads[0].stopped}")
    return heads[min(candidates, key=rank)]
