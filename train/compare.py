"""`s4v compare`: the side network beside the baselines that a reviewer would ask for, from one store."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..device import find_device
from ..errors import ConfigError, S4vError
from ..files import write_json, write_text
from ..store.reader import StoreReader, open_store
from .config import TrainConfig
from .evaluate import evaluate_run
from .loop import train_run
from .networks import NETWORKS
from .networks.contract import NetworkKind
from .settings import resolve_preset
from .tasks.ranks import rank_own
from .tasks.recognition import Recognition
from .tasks.recognition_metrics import find_interval

_log = logging.getLogger(__name__)


def list_methods() -> list[str]:
    """What can be compared, in the table's order; the first is what the others stand beside."""
    return [kind.name for kind in NETWORKS.values() if Recognition.name in kind.tasks]


@dataclass(frozen=True, slots=True)
class Compared:
    """One line of the table."""

    method: str
    reads: str
    parameters: int
    """Trained ones."""
    epochs: int | None
    """Of each training; None of what is not trained."""
    videos: int
    """Held out."""
    top1: float
    """Mean over seeds."""
    interval: tuple[float, float]
    """95 % over videos, around that mean."""
    deviation: float | None
    """Standard deviation over seeds; None of one."""
    top5: float | None
    mean_class_accuracy: float
    seconds: float | None
    """Of one training."""


def compare_methods(
    base: TrainConfig,
    *,
    methods: Sequence[str] | None = None,
    seeds: int = 1,
    untrained: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Compared]:
    """Train every method from one store, evaluate each on the validation split, and leave compare.json and compare.md.

    Run again, it goes on where it was. The last checkpoint counts: the best one was chosen on the same videos.

    Args:
        base: What all trainings share; `out` is the folder of them all, and head and seed are set here.
        methods: Of `list_methods`, in the order of the lines; None takes all.
        seeds: Trainings of each, from seed 0 up.
        untrained: Options of what is not trained, such as `prompt` and `weights` of zero-shot.
        say: Told what is under way.

    Raises:
        ConfigError: If a method is not known, or there is no seed.
    """
    known = list_methods()
    methods = known if methods is None else methods
    if unknown := [method for method in methods if method not in known]:
        raise ConfigError(f"--methods takes {', '.join(known)}; found {', '.join(unknown)}")
    if seeds < 1:
        raise ConfigError(f"--seeds must be at least 1; found {seeds}")
    store = open_store(base.features)
    # All are trained as long, on as many clips a step, as the side network; rates and weight decay are each one's own.
    side = resolve_preset(replace(base, head=known[0]), store)
    base = replace(base, epochs=side.epochs, batch_size=side.batch_size, warmup_epochs=side.warmup_epochs)
    lines = []
    for method in methods:
        if not NETWORKS[method].is_trained:
            line = _ask(NETWORKS[method], store, base.val_split, untrained or {}, say)
        else:
            line = _train_and_evaluate(base, method, seeds, say)
        lines += [line] if line is not None else []
        _write(base.out, store, lines)
    return lines


def _train_and_evaluate(base: TrainConfig, method: str, seeds: int, say: Callable[[str], None]) -> Compared:
    evaluations, parameters, epochs, seconds = [], 0, 0, []
    for seed in range(seeds):
        out = base.out / f"{method}-{seed}"
        own = {"inputs": "all", "side_width": None} if method != list_methods()[0] else {}
        fields = {name: getattr(base, name) for name in TrainConfig.__dataclass_fields__}
        config = TrainConfig(**{**fields, "head": method, "out": out, "seed": seed, "resume": True, **own})
        say(f"training {method}{f', seed {seed}' if seeds > 1 else ''}")
        trained = train_run(config)
        parameters, epochs = trained["parameters"], trained["epochs"]
        seconds.append(trained["seconds"])
        evaluations.append(evaluate_run(out, split=base.val_split, checkpoint="last", device=find_device(base.device)))
    top1 = [one["top1"] for one in evaluations]
    videos = evaluations[0]["videos"]
    return Compared(
        method=method,
        reads=NETWORKS[method].reads,
        parameters=parameters,
        epochs=epochs,
        videos=videos,
        top1=float(np.mean(top1)),
        interval=find_interval(float(np.mean(top1)), videos),
        deviation=float(np.std(top1, ddof=1)) if seeds > 1 else None,
        top5=float(np.mean([one["top5"] for one in evaluations])) if "top5" in evaluations[0] else None,
        mean_class_accuracy=float(np.mean([one["mean_class_accuracy"] for one in evaluations])),
        seconds=float(np.mean(seconds)),
    )


def _ask(
    kind: NetworkKind, store: StoreReader, split: str, options: Mapping[str, Any], say: Callable[[str], None]
) -> Compared | None:
    """What is not trained; None, with the reason said, where there is no text tower worth asking."""
    say("asking the backbone")
    try:
        scores, labels = kind.score(store, split, **options)
    except S4vError as error:
        say(f"no {kind.name}: {error}")
        return None
    ranks = rank_own(scores, labels)
    right = ranks == 1
    return Compared(
        method=kind.name,
        reads=kind.reads,
        parameters=0,
        epochs=None,
        videos=len(labels),
        top1=float(right.mean()),
        interval=find_interval(float(right.mean()), len(labels)),
        deviation=None,
        top5=float((ranks <= 5).mean()) if scores.shape[1] > 5 else None,
        mean_class_accuracy=float(np.mean([right[labels == label].mean() for label in np.unique(labels)])),
        seconds=None,
    )


def _write(out: Path, store: StoreReader, lines: Sequence[Compared]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "compare.json", {"store": str(store.path), "methods": [asdict(line) for line in lines]})
    write_text(out / "compare.md", "\n".join(render_table(lines)) + "\n")


def render_table(lines: Sequence[Compared]) -> list[str]:
    """A Markdown table, line by line."""
    header = ("method", "reads", "trained weights", "epochs", "top-1", "95 %", "top-5", "mean class", "seconds")
    rows = [
        (
            line.method,
            line.reads,
            f"{line.parameters:,}",
            "" if line.epochs is None else line.epochs,
            f"{line.top1:.1%}" + (f" ± {line.deviation:.1%}" if line.deviation is not None else ""),
            f"{100 * line.interval[0]:.0f} to {100 * line.interval[1]:.0f}",
            "" if line.top5 is None else f"{line.top5:.1%}",
            f"{line.mean_class_accuracy:.1%}",
            "" if line.seconds is None or math.isnan(line.seconds) else f"{line.seconds:.0f}",
        )
        for line in lines
    ]
    return [f"| {' | '.join(map(str, cells))} |" for cells in (header, ("---",) * len(header), *rows)]
