"""The whole extraction against its floor: the backbone's forward and the decoding of the same files, each by itself.

    python benchmarks/extract.py [--videos 300] [--rounds 2]                            # ViT-B/32 on a CPU: 7 minutes
    python benchmarks/extract.py --models vit-b16,vit-l,vit-e --videos 300              # all sizes, on a GPU

On a CPU the floor is (CPU seconds of the bare forward + CPU seconds of bare decoding and resizing) / cores, and the bar
is 1.15 of it; on a GPU it is the wall time of the bare forward, frames on the device already, and the bar is 1.05 where
cores are enough to decode (`held up by` says whether they were). Imports, building the model and starting processes are
not counted: every kind is warmed up first. Rounds are paired.
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
from typing import Any

import av
import numpy as np
import torch
from _report import check_bar, describe_machine, format_table, keep

from s4v.backbone.vision_tower import Backbone, build_backbone, find_peak_flops, parse_layers
from s4v.device import find_device
from s4v.extract.config import ExtractConfig
from s4v.extract.decode.pool import DecodeRequest, DecoderPool
from s4v.extract.extraction import extract_dataset
from s4v.files import read_json

FRAMES = 8

_CPU_BAR = 1.15
_GPU_BAR = 1.05


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
    """The bare forward over as many frames, pixels and tokens left on the device."""
    height, width = backbone.info.image_size
    drawn = np.random.default_rng(0).integers(0, 256, (batch_size, height, width, 3), dtype=np.uint8)
    pixels = torch.from_numpy(drawn).to(backbone.device)
    for _ in range(-(-num_frames // batch_size)):
        backbone.encode_frames(pixels, layers)
    if backbone.device.type == "cuda":
        torch.cuda.synchronize()


def decode_all(pool: DecoderPool, paths: list[Path], image_size: tuple[int, int]) -> None:
    """The same frames of the same files, resized and cropped, and no more."""
    wanted = {"num_frames": FRAMES, "sampling": "uniform", "resize": "256", "image_size": image_size}
    futures = [pool.submit(DecodeRequest(path=str(path), **wanted)) for path in paths]
    for future in futures:
        assert future.result().pixels is not None


def measure_decoding(paths: list[Path], image_size: tuple[int, int]) -> tuple[float, float]:
    """Wall and CPU seconds of bare decoding; children's are known when they end, those of warming up are taken off."""
    cores = os.cpu_count() or 1
    with DecoderPool(cores) as pool:
        decode_all(pool, paths[:cores], image_size)  # processes have started
        start = time.perf_counter()
        decode_all(pool, paths, image_size)
        wall = time.perf_counter() - start
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, used * len(paths) / (len(paths) + cores)


def extract(config: ExtractConfig) -> tuple[float, str]:
    """Seconds of the work itself, from the first batch's wait to the last write; and what held it up."""
    extract_dataset(config)
    stats = read_json(config.out / "stats.json")
    apart = ("start", "calibration", "measuring")
    return sum(value for name, value in stats["seconds_by_stage"].items() if name not in apart), stats["bottleneck"]


def measure_model(model: str, paths: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    """One model in paired rounds."""
    device, folder = find_device(options.device), options.folder
    backbone = build_backbone(model, weights="random", device=device, precision=options.precision).load_weights()
    layers, image_size = parse_layers("paper", backbone.info.depth), backbone.info.image_size
    num_frames = FRAMES * len(paths)
    config = ExtractConfig(
        model=model, weights="random", dataset="folder", root=folder / "videos", out=folder / "out.zarr",
        frames={"": FRAMES}, dtype=options.dtype, device=options.device, precision=options.precision,
        batch_size=options.batch_size, overwrite=True,
    )  # fmt: skip
    walls: dict[str, list[float]] = {"forward": [], "decoding": [], "extract": []}
    cpus: dict[str, list[float]] = {"forward": [], "decoding": []}
    held_up = ""
    for _ in range(options.rounds):
        if not backbone.has_weights:
            backbone.load_weights()
        forward_all(backbone, layers, options.batch_size, options.batch_size)
        forward = measure(lambda: forward_all(backbone, layers, num_frames, options.batch_size))
        for name, (wall, cpu) in {"forward": forward, "decoding": measure_decoding(paths, image_size)}.items():
            walls[name].append(wall)
            cpus[name].append(cpu)
        backbone.free_weights()  # two of a giant do not fit
        seconds, held_up = extract(config)
        walls["extract"].append(seconds)
    cpu_floors = [sum(pair) / (os.cpu_count() or 1) for pair in zip(cpus["forward"], cpus["decoding"], strict=True)]
    floors = walls["forward"] if device.type == "cuda" else cpu_floors
    peak = find_peak_flops(device, backbone.info.precision)
    work = backbone.flops_per_frame * num_frames
    return {
        "model": model,
        "wall_seconds": walls,
        "cpu_seconds": cpus,
        "floor_seconds": floors,
        "ratios": [whole / floor for whole, floor in zip(walls["extract"], floors, strict=True)],
        "held_up_by": held_up,
        "frames_per_second": num_frames / statistics.median(walls["extract"]),
        "flop_utilisation": {
            name: None if peak is None else work / statistics.median(walls[name]) / peak
            for name in ("forward", "extract")
        },
    }


def tabulate(found: dict[str, Any]) -> list[str]:
    """One model's line."""

    def seconds(values: list[float]) -> str:
        return f"{statistics.median(values):.1f}"

    walls, cpus, ratios, shares = (
        found[name] for name in ("wall_seconds", "cpu_seconds", "ratios", "flop_utilisation")
    )
    return [
        found["model"],
        f"{seconds(walls['forward'])} ({seconds(cpus['forward'])})",
        f"{seconds(walls['decoding'])} ({seconds(cpus['decoding'])})",
        seconds(found["floor_seconds"]),
        seconds(walls["extract"]),
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{found['frames_per_second']:.1f}",
        found["held_up_by"],
        *("not known" if shares[name] is None else f"{shares[name]:.0%}" for name in ("forward", "extract")),
    ]


HEADS = (
    *("model", "bare forward, s (CPU)", "bare decoding, s (CPU)", "floor, s", "extract, s", "of the floor"),
    *("frames/s", "held up by", "FLOP utilisation, forward", "and extract"),
)


def main() -> None:
    """Make videos, measure the parts and the whole in turns, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=48)
    parser.add_argument("--models", default="vit-b32", help="one or more, between commas")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-extract"))
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    make_videos(options.folder / "videos", options.videos)
    paths = sorted((options.folder / "videos").rglob("*.mp4"))
    models, kind = options.models.split(","), find_device(options.device).type
    found = [measure_model(model, paths, options) for model in models]
    shutil.rmtree(options.folder)
    bar = _GPU_BAR if kind == "cuda" else _CPU_BAR
    bars = [
        check_bar(f"extract over its floor, {one['model']}", statistics.median(one["ratios"]), bar) for one in found
    ]
    sizes = {"videos": options.videos, "frames": FRAMES * len(paths), "batch": options.batch_size}
    result = {"machine": describe_machine("torch", "av", "open_clip_torch"), "sizes": sizes, "models": found}
    keep(f"extract_{'_'.join(models)}_{kind}", result, format_table(HEADS, [tabulate(one) for one in found]), bars)


if __name__ == "__main__":
    main()
