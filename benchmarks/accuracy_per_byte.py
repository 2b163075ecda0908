"""What a video side network keeps per byte of cached token: accuracy in the small world against bytes of a frame.

    python benchmarks/accuracy_per_byte.py [--seeds 5] [--epochs 28] [--val 2000] [--device cuda] [--only "int8"]

One store for each codec, the same videos in all; side networks of the demo's recipe but for their epochs, the same
seeds in all. Every training that is done is a line of results.jsonl in --folder: run again with the same settings, it
goes on with those that are missing, and writes table and plot from those that are there. Bytes are those of what the
side network reads, and of the frames' embeddings: captions' texts are left out, for nothing here reads them.

Frames are stored as RGB but in two kinds of arms. One has `--pixel-format ycbcr420`. The other has what JPEG gives back
of every frame, in a store of RGB: no store of s4v holds JPEG, so its bytes are not told.
"""

from __future__ import annotations

import argparse
import io
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from _report import RESULTS, check_bar, describe_machine, format_table, keep
from _stores import change_store
from _trainings import Lines, summarise_pairs, tell_difference, train_and_evaluate
from PIL import Image

from s4v.demo.pipeline import EXTRACTION, RECIPES
from s4v.demo.world import ANNOTATIONS_NAME, WorldConfig, write_world
from s4v.extract.config import ExtractConfig
from s4v.extract.extraction import extract_dataset
from s4v.store.info import describe_store
from s4v.store.reader import StoreReader, open_store
from s4v.store.writer import RowTokens
from s4v.train.allocator import keep_freed_memory

WIDTH = 192
REFERENCE = "float32"

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
    jpeg_quality: int | None = None
    """Frames are what JPEG (4:2:0) of this quality gives back of those of the store; None leaves them."""
    is_drawn: bool = True
    """Whether it is in the plot."""


_PLANES = {"dtype": "float32", "pixel_format": "ycbcr420"}

ARMS = (
    Arm("float32", {"dtype": "float32"}),
    Arm("float16", {"dtype": "float16"}),
    Arm("float16, 5 bits", {"dtype": "float16", "keep_bits": 5}),
    Arm("float16, 2 bits", {"dtype": "float16", "keep_bits": 2}),
    Arm("int8", {"dtype": "int8"}),
    *(Arm(f"int8, K = D/{part}", {"dtype": "int8", "channels": WIDTH // part}) for part in (2, 4, 8, 16, 32)),
    *(
        Arm(
            f"int8{'' if part == 1 else f', K = D/{part}'}, class tokens too",
            {"dtype": "int8", "channels": WIDTH // part, "cls_dtype": "int8", "cls_channels": WIDTH // part},
        )
        for part in (1, 8, 16, 32)
    ),
    Arm("int8, last layer only", {"dtype": "int8", "layers": "5"}),
    Arm("float32, YCbCr 4:2:0", _PLANES),
    Arm("float32, JPEG 90", {"dtype": "float32"}, is_control=True, jpeg_quality=90, is_drawn=False),
    Arm("tokens zeroed", {"dtype": "float32"}, recipe="pixels only", is_control=True),
    Arm("tokens zeroed, YCbCr 4:2:0", _PLANES, recipe="pixels only", is_control=True, is_drawn=False),
    Arm(
        "tokens zeroed, JPEG 90",
        {"dtype": "float32"},
        recipe="pixels only",
        is_control=True,
        jpeg_quality=90,
        is_drawn=False,
    ),
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
    if arm.jpeg_quality is None:
        return describe_store(open_store(path))
    store, changed = open_store(path), folder / f"{name}-jpeg-{arm.jpeg_quality}.zarr"
    change_store(store, changed, store.layout, store.codec, lambda row: compress(store, row, arm.jpeg_quality or 0))
    return describe_store(open_store(changed))


def compress(store: StoreReader, row: int, quality: int) -> RowTokens:
    """A row, its frames as JPEG gives them back."""
    values = store.read_row(row, 1, store.layout.num_frames)
    frames = values["pixels"].reshape(-1, *values["pixels"].shape[-3:])
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, format="jpeg", quality=quality, subsampling=2)
        frame[:] = np.asarray(Image.open(buffer))
    return RowTokens(**values)


def measure(folder: Path, arm: Arm, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm with one seed; a line of the results."""
    facts = make_store(folder, arm, options.device)
    recipe = dict(RECIPES[arm.recipe])
    if recipe["head"] == "side4video":
        recipe["epochs"] = options.epochs
    run = folder / "runs" / f"{arm.name.replace(' ', '-').replace('/', '')}-{seed}"
    found = train_and_evaluate(Path(facts["store"]), run, seed=seed, device=options.device, **recipe)
    frames = facts["cached_frames"]
    held = {name: array["bytes"] for name, array in facts["arrays"].items() if not name.startswith("text/")}
    return {
        **found,
        "bytes_per_frame": sum(held.values()) / frames,
        "patch_bytes_per_frame": held["patches"] / frames,
        "variance_kept": find_least_kept(facts, "layers"),
        "cls_variance_kept": find_least_kept(facts, "cls_layers"),
        "machine": describe_machine("torch"),
    }


def find_least_kept(facts: dict[str, Any], name: str) -> float:
    """Of the variance of a layer's patches (`layers`) or class tokens (`cls_layers`); 1 where they are not coded."""
    return min((one["variance_kept"] for one in (facts["fidelity"] or {}).get(name, ())), default=1.0)


def summarise(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each arm's difference to float32, and its bytes.

    A codec's top-1 is float32's mean plus that difference: means over other seeds cannot be compared.
    """
    summaries = summarise_pairs(lines, [arm.name for arm in ARMS], REFERENCE)
    first = {line["arm"]: line for line in reversed(lines)}
    controls = {arm.name for arm in ARMS if arm.is_control}
    for one in summaries:
        is_control, difference = one["arm"] in controls, one["difference"]
        if difference is not None and not is_control:
            one["top1"] = statistics.mean(line["top1"] for line in lines if line["arm"] == REFERENCE) + difference
        one["is_control"] = is_control
        sizes = ("bytes_per_frame", "patch_bytes_per_frame", "variance_kept")
        one.update({name: first[one["arm"]][name] for name in sizes})
        one["cls_variance_kept"] = first[one["arm"]].get("cls_variance_kept", 1.0)  # of lines from before: not coded
    return summaries


def tabulate(summaries: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = []
    for one in summaries:
        difference = "" if one["arm"] == REFERENCE else tell_difference(one)
        sizes = ("", "") if one["is_control"] else (
            f"{one['patch_bytes_per_frame'] / 1e3:.1f} kB", f"{one['bytes_per_frame'] / 1e3:.1f} kB"
        )  # fmt: skip
        kept = "" if one["is_control"] else f"{one['variance_kept']:.1%}"
        of_cls = "" if one["is_control"] else f"{one['cls_variance_kept']:.1%}"
        rows.append([one["arm"], *sizes, kept, of_cls, f"{one['top1']:.1%}", difference, one["seeds"]])
    heads = ["codec", "patches of a frame", "all bytes of a frame", "least variance kept of a layer",
             "of its class tokens", "top-1", "points from float32, 95 %", "seeds"]  # fmt: skip
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
    drawn = {arm.name for arm in ARMS if arm.is_drawn}
    controls = sorted(
        (one for one in summaries if one["is_control"] and one["arm"] in drawn), key=lambda one: one["top1"]
    )
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
    settings = {name: getattr(options, name) for name in ("epochs", "train", "val")}
    lines = Lines(options.folder / "results.jsonl", settings)
    for seed in range(options.seeds):
        for arm in ARMS:
            if lines.holds(arm.name, seed) or (options.only and arm.name not in options.only):
                continue
            lines.add(arm.name, seed, measure(options.folder, arm, seed, options))
    summaries = summarise(lines.done)
    result = {"machine": describe_machine("torch"), "world": asdict(world), "summaries": summaries, "runs": lines.done}
    keep("accuracy_per_byte", result, tabulate(summaries), check_bars(summaries))
    plot(summaries, RESULTS / "accuracy_per_byte.png")


if __name__ == "__main__":
    main()
