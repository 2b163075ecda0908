"""What a video side network keeps per byte of cached token: accuracy in the small world against bytes of a frame.

    python benchmarks/accuracy_per_byte.py [--seeds 5] [--epochs 28] [--val 2000] [--device cuda] [--only "int8"]

One store for each codec, the same videos in all; side networks of the demo's recipe but for their epochs, the same
seeds in all. Every training that is done is a line of results.jsonl in --folder: run again with the same settings, it
goes on with those that are missing, and writes table and plot from those that are there. Bytes are those of what the
side network reads, and of the frames' embeddings: captions' texts are left out, for nothing here reads them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _report import RESULTS, check_bar, describe_machine, format_table, keep

from s4v.demo.pipeline import EXTRACTION, RECIPES
from s4v.demo.world import ANNOTATIONS_NAME, WorldConfig, write_world
from s4v.extract.config import ExtractConfig
from s4v.extract.extraction import extract_dataset
from s4v.store.info import describe_store
from s4v.store.reader import open_store
from s4v.train.allocator import keep_freed_memory
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run

WIDTH = 192
_T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Quantiles of Student's t for an interval of 95 % over so many paired seeds; more take that of 10, a little wide."""

_LABELS_BELOW = 75
"""Percent: names of points under it stand under them, out of the way of those above."""


@dataclass(frozen=True)
class Arm:
    """One point of the curve, or one control."""

    name: str
    store: dict[str, Any] = field(default_factory=dict)
    """What `s4v extract` is told beside what all arms are."""
    recipe: str = "side network"
    is_control: bool = False


ARMS = (
    Arm("float32", {"dtype": "float32"}),
    Arm("float16", {"dtype": "float16"}),
    Arm("float16, 5 bits", {"dtype": "float16", "keep_bits": 5}),
    Arm("float16, 2 bits", {"dtype": "float16", "keep_bits": 2}),
    Arm("int8", {"dtype": "int8"}),
    *(Arm(f"int8, K = D/{part}", {"dtype": "int8", "channels": WIDTH // part}) for part in (2, 4, 8, 16)),
    Arm("int8, last layer only", {"dtype": "int8", "layers": "5"}),
    Arm("tokens zeroed", {"dtype": "float32"}, recipe="pixels only", is_control=True),
    Arm("order-blind probe", {"dtype": "float32"}, recipe="linear probe", is_control=True),
)


def make_store(folder: Path, arm: Arm, device: str) -> dict[str, Any]:
    """Extract an arm's store unless it is there; returns what `s4v info` knows of it."""
    name = "-".join(str(value) for value in arm.store.values())
    path = folder / f"{name}.zarr"
    extract_dataset(
        ExtractConfig(
            **{
                **EXTRACTION,
                "root": folder / "world",
                "annotations": folder / "world" / ANNOTATIONS_NAME,
                "out": path,
                "device": device,
                **arm.store,
            }
        )
    )
    return describe_store(open_store(path))


def measure(folder: Path, arm: Arm, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm with one seed; a line of the results."""
    facts = make_store(folder, arm, options.device)
    run = folder / "runs" / f"{arm.name.replace(' ', '-').replace('/', '')}-{seed}"
    recipe = dict(RECIPES[arm.recipe])
    if recipe["head"] == "side4video":
        recipe["epochs"] = options.epochs
    recipe["validate_every"] = recipe["epochs"]  # once, at the end
    if run.exists():  # from a run that was stopped
        for file in run.iterdir():
            file.unlink()
        run.rmdir()
    trained = train_run(TrainConfig(features=Path(facts["store"]), out=run, seed=seed, device=options.device, **recipe))
    evaluated = evaluate_run(run, checkpoint="last")
    frames = facts["cached_frames"]
    held = {name: array["bytes"] for name, array in facts["arrays"].items() if not name.startswith("text/")}
    return {
        "arm": arm.name,
        "seed": seed,
        "settings": settings_of(options),
        "top1": evaluated["top1"],
        "videos": evaluated["videos"],
        "seconds": trained["seconds"],
        "epochs": trained["epochs"],
        "bytes_per_frame": sum(held.values()) / frames,
        "patch_bytes_per_frame": held["patches"] / frames,
        "variance_kept": min((one["variance_kept"] for one in facts["fidelity"]["layers"]), default=1.0)
        if facts["fidelity"]
        else 1.0,
        "machine": describe_machine("torch"),
    }


def settings_of(options: argparse.Namespace) -> dict[str, int]:
    """What lines must agree in to stand in one table."""
    return {name: getattr(options, name) for name in ("epochs", "train", "val")}


def read_lines(results: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of earlier runs; one that a kill has cut short is left out.

    Raises:
        SystemExit: If they were measured with other settings.
    """
    lines = []
    for text in results.read_text(encoding="utf-8").splitlines() if results.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    if others := [line["settings"] for line in lines if line["settings"] != settings_of(options)]:
        raise SystemExit(
            f"{results} holds lines of {others[0]}, this run is {settings_of(options)}: name another --folder"
        )
    return lines


def summarise(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each arm's difference to float32 over the seeds that both have, with a 95 % interval.

    A codec's top-1 is float32's mean plus that difference: means over other seeds cannot be compared.
    """
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        by_arm.setdefault(line["arm"], {})[line["seed"]] = line
    reference = {seed: line["top1"] for seed, line in by_arm.get("float32", {}).items()}
    summaries = []
    for arm in ARMS:
        found = by_arm.get(arm.name, {})
        if not found:
            continue
        first = next(iter(found.values()))
        paired = [line["top1"] - reference[seed] for seed, line in found.items() if seed in reference]
        difference = statistics.mean(paired) if paired else None
        quantile = _T_95.get(min(len(paired), 10))
        reach = None if quantile is None else quantile * statistics.stdev(paired) / len(paired) ** 0.5
        summaries.append(
            {
                "arm": arm.name,
                "is_control": arm.is_control,
                "seeds": len(found),
                "top1": statistics.mean(line["top1"] for line in found.values())
                if difference is None or arm.is_control
                else statistics.mean(reference.values()) + difference,
                "difference": difference,
                "reach": reach,
                **{name: first[name] for name in ("bytes_per_frame", "patch_bytes_per_frame", "variance_kept")},
            }
        )
    return summaries


def tabulate(summaries: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = []
    for one in summaries:
        difference = ""
        if one["difference"] is not None and one["arm"] != "float32":
            difference = f"{100 * one['difference']:+.1f}"
        if difference and one["reach"] is not None:
            difference += f" ± {100 * one['reach']:.1f}"
        sizes = ("", "") if one["is_control"] else (
            f"{one['patch_bytes_per_frame'] / 1e3:.1f} kB", f"{one['bytes_per_frame'] / 1e3:.1f} kB"
        )  # fmt: skip
        kept = "" if one["is_control"] else f"{one['variance_kept']:.1%}"
        rows.append([one["arm"], *sizes, kept, f"{one['top1']:.1%}", difference, one["seeds"]])
    heads = ["codec", "patches of a frame", "all bytes of a frame", "least variance kept of a layer", "top-1",
             "points from float32, 95 %", "seeds"]  # fmt: skip
    return format_table(heads, rows)


def check_bars(summaries: list[dict[str, Any]]) -> list[str]:
    """What issue and design ask of the curve, with what was found."""
    found = {one["arm"]: one for one in summaries}
    checks = []
    if reference := found.get("float32"):
        checks.append(check_bar("float32, top-1 at least", reference["top1"], 0.80, most=False))
        checks.append(check_bar("float32, top-1 at most", reference["top1"], 0.95))
    if (plain := found.get("int8")) and plain["reach"] is not None:
        name = f"int8, points from float32 within their interval of {100 * plain['reach']:.1f}"
        checks.append(check_bar(name, 100 * abs(plain["difference"]), 100 * plain["reach"]))
    if (small := found.get("int8, K = D/8")) and small["reach"] is not None:
        name = f"int8, K = D/8, points lost to float32 (interval {100 * small['reach']:.1f})"
        checks.append(check_bar(name, -100 * small["difference"], 1.0))
    return checks


def plot(summaries: list[dict[str, Any]], path: Path) -> None:
    """Top-1 against bytes: of patches alone, and of all arrays."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    points = [one for one in summaries if not one["is_control"]]
    controls = sorted((one for one in summaries if one["is_control"]), key=lambda one: one["top1"])
    for axes, key, label in zip(
        panels, ("patch_bytes_per_frame", "bytes_per_frame"), ("patches alone", "all bytes of the store"), strict=True
    ):
        for one in points:
            top1, reach = 100 * one["top1"], 100 * (one["reach"] or 0)
            axes.errorbar(one[key], top1, yerr=reach, fmt="o", color="#1f6fb4", capsize=3, markersize=4)
            is_low = top1 < _LABELS_BELOW
            place = top1 - reach - 1 if is_low else top1 + reach + 1
            axes.text(
                one[key], place, one["arm"], fontsize=7, rotation=90, ha="center", va="top" if is_low else "bottom"
            )
        for one in controls:
            top1, is_lowest = 100 * one["top1"], one is controls[0]
            axes.axhline(top1, color="#888", linestyle=":", linewidth=1)
            axes.annotate(
                one["arm"], (0.01, top1), xytext=(0, -2 if is_lowest else 1), xycoords=axes.get_yaxis_transform(),
                textcoords="offset points", fontsize=7, color="#555", va="top" if is_lowest else "bottom",
            )  # fmt: skip
        axes.set(xscale="log", xlabel=f"bytes of a cached frame, {label}", ylim=(0, 125), yticks=range(0, 101, 20))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("top-1 of held-out videos, 95 % beside float32")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Do what is missing, seed by seed so that pairs grow together; then table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--train", type=int, default=WorldConfig().num_train)
    parser.add_argument("--val", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=28, help="of side networks")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", action="append", help="arms, by name; repeatable")
    parser.add_argument("--folder", type=Path, default=Path("runs/accuracy-per-byte"))
    options = parser.parse_args()
    keep_freed_memory()
    world = WorldConfig(num_train=options.train, num_val=options.val, num_novel=0)
    marker = options.folder / "world" / ANNOTATIONS_NAME
    if not marker.is_file():
        write_world(options.folder / "world", world)
    results = options.folder / "results.jsonl"
    lines = read_lines(results, options)
    done = {(line["arm"], line["seed"]) for line in lines}
    for seed in range(options.seeds):
        for arm in ARMS:
            if (arm.name, seed) in done or (options.only and arm.name not in options.only):
                continue
            line = measure(options.folder, arm, seed, options)
            lines.append(line)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{arm.name}, seed {seed}: {line['top1']:.1%} in {line['seconds']:.0f} s", flush=True)
    summaries = summarise(lines)
    result = {"machine": describe_machine("torch"), "world": asdict(world), "summaries": summaries, "runs": lines}
    keep("accuracy_per_byte", result, tabulate(summaries), check_bars(summaries))
    plot(summaries, RESULTS / "accuracy_per_byte.png")


if __name__ == "__main__":
    main()
