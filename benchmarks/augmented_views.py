"""What augmented views bring in the small world: the centre alone, beside it one drawn view, and four, at equal steps.

    python benchmarks/augmented_views.py [--seeds 3] [--epochs 14]

With all 2,400 training videos, and with the first 240 in ten times as many epochs. Views are drawn by the recipe of a
table (crop, flip, grey). Side networks are the demo's, with the same seeds for all arms of a share. Held-out videos are
seen at the centre. Every training that is done is a line of results.jsonl in --folder: run again, it goes on with those
that are missing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _report import describe_machine, format_table, keep
from _trainings import Lines, summarise_pairs, tell_difference, train_and_evaluate

from s4v.demo.pipeline import EXTRACTION, RECIPES
from s4v.demo.world import ANNOTATIONS_NAME, WorldConfig, write_world
from s4v.extract.config import ExtractConfig
from s4v.extract.extraction import extract_dataset
from s4v.store.reader import open_store
from s4v.train.allocator import keep_freed_memory

SHARES = {"10 %": 10, "100 %": 1}
"""By name: one training video of how many."""
VIEWS = {"centre alone": "centre", "1 augmented view": "augment:1", "4 augmented views": "augment:4"}


def make_store(folder: Path, views: str) -> Path:
    """The world's store with these views of training videos; one that is there is gone on with."""
    out = folder / f"{views.replace(':', '-')}.zarr"
    places = {"root": folder / "world", "annotations": folder / "world" / ANNOTATIONS_NAME, "out": out}
    seen = {"train": views, "": "centre"}
    extract_dataset(ExtractConfig(**{**EXTRACTION, **places, "views": seen, "device": "cpu"}))
    return out


def main() -> None:
    """Do what is missing, seed by seed; then a table of each share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=2400)
    parser.add_argument("--val", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=14, help="of all training videos")
    parser.add_argument("--folder", type=Path, default=Path("runs/augmented-views"))
    options = parser.parse_args()
    keep_freed_memory()
    settings = {name: getattr(options, name) for name in ("epochs", "train", "val")}
    lines = Lines(options.folder / "results.jsonl", settings)
    stores: dict[str, tuple[Path, int]] = {}
    for share, part in SHARES.items():
        folder = options.folder / f"of-{part}"
        if not (folder / "world" / ANNOTATIONS_NAME).is_file():
            # The first videos of a larger world are those of a smaller one.
            write_world(
                folder / "world", WorldConfig(num_train=options.train // part, num_val=options.val, num_novel=0)
            )
        for name, views in VIEWS.items():
            stores[f"{share}, {name}"] = make_store(folder, views), part
    for seed in range(options.seeds):
        for arm, (store, part) in stores.items():
            if lines.holds(arm, seed):
                continue
            recipe = RECIPES["side network"]
            longer = {"epochs": options.epochs * part, "warmup_epochs": recipe["warmup_epochs"] * part}
            run = options.folder / "runs" / f"{store.stem}-of-{part}-{seed}"
            lines.add(arm, seed, train_and_evaluate(store, run, seed=seed, device="cpu", **{**recipe, **longer}))
    rows, summaries = [], []
    for share in SHARES:
        reference = f"{share}, {next(iter(VIEWS))}"
        for one in summarise_pairs(lines.done, [f"{share}, {name}" for name in VIEWS], reference):
            of_seeds = ", ".join(f"{top1:.1%}" for top1 in one["top1_of_seeds"])
            difference = "" if one["arm"] == reference else tell_difference(one)
            rows.append([*one["arm"].split(", "), f"{one['top1']:.1%}", of_seeds, difference])
            summaries.append(one)
    heads = ["training videos", "views", "top-1", "of each seed", "points from the centre alone, 95 %"]
    layers = list(open_store(next(iter(stores.values()))[0]).layout.layers)
    result = {"machine": describe_machine("torch", "timm"), **settings, "layers": layers, "summaries": summaries,
              "runs": lines.done}  # fmt: skip
    keep("augmented_views", result, format_table(heads, rows))


if __name__ == "__main__":
    main()
