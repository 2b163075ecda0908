"""Several heads in one read of the store, against one head alone and against trainings of their own.

    python benchmarks/heads.py [--rounds 3] [--videos 2400] [--side-videos 96] [--only probes] [--device cuda]

Stores are of random tokens: of ViT-B/16's sizes, and of the demo's. Probes learn from as many videos as the demo
trains on: with few, the files of eight runs would count for more than they do in a training. Rounds are paired: in each
of them every arm trains the same epochs on the same clips, one after another, and the ratio is the middle one of the
rounds' ratios.

The floor is what no code around them can save: the further heads' products, losses and AdamW by bare calls of torch, on
one batch in memory, beside the time of one head. One head's own share of that is in its time already.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from _report import check_bar, describe_machine, format_table, keep
from _stores import begin_store, write_rows

from s4v.store.codecs.affine import AffineCodec
from s4v.store.layout import StoreLayout
from s4v.store.writer import RowTokens
from s4v.train.allocator import keep_freed_memory
from s4v.train.config import TrainConfig
from s4v.train.loop import train_heads, train_run
from s4v.train.networks import find_network

B16 = {
    "num_frames": 8,
    "layers": tuple(range(1, 12, 2)),
    "num_patches": 196,
    "width": 768,
    "embed_dim": 512,
    "pixels": 224,
    "classes": 400,
}
DEMO = {
    "num_frames": 4,
    "layers": (3, 5),
    "num_patches": 64,
    "width": 192,
    "embed_dim": 128,
    "pixels": 64,
    "classes": 60,
}
STORES = {"B/16": (B16, 1.3), "demo": (DEMO, 1.6)}
"""Sizes, and the most that eight probes may take of one probe's time."""

CHANNELS = 64

BATCH_SIZE = find_network("linear").find_recipe("recognition", B16["width"]).batch_size


def write_store(path: Path, sizes: dict, num_videos: int) -> None:
    """Random tokens, int8; all videos are training videos."""
    pixels, classes = sizes["pixels"], [f"{place:03d}" for place in range(sizes["classes"])]
    layout = StoreLayout(
        num_rows=num_videos,
        num_views=1,
        num_frames=sizes["num_frames"],
        layers=sizes["layers"],
        num_patches=sizes["num_patches"],
        width=sizes["width"],
        channels=CHANNELS,
        embed_dim=sizes["embed_dim"],
        image_size=(pixels, pixels),
        patch_dtype="int8",
    )
    rng = np.random.default_rng(0)
    num_layers, width = len(layout.layers), layout.width
    basis = np.stack([np.linalg.qr(rng.normal(size=(width, CHANNELS)))[0].T for _ in range(num_layers)])
    codec = AffineCodec(
        dtype="int8",
        mean=np.zeros((num_layers, width), np.float32),
        basis=basis.astype(np.float32),
        scale=np.full((num_layers, CHANNELS), 0.02, np.float32),
    )
    side = round(layout.num_patches**0.5)
    backbone = {
        "architecture": "none",
        "weights": "none",
        "weights_sha256": "none",
        "depth": max(layout.layers) + 1,
        "embed_dim": layout.embed_dim,
        "image_size": [pixels, pixels],
        "patch_size": [pixels // side, pixels // side],
        "grid": [side, side],
        "std": [0.5] * 3,
        "family": "clip",
    }

    def make_tokens(row: int) -> RowTokens:
        frames, patches = layout.num_frames, layout.num_patches
        return RowTokens(
            patches=rng.integers(-127, 127, (1, frames, num_layers, patches, CHANNELS), dtype=np.int8, endpoint=True),
            cls=rng.normal(size=(1, frames, num_layers, width)).astype(np.float16),
            embedding=np.zeros((1, frames, layout.embed_dim), np.float32),
            pixels=rng.integers(0, 256, (1, frames, 1, pixels, pixels, 3), dtype=np.uint8),
        )

    writer, records = begin_store(path, layout, codec, classes, backbone=backbone)
    with writer:
        for shard in writer.pending_shards():
            write_rows(writer, records, shard, make_tokens)
        writer.consolidate()


def time_rounds(arms: dict[str, Callable[[Path], None]], folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each arm in each round; a round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, train in arms.items():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            start = time.perf_counter()
            train(folder)
            seconds[name] += [time.perf_counter() - start] if number else []
    return seconds


def list_heads(config: TrainConfig, out: Path, count: int) -> list[TrainConfig]:
    """So many, at rates of their own."""
    return [replace(config, out=out / str(place), learning_rate=1e-3 * 1.5**place) for place in range(count)]


def measure_probes(store: Path, folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """One linear probe, and several in one read."""
    config = TrainConfig(
        features=store,
        out=folder,
        head="linear",
        epochs=options.epochs,
        device=options.device,
        checkpoint_minutes=60.0,
        warmup_epochs=1.0,
    )
    arms = {
        "one": lambda out: train_run(replace(config, out=out / "one", learning_rate=1e-3)),
        "several": lambda out: train_heads(list_heads(config, out, options.heads), out / "state"),
    }
    return time_rounds(arms, folder, options.rounds)


def measure_floor(sizes: dict, heads: int, steps: int = 200) -> dict[str, float]:
    """Seconds of a CPU's step of so many linear heads on one batch, the middle one: without and with their losses."""
    x = torch.randn(BATCH_SIZE, sizes["width"])
    labels = torch.randint(0, sizes["classes"], (BATCH_SIZE,))
    weights = [torch.nn.Parameter(0.01 * torch.randn(sizes["classes"], sizes["width"])) for _ in range(heads)]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=True)

    def multiply() -> None:
        for weight in weights:
            scores = x @ weight.detach().T
            weight.grad = scores.T @ x  # of the size of a loss's gradient
        optimizer.step()

    def learn() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses = [torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, one), labels) for one in weights]
        torch.stack(losses).sum().backward()
        optimizer.step()

    found = {}
    for name, step in (("products and AdamW", multiply), ("products, losses and AdamW", learn)):
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        found[name] = statistics.median(seconds)
    return found


def measure_side_networks(store: Path, folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Side networks in one read, and each in one of its own."""
    config = TrainConfig(
        features=store,
        out=folder,
        epochs=1,
        batch_size=4,
        side_width=64,
        device=options.device,
        warmup_epochs=0.5,
        checkpoint_minutes=60.0,
    )
    count = options.side_heads
    arms = {
        "separate": lambda out: [train_run(one) for one in list_heads(config, out, count)],
        "one read": lambda out: train_heads(list_heads(config, out, count), out / "state"),
    }
    return time_rounds(arms, folder, max(1, options.rounds // 2))


def find_middle_ratio(seconds: dict[str, list[float]], above: str, below: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--videos", type=int, default=2400)
    parser.add_argument("--side-videos", type=int, default=96)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--side-heads", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=("probes", "side"))
    parser.add_argument("--folder", type=Path, default=Path("benchmark-heads"))
    options = parser.parse_args()
    keep_freed_memory()
    results, rows, bars = {}, [], []
    for name, (sizes, bar) in STORES.items():
        store = options.folder / f"{name.replace('/', '')}.zarr"
        shutil.rmtree(store, ignore_errors=True)
        if options.only != "side":
            write_store(store, sizes, options.videos)
            seconds = measure_probes(store, options.folder / "runs", options)
            ratio = find_middle_ratio(seconds, "several", "one")
            middle = {arm: statistics.median(values) for arm, values in seconds.items()}
            rows.append([name, f"{options.heads} linear probes", f"{middle['one']:.2f} s", f"{middle['several']:.2f} s",
                         f"{ratio:.2f} of one"])  # fmt: skip
            bars.append(check_bar(f"{options.heads} linear probes in one read, {name}", ratio, bar, " of one"))
            floor = measure_floor(sizes, options.heads - 1) if options.device == "cpu" else {}
            steps = options.epochs * (options.videos // BATCH_SIZE)
            for part, of_step in floor.items():
                label = f"{options.heads - 1} further heads, bare {part}"
                share = 1 + of_step * steps / middle["one"]
                rows.append([name, label, "", f"{of_step * 1e3:.1f} ms a step", f"{share:.2f} of one"])
            results[f"{name} probes"] = {**seconds, "ratio": ratio, "floor": floor, "steps": steps}
        if options.only != "probes":
            shutil.rmtree(store, ignore_errors=True)
            write_store(store, sizes, options.side_videos)
            seconds = measure_side_networks(store, options.folder / "runs", options)
            ratio = find_middle_ratio(seconds, "one read", "separate")
            middle = {arm: statistics.median(values) for arm, values in seconds.items()}
            rows.append([name, f"{options.side_heads} side networks", f"{middle['separate']:.2f} s separately",
                         f"{middle['one read']:.2f} s", f"{ratio:.2f} of separate runs"])  # fmt: skip
            results[f"{name} side networks"] = {**seconds, "ratio": ratio}
    shutil.rmtree(options.folder, ignore_errors=True)
    table = format_table(["store", "heads", "one, or separately", "in one read", "ratio"], rows)
    keep("heads", {"machine": describe_machine("torch", "s4v"), "seconds": results}, table, bars)


if __name__ == "__main__":
    main()
