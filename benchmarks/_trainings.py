"""Trainings of several arms with the same seeds: each is a line of a file as it ends, told as differences of pairs."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run

_T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Quantiles of Student's t for an interval of 95 % over so many paired seeds; more take that of 10, a little wide."""


def train_and_evaluate(features: Path, run: Path, **recipe: Any) -> dict[str, Any]:
    """One training, validated once at its end; what was found of its last weights.

    Args:
        features: The store.
        run: Its folder; what a stopped training left there is replaced.
        recipe: Of the training.
    """
    shutil.rmtree(run, ignore_errors=True)
    trained = train_run(TrainConfig(features=features, out=run, validate_every=recipe["epochs"], **recipe))
    evaluated = evaluate_run(run, checkpoint="last")
    return {
        "top1": evaluated["top1"],
        "videos": evaluated["videos"],
        "seconds": trained["seconds"],
        "epochs": trained["epochs"],
    }


class Lines:
    """The file of results; a line that a kill has cut short is left out.

    Args:
        path: Of the file.
        settings: What lines must agree in to stand in one table.
        known: What `keep` left of an earlier run, perhaps of another folder: its `runs` count too. None is none.

    Raises:
        SystemExit: If it holds lines of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], known: Path | None = None) -> None:
        self.path = path
        self.settings = settings
        self.done: list[dict[str, Any]] = [] if known is None else json.loads(known.read_text(encoding="utf-8"))["runs"]
        for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if line not in self.done:
                self.done.append(line)
        if others := [line["settings"] for line in self.done if line["settings"] != settings]:
            raise SystemExit(f"{path} holds lines of {others[0]}, this run is {settings}: name another --folder")

    def holds(self, arm: str, seed: int) -> bool:
        """Whether that training is done."""
        return any((line["arm"], line["seed"]) == (arm, seed) for line in self.done)

    def add(self, arm: str, seed: int, found: dict[str, Any]) -> None:
        """Keep a training's figures, and say them."""
        self.append({"arm": arm, "seed": seed, **found})
        print(f"{arm}, seed {seed}: {found['top1']:.1%} in {found['seconds']:.0f} s", flush=True)

    def append(self, found: dict[str, Any]) -> None:
        """Keep a line."""
        line = {"settings": self.settings, **found}
        self.done.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def summarise_pairs(lines: Sequence[dict[str, Any]], arms: Sequence[str], reference: str) -> list[dict[str, Any]]:
    """Each arm's mean, and its difference to a reference over the seeds that both have, with a 95 % interval.

    Returns:
        By arm: arm, seeds, top1, top1_of_seeds, difference and reach (of the interval, to either side); the last two
        are None where no pair, or one alone, is there.
    """
    by_arm: dict[str, dict[int, float]] = {}
    for line in lines:
        by_arm.setdefault(line["arm"], {})[line["seed"]] = line["top1"]
    summaries = []
    for arm in arms:
        if not (found := by_arm.get(arm)):
            continue
        base = by_arm.get(reference, {})
        paired = [top1 - base[seed] for seed, top1 in found.items() if seed in base]
        quantile = _T_95.get(min(len(paired), 10))
        summaries.append(
            {
                "arm": arm,
                "seeds": len(found),
                "top1": statistics.mean(found.values()),
                "top1_of_seeds": [found[seed] for seed in sorted(found)],
                "difference": statistics.mean(paired) if paired else None,
                "reach": None if quantile is None else quantile * statistics.stdev(paired) / len(paired) ** 0.5,
            }
        )
    return summaries


def tell_difference(summary: dict[str, Any]) -> str:
    """Points from the reference, with their interval; `undecided` where it holds zero."""
    if summary["difference"] is None:
        return ""
    text = f"{100 * summary['difference']:+.1f}"
    if summary["reach"] is None:
        return text
    verdict = ", undecided" if abs(summary["difference"]) <= summary["reach"] else ""
    return f"{text} ± {100 * summary['reach']:.1f}{verdict}"
