"""The whole extraction against its floor: the backbone's forward and the decoding of the same files, each by itself.

    python benchmarks/extract.py [--videos 48] [--model vit-b32] [--device cuda] [--precision fp16]

On a CPU the floor is (CPU seconds of the bare forward + CPU seconds of bare decoding and resizing) / cores; on a GPU it
is the wall time of the bare forward, and model FLOP utilisation is printed where the device's peak is given (--peak).
Imports, building the model and starting processes are not counted: every kind is warmed up first. Rounds are paired.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from _report import describe_machine, format_table, keep

from s4v.extract.backbone import Backbone, build_backbone, parse_layers, resolve_device
from s4v.extract.config import ExtractConfig
from s4v.extract.decoding import DecodeRequest, DecoderPool
from s4v.extract.pipeline import extract_dataset
from s4v.store._files import read_json

FRAMES = 8


def make_videos(root: Path, count: int, seconds: int = 10) -> None:
    """340 x 256 H.264 clips at 25 frames a second: a texture that drifts, with noise."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (64, 85, 3)).repeat(8, axis=0).repeat(8, axis=1).astype(np.int16)
    for number in range(count):
        path = root / "train" / f"class-{number % 4}" / f"{number:04d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast", "crf": "23"})
            stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
            for index in range(25 * seconds):
                top, left = (3 * index + 11 * number) % 200, (5 * index) % 300
                image = texture[top : top + 256, left : left + 340] + rng.integers(-6, 7, (256, 340, 1))
                frame = av.VideoFrame.from_ndarray(np.clip(image, 0, 255).astype(np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


def cpu_seconds() -> float:
    """Of this process and its children that have ended."""
    return sum(
        use.ru_utime + use.ru_stime
        for use in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def measure(run: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    run()
    return time.perf_counter() - wall, cpu_seconds() - cpu


def forward_all(backbone: Backbone, layers: tuple[int, ...], num_frames: int, batch_size: int) -> None:
    """The bare forward over as many frames, tokens left on the device."""
    height, width = backbone.info.image_size
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (batch_size, height, width, 3), dtype=np.uint8))
    for _ in range(-(-num_frames // batch_size)):
        backbone.encode_frames(pixels, layers)
    if backbone.device.type == "cuda":
        torch.cuda.synchronize()


def decode_all(pool: DecoderPool, paths: list[Path], crop_px: int) -> None:
    """The same frames of the same files, resized and cropped, and no more."""
    futures = [
        pool.submit(DecodeRequest(path=str(path), num_frames=FRAMES, sampling="uniform", resize="256", crop_px=crop_px))
        for path in paths
    ]
    for future in futures:
        assert future.result().pixels is not None


def main() -> None:
    """Make videos, measure the parts and the whole in turns, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=48)
    parser.add_argument("--model", default="vit-b32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device at this precision")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-extract"))
    options = parser.parse_args()
    folder, cores = options.folder, os.cpu_count() or 1
    shutil.rmtree(folder, ignore_errors=True)
    make_videos(folder / "videos", options.videos)
    paths = sorted((folder / "videos").rglob("*.mp4"))
    num_frames = FRAMES * len(paths)
    device = resolve_device(options.device)
    backbone = build_backbone(options.model, weights="random", device=device, precision=options.precision)
    backbone.load_weights()
    layers = parse_layers("paper", backbone.info.depth)
    forward_all(backbone, layers, options.batch_size, options.batch_size)

    def extract() -> float:
        """Seconds of the work itself: from the first batch's wait to the last write."""
        config = ExtractConfig(
            model=options.model, weights="random", dataset="folder", root=folder / "videos", out=folder / "out.zarr",
            frames={"": FRAMES}, dtype=options.dtype, device=options.device, precision=options.precision,
            batch_size=options.batch_size, overwrite=True,
        )  # fmt: skip
        extract_dataset(config)
        stages = read_json(folder / "out.zarr" / "stats.json")["seconds_by_stage"]
        return sum(value for name, value in stages.items() if name not in ("start", "calibration", "measuring"))

    walls: dict[str, list[float]] = {"forward": [], "decoding": [], "extract": []}
    cpus: dict[str, list[float]] = {"forward": [], "decoding": []}
    for _ in range(options.rounds):
        wall, cpu = measure(lambda: forward_all(backbone, layers, num_frames, options.batch_size))
        walls["forward"].append(wall)
        cpus["forward"].append(cpu)
        with DecoderPool(cores) as pool:
            decode_all(pool, paths[:cores], backbone.info.image_size[0])  # processes have started
            start = time.perf_counter()
            decode_all(pool, paths, backbone.info.image_size[0])
            walls["decoding"].append(time.perf_counter() - start)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        # The children's seconds are known when they end; those of starting and warming up are taken off.
        cpus["decoding"].append(used * len(paths) / (len(paths) + cores))
        walls["extract"].append(extract())
    floors = (
        walls["forward"]
        if device.type == "cuda"
        else [(a + b) / cores for a, b in zip(cpus["forward"], cpus["decoding"], strict=True)]
    )
    ratios = [whole / floor for whole, floor in zip(walls["extract"], floors, strict=True)]
    rate = num_frames / statistics.median(walls["extract"])
    median = statistics.median
    rows = [
        ["bare forward", f"{median(walls['forward']):.1f} s", f"{median(cpus['forward']):.1f} s"],
        ["bare decoding", f"{median(walls['decoding']):.1f} s", f"{median(cpus['decoding']):.1f} s"],
        ["floor", f"{median(floors):.1f} s", ""],
        ["extract", f"{median(walls['extract']):.1f} s", ""],
        ["of the floor", f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", ""],
        ["frames a second", f"{rate:.1f}", ""],
    ]  # fmt: skip
    if options.peak:
        parameters = sum(p.numel() for p in backbone.tower.parameters())
        flops = 2 * parameters * (backbone.info.num_patches + 1) * rate
        rows.append(["model FLOP utilisation", f"{flops / options.peak / 1e12:.1%}", ""])
    shutil.rmtree(folder)
    machine = describe_machine("torch", "av", "open_clip_torch")
    sizes = {"videos": options.videos, "frames": num_frames, "model": options.model, "batch": options.batch_size}
    result = {"machine": machine, "sizes": sizes, "wall_seconds": walls, "cpu_seconds": cpus, "ratios": ratios}
    keep(f"extract_{options.model}_{device.type}", result, format_table(["", "wall", "CPU"], rows))


if __name__ == "__main__":
    main()
