"""Train the smallest network of the paper (B/16 light: 6 layers, 192 wide) from a store, and from one batch in memory.

    python benchmarks/loader.py [--steps 12] [--batch-size 4] [--device cuda]

The difference is what reading, copying and checking cost beside the step. Both epochs take the same steps, in turns.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _report import check_bar, describe_machine, format_table, keep
from _stores import begin_store, write_rows

from s4v.store.codecs.affine import AffineCodec
from s4v.store.layout import StoreLayout
from s4v.store.reader import StoreReader, open_store
from s4v.store.writer import RowTokens
from s4v.train.clips import ClipBatch, ClipLoader, codec_for, find_labelled_rows, plan_training_epoch
from s4v.train.networks.side4video import SideNetwork

FRAMES, CLIP = 16, 8
LAYERS, PATCHES, WIDTH, CHANNELS = 6, 196, 768, 256
ROUNDS = 5


def write_store(path: Path, num_videos: int) -> None:
    """B/16's shapes, int8 with 256 channels, with pixels; random."""
    layout = StoreLayout(
        num_rows=num_videos,
        num_views=1,
        num_frames=FRAMES,
        layers=tuple(range(1, 12, 2)),
        num_patches=PATCHES,
        width=WIDTH,
        channels=CHANNELS,
        embed_dim=512,
        image_size=(224, 224),
        patch_dtype="int8",
    )
    rng = np.random.default_rng(0)
    basis = np.stack([np.linalg.qr(rng.normal(size=(WIDTH, CHANNELS)))[0].T for _ in range(LAYERS)])
    codec = AffineCodec(
        dtype="int8",
        mean=np.zeros((LAYERS, WIDTH), np.float32),
        basis=basis.astype(np.float32),
        scale=np.full((LAYERS, CHANNELS), 0.02, np.float32),
    )

    def make_tokens(row: int) -> RowTokens:
        return RowTokens(
            patches=rng.integers(-127, 127, (1, FRAMES, LAYERS, PATCHES, CHANNELS), dtype=np.int8, endpoint=True),
            cls=rng.normal(size=(1, FRAMES, LAYERS, WIDTH)).astype(np.float16),
            embedding=np.zeros((1, FRAMES, 512), np.float32),
            pixels=rng.integers(0, 256, (1, FRAMES, 1, 224, 224, 3), dtype=np.uint8),
        )

    writer, records = begin_store(path, layout, codec, ["a", "b"])
    with writer:
        for shard in writer.pending_shards():
            write_rows(writer, records, shard, make_tokens)
        writer.consolidate()


class Trainer:
    """A side network and its optimiser."""

    def __init__(self, store: StoreReader, device: torch.device) -> None:
        torch.manual_seed(0)
        self._device = device
        self._codec = codec_for(store, store.layout.layers, device)
        self._network = SideNetwork(
            num_layers=LAYERS, width=WIDTH, side_width=192, num_patches=PATCHES, patch_px=16, num_classes=2
        ).to(device)
        self._optimizer = torch.optim.AdamW(self._network.parameters(), lr=1e-4)

    def run(self, batches: Iterable[ClipBatch]) -> float:
        """Take a step on every batch; returns the seconds it took."""
        start = time.perf_counter()
        for batch in batches:
            loss = F.cross_entropy(self._network(batch.pixels, batch.patches, batch.cls, self._codec), batch.labels)
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def main() -> None:
    """Write a store, train from it and from memory in turns, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-loader"))
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    device = torch.device(options.device)
    write_store(options.folder / "store.zarr", options.steps * options.batch_size)
    store = open_store(options.folder / "store.zarr")
    data = find_labelled_rows(store, "train")
    loader = ClipLoader(store, arrays=("patches", "cls", "pixels"), layers=store.layout.layers, device=device)
    trainer = Trainer(store, device)

    def plan(epoch: int) -> list:
        return plan_training_epoch(data, num_frames=CLIP, batch_size=options.batch_size, seed=0, epoch=epoch)

    preloaded = next(iter(loader.load(plan(0)[:1])))
    trainer.run([preloaded] * 2)  # warm up
    seconds: dict[str, list[float]] = {"from the store": [], "one batch in memory": []}
    for round_ in range(ROUNDS):
        seconds["from the store"].append(trainer.run(loader.load(plan(round_))))
        seconds["one batch in memory"].append(trainer.run([preloaded] * options.steps))
    shutil.rmtree(options.folder)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    table = format_table(
        ["epoch", "seconds", "lowest to highest", "of the one in memory"],
        [
            [name, f"{medians[name]:.2f}", f"{min(found):.2f} to {max(found):.2f}",
             f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})" if place == 0 else "1"]
            for place, (name, found) in enumerate(seconds.items())
        ],
    )  # fmt: skip
    sizes = {"steps": options.steps, "batch": options.batch_size, "clip": CLIP, "layers": LAYERS, "side_width": 192}
    name = f"loader_{device.type}"
    bars = [check_bar("epoch from the store, of the one in memory, median", statistics.median(ratios), 1.03)]
    result = {"machine": describe_machine("torch"), "sizes": sizes, "seconds": seconds, "ratios": ratios}
    keep(name, result, table, bars)


if __name__ == "__main__":
    main()
