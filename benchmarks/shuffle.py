"""How well a window of shards mixes the rows of a store that is sorted by class, and what a probe learns of that.

    python benchmarks/shuffle.py [--seeds 20]

First the order alone, of as many rows as Kinetics-400 has in 1,000 shards, and of 40 shards. A batch has 32 clips.
Classes are counted, and the distance between two rows of a batch is told as a share of its mean in any order. Then the
small world, its rows sorted by class: the demo's linear probe with the same seeds in any order, and in a window of an
eighth of the training shards. Every training that is done is a line of results.jsonl in --folder: run again, it goes on
with those that are missing.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
from _report import check_bar, describe_machine, format_table, keep
from _trainings import Lines, summarise_pairs, tell_difference, train_and_evaluate

from s4v.demo.pipeline import EXTRACTION, RECIPES
from s4v.demo.world import ANNOTATIONS_NAME, WorldConfig, write_world
from s4v.extract.config import ExtractConfig
from s4v.extract.extraction import extract_dataset
from s4v.store.reader import open_store
from s4v.train.allocator import keep_freed_memory
from s4v.train.clips import find_labelled_rows
from s4v.train.order import ShardWindow, draw_order

BATCH = 32
ORDERS = (
    # shards, rows in one, classes, windows
    (40, 60, 60, (1, 2, 5, 10, 40)),
    (1000, 240, 400, (1, 8, 32, 125)),
)
EPOCHS_DRAWN = 5
ANY, WINDOW = "any order", "window of an eighth"


def describe_order(rows: np.ndarray, classes: np.ndarray, window: ShardWindow | None) -> tuple[float, float]:
    """Classes in a batch, and the mean distance between two of its rows, over some epochs."""
    counts, distances = [], []
    for epoch in range(EPOCHS_DRAWN):
        order = draw_order(rows, np.random.default_rng([0, epoch]), window)
        batches = order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)
        counts.append(np.mean([len(np.unique(classes[batch])) for batch in batches]))
        distances.append(np.abs(rows[batches[:, :-1]] - rows[batches[:, 1:]]).mean())
    return float(np.mean(counts)), float(np.mean(distances))


def tabulate_orders() -> list[list[Any]]:
    """Lines of the first table."""
    lines = []
    for num_shards, size, num_classes, windows in ORDERS:
        rows = np.arange(num_shards * size)
        classes = rows * num_classes // len(rows)
        any_classes, any_distance = describe_order(rows, classes, None)
        stands = f"{num_shards:,} of {size}"
        lines.append([stands, num_classes, "any order", f"{any_classes:.1f}", "1.00"])
        for window in windows:
            found, distance = describe_order(rows, classes, ShardWindow(window, size))
            lines.append([stands, num_classes, window, f"{found:.1f}", f"{distance / any_distance:.2f}"])
    return lines


def make_store(folder: Path, options: argparse.Namespace) -> Path:
    """The small world's store, its rows sorted by split and class; one that is there is gone on with."""
    world, out = folder / "world", folder / "sorted.zarr"
    table = world / "sorted.csv"
    if not table.is_file():
        write_world(world, WorldConfig(num_train=options.train, num_val=options.val, num_novel=0))
        with (world / ANNOTATIONS_NAME).open(newline="") as file:
            lines = sorted(csv.DictReader(file), key=lambda line: (line["split"], line["shape_motion"]))
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    places = {"root": world, "annotations": table, "out": out}
    extract_dataset(ExtractConfig(**{**EXTRACTION, **places, "device": "cpu"}))
    return out


def main() -> None:
    """The orders, then what trainings are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--train", type=int, default=2400)
    parser.add_argument("--val", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("runs/shuffle"))
    options = parser.parse_args()
    keep_freed_memory()
    orders = tabulate_orders()
    print(format_table(["shards", "classes", "window", "classes in a batch", "distance"], orders), flush=True)
    features = make_store(options.folder, options)
    store = open_store(features)
    trained = find_labelled_rows(store, "train")
    shards = len(np.unique(trained.rows // store.layout.rows_per_shard))
    arms = {ANY: None, WINDOW: shards // 8}
    lines = Lines(options.folder / "results.jsonl", {name: getattr(options, name) for name in ("train", "val")})
    for seed in range(options.seeds):
        for arm, window in arms.items():
            if not lines.holds(arm, seed):
                run = options.folder / "runs" / f"{window}-{seed}"
                recipe = {**RECIPES["linear probe"], "seed": seed, "window": window, "device": "cpu"}
                lines.add(arm, seed, train_and_evaluate(features, run, **recipe))
    summaries = summarise_pairs(lines.done, list(arms), ANY)
    second = [
        [one["arm"], arms[one["arm"]] or shards, one["seeds"], f"{one['top1']:.1%}",
         "" if one["arm"] == ANY else tell_difference(one)]
        for one in summaries
    ]  # fmt: skip
    table = "\n\n".join(
        [
            format_table(["shards of rows", "classes", "window", "classes in a batch", "distance"], orders),
            format_table(["order", f"of {shards} shards", "seeds", "top-1", "points from any order, 95 %"], second),
        ]
    )
    other = summaries[-1]
    bars = []
    if other["reach"] is not None:
        name = f"window, points from any order, within their interval of {100 * other['reach']:.1f}"
        bars.append(check_bar(name, 100 * abs(other["difference"]), 100 * other["reach"]))
    result = {"machine": describe_machine("torch"), "orders": orders, "shards": shards, "summaries": summaries}
    keep("shuffle", {**result, "runs": lines.done}, table, bars)


if __name__ == "__main__":
    main()
