"""The linear probe that `s4v compare` chooses, beside the best fit of L-BFGS, on held-out videos of the small world.

    python benchmarks/linear_probe.py [--train 2400] [--val 2400] [--epochs 14] [--folder benchmark-linear-probe]

Both are chosen on the same tenth of the training videos: the probe among the rates and decays that `s4v compare`
tries, L-BFGS among penalties. Both are then fitted to all of them. Beside them stands the probe that `s4v train` makes
alone, at its own rate. The store stays in the folder for another call.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from _report import check_bar, describe_machine, format_table, keep

from s4v.demo.pipeline import EXTRACTION
from s4v.demo.world import ANNOTATIONS_NAME, WorldConfig, write_world
from s4v.extract.config import ExtractConfig
from s4v.extract.extraction import extract_dataset
from s4v.store.reader import StoreReader, open_store
from s4v.train.clips import ClipLoader, LabelledRows, find_labelled_rows, hold_out_rows, plan_evaluation
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run
from s4v.train.networks import NETWORKS
from s4v.train.run_folder import open_run
from s4v.train.sweep import HELD_OUT_SHARE, render_sweep, sweep_heads, train_winner

PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SMOOTHING = 0.1

Clips = tuple[torch.Tensor, torch.Tensor]
"""Mean class tokens (n, D), labels (n,)."""


def make_store(folder: Path, num_train: int, num_val: int) -> Path:
    """The demo's store, of so many videos."""
    store = folder / f"world-{num_train}-{num_val}.zarr"
    if not (store / "videos.parquet").is_file():
        world = folder / f"world-{num_train}-{num_val}"
        if not (world / ANNOTATIONS_NAME).is_file():
            shutil.rmtree(world, ignore_errors=True)
            write_world(world, WorldConfig(num_train=num_train, num_val=num_val, num_novel=0))
        extract_dataset(ExtractConfig(root=world, annotations=world / ANNOTATIONS_NAME, out=store, **EXTRACTION))
    return store


def read_clips(store: StoreReader, data: LabelledRows, num_frames: int) -> Clips:
    """What the probe classifies, before its norm."""
    plans, _ = plan_evaluation(data, num_frames=num_frames, batch_size=64)
    loader = ClipLoader(store, arrays=("cls",), layers=store.layout.layers, device=torch.device("cpu"))
    batches = [(batch.cls[:, :, -1].mean(dim=1), batch.labels) for batch in loader.load(plans)]
    return torch.cat([tokens for tokens, _ in batches]), torch.cat([labels for _, labels in batches])


def fit(train: Clips, val: Clips, num_classes: int, penalty: float) -> float:
    """Top-1 of the lowest objective that there is."""
    (x, labels), (held, held_labels) = train, val
    mean, std = x.mean(0), (x.var(0, correction=0) + 1e-5).sqrt()
    x, held = (x - mean) / std, (held - mean) / std
    parameters = [
        torch.zeros(num_classes, x.shape[1], requires_grad=True),
        torch.zeros(num_classes, requires_grad=True),
    ]
    optimizer = torch.optim.LBFGS(parameters, max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

    def measure() -> torch.Tensor:
        optimizer.zero_grad()
        weight, bias = parameters
        loss = F.cross_entropy(F.linear(x, weight, bias), labels, label_smoothing=SMOOTHING)
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(measure)
    with torch.no_grad():
        return float((F.linear(held, *parameters).argmax(1) == held_labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=2400)
    parser.add_argument("--val", type=int, default=2400)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--folder", type=Path, default=Path("benchmark-linear-probe"))
    options = parser.parse_args()
    path = make_store(options.folder, options.train, options.val)
    store, kind, out = open_store(path), NETWORKS["linear"], options.folder / "runs"
    shutil.rmtree(out, ignore_errors=True)
    num_frames = store.layout.num_frames
    config = TrainConfig(
        features=path, out=out, head="linear", epochs=options.epochs, frames=num_frames, device="cpu", preset="none"
    )
    sweep = sweep_heads(config, learning_rates=kind.tried_rates, weight_decays=kind.tried_decays, say=print)
    print("\n".join(render_sweep(sweep)))
    train_winner(config, sweep)
    probe = evaluate_run(out / "winner", checkpoint="last")["top1"]
    train_run(replace(config, out=out / "alone"))
    alone, own = evaluate_run(out / "alone", checkpoint="last")["top1"], open_run(out / "alone").config

    data = find_labelled_rows(store, "train")
    parts = hold_out_rows(data, store, HELD_OUT_SHARE, seed=0, by_class=True)
    rest, held = (read_clips(store, part, num_frames) for part in parts)
    train, val = (read_clips(store, find_labelled_rows(store, split), num_frames) for split in ("train", "val"))
    num_classes = len(store.classes.names)
    chosen_by = {penalty: fit(rest, held, num_classes, penalty) for penalty in PENALTIES}
    penalty = max(PENALTIES, key=lambda one: chosen_by[one])
    tops = {one: fit(train, val, num_classes, one) for one in PENALTIES}
    best = sweep.winner
    rows = [["probe", f"rate {best.learning_rate:g}, decay {best.weight_decay:g}", f"{best.top:.1%}", f"{probe:.1%}"]]
    rows += [["alone", f"rate {own['learning_rate']:g}, decay {own['weight_decay']:g}", "", f"{alone:.1%}"]]
    rows += [["L-BFGS", f"penalty {one:g}", f"{chosen_by[one]:.1%}", f"{tops[one]:.1%}"] for one in PENALTIES]
    table = format_table(["fit", "of", "held-out tenth", f"{len(val[1])} held-out videos"], rows)
    bar = check_bar("points below the chosen fit of L-BFGS", 100 * (tops[penalty] - probe), 2.0)
    figures = {"probe": probe, "alone": alone, "lbfgs": tops, "chosen_by": chosen_by, "penalty": penalty}
    keep("linear_probe", {"machine": describe_machine("torch", "s4v"), **figures}, table, [bar])


if __name__ == "__main__":
    main()
