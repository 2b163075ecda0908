"""A training step of the paper's side networks: time and peak memory, beside what it cannot do without.

    python benchmarks/side_network.py [--presets b16-light,b16] [--arms products,step] [--clips 2]
    python benchmarks/side_network.py --presets l14-light,l14,e14      on a CPU: 2 clips, of E/14 one
    python benchmarks/side_network.py --device cuda --precision bf16 --presets e14 --clips 8 \
        --arms products,step,checkpointed                              does E/14 fit a card of 12 GB?

Each arm runs in a process of its own, in turns, and once more for its memory:

    products        the step's matrix products (and attention) alone, timed inside the step: the floor
    step            ours, from int8 codes of 256 channels
    checkpointed    the same with --checkpoint-activations: each layer is computed again in the backward pass
    decoded         the same network, every layer's tokens decoded to float32 before the step, as a backbone in the step
                    would leave them, and kept for the backward pass whatever autograd keeps
    backbone        the frozen backbone's forward pass over the frames of the same clips

Figures of other presets than the default ones, and of given arms, are kept under a name of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _report import describe_machine, format_table, keep
from torch.utils._python_dispatch import TorchDispatchMode

from s4v.backbone.vision_tower import build_backbone
from s4v.store.codecs.affine import AffineCodec
from s4v.train.allocator import keep_freed_memory
from s4v.train.networks import parts
from s4v.train.networks.side4video import SideNetwork
from s4v.train.paper.presets import SIZES, Size

FRAMES, CHANNELS, CLASSES = 8, 256, 400
BACKBONES = {"b16": "vit-b16", "l14": "vit-l", "e14": "vit-e"}
ARMS = ("products", "step", "checkpointed", "decoded", "backbone")
NAMES = {"checkpointed": "step, checkpointed"}
DEFAULT_PRESETS, DEFAULT_CLIPS = "b16-light,b16", 2
# On a CPU. ViT-E's own pass would take a minute, and its tokens of all layers 15 GB.
CPU_CLIPS, CPU_ARMS = {"e14": 1}, {"e14": ("products", "step", "checkpointed")}
# What is left of 12 GB beside CUDA's own context.
CARD_BYTES = 12e9 - 0.5e9
ROUNDS = 5
# For memory: a tensor that is gone is gone. By default glibc keeps what was freed, in pieces: a third more, or twice.
RETURNED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "scaled_dot_product")


class ProductClock(TorchDispatchMode):
    """Adds up the seconds of matrix products."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._seconds = 0.0
        self._device = device
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and time it if it is a product."""
        name = func.overloadpacket.__name__.strip("_")
        if not name.startswith(PRODUCTS):
            return func(*args, **(kwargs or {}))
        if self._device.type == "cuda":
            # Read when all is done: to wait for each product would time the waiting.
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            out = func(*args, **(kwargs or {}))
            ended.record()
            self._events.append((began, ended))
            return out
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        self._seconds += time.perf_counter() - start
        return out

    def read_seconds(self) -> float:
        """Of all products so far; waits for the device once."""
        synchronise(self._device)
        return self._seconds + sum(began.elapsed_time(ended) for began, ended in self._events) / 1000


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def find_patches(size: Size) -> int:
    """N at 224 pixels."""
    return (224 // size.patch_px) ** 2


def make_batch(size: Size, num_clips: int, device: torch.device) -> tuple[Any, ...]:
    """Random pixels, codes and class tokens, labels, and a codec with a basis."""
    rng = torch.Generator().manual_seed(0)
    num_layers, num_patches = len(size.layers), find_patches(size)
    channels = min(CHANNELS, size.width)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(size.width, channels)))[0].T.astype(np.float32)
    codec = AffineCodec(
        dtype="int8",
        mean=np.zeros((num_layers, size.width), np.float32),
        basis=np.repeat(basis[None], num_layers, axis=0),
        scale=np.full((num_layers, channels), 0.02, np.float32),
    ).map_parts(lambda part: torch.from_numpy(part).to(device))
    pixels = torch.randn(num_clips, FRAMES, 3, 224, 224, generator=rng).to(device)
    shape = (num_clips, FRAMES, num_layers, num_patches, channels)
    codes = torch.randint(-127, 128, shape, generator=rng, dtype=torch.int8).to(device)
    cls = torch.randn(num_clips, FRAMES, num_layers, size.width, generator=rng).to(device)
    return pixels, codes, cls, torch.arange(num_clips, device=device) % CLASSES, codec


def run_arm(arm: str, preset: str, num_clips: int, device: torch.device, precision: str) -> dict[str, float]:
    """Seconds of each of some steps after a first one, and the peak of memory above an empty process."""
    size = SIZES[preset]
    keep_freed_memory()  # as `s4v train` does; not where memory is measured, see RETURNED_AT_ONCE
    take_first_step(device)
    torch.manual_seed(0)
    empty = peak_bytes(device)
    if arm == "backbone":
        backbone = build_backbone(
            BACKBONES[preset.removesuffix("-light")], weights="random", device=device, precision=precision
        ).load_weights()
        frames = torch.randint(0, 256, (num_clips * FRAMES, 224, 224, 3), dtype=torch.uint8, device=device)

        def step() -> float:
            backbone.encode_frames(frames, size.layers)
            return 0.0
    else:
        network = SideNetwork(
            num_layers=len(size.layers),
            width=size.width,
            side_width=size.side_width,
            num_patches=find_patches(size),
            patch_px=size.patch_px,
            num_classes=CLASSES,
            family=size.family,
        ).to(device)
        network.checkpoints_activations = arm == "checkpointed"
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        pixels, codes, cls, labels, codec = make_batch(size, num_clips, device)
        if arm == "decoded":
            codes = torch.stack([codec.decode(codes[:, :, layer], layer) for layer in range(codes.shape[2])], dim=2)
            codec = None
            parts.make_again = lambda function, *inputs, side_width: function(*inputs)

        def train() -> None:
            with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
                loss = F.cross_entropy(network(pixels, codes, cls, codec), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def step() -> float:
            if arm != "products":
                train()
                return 0.0
            with ProductClock(device) as clock:
                train()
            return clock.read_seconds()

    step()
    seconds = []
    for _ in range(ROUNDS):
        synchronise(device)
        start = time.perf_counter()
        own = step()
        synchronise(device)
        seconds.append(own or time.perf_counter() - start)
    found = {"seconds": statistics.median(seconds), "bytes": peak_bytes(device) - empty}
    if device.type == "cuda":
        found["reserved"] = torch.cuda.max_memory_reserved()
    return found


def take_first_step(device: torch.device) -> None:
    """What torch loads when an optimiser steps for the first time is nobody's activation."""
    layer = torch.nn.Linear(8, 8, device=device)
    layer(torch.zeros(1, 8, device=device)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run every arm of every preset, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default=DEFAULT_PRESETS, help=f"of {', '.join(SIZES)}")
    parser.add_argument("--arms", help=f"of {', '.join(ARMS)} [all; of e14 on a CPU those of the side network]")
    parser.add_argument("--clips", type=int, help=f"in a step [{DEFAULT_CLIPS}; of e14 on a CPU 1]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--print-only", action="store_true", help="keep nothing under docs/benchmarks")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        found = run_arm(options.arm, options.presets, options.clips, torch.device(options.device), options.precision)
        print(json.dumps(found))
        return
    chosen = options.presets.split(",")
    if unknown := (set(chosen) - set(SIZES)) | (set((options.arms or "").split(",")) - {"", *ARMS}):
        parser.error(f"no such preset or arm: {', '.join(sorted(unknown))}")
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    clips = {preset: find_clips(preset, options) for preset in chosen}
    for preset in chosen:
        arms = find_arms(preset, options)
        results[preset] = {arm: [] for arm in arms}
        peaks = {arm: run_child(preset, arm, clips[preset], options, **RETURNED_AT_ONCE) for arm in arms}
        for _ in range(options.rounds):
            for arm in arms:
                found = run_child(preset, arm, clips[preset], options)
                results[preset][arm].append({**found, "bytes": peaks[arm]["bytes"]})
    rows = [row for preset, arms in results.items() for row in describe(preset, clips[preset], arms)]
    heads = ["preset", "clips", "arm", "seconds", "lowest to highest", "of the products", "peak MB", "of decoded"]
    if options.device.startswith("cuda"):
        heads += ["reserved MB", "fits 12 GB"]
    table = format_table(heads, [row[: len(heads)] for row in rows])
    if options.print_only:
        print(table)
        return
    sizes = {"clips": clips, "frames": FRAMES, "channels": CHANNELS, "precision": options.precision}
    name = f"side_network_{options.device.partition(':')[0]}"
    if options.presets != DEFAULT_PRESETS or options.arms or options.clips:
        name = "_".join([name, *chosen])
    keep(
        name,
        {"machine": describe_machine("torch", "timm", "open_clip_torch"), "sizes": sizes, "results": results},
        table,
    )


def find_clips(preset: str, options: argparse.Namespace) -> int:
    """Clips in a step."""
    fewer = CPU_CLIPS.get(preset) if options.device == "cpu" else None
    return options.clips or fewer or DEFAULT_CLIPS


def find_arms(preset: str, options: argparse.Namespace) -> tuple[str, ...]:
    """Arms in the table's order."""
    if options.arms:
        return tuple(arm for arm in ARMS if arm in options.arms.split(","))
    return CPU_ARMS.get(preset, ARMS) if options.device == "cpu" else ARMS


def run_child(
    preset: str, arm: str, num_clips: int, options: argparse.Namespace, **environment: str
) -> dict[str, float]:
    """One arm in a process of its own; figures are NaN where it does not fit."""
    command = [sys.executable, __file__, "--arm", arm, "--presets", preset, "--clips", str(num_clips)]
    command += ["--device", options.device, "--precision", options.precision]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if ran.returncode:
        print(f"{preset} {arm}: {ran.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return {"seconds": float("nan"), "bytes": float("nan")}
    return json.loads(ran.stdout.splitlines()[-1])


def describe(preset: str, num_clips: int, arms: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """Rows of the table, ratios by round; empty where there is nothing to compare with."""
    rows = []
    for arm, found in arms.items():
        seconds = [one["seconds"] for one in found]
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        row = [preset, str(num_clips), NAMES.get(arm, arm), f"{statistics.median(seconds):.3f}", spread]
        row += [compare(found, arms.get("products"), "seconds")]
        row += [f"{statistics.median(one['bytes'] for one in found) / 1e6:.0f}"]
        row += [compare(found, arms.get("decoded"), "bytes")]
        if reserved := max((one.get("reserved", 0) for one in found), default=0):
            row += [f"{reserved / 1e6:.0f}", "yes" if reserved <= CARD_BYTES else "no"]
        rows.append([*row, "", ""])
    if "backbone" in arms and "step" in arms:
        both = statistics.median(
            (a["seconds"] + b["seconds"]) / b["seconds"] for a, b in zip(arms["backbone"], arms["step"], strict=True)
        )
        rows.append([preset, str(num_clips), "backbone and step, of the step", "", "", f"{both:.2f}", "", "", "", ""])
    return rows


def compare(found: list[dict[str, float]], other: list[dict[str, float]] | None, what: str) -> str:
    """The median ratio of one figure to another arm's."""
    if other is None:
        return ""
    return f"{statistics.median(a[what] / b[what] for a, b in zip(found, other, strict=True)):.2f}"


if __name__ == "__main__":
    main()
