"""What makes frames smaller, and what that costs a reader: bytes, decoding on one core, and loss.

    python benchmarks/pixels.py --videos FOLDER [--folder runs/benchmark-pixels] [--rounds 5]

Frames are those of real videos and of the small world, at 224 x 224 pixels as a store caches them, with the frame
before and the frame behind each. Every way codes the same frames; decoding is timed in one thread of one core, all ways
in turns. What comes back is compared with what was there.

Beside them stands the reader: whole clips of frames from the page cache, by the same core, of a store with RGB and of
one with YCbCr 4:2:0; and the training loader on that core, which makes floats of them.

The last columns say what a reader gives with a way: MB of uncoded frames a second. From the page cache the core reads
and then decodes. A disk of 500 MB/s reads while the core decodes, so the slower of both counts.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import describe_machine, format_table, keep
from _stores import begin_store, write_rows
from numcodecs import Blosc, Zstd
from numcodecs.blosc import set_nthreads
from PIL import Image

from s4v.demo.world import WorldConfig, write_world
from s4v.extract.decode.pool import DecodeRequest, DecoderPool
from s4v.store.codecs.affine import AffineCodec
from s4v.store.fidelity import compare_pixels
from s4v.store.layout import PIXEL_ARRAYS, PixelFormat, StoreLayout
from s4v.store.pixel_formats import decode_pixels, encode_pixels
from s4v.store.reader import StoreReader, open_store
from s4v.store.writer import RowTokens
from s4v.train.clips import ClipLoader, ClipPlan
from s4v.train.pixel_decoding import decode_ycbcr420

SIDE = 224
SIZE = (SIDE, SIDE)
FRAMES = 4
"""Of each video; each with two neighbours."""
WORLD_VIDEOS = 12
DISK = 500.0
"""MB/s, as `s4v plan` takes it."""
ROWS, CLIPS, CLIP_FRAMES = 64, 32, 8
"""Of the store that is read, and of a batch."""

Parts = list[Any]
"""A frame and its neighbours as they are coded."""


@dataclass(frozen=True)
class Way:
    """How three neighbouring frames, (3, H, W, 3) uint8, are made smaller and come back."""

    name: str
    encode: Callable[[np.ndarray], Parts]
    decode: Callable[[Parts], np.ndarray]
    compress: Callable[[bytes], bytes] | None = None
    """In its own right, of each part; `expand` is its inverse."""
    expand: Callable[[bytes], bytes] | None = None


def split_frames(frames: np.ndarray) -> Parts:
    """Each frame by itself, as it is."""
    return list(frames)


def join_frames(parts: Parts) -> np.ndarray:
    """The inverse."""
    return np.stack(parts)


def subtract(frames: np.ndarray, axis: int) -> Parts:
    """Each value less the one before it along an axis of the frame, modulo 256."""
    parts = frames.copy()
    ahead = [slice(None)] * frames.ndim
    behind = [slice(None)] * frames.ndim
    ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
    parts[tuple(ahead)] -= frames[tuple(behind)]
    return list(parts)


def add_up(parts: Parts, axis: int) -> np.ndarray:
    """The inverse."""
    return np.add.accumulate(np.stack(parts), axis=axis, dtype=np.uint8)


def subtract_middle(frames: np.ndarray) -> Parts:
    """Neighbours less the frame between them, modulo 256."""
    return [frames[0] - frames[1], frames[1], frames[2] - frames[1]]


def add_middle(parts: Parts) -> np.ndarray:
    """The inverse."""
    return np.stack([parts[0] + parts[1], parts[1], parts[2] + parts[1]])


def write_pictures(frames: np.ndarray, **options: Any) -> Parts:
    """Each frame as a file of PIL's."""
    parts = []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, **options)
        parts.append(buffer.getvalue())
    return parts


def read_pictures(parts: Parts) -> np.ndarray:
    """The inverse."""
    return np.stack([np.asarray(Image.open(io.BytesIO(part))) for part in parts])


def list_ways() -> list[Way]:
    """All that are measured; the first one changes nothing."""
    shuffled = Blosc(cname="lz4", clevel=5, shuffle=Blosc.SHUFFLE, blocksize=0)
    coders = {"lz4 (blosc)": shuffled, "zstd": Zstd(level=1)}
    before = {
        "": (split_frames, join_frames),
        " of differences along x": (partial(subtract, axis=2), partial(add_up, axis=2)),
        " of differences along y": (partial(subtract, axis=1), partial(add_up, axis=1)),
        " of differences to the neighbour": (subtract_middle, add_middle),
    }
    ways = [Way("as they are", split_frames, join_frames)]
    for name, coder in coders.items():
        for kind, (encode, decode) in before.items():
            ways.append(Way(f"{name}{kind}", encode, decode, *shuffling(coder)))
    ways.append(Way("PNG", partial(write_pictures, format="png", compress_level=6), read_pictures))
    for name, subsampling in (("4:4:4", 0), ("4:2:0", 2)):
        options = {"format": "jpeg", "quality": 90, "subsampling": subsampling}
        ways.append(Way(f"JPEG, quality 90, {name}", partial(write_pictures, **options), read_pictures))
    coded: Callable[[np.ndarray], Parts] = lambda frames: list(encode_pixels(frames, "ycbcr420"))  # noqa: E731
    ways.append(Way("YCbCr 4:2:0, by numpy", coded, lambda parts: decode_pixels(np.stack(parts), "ycbcr420", SIZE)))
    ways.append(Way("YCbCr 4:2:0, colours repeated", coded, repeat_colours))
    ways.append(Way("YCbCr 4:2:0, by torch", coded, decode_with_torch))
    return ways


def shuffling(coder: Any) -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    """Compression of a frame whose colours are put apart: the shuffle of bytes, three to a pixel."""

    def compress(frame: np.ndarray) -> bytes:
        return bytes(coder.encode(np.ascontiguousarray(np.moveaxis(frame, -1, 0))))

    def expand(data: bytes) -> np.ndarray:
        planes = np.frombuffer(coder.decode(data), np.uint8).reshape(3, *SIZE)
        return np.ascontiguousarray(np.moveaxis(planes, 0, -1))

    return compress, expand


def decode_with_torch(parts: Parts) -> np.ndarray:
    """As the training loader does, but for its normalisation; rounded."""
    rgb = decode_ycbcr420(torch.from_numpy(np.stack(parts)), SIZE)
    return rgb.round_().to(torch.uint8).movedim(-3, -1).numpy()


def repeat_colours(parts: Parts) -> np.ndarray:
    """The same without a bilinear step: each pixel has the colours of its four."""
    planes = torch.from_numpy(np.stack(parts))
    luma = planes[:, : SIDE * SIDE].view(-1, SIDE, SIDE).float()
    chroma = planes[:, SIDE * SIDE :].view(-1, 2, SIDE // 2, SIDE // 2).float().sub_(128)
    blue, red = chroma.repeat_interleave(2, -1).repeat_interleave(2, -2).unbind(1)
    rgb = torch.stack([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue], dim=1)
    return rgb.clamp_(0, 255).round_().to(torch.uint8).movedim(-3, -1).numpy()


def read_frames(folder: Path) -> np.ndarray:
    """(n, 3, H, W, 3) uint8: frames of all videos of a folder that decode, each between its neighbours."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".mp4", ".avi", ".mov", ".mkv"))
    asked = [
        DecodeRequest(
            path=str(file), num_frames=FRAMES, sampling="uniform", resize="224", image_size=SIZE,
            pixel_offsets=(-1, 0, 1),
        )
        for file in files
    ]  # fmt: skip
    with DecoderPool(1) as pool:
        videos = list(pool.decode_ahead(asked))
    return np.concatenate([video.pixels[0] for video in videos if video.pixels is not None])


def encode(way: Way, frames: np.ndarray) -> list[Parts]:
    """All frames, three by three."""
    coded = [way.encode(three) for three in frames]
    return coded if way.compress is None else [[way.compress(part) for part in parts] for parts in coded]


def decode(way: Way, coded: Sequence[Parts]) -> Iterator[np.ndarray]:
    """The inverse."""
    for parts in coded:
        yield way.decode(parts if way.expand is None else [way.expand(part) for part in parts])


def measure_way(way: Way, frames: dict[str, np.ndarray]) -> dict[str, Any]:
    """What a way makes of frames, by whose they are: bytes a frame and what is lost."""
    found: dict[str, Any] = {"way": way.name}
    for name, own in frames.items():
        coded = encode(way, own)
        num_bytes = sum(len(part) if isinstance(part, bytes) else part.nbytes for parts in coded for part in parts)
        loss = compare_pixels(own.reshape(-1, *SIZE, 3), (f for three in decode(way, coded) for f in three))
        found[name] = {"bytes": num_bytes / own.shape[0] / 3, **asdict(loss)}
    return found


def time_ways(ways: Sequence[Way], frames: np.ndarray, rounds: int) -> dict[str, float]:
    """MB of uncoded frames that each way decodes in a second: the median of rounds in turns."""
    coded = {way.name: encode(way, frames) for way in ways}
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            begin = time.perf_counter()
            for _ in decode(way, coded[way.name]):
                pass
            seconds[way.name].append(time.perf_counter() - begin)
    return {name: frames.nbytes / 1e6 / statistics.median(own) for name, own in seconds.items()}


def make_store(path: Path, frames: np.ndarray, pixel_format: PixelFormat) -> StoreReader:
    """A store of those frames over and over, and next to nothing else."""
    layout = StoreLayout(
        num_rows=ROWS, num_views=1, num_frames=CLIP_FRAMES, layers=(0,), num_patches=1, width=4, channels=4,
        embed_dim=4, image_size=SIZE, patch_dtype="float16", pixel_format=pixel_format, frames_per_block=CLIP_FRAMES,
    )  # fmt: skip
    place = (1, CLIP_FRAMES)
    small = {
        "patches": np.ones((*place, 1, 1, 4), np.float16),
        "cls": np.ones((*place, 1, 4), np.float16),
        "embedding": np.ones((*place, 4), np.float32),
    }

    def make_tokens(row: int) -> RowTokens:
        held = frames[(row * CLIP_FRAMES + np.arange(CLIP_FRAMES)) % len(frames), 1][None, :, None]
        return RowTokens(**small, **{PIXEL_ARRAYS[pixel_format]: encode_pixels(held, pixel_format)})

    writer, records = begin_store(path, layout, AffineCodec(dtype="float16"), ["a"])
    with writer:
        for shard in range(layout.num_shards):
            write_rows(writer, records, shard, make_tokens)
        writer.consolidate()
    return open_store(path)


def time_reading(stores: dict[str, StoreReader], rounds: int) -> dict[str, dict[str, float]]:
    """MB of uncoded frames a second, by store: of the bare reader, and of the loader, which makes floats of them."""
    batches = [np.arange(first, first + CLIPS) % ROWS for first in range(0, 2 * ROWS, CLIPS)]
    places = np.tile(np.arange(CLIP_FRAMES), (CLIPS, 1))
    zeros = np.zeros(CLIPS, np.int64)
    plans = [ClipPlan(rows, zeros, places, zeros) for rows in batches]
    size = len(batches) * places.size * SIDE * SIDE * 3 / 1e6
    seconds: dict[str, dict[str, list[float]]] = {name: {"reader": [], "loader": []} for name in stores}
    for number in range(rounds + 1):
        for name, store in stores.items():
            loader = ClipLoader(store, arrays=("pixels",), layers=store.layout.layers, device=torch.device("cpu"))
            begin = time.perf_counter()
            for rows in batches:
                store.read_clips(rows, places, arrays=("pixels",))
            middle = time.perf_counter()
            for _ in loader.load(plans):
                pass
            if number:  # the first round fills the page cache
                seconds[name]["reader"].append(middle - begin)
                seconds[name]["loader"].append(time.perf_counter() - middle)
    return {
        name: {what: size / statistics.median(own) for what, own in kinds.items()} for name, kinds in seconds.items()
    }


def tabulate(ways: Sequence[dict[str, Any]], reading: dict[str, dict[str, float]]) -> str:
    """A line for each way; then one for each store."""
    rows = []
    reader = reading["rgb"]["reader"]
    for one in ways:
        share, speed = one["real"]["bytes"] / (SIDE * SIDE * 3), one["mb_per_s"]
        is_coded = one is not ways[0]
        cached = 1 / (share / reader + is_coded / speed)
        from_disk = min(DISK / share, speed) if is_coded else DISK
        loss = one["real"]
        lost = ["", "", ""] if loss["psnr"] is None else [
            f"{loss['error_mean']:.2f}", loss["error_worst"], f"{loss['psnr']:.1f} dB"
        ]  # fmt: skip
        sizes = [f"{one[name]['bytes'] / 1e3:.1f} kB" for name in ("real", "world")]
        rows.append([one["way"], *sizes, f"{speed:,.0f}" if is_coded else "", *lost,
                     f"{cached:,.0f}", f"{from_disk:,.0f}"])  # fmt: skip
    heads = ["way", "a frame, real videos", "small world", "decoding, MB/s", "mean error of 255", "worst", "PSNR",
             "read from the page cache, MB/s", f"from a disk of {DISK:.0f} MB/s"]  # fmt: skip
    stores = [[name, *(f"{own[what]:,.0f}" for what in ("reader", "loader"))] for name, own in reading.items()]
    others = format_table(["store", "reader, MB/s", "training loader, MB/s"], stores)
    return f"{format_table(heads, rows)}\n\n{others}"


def main() -> None:
    """Measure on one core, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True, help="folder of real videos")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-pixels"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    write_world(options.folder / "world", WorldConfig(num_train=WORLD_VIDEOS, num_val=0, num_novel=0))
    frames = {"real": read_frames(options.videos), "world": read_frames(options.folder / "world")}
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # whatever threads come from here on share one core
    torch.set_num_threads(1)
    set_nthreads(1)
    ways = list_ways()
    found = [measure_way(way, frames) for way in ways]
    speeds = time_ways(ways, frames["real"], options.rounds)
    for one in found:
        one["mb_per_s"] = speeds[one["way"]]
    kinds: tuple[PixelFormat, ...] = ("rgb", "ycbcr420")
    stores = {kind: make_store(options.folder / f"{kind}.zarr", frames["real"], kind) for kind in kinds}
    reading = time_reading(stores, options.rounds)
    counts = {name: int(own.shape[0] * 3) for name, own in frames.items()}
    result = {"machine": describe_machine("torch", "numpy", "numcodecs", "pillow"), "frames": counts, "ways": found,
              "reading": reading}  # fmt: skip
    keep("pixels", result, tabulate(found, reading))
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
