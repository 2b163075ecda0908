"""A training step of the papers' side networks: time and peak memory, beside what it cannot do without.

    python benchmarks/side_network.py [--presets b16-light,b16] [--arms products,step] [--clips 2]
    python benchmarks/side_network.py --presets tds-clip-b16,dist-b16 --profile
    python benchmarks/side_network.py --presets l14-light,l14,e14      on a CPU: 2 clips, of E/14 one
    python benchmarks/side_network.py --device cuda --precision bf16 --presets e14 --clips 8 \
        --arms products,step,checkpointed                              does E/14 fit a card of 12 GB?

Each arm runs in a process of its own, in turns, and once more for its memory:

    products        the step's matrix products (and attention, and convolutions) alone, timed inside the step: the floor
    step            ours, from int8 codes of 256 channels
    tokens          the same from float32 tokens of all layers, as a backbone in the step would leave them
    published       the same network in the layout of its paper's code (`_published.py`), from those tokens
    checkpointed    the same with --checkpoint-activations: each layer is computed again in the backward pass
    decoded         as `tokens`, and kept for the backward pass whatever autograd keeps
    backbone        the frozen backbone's forward pass over the frames of the same clips

Before the published layout is timed, its outputs and gradients are compared with ours. `--profile` tells what a step's
time goes to. Figures of other presets than the default ones, and of given arms, are kept under a name of their own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import _published
import numpy as np
import torch
import torch.nn.functional as F
from _profile import is_product, profile_step
from _report import check_bar, describe_machine, format_table, keep
from torch.utils._python_dispatch import TorchDispatchMode

from s4v.backbone.vision_tower import build_backbone
from s4v.store.codecs.affine import AffineCodec
from s4v.train.allocator import keep_freed_memory
from s4v.train.networks import parts
from s4v.train.networks.contract import Network
from s4v.train.networks.dist import DistNetwork
from s4v.train.networks.side4video import SideNetwork
from s4v.train.networks.tds_clip import TdsNetwork
from s4v.train.paper.presets import SIZES, Size

FRAMES, CHANNELS, CLASSES = 8, 256, 400
BACKBONES = {"b16": "vit-b16", "l14": "vit-l", "e14": "vit-e"}
PRESETS = {
    **{name: ("side4video", size) for name, size in SIZES.items()},
    **{f"{head}-{name}": (head, SIZES[name]) for head in ("tds-clip", "dist") for name in ("b16", "l14")},
}
"""Head and size."""
FRAMES_OF_PIXELS = {"side4video": (FRAMES,), "tds-clip": (FRAMES, 5), "dist": (2 * FRAMES,)}
DIST_SIZES = {"side_width": 384, "temporal_width": 96, "pooling_layers": 2}
EMBED_DIMS = {768: 512, 1024: 768}
ARMS = ("products", "step", "tokens", "published", "checkpointed", "decoded", "backbone")
DEFAULT_ARMS = {"side4video": ("products", "step", "checkpointed", "decoded", "backbone")}
"""By head; of the others the first four."""
# What the step of the others is held against.
MOST_OF_PRODUCTS, MOST_OF_PUBLISHED = 1.25, 0.9
MOST_APART = 1e-4
NAMES = {"checkpointed": "step, checkpointed"}
DEFAULT_PRESETS, DEFAULT_CLIPS = "b16-light,b16", 2
# On a CPU. ViT-E's own pass would take a minute, and its tokens of all layers 15 GB.
CPU_CLIPS, CPU_ARMS = {"e14": 1}, {"e14": ("products", "step", "checkpointed")}
# What is left of 12 GB beside CUDA's own context.
CARD_BYTES = 12e9 - 0.5e9
STEPS, STEPS_FOR_MEMORY = 5, 1
# For memory: a tensor that is gone is gone. By default glibc keeps what was freed, in pieces: a third more, or twice.
RETURNED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ProductClock(TorchDispatchMode):
    """Adds up the seconds of matrix products, attention and convolutions."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._seconds = 0.0
        self._device = device
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and time it if it is a product."""
        if not is_product(func.overloadpacket.__name__):
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


def make_batch(preset: str, num_clips: int, device: torch.device) -> tuple[Any, ...]:
    """Random pixels, codes and class tokens, labels, and a codec with a basis."""
    head, size = PRESETS[preset]
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
    pixels = torch.randn(num_clips, *FRAMES_OF_PIXELS[head], 3, 224, 224, generator=rng).to(device)
    shape = (num_clips, FRAMES, num_layers, num_patches, channels)
    codes = torch.randint(-127, 128, shape, generator=rng, dtype=torch.int8).to(device)
    cls = torch.randn(num_clips, FRAMES, num_layers, size.width, generator=rng).to(device)
    return pixels, codes, cls, torch.arange(num_clips, device=device) % CLASSES, codec


def build_networks(preset: str) -> tuple[Network, Callable[[], torch.nn.Module]]:
    """Ours, and what builds the same in the published layout, with our weights."""
    head, size = PRESETS[preset]
    sizes: dict[str, Any] = {
        "num_layers": len(size.layers),
        "width": size.width,
        "num_patches": find_patches(size),
        "patch_px": size.patch_px,
        "num_classes": CLASSES,
    }
    if head == "dist":
        sizes |= {**DIST_SIZES, "num_frames": FRAMES, "embed_dim": EMBED_DIMS[size.width]}
        dist = DistNetwork(**sizes)
        torch.nn.init.normal_(dist.class_texts)
        torch.nn.init.constant_(dist.logit_scale, math.log(100))
        return dist, lambda: _published.take_weights(_published.DistNetwork(**sizes), dist)
    sizes["side_width"] = size.side_width
    is_tds_clip = head == "tds-clip"
    side = TdsNetwork(**sizes) if is_tds_clip else SideNetwork(**sizes, family=size.family)
    return side, lambda: _published.take_weights(_published.SideNetwork(**sizes, is_tds_clip=is_tds_clip), side)


def decode_all(codes: torch.Tensor, codec: Any) -> torch.Tensor:
    """Codes (B, T, L, N, K) -> tokens (B, T, L, N, D)."""
    return torch.stack([codec.decode(codes[:, :, layer], layer) for layer in range(codes.shape[2])], dim=2)


def make_loss(
    arm: str, preset: str, num_clips: int, device: torch.device
) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """An arm's network, and what finds its loss."""
    ours, publish = build_networks(preset)
    pixels, codes, cls, labels, codec = make_batch(preset, num_clips, device)
    network: torch.nn.Module = ours
    inputs: tuple[Any, ...] = (pixels, codes, cls, codec)
    if arm in ("tokens", "published", "decoded"):
        inputs = (pixels, decode_all(codes, codec), cls)
    if arm == "decoded":
        parts._LEAN_FROM_WIDTH = math.inf  # type: ignore[assignment]
    if arm == "published":
        network, inputs = publish(), (pixels, _published.order_tokens(*inputs[1:]))
    ours.checkpoints_activations = arm == "checkpointed"
    network.to(device)
    return network, lambda: F.cross_entropy(network(*inputs), labels)


def run_arm(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each of some steps after a first one, and the peak of memory above an empty process."""
    preset, num_clips, device = options.presets, options.clips, torch.device(options.device)
    keep_freed_memory()  # as `s4v train` does; not where memory is measured, see RETURNED_AT_ONCE
    take_first_step(device)
    torch.manual_seed(0)
    empty = peak_bytes(device)
    if arm == "backbone":
        step = make_backbone_step(preset, num_clips, device, options.precision)
    else:
        network, find_loss = make_loss(arm, preset, num_clips, device)
        # As in train/loop.py.
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=device.type == "cpu")

        def step() -> None:
            with torch.autocast(device.type, DTYPES[options.precision], enabled=options.precision != "fp32"):
                loss = find_loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    step()
    if options.profile:
        return {"profile": profile_step(step, device, options.steps)}
    seconds = [time_step(step, device, is_of_products=arm == "products") for _ in range(options.steps)]
    found = {"seconds": statistics.median(seconds), "bytes": peak_bytes(device) - empty}
    if device.type == "cuda":
        found["reserved"] = torch.cuda.max_memory_reserved()
    return found


def make_backbone_step(preset: str, num_clips: int, device: torch.device, precision: str) -> Callable[[], Any]:
    """The backbone's forward pass over the frames that it sees of the clips."""
    _, size = PRESETS[preset]
    name = BACKBONES[next(one for one in BACKBONES if one in preset)]
    backbone = build_backbone(name, weights="random", device=device, precision=precision).load_weights()
    frames = torch.randint(0, 256, (num_clips * FRAMES, 224, 224, 3), dtype=torch.uint8, device=device)
    return lambda: backbone.encode_frames(frames, size.layers)


def time_step(step: Callable[[], Any], device: torch.device, *, is_of_products: bool) -> float:
    """Seconds of a step, or of the products in it."""
    if is_of_products:
        with ProductClock(device) as clock:
            step()
        return clock.read_seconds()
    synchronise(device)
    start = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - start


def check_published(preset: str, num_clips: int, device: torch.device) -> dict[str, float]:
    """How far the published layout's logits and gradients are from ours, and ours of codes from those of tokens.

    In double precision, and of two clips at least: the mean behind a batch norm leaves next to no gradient of the same
    few clips, of one none but rounding.

    Raises:
        SystemExit: If they are further apart than rounding.
    """
    torch.manual_seed(0)
    ours, publish = build_networks(preset)
    pixels, codes, cls, _, codec = make_batch(preset, max(2, num_clips), device)
    tokens = decode_all(codes, codec)
    ours.to(device)
    with torch.no_grad():
        of_codes, of_tokens = ours(pixels, codes, cls, codec), ours(pixels, tokens, cls)
    pixels, tokens, cls = pixels.double(), tokens.double(), cls.double()
    network = publish().to(device).double()
    expected = ours.double()(pixels, tokens, cls)
    found = network(pixels, _published.order_tokens(tokens, cls))
    cotangent = torch.randn(expected.shape, dtype=torch.double).to(device)
    for output in (expected, found):
        (output * cotangent).sum().backward()
    apart = {
        "logits": ((found - expected).abs().max() / expected.abs().max()).item(),
        "logits from codes": ((of_codes - of_tokens).abs().max() / of_tokens.abs().max()).item(),
        "gradients": _published.compare(network, ours),
    }
    if not max(apart.values()) <= MOST_APART:
        sys.exit(f"{preset}: the published layout computes something else: {apart}")
    return apart


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
    options = read_options()
    if options.arm:
        print(json.dumps(run_alone(options)))
        return
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    chosen = options.presets.split(",")
    clips = {preset: find_clips(preset, options) for preset in chosen}
    apart, profiles = {}, {}
    for preset in chosen:
        arms = find_arms(preset, options)
        if "published" in arms:
            apart[preset] = run_child(preset, "check", clips[preset], options)
        results[preset] = {arm: [] for arm in arms}
        short = ["--steps", str(STEPS_FOR_MEMORY)]
        peaks = {arm: run_child(preset, arm, clips[preset], options, *short, **RETURNED_AT_ONCE) for arm in arms}
        for _ in range(options.rounds):
            for arm in arms:
                found = run_child(preset, arm, clips[preset], options)
                results[preset][arm].append({**found, "bytes": peaks[arm]["bytes"]})
        if options.profile:
            profiles[preset] = run_child(preset, "step", clips[preset], options, "--profile")["profile"]
    table = "\n\n".join([tabulate(results, clips, options), *([tabulate_profiles(profiles)] if profiles else [])])
    bars = [bar for preset, arms in results.items() for bar in list_bars(preset, arms)]
    if options.print_only:
        print("\n".join([table, *bars]))
        return
    sizes = {"clips": clips, "frames": FRAMES, "channels": CHANNELS, "precision": options.precision}
    machine = describe_machine("torch", "timm", "open_clip_torch")
    result = {"machine": machine, "sizes": sizes, "results": results, "apart": apart, "profiles": profiles}
    keep(find_name(options), {key: value for key, value in result.items() if value}, table, bars)


def read_options() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default=DEFAULT_PRESETS, help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--arms", help=f"of {', '.join(ARMS)} [by preset; of e14 on a CPU those of the side network]")
    parser.add_argument("--clips", type=int, help=f"in a step [{DEFAULT_CLIPS}; of e14 on a CPU 1]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="also what a step's time goes to")
    parser.add_argument("--print-only", action="store_true", help="keep nothing under docs/benchmarks")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen, arms = options.presets.split(","), set((options.arms or "").split(",")) - {""}
    if unknown := (set(chosen) - set(PRESETS)) | (arms - set(ARMS)):
        parser.error(f"no such preset or arm: {', '.join(sorted(unknown))}")
    if "published" in arms and any(PRESETS[preset][1].family != "clip" for preset in chosen):
        parser.error("the published layout is there of networks beside CLIP alone: leave e14 or --arms published out")
    return options


def run_alone(options: argparse.Namespace) -> dict[str, Any]:
    """The one arm of this process."""
    if options.arm == "check":
        return check_published(options.presets, options.clips, torch.device(options.device))
    return run_arm(options.arm, options)


def find_name(options: argparse.Namespace) -> str:
    """Under which figures are kept."""
    name = f"side_network_{options.device.partition(':')[0]}"
    if options.presets != DEFAULT_PRESETS or options.arms or options.clips:
        name = "_".join([name, *options.presets.split(",")])
    return name


def find_clips(preset: str, options: argparse.Namespace) -> int:
    """Clips in a step."""
    fewer = CPU_CLIPS.get(preset) if options.device == "cpu" else None
    return options.clips or fewer or DEFAULT_CLIPS


def find_arms(preset: str, options: argparse.Namespace) -> tuple[str, ...]:
    """Arms in the table's order."""
    if options.arms:
        return tuple(arm for arm in ARMS if arm in options.arms.split(","))
    if options.device == "cpu" and preset in CPU_ARMS:
        return CPU_ARMS[preset]
    return DEFAULT_ARMS.get(PRESETS[preset][0], ARMS[:4])


def run_child(
    preset: str, arm: str, num_clips: int, options: argparse.Namespace, *more: str, **environment: str
) -> dict[str, Any]:
    """One arm in a process of its own; figures are NaN where it does not fit."""
    command = [sys.executable, __file__, "--arm", arm, "--presets", preset, "--clips", str(num_clips)]
    command += ["--device", options.device, "--precision", options.precision, *more]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if ran.returncode:
        print(f"{preset} {arm}: {ran.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        if arm == "check":
            sys.exit(1)
        return {"seconds": float("nan"), "bytes": float("nan"), "profile": {}}
    return json.loads(ran.stdout.splitlines()[-1])


def tabulate(results: dict[str, Any], clips: dict[str, int], options: argparse.Namespace) -> str:
    """All arms of all presets."""
    rows = [row for preset, arms in results.items() for row in describe(preset, clips[preset], arms)]
    heads = ["preset", "clips", "arm", "seconds", "lowest to highest", "of the products", "of the published layout"]
    heads += ["peak MB", "of decoded"]
    if options.device.startswith("cuda"):
        heads += ["reserved MB", "fits 12 GB"]
    places = [place for place in range(len(heads)) if any(row[place] for row in rows)]
    return format_table([heads[place] for place in places], [[row[place] for place in places] for row in rows])


def tabulate_profiles(profiles: dict[str, dict[str, float]]) -> str:
    """What share of a profiled step each kind of operation takes."""
    kinds = dict.fromkeys(kind for profile in profiles.values() for kind in profile)
    rows = [
        [kind, *(f"{100 * profile.get(kind, 0) / sum(profile.values()):.1f} %" for profile in profiles.values())]
        for kind in kinds
    ]
    return format_table(["of a step's time", *profiles], rows)


def list_bars(preset: str, arms: dict[str, list[dict[str, float]]]) -> list[str]:
    """How the step stands against what was asked for of TDS-CLIP and DiST."""
    if PRESETS[preset][0] in DEFAULT_ARMS:
        return []
    asked = (
        ("step", "products", "step, of its products and convolutions", MOST_OF_PRODUCTS),
        ("tokens", "published", "step from tokens, of the published layout from the same", MOST_OF_PUBLISHED),
        ("step", "published", "step from codes, of the published layout from tokens", MOST_OF_PUBLISHED),
    )
    return [
        check_bar(f"{preset}: {name}", find_ratio(arms[ours], arms[other], "seconds"), bar)
        for ours, other, name, bar in asked
        if ours in arms and other in arms
    ]


def describe(preset: str, num_clips: int, arms: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """Rows of the table, ratios by round; empty where there is nothing to compare with."""
    rows = []
    for arm, found in arms.items():
        seconds = [one["seconds"] for one in found]
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        row = [preset, str(num_clips), NAMES.get(arm, arm), f"{statistics.median(seconds):.3f}", spread]
        row += [compare(found, arms.get(other), "seconds") for other in ("products", "published")]
        row += [f"{statistics.median(one['bytes'] for one in found) / 1e6:.0f}"]
        row += [compare(found, arms.get("decoded"), "bytes")]
        if reserved := max((one.get("reserved", 0) for one in found), default=0):
            row += [f"{reserved / 1e6:.0f}", "yes" if reserved <= CARD_BYTES else "no"]
        rows.append([*row, "", ""])
    if "backbone" in arms and "step" in arms:
        both = statistics.median(
            (a["seconds"] + b["seconds"]) / b["seconds"] for a, b in zip(arms["backbone"], arms["step"], strict=True)
        )
        rows.append(
            [preset, str(num_clips), "backbone and step, of the step", "", "", f"{both:.2f}", "", "", "", "", ""]
        )
    return rows


def compare(found: list[dict[str, float]], other: list[dict[str, float]] | None, what: str) -> str:
    """The median ratio of one figure to another arm's, for a table."""
    return "" if other is None else f"{find_ratio(found, other, what):.2f}"


def find_ratio(found: list[dict[str, float]], other: list[dict[str, float]], what: str) -> float:
    """The median over rounds of one arm's figure by another's."""
    return statistics.median(a[what] / b[what] for a, b in zip(found, other, strict=True))


if __name__ == "__main__":
    main()
