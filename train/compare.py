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
from ..errors import ConfigError, S4vError, StoreMismatchError
from ..files import write_json, write_text
from ..store.reader import StoreReader, open_store
from .clips import find_labelled_rows
from .config import TrainConfig
from .evaluate import evaluate_run
from .loop import train_run
from .networks import NETWORKS, find_network
from .networks.contract import NetworkKind
from .paired import Answers, Difference, average_answers, find_difference
from .run_folder import CONFIG_NAME, open_run
from .settings import require_what_is_read, resolve_preset
from .sweep import SWEEP_NAME, sweep_heads
from .tasks import find_task
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
    learning_rate: float | None = None
    """Of each training; None of what is not trained."""
    weight_decay: float | None = None
    choice: str | None = None
    """How these two were chosen; None where nothing was chosen."""
    differences: tuple[Difference, ...] = ()
    """To each line above that was asked the same."""


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
    known, is_asked = list_methods(), methods is not None
    methods = known if methods is None else methods
    if unknown := [method for method in methods if method not in known]:
        raise ConfigError(f"--methods takes {', '.join(known)}; found {', '.join(unknown)}")
    if seeds < 1:
        raise ConfigError(f"--seeds must be at least 1; found {seeds}")
    store = open_store(base.features)
    # All are trained as long, on as many clips a step and on the same videos as the side network; rates and weight
    # decay are each one's own.
    side = resolve_preset(replace(base, head=known[0]), store)
    base = replace(base, epochs=side.epochs, batch_size=side.batch_size, warmup_epochs=side.warmup_epochs)
    lines: list[Compared] = []
    answers: dict[str, Answers | None] = {}
    for method in _leave_out_unserved(base, methods, store, say, is_asked=is_asked):
        if not NETWORKS[method].is_trained:
            line, own = _ask(NETWORKS[method], store, base.val_split, untrained or {}, say)
        else:
            shortest = _find_shortest(base, side, method)
            try:
                line, own = _train_and_evaluate(replace(base, min_video_frames=shortest), method, seeds, say)
            except StoreMismatchError as error:  # its clips may be others than those of the rest
                if is_asked:
                    raise
                say(f"no {method}: {error}")
                continue
        if line is not None:
            lines.append(replace(line, differences=_find_differences(own, answers)))
            answers[method] = own
        _write(base.out, store, lines)
    return lines


def _leave_out_unserved(
    base: TrainConfig, methods: Sequence[str], store: StoreReader, say: Callable[[str], None], *, is_asked: bool
) -> list[str]:
    """The methods that read nothing that the store lacks; told before any training.

    Raises:
        StoreMismatchError: If one that was asked for does, or all do.
    """
    served = []
    for method in methods:
        kind = NETWORKS[method]
        try:
            if kind.is_trained:
                require_what_is_read(_configure(base, method), store)
        except StoreMismatchError as error:
            if is_asked or len(methods) == 1:
                raise
            say(f"no {method}: {error}")
        else:
            served.append(method)
    return served


def compare_runs(
    runs: Sequence[Path],
    *,
    features: Path,
    split: str = "val",
    checkpoint: str = "best",
    device: str = "auto",
    out: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Evaluate runs that are there on one split of one store, and say how far they are apart.

    Args:
        runs: Two or more, of one task.
        features: The store.
        split: Of it.
        checkpoint: Of each run: best or last.
        device: Where to compute.
        out: Where compare.json, compare.md and compare.html go; None writes nothing.
        say: Told what is under way.

    Returns:
        Of each run: run, figure, share, questions, and differences to the runs before it.

    Raises:
        ConfigError: If there are fewer than two runs, or one is named twice.
        StoreMismatchError: If a run does not fit the store, or two were not asked the same.
    """
    if len(runs) < 2 or len(set(map(str, runs))) < len(runs):
        raise ConfigError(f"--run takes two or more different runs, each with an option of its own; found {len(runs)}")
    answers: dict[str, Answers | None] = {}
    lines: list[dict[str, Any]] = []
    for path in runs:
        say(f"evaluating {path}")
        evaluate_run(path, features=features, split=split, checkpoint=checkpoint, device=find_device(device))
        own = find_task(open_run(path).shape.task).read_answers(path, split)
        if own is None:
            raise ConfigError(f"{path} is of a task whose answers are not right or wrong: its figures are in s4v eval")
        differences = [asdict(one) for one in _find_differences(own, answers)]
        share, questions = float(np.mean(own.is_right)), len(own.videos)
        answers[str(path)] = own
        lines.append(
            {"run": str(path), "figure": own.figure, "share": share, "questions": questions, "differences": differences}
        )
    if out is not None:
        table = render_runs(lines)
        _write_all(out, {"store": str(features), "split": split, "checkpoint": checkpoint, "runs": lines}, table)
    return lines


def _find_shortest(base: TrainConfig, side: TrainConfig, method: str) -> int | None:
    """`min_video_frames` of a method: the side network's, for all learn from the same videos.

    What was begun goes on with what it has.
    """
    if base.min_video_frames is not None:
        return base.min_video_frames
    for folder in (f"{method}-0", f"{method}-choice/heads/000", f"{side.head}-0"):
        if (base.out / folder / CONFIG_NAME).is_file():
            recorded: int = open_run(base.out / folder).config.get("min_video_frames", 0)
            return recorded
    return side.min_video_frames


def _find_differences(own: Answers | None, others: Mapping[str, Answers | None]) -> tuple[Difference, ...]:
    if own is None:
        return ()
    return tuple(find_difference(own, theirs, name) for name, theirs in others.items() if theirs is not None)


def _choose(config: TrainConfig, say: Callable[[str], None]) -> tuple[TrainConfig, str | None]:
    """A method's rate and decay, and how they were chosen: on held-out training videos, where its kind names several.

    A rate that was given is everybody's; a training that was begun without a choice goes on as it was begun.
    """
    kind, folder = find_network(config.head), config.out.with_name(f"{config.head}-choice")
    is_begun = (config.out / CONFIG_NAME).is_file() and not (folder / SWEEP_NAME).is_file()
    if is_begun:
        begun = open_run(config.out).config
        return replace(config, learning_rate=begun["learning_rate"], weight_decay=begun["weight_decay"]), None
    if config.learning_rate is not None or not kind.tried_rates:
        return config, None
    say(f"choosing the rate of {config.head}")
    sweep = sweep_heads(
        replace(config, out=folder), learning_rates=kind.tried_rates, weight_decays=kind.tried_decays or None, say=say
    )
    best = sweep.winner
    choice = (
        f"{config.head}: rate {best.learning_rate:g} and decay {best.weight_decay:g} were chosen of "
        f"{len(sweep.heads)}, trained in {sweep.reads} read{'s' if sweep.reads > 1 else ''} on shared batches, by "
        f"top-1 on {sweep.held_out_videos} held-out training videos ({best.top:.1%}). Then it was trained on all."
    )
    return replace(config, learning_rate=best.learning_rate, weight_decay=best.weight_decay), choice


def _configure(base: TrainConfig, method: str) -> TrainConfig:
    """A method's first training."""
    own = {"inputs": "all", "side_width": None} if method != list_methods()[0] else {}
    fields = {name: getattr(base, name) for name in TrainConfig.__dataclass_fields__}
    return TrainConfig(**{**fields, "head": method, "out": base.out / f"{method}-0", "seed": 0, "resume": True, **own})


def _train_and_evaluate(
    base: TrainConfig, method: str, seeds: int, say: Callable[[str], None]
) -> tuple[Compared, Answers | None]:
    config, choice = _choose(_configure(base, method), say)
    runs = [replace(config, out=base.out / f"{method}-{seed}", seed=seed) for seed in range(seeds)]
    trainings = []
    for run in runs:
        say(f"training {method}{f', seed {run.seed}' if seeds > 1 else ''}")
        trainings.append(train_run(run))
    evaluations = [
        evaluate_run(run.out, split=base.val_split, checkpoint="last", device=find_device(base.device)) for run in runs
    ]
    answers = [Recognition.read_answers(run.out, base.val_split) for run in runs]
    top1 = [one["top1"] for one in evaluations]
    videos, trained = evaluations[0]["videos"], open_run(runs[0].out).config
    line = Compared(
        method=method,
        reads=NETWORKS[method].reads,
        parameters=trainings[-1]["parameters"],
        epochs=trainings[-1]["epochs"],
        videos=videos,
        top1=float(np.mean(top1)),
        interval=find_interval(float(np.mean(top1)), videos),
        deviation=float(np.std(top1, ddof=1)) if seeds > 1 else None,
        top5=float(np.mean([one["top5"] for one in evaluations])) if "top5" in evaluations[0] else None,
        mean_class_accuracy=float(np.mean([one["mean_class_accuracy"] for one in evaluations])),
        seconds=float(np.mean([one["seconds"] for one in trainings])),
        learning_rate=trained["learning_rate"],
        weight_decay=trained["weight_decay"],
        choice=choice,
    )
    return line, average_answers(answers)


def _ask(
    kind: NetworkKind, store: StoreReader, split: str, options: Mapping[str, Any], say: Callable[[str], None]
) -> tuple[Compared | None, Answers | None]:
    """What is not trained; None, with the reason said, where there is no text tower worth asking."""
    say("asking the backbone")
    try:
        scores, labels = kind.score(store, split, **options)
    except S4vError as error:
        say(f"no {kind.name}: {error}")
        return None, None
    ranks = rank_own(scores, labels)
    right = ranks == 1
    line = Compared(
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
    rows = find_labelled_rows(store, split).rows
    ids = store.read_manifest(["video_id"])["video_id"].take(rows).to_pylist()
    return line, Answers("top1", tuple(ids), right.astype(np.float64)) if len(ids) == len(right) else None


def _write(out: Path, store: StoreReader, lines: Sequence[Compared]) -> None:
    table, notes = render_table(lines), render_notes(lines)
    methods = {"store": str(store.path), "methods": [asdict(line) for line in lines]}
    _write_all(out, methods, table, notes)


def _write_all(out: Path, facts: Mapping[str, Any], table: Sequence[str], notes: Sequence[str] = ()) -> None:
    """compare.json, compare.md and a page."""
    from ..pages import draw_table, escape, write_page  # matplotlib takes a second

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "compare.json", dict(facts))
    write_text(out / "compare.md", "\n".join([*table, *(f"\n{note}" for note in notes)]) + "\n")
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    sections = [
        f"<h1>{escape(out.name)}</h1><p class='note'>{escape(facts['store'])}</p>",
        draw_table(header, rows),
        *(f"<p>{escape(note)}</p>" for note in notes),
    ]
    write_page(out / "compare.html", f"s4v compare {out.name}", sections)


def render_table(lines: Sequence[Compared]) -> list[str]:
    """A Markdown table, line by line."""
    first = lines[0].method if lines else ""
    beside = f"beside {first}, paired 95 %"
    header = (
        "method",
        "reads",
        "trained weights",
        "epochs",
        "rate",
        "top-1",
        "95 %",
        beside,
        "top-5",
        "mean class",
        "seconds",
    )
    rows = [
        (
            line.method,
            line.reads,
            f"{line.parameters:,}",
            "" if line.epochs is None else line.epochs,
            "" if line.learning_rate is None else f"{line.learning_rate:g}" + (" *" if line.choice else ""),
            f"{line.top1:.1%}" + (f" ± {line.deviation:.1%}" if line.deviation is not None else ""),
            f"{100 * line.interval[0]:.0f} to {100 * line.interval[1]:.0f}",
            "".join(render_difference(asdict(one)) for one in line.differences if one.other == first),
            "" if line.top5 is None else f"{line.top5:.1%}",
            f"{line.mean_class_accuracy:.1%}",
            "" if line.seconds is None or math.isnan(line.seconds) else f"{line.seconds:.0f}",
        )
        for line in lines
    ]
    return [f"| {' | '.join(map(str, cells))} |" for cells in (header, ("---",) * len(header), *rows)]


def render_notes(lines: Sequence[Compared]) -> list[str]:
    """What stands under the table: how rates were chosen, and what the paired intervals are."""
    notes = [f"* {line.choice}" for line in lines if line.choice is not None]
    if any(line.differences for line in lines):
        notes.append(
            "Paired intervals are bootstraps over the same videos, in points; several trainings of one method are "
            "averaged. compare.json has those of any two lines."
        )
    return notes


def render_difference(difference: Mapping[str, Any]) -> str:
    """`+1.2 [-0.3, 2.8]`, in points."""
    low, high = difference["interval"]
    return f"{100 * difference['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def render_runs(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """A Markdown table of runs, each beside all before it."""
    header = ("run", lines[0]["figure"], "questions", "paired difference, 95 %")
    rows = [
        (
            line["run"],
            f"{line['share']:.1%}",
            line["questions"],
            "; ".join(f"{render_difference(one)} to {one['other']}" for one in line["differences"]),
        )
        for line in lines
    ]
    return [f"| {' | '.join(map(str, cells))} |" for cells in (header, ("---",) * len(header), *rows)]
