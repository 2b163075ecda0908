"""Random clips of 8 out of 32 cached frames, batch after batch: ours, other formats, and the page cache itself.

    python benchmarks/reader.py [--videos 128] [--batches 40] [--cold]

All read the same bytes (int8 codes, about 300 kB a frame) into batches of (16, 8, L, N, K); who reads in threads has as
many as our reader. Rounds are interleaved and the median of five counts. `--cold` drops the files from the page cache
before each round, as far as the system does that.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from _report import RESULTS, check_bar, describe_machine, format_table, keep
from _stores import begin_store, write_rows

from s4v.store.codecs.affine import AffineCodec
from s4v.store.layout import StoreLayout
from s4v.store.reader import count_threads, open_store
from s4v.store.writer import RowTokens
from s4v.train.clips import ClipLoader, ClipPlan

FRAMES, CLIP, BATCH = 32, 8, 16
LAYERS, PATCHES, CHANNELS = 6, 196, 256
ROUNDS = 5
CEILING = "preadv, no checks (ceiling)"

Batches = list[tuple[np.ndarray, np.ndarray]]
"""Rows (B,) and places (B, T) of each batch."""


def draw_tokens(row: int) -> np.ndarray:
    """The codes of a video, (F, L, N, K) int8."""
    rng = np.random.default_rng(row)
    return np.clip(rng.normal(0, 30, (FRAMES, LAYERS, PATCHES, CHANNELS)), -127, 127).astype(np.int8)


def write_store(path: Path, num_videos: int) -> None:
    """A store without pixels."""
    layout = StoreLayout(
        num_rows=num_videos,
        num_views=1,
        num_frames=FRAMES,
        layers=tuple(range(LAYERS)),
        num_patches=PATCHES,
        width=CHANNELS,
        channels=CHANNELS,
        embed_dim=8,
        image_size=(224, 224),
        patch_dtype="int8",
        with_pixels=False,
    )
    codec = AffineCodec(dtype="int8", scale=np.ones((LAYERS, CHANNELS), np.float32))

    def make_tokens(row: int) -> RowTokens:
        return RowTokens(
            patches=draw_tokens(row)[None],
            cls=np.zeros((1, FRAMES, LAYERS, CHANNELS), np.float16),
            embedding=np.zeros((1, FRAMES, 8), np.float32),
        )

    writer, records = begin_store(path, layout, codec, ["a", "b"])
    with writer:
        for shard in writer.pending_shards():
            write_rows(writer, records, shard, make_tokens)
        writer.consolidate()


def write_flat(path: Path, num_videos: int) -> None:
    """One file, videos behind each other."""
    with path.open("wb") as file:
        for row in range(num_videos):
            file.write(draw_tokens(row).tobytes())


def write_h5(path: Path, num_videos: int) -> None:
    """One dataset, a chunk a frame, with HDF5's own checksums."""
    import h5py

    tail = (LAYERS, PATCHES, CHANNELS)
    with h5py.File(path, "w") as file:
        tokens = file.create_dataset(
            "patches", (num_videos, FRAMES, *tail), dtype="i1", chunks=(1, 1, *tail), fletcher32=True
        )
        for row in range(num_videos):
            tokens[row] = draw_tokens(row)


def write_npy(folder: Path, num_videos: int) -> None:
    """One .npy a video."""
    folder.mkdir()
    for row in range(num_videos):
        np.save(folder / f"{row:06d}.npy", draw_tokens(row))


def write_tars(folder: Path, num_videos: int) -> None:
    """WebDataset shards of 16 videos, a .npy each."""
    import webdataset

    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/%04d.tar", maxcount=16, verbose=0) as shards:
        for row in range(num_videos):
            shards.write({"__key__": f"{row:06d}", "npy": draw_tokens(row)})


def read_ours(path: Path) -> Callable[[Batches], Iterator[np.ndarray]]:
    """The store's reader, patches only, checksums verified."""
    store = open_store(path)

    def read(batches: Batches) -> Iterator[np.ndarray]:
        for rows, places in batches:
            yield store.read_clips(rows, places, arrays=("patches",)).patches

    return read


def read_with_loader(path: Path) -> Callable[[Batches], Iterator[np.ndarray]]:
    """The training loader on top of it."""
    import torch

    store = open_store(path)
    loader = ClipLoader(store, arrays=("patches",), layers=store.layout.layers, device=torch.device("cpu"))

    def read(batches: Batches) -> Iterator[np.ndarray]:
        plans = [ClipPlan(rows, 0 * rows, places, 0 * rows) for rows, places in batches]
        for batch in loader.load(plans):
            yield batch.patches.numpy()

    return read


def read_with_tensorstore(path: Path) -> Callable[[Batches], Iterator[np.ndarray]]:
    """The same store through tensorstore, as compressed stores are read."""
    from s4v.store._zarr import open_array

    array = open_array(path, "patches")

    def read(batches: Batches) -> Iterator[np.ndarray]:
        for rows, places in batches:
            yield array.vindex[np.broadcast_to(rows[:, None], places.shape), 0, places].read().result()

    return read


def read_with_zarr(path: Path) -> Callable[[Batches], Iterator[np.ndarray]]:
    """The same store through zarr-python."""
    import zarr

    array = zarr.open_group(path, mode="r")["patches"]

    def read(batches: Batches) -> Iterator[np.ndarray]:
        for rows, places in batches:
            yield np.stack([array.oindex[row, 0, steps] for row, steps in zip(rows, places, strict=True)])

    return read


def read_preadv(path: Path, num_threads: int) -> Callable[[Batches], Iterator[np.ndarray]]:
    """The ceiling: preadv from one file into fresh batches, nothing verified."""
    descriptor = os.open(path, os.O_RDONLY)
    frame_bytes = LAYERS * PATCHES * CHANNELS
    threads = ThreadPoolExecutor(num_threads)

    def read_clip(row: int, places: list[int], clip: np.ndarray) -> None:
        for place, frame in zip(places, clip, strict=True):
            os.preadv(descriptor, [frame], (row * FRAMES + place) * frame_bytes)

    def read(batches: Batches) -> Iterator[np.ndarray]:
        for rows, places in batches:
            clips = np.empty((*places.shape, LAYERS, PATCHES, CHANNELS), np.int8)
            list(threads.map(read_clip, rows.tolist(), places.tolist(), clips))
            yield clips

    return read


def read_h5(path: Path) -> Callable[[Batches], Iterator[np.ndarray]]:
    """h5py; it reads one chunk at a time, under a lock of its own."""
    import h5py

    tokens = h5py.File(path)["patches"]

    def read(batches: Batches) -> Iterator[np.ndarray]:
        for rows, places in batches:
            clips = np.empty((*places.shape, LAYERS, PATCHES, CHANNELS), np.int8)
            for row, steps, clip in zip(rows, places, clips, strict=True):
                for step, frame in zip(steps, clip, strict=True):
                    tokens.read_direct(frame, np.s_[row, step])
            yield clips

    return read


def read_npy(folder: Path) -> Callable[[Batches], Iterator[np.ndarray]]:
    """A memory map of each video's file."""

    def read(batches: Batches) -> Iterator[np.ndarray]:
        for rows, places in batches:
            clips = np.empty((*places.shape, LAYERS, PATCHES, CHANNELS), np.int8)
            for row, steps, clip in zip(rows, places, clips, strict=True):
                clip[:] = np.load(folder / f"{row:06d}.npy", mmap_mode="r")[steps]
            yield clips

    return read


def read_tars(folder: Path) -> Callable[[Batches], Iterator[np.ndarray]]:
    """WebDataset in its own order, shards shuffled: whole videos are read, 8 frames of each kept."""
    import webdataset

    shards = sorted(str(path) for path in folder.glob("*.tar"))

    def read(batches: Batches) -> Iterator[np.ndarray]:
        samples = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0).decode().repeat()
        videos = (sample["npy"] for sample in samples)
        for _, places in batches:
            taken = islice(videos, len(places))
            yield np.stack([video[steps] for video, steps in zip(taken, places, strict=True)])

    return read


def draw_batches(num_videos: int, count: int, seed: int) -> Batches:
    """Random videos, one random frame of each of T equal parts."""
    rng = np.random.default_rng(seed)
    part = FRAMES // CLIP
    return [
        (rng.permutation(num_videos)[:BATCH], np.arange(CLIP) * part + rng.integers(0, part, (BATCH, CLIP)))
        for _ in range(count)
    ]


def drop_from_page_cache(folder: Path) -> None:
    """Ask the system to forget the files below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def check_bars(medians: dict[str, float], clip_bytes: int) -> list[str]:
    """What the reader is held against, page cache warm."""
    ours, loader = medians["s4v"], medians["s4v training loader"]
    return [
        check_bar("s4v, of the ceiling", ours / medians[CEILING], 0.7, most=False),
        check_bar("s4v, times h5py", ours / medians["h5py"], 2, most=False),
        check_bar("s4v, times WebDataset", ours / medians["WebDataset"], 2, most=False),
        check_bar("training loader, of the bare reader", loader / ours, 0.7, most=False),
        check_bar("training loader", loader * clip_bytes / 1e9, 1, " GB/s", most=False),
    ]


def plot(rates: dict[str, list[float]], path: Path) -> None:
    """Clips a second of each reader, median and range."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.4))
    names = list(rates)[::-1]
    medians = [statistics.median(rates[name]) for name in names]
    below = [median - min(rates[name]) for name, median in zip(names, medians, strict=True)]
    above = [max(rates[name]) - median for name, median in zip(names, medians, strict=True)]
    colours = ["#1f6fb4" if name.startswith("s4v") else "#b9c3cb" for name in names]
    axes.barh(names, medians, xerr=[below, above], color=colours, capsize=3)
    for place, median in enumerate(medians):
        axes.text(0, place, f"  {median:,.0f}", va="center", fontsize=8)
    axes.set(xlabel="clips of 8 frames a second: median and range of five rounds")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    """Write the files once, read them in rounds, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=128)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-reader"))
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args()
    folder = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    threads = count_threads()
    for write, name in (
        (write_store, "store.zarr"), (write_flat, "flat.bin"), (write_h5, "tokens.h5"), (write_npy, "npy"),
        (write_tars, "tars"),
    ):  # fmt: skip
        write(folder / name, options.videos)
    readers = {
        CEILING: read_preadv(folder / "flat.bin", threads),
        "s4v": read_ours(folder / "store.zarr"),
        "s4v training loader": read_with_loader(folder / "store.zarr"),
        "tensorstore, same store": read_with_tensorstore(folder / "store.zarr"),
        "zarr-python, same store": read_with_zarr(folder / "store.zarr"),
        "h5py": read_h5(folder / "tokens.h5"),
        ".npy a video, mmap": read_npy(folder / "npy"),
        "WebDataset": read_tars(folder / "tars"),
    }
    check = draw_batches(options.videos, 1, seed=99)
    for name, read in readers.items():
        if name != "WebDataset":  # has its own order
            (rows, places), (found,) = check[0], read(check)
            expected = np.stack([draw_tokens(row)[steps] for row, steps in zip(rows, places, strict=True)])
            assert np.array_equal(found, expected), name
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for round_ in range(ROUNDS):
        batches = draw_batches(options.videos, options.batches, seed=round_)
        for name, read in readers.items():
            mine = batches[: max(2, options.batches // 20)] if name.startswith("zarr-python") else batches
            if options.cold:
                drop_from_page_cache(folder)
            start = time.perf_counter()
            touched = sum(int(clips[0, 0, 0, 0, 0]) for clips in read(mine))
            rates[name].append(len(mine) * BATCH / (time.perf_counter() - start))
            assert isinstance(touched, int)
    shutil.rmtree(folder)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    frame_bytes = LAYERS * PATCHES * CHANNELS
    table = format_table(
        ["reader", "clips/s", "lowest to highest", "GB/s", "of the ceiling"],
        [
            [name, f"{rate:,.0f}", f"{min(rates[name]):,.0f} to {max(rates[name]):,.0f}",
             f"{rate * CLIP * frame_bytes / 1e9:.2f}", f"{rate / medians[CEILING]:.2f}"]
            for name, rate in medians.items()
        ],
    )  # fmt: skip
    machine = describe_machine("zarr", "tensorstore", "crc32c", "h5py", "webdataset")
    sizes = {"videos": options.videos, "frames": FRAMES, "clip": CLIP, "batch": BATCH, "frame_bytes": frame_bytes}
    result = {"machine": machine, "sizes": sizes, "cold": options.cold, "clips_per_second": rates}
    name = "reader_cold" if options.cold else "reader"
    keep(name, result, table, [] if options.cold else check_bars(medians, CLIP * frame_bytes))
    plot(rates, RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
