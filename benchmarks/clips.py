"""Whole clips (patches, class tokens, pixels) of stores of several chunk sizes, against C that reads the same bytes.

    python benchmarks/clips.py [--videos 96] [--seconds 1] [--only "75 kB"] [--planning]

The ceiling is `_ceiling.c`: one flat file, a preadv with crc32c for each chunk, as many threads as our reader, where
each chunk goes worked out beforehand. It has the same chunks and the same batches; beside it stands the same without
crc32c. The page cache is warm, rounds are interleaved, the median of five counts. All take fresh room for each batch,
and the process keeps what it frees, as commands do. The training loader hands pixels and class tokens over as they are
stored: their conversion to float32 is the training device's work, and on a CPU takes longer than all reading. Others
read the same bytes out of their own formats.

`--planning` measures something else: the seconds that a thread of the loader computes outside of the one native call
for each batch, which it does under the interpreter's lock.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import check_bar, describe_machine, format_table, keep
from _stores import begin_store, write_rows

from s4v.store import _chunk_reads
from s4v.store.codecs.affine import AffineCodec
from s4v.store.layout import StoreLayout
from s4v.store.reader import StoreReader, count_threads, open_store
from s4v.store.writer import RowTokens
from s4v.train.allocator import keep_freed_memory
from s4v.train.clips import ClipLoader, ClipPlan

FRAMES, CLIP = 16, 8
ROUNDS = 5
CHECKED, UNCHECKED = "preadv with crc32c, C (ceiling)", "preadv without, C"
NATIVE, PYTHON = "s4v", "s4v without its native module"
LOADER = "s4v training loader"
TURNS = "s4v, six batches' room in turns"
NUM_TURNS = 6
"""As many batches as the loader has under way, or has handed over: their memory is in no near cache."""
ARRAYS = ("patches", "cls", "pixels")


@dataclass(frozen=True)
class Sizes:
    """Of a store: what a chunk of patches holds decides."""

    name: str
    layers: int
    patches: int
    channels: int
    width: int = 768

    @property
    def chunk_bytes(self) -> int:
        """Of patches: a frame."""
        return self.layers * self.patches * self.channels

    @property
    def frame_bytes(self) -> int:
        """Of all arrays."""
        return self.chunk_bytes + 2 * self.layers * self.width + 224 * 224 * 3


SIZES = (
    Sizes("18 kB", 6, 49, 64),
    Sizes("38 kB", 12, 49, 64),
    Sizes("75 kB", 6, 196, 64),
    Sizes("150 kB", 12, 49, 256),
    Sizes("301 kB", 6, 196, 256),
)
BATCHES = (8, 32)
BARS = {name: 0.8 if name in ("18 kB", "38 kB", "75 kB") else 0.9 for name in (one.name for one in SIZES)}

Batch = tuple[np.ndarray, np.ndarray]
"""Rows (B,), places (B, T)."""


def draw_row(sizes: Sizes, row: int, num_frames: int = FRAMES) -> RowTokens:
    """A video's random tokens."""
    rng = np.random.default_rng(row)
    return RowTokens(
        patches=rng.integers(-127, 128, (1, num_frames, sizes.layers, sizes.patches, sizes.channels), dtype=np.int8),
        cls=rng.standard_normal((1, num_frames, sizes.layers, sizes.width), np.float32).astype(np.float16),
        embedding=np.zeros((1, num_frames, 8), np.float32),
        pixels=rng.integers(0, 256, (1, num_frames, 1, 224, 224, 3), dtype=np.uint8),
    )


def write_store(
    path: Path,
    sizes: Sizes,
    num_videos: int,
    *,
    num_frames: int = FRAMES,
    rows_per_shard: int = 0,
    num_drawn: int | None = None,
) -> StoreReader:
    """As an extraction writes it.

    Args:
        path: Of the store.
        sizes: Of a frame.
        num_videos: Rows.
        num_frames: Of a row.
        rows_per_shard: 0 takes what an extraction would.
        num_drawn: Rows of different bytes, which come over and over; None draws each.
    """
    layout = StoreLayout(
        num_rows=num_videos,
        num_views=1,
        num_frames=num_frames,
        layers=tuple(range(sizes.layers)),
        num_patches=sizes.patches,
        width=sizes.width,
        channels=sizes.channels,
        embed_dim=8,
        image_size=(224, 224),
        patch_dtype="int8",
        rows_per_shard=rows_per_shard,
        frames_per_block=num_frames,
    )
    codec = AffineCodec(
        dtype="int8",
        mean=np.zeros((sizes.layers, sizes.width), np.float32),
        basis=np.zeros((sizes.layers, sizes.channels, sizes.width), np.float32),
        scale=np.ones((sizes.layers, sizes.channels), np.float32),
    )
    drawn: dict[int, RowTokens] = {}

    def make(row: int) -> RowTokens:
        if num_drawn is None:
            return draw_row(sizes, row, num_frames)
        if row % num_drawn not in drawn:
            drawn[row % num_drawn] = draw_row(sizes, row % num_drawn, num_frames)
        return drawn[row % num_drawn]

    writer, records = begin_store(path, layout, codec, ["a", "b"])
    with writer:
        for shard in writer.pending_shards():
            write_rows(writer, records, shard, make)
        writer.consolidate()
    return open_store(path)


class Ceiling:
    """The same chunks in one flat file: by array, then by row."""

    def __init__(self, store: StoreReader, path: Path) -> None:
        from crc32c import crc32c

        library = path.with_suffix(".so")
        source = Path(__file__).parent / "_ceiling.c"
        subprocess.run(["cc", "-O3", "-shared", "-fPIC", "-o", library, source, "-lpthread"], check=True)
        self._library = ctypes.CDLL(str(library))
        self._library.begin()
        self._library.read_batch.restype = ctypes.c_int64
        specs = {spec.name: spec for spec in store.layout.array_specs() if spec.name in ARRAYS}
        self._shapes = {name: (specs[name].shape[3:], np.dtype(specs[name].dtype)) for name in ARRAYS}
        self._frames = {name: specs[name].chunk_shape[2] for name in ARRAYS}
        self._first: dict[str, int] = {}
        self._size: dict[str, int] = {}
        offset = 0
        with path.open("wb") as file:
            for name in ARRAYS:
                self._first[name] = offset
                for row in range(store.layout.num_rows):
                    values = store.read_row(row, 1, FRAMES)[name][0]
                    for start in range(0, FRAMES, self._frames[name]):
                        chunk = values[start : start + self._frames[name]].tobytes()
                        file.write(chunk + crc32c(chunk).to_bytes(4, "little"))
                        self._size[name] = len(chunk)
                        offset += len(chunk) + 4
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, batches: Sequence[Batch], *, verifies: bool) -> Iterator[list[np.ndarray]]:
        """Batch after batch; a chunk of several frames is read whole, and given as it is."""
        planned = [self._plan(rows, places) for rows, places in batches]
        for total, (offsets, sizes, targets) in planned:
            target = np.empty(total, np.uint8)
            bad = self._library.read_batch(
                self._descriptor, ctypes.c_int64(len(offsets)), *(part.ctypes for part in (offsets, sizes, targets)),
                target.ctypes, count_threads(), int(verifies),
            )  # fmt: skip
            assert bad == 0
            yield [target]

    def _plan(self, rows: np.ndarray, places: np.ndarray) -> tuple[int, tuple[np.ndarray, ...]]:
        offsets, sizes = [], []
        for name in ARRAYS:
            step, frames = self._size[name] + 4, self._frames[name]
            for row, own in zip(rows.tolist(), places, strict=True):
                for chunk in np.unique(own // frames).tolist():
                    offsets.append(self._first[name] + (row * (FRAMES // frames) + chunk) * step)
                    sizes.append(self._size[name])
        targets = np.concatenate([[0], np.cumsum(sizes)])
        return int(targets[-1]), tuple(np.array(part, np.int64) for part in (offsets, sizes, targets[:-1]))


def read_ours(store: StoreReader, batches: Sequence[Batch]) -> Iterator[list[np.ndarray]]:
    """The store's reader."""
    for rows, places in batches:
        clips = store.read_clips(rows, places)
        yield [clips.patches, clips.cls, clips.pixels]


def read_in_turns(store: StoreReader, batches: Sequence[Batch]) -> Iterator[list[np.ndarray]]:
    """The store's reader into room that was used some batches ago, as the loader has it."""
    rooms: list[dict[Any, np.ndarray]] = [{} for _ in range(NUM_TURNS)]
    for number, (rows, places) in enumerate(batches):
        room = rooms[number % NUM_TURNS]

        def allocate(shape: tuple[int, ...], dtype: np.dtype, room: dict[Any, np.ndarray] = room) -> np.ndarray:
            if (shape, dtype.str) not in room:
                room[shape, dtype.str] = np.empty(shape, dtype)
            return room[shape, dtype.str]

        clips = store.read_clips(rows, places, allocate=allocate)
        yield [clips.patches, clips.cls, clips.pixels]


def read_by_python(store: StoreReader, batches: Sequence[Batch]) -> Iterator[list[np.ndarray]]:
    """The same where the module was not built."""
    found, _chunk_reads.find_native = _chunk_reads.find_native, lambda: (None, "Python")
    try:
        yield from read_ours(store, batches)
    finally:
        _chunk_reads.find_native = found


class BytesLoader(ClipLoader):
    """Hands arrays over as stored: their floats are the training device's work."""

    def _normalise(self, raw: torch.Tensor) -> torch.Tensor:
        return raw

    def _widen(self, raw: torch.Tensor) -> torch.Tensor:
        return raw


def read_with_loader(store: StoreReader, batches: Sequence[Batch]) -> Iterator[list[np.ndarray]]:
    """The training loader."""
    loader = BytesLoader(store, arrays=ARRAYS, layers=store.layout.layers, device=torch.device("cpu"))
    for batch in loader.load([ClipPlan(rows, 0 * rows, places, 0 * rows) for rows, places in batches]):
        yield [batch.patches.numpy(), batch.cls.numpy(), batch.pixels.numpy()]


def read_with_tensorstore(store: StoreReader, batches: Sequence[Batch]) -> Iterator[list[np.ndarray]]:
    """The same store, its arrays read at once."""
    from s4v.store._zarr import open_array

    arrays = [open_array(store.path, name) for name in ARRAYS]
    for rows, places in batches:
        at = np.broadcast_to(rows[:, None], places.shape), 0, places
        under_way = [array.vindex[at].read() for array in arrays]
        yield [one.result() for one in under_way]


def read_with_zarr(store: StoreReader, batches: Sequence[Batch]) -> Iterator[list[np.ndarray]]:
    """The same store through zarr-python."""
    import zarr

    group = zarr.open_group(store.path, mode="r")
    for rows, places in batches[:1]:
        yield [
            np.stack([group[name].oindex[row, 0, own] for row, own in zip(rows, places, strict=True)])
            for name in ARRAYS
        ]


def write_h5(path: Path, store: StoreReader) -> None:
    """A dataset for each array, a chunk a frame, with HDF5's own checksums."""
    import h5py

    with h5py.File(path, "w") as file:
        for spec in store.layout.array_specs():
            if spec.name in ARRAYS:
                tail = spec.shape[3:]
                shape = (store.layout.num_rows, FRAMES, *tail)
                file.create_dataset(spec.name, shape, dtype=spec.dtype, chunks=(1, 1, *tail), fletcher32=True)
        for row in range(store.layout.num_rows):
            values = store.read_row(row, 1, FRAMES)
            for name in ARRAYS:
                file[name][row] = values[name][0]


def read_h5(path: Path, batches: Sequence[Batch]) -> Iterator[list[np.ndarray]]:
    """h5py: one chunk at a time, under a lock of its own."""
    import h5py

    file = h5py.File(path)
    for rows, places in batches:
        found = []
        for name in ARRAYS:
            clips = np.empty((*places.shape, *file[name].shape[2:]), file[name].dtype)
            for row, own, clip in zip(rows, places, clips, strict=True):
                for place, frame in zip(own, clip, strict=True):
                    file[name].read_direct(frame, np.s_[row, place])
            found.append(clips)
        yield found


def write_tars(folder: Path, store: StoreReader) -> None:
    """WebDataset shards of 16 videos."""
    import webdataset

    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/%04d.tar", maxcount=16, verbose=0) as shards:
        for row in range(store.layout.num_rows):
            values = store.read_row(row, 1, FRAMES)
            shards.write({"__key__": f"{row:06d}", **{f"{name}.npy": values[name][0] for name in ARRAYS}})


def read_tars(folder: Path, batches: Sequence[Batch]) -> Iterator[list[np.ndarray]]:
    """WebDataset, in its own order: whole videos are read, the clips' frames kept."""
    import webdataset

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    videos = iter(webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0).decode().repeat())
    for _, places in batches:
        taken = [(next(videos), own) for own in places]
        yield [np.stack([video[f"{name}.npy"][own] for video, own in taken]) for name in ARRAYS]


def write_mds(folder: Path, store: StoreReader) -> None:
    """Mosaic's shards, of 64 MB."""
    from streaming import MDSWriter

    specs = {spec.name: spec for spec in store.layout.array_specs() if spec.name in ARRAYS}
    columns = {
        name: f"ndarray:{spec.dtype}:{','.join(map(str, (FRAMES, *spec.shape[3:])))}" for name, spec in specs.items()
    }
    with MDSWriter(out=str(folder), columns=columns, size_limit=2**26) as shards:
        for row in range(store.layout.num_rows):
            values = store.read_row(row, 1, FRAMES)
            shards.write({name: np.ascontiguousarray(values[name][0]) for name in ARRAYS})


def read_mds(folder: Path, batches: Sequence[Batch]) -> Iterator[list[np.ndarray]]:
    """Mosaic StreamingDataset by number, local shards: whole videos are read, the clips' frames kept."""
    from streaming import StreamingDataset

    videos = StreamingDataset(local=str(folder), batch_size=1)
    for rows, places in batches:
        taken = [(videos[int(row)], own) for row, own in zip(rows, places, strict=True)]
        yield [np.stack([video[name][own] for video, own in taken]) for name in ARRAYS]


def draw_batches(num_videos: int, batch_size: int, count: int, seed: int) -> list[Batch]:
    """Random videos, one random frame of each of T equal parts."""
    rng, part = np.random.default_rng(seed), FRAMES // CLIP
    return [
        (rng.permutation(num_videos)[:batch_size], np.arange(CLIP) * part + rng.integers(0, part, (batch_size, CLIP)))
        for _ in range(count)
    ]


def time_batches(read: Callable[[Sequence[Batch]], Iterator[list[np.ndarray]]], batches: Sequence[Batch]) -> float:
    """Clips a second; each batch is let go when the next one comes."""
    start, clips = time.perf_counter(), 0
    for (rows, _), _found in zip(batches, read(batches), strict=False):
        clips += len(rows)
    return clips / (time.perf_counter() - start)


def measure(sizes: Sizes, batch_size: int, options: argparse.Namespace, with_others: bool) -> dict[str, list[float]]:
    """Clips a second of each reader, round by round."""
    folder = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    store = write_store(folder / "store.zarr", sizes, options.videos)
    ceiling = Ceiling(store, folder / "flat.bin")
    readers: dict[str, Callable[[Sequence[Batch]], Iterator[list[np.ndarray]]]] = {
        CHECKED: lambda batches: ceiling.read(batches, verifies=True),
        UNCHECKED: lambda batches: ceiling.read(batches, verifies=False),
        NATIVE: lambda batches: read_ours(store, batches),
        LOADER: lambda batches: read_with_loader(store, batches),
        TURNS: lambda batches: read_in_turns(store, batches),
        PYTHON: lambda batches: read_by_python(store, batches),
    }
    if with_others:
        write_h5(folder / "tokens.h5", store)
        write_tars(folder / "tars", store)
        write_mds(folder / "mds", store)
        readers |= {
            "tensorstore, same store": lambda batches: read_with_tensorstore(store, batches),
            "zarr-python, same store": lambda batches: read_with_zarr(store, batches),
            "h5py": lambda batches: read_h5(folder / "tokens.h5", batches),
            "WebDataset": lambda batches: read_tars(folder / "tars", batches),
            "Mosaic StreamingDataset": lambda batches: read_mds(folder / "mds", batches),
        }
    count = max(4, int(options.seconds * 5e9 / (batch_size * CLIP * sizes.frame_bytes)))
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(ROUNDS + 1):  # the first one warms up
        batches = draw_batches(options.videos, batch_size, count, seed=number)
        for place, (name, read) in enumerate(readers.items()):
            mine = (
                batches if place < len((CHECKED, UNCHECKED, NATIVE, LOADER, TURNS)) else batches[: max(2, count // 8)]
            )
            rate = time_batches(read, mine)
            rates[name] += [rate] if number else []
    shutil.rmtree(folder)
    return rates


class TimedModule:
    """The native module; how long its reads took, by this thread's own clock."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def read_chunks(self, *arguments: Any) -> Any:
        """Of the module."""
        start = time.thread_time()
        found = self._module.read_chunks(*arguments)
        self.seconds += time.thread_time() - start
        return found


def measure_planning(sizes: Sizes, batch_size: int, options: argparse.Namespace) -> list[float]:
    """Milliseconds outside of the native call for a GB, round by round."""
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    store = write_store(options.folder / "store.zarr", sizes, options.videos)
    loader = BytesLoader(store, arrays=ARRAYS, layers=store.layout.layers, device=torch.device("cpu"))
    module, told = _chunk_reads.find_native()
    timed, found = TimedModule(module), _chunk_reads.find_native
    _chunk_reads.find_native = lambda: (timed, told)
    rates = []
    try:
        for number in range(ROUNDS + 1):
            drawn = draw_batches(options.videos, batch_size, 60, seed=number)
            plans = [ClipPlan(rows, 0 * rows, places, 0 * rows) for rows, places in drawn]
            timed.seconds, start = 0.0, time.thread_time()
            for plan in plans:
                loader._read(plan)
            outside = time.thread_time() - start - timed.seconds
            rates.append(1e3 * outside / sum(map(loader.count_bytes, plans)) * 1e9)
    finally:
        _chunk_reads.find_native = found
        shutil.rmtree(options.folder)
    return rates[1:]  # the first one warms up


def report_planning(options: argparse.Namespace) -> None:
    """The table of `--planning`."""
    rows, bars, results = [], [], []
    for sizes in SIZES:
        for batch_size in BATCHES if options.only in (None, sizes.name) else ():
            rates = measure_planning(sizes, batch_size, options)
            median = statistics.median(rates)
            rows.append([sizes.name, batch_size, f"{median:.1f}", f"{min(rates):.1f} to {max(rates):.1f}"])
            bars.append(check_bar(f"{sizes.name}, batches of {batch_size}: ms for a GB", median, 25.0))
            results.append({"sizes": sizes.name, "batch": batch_size, "ms_per_gb": rates})
    heads = ["chunk of patches", "clips in a batch", "ms for a GB", "lowest to highest"]
    keep("clips_planning", {"machine": describe_machine("numpy"), "results": results}, format_table(heads, rows), bars)


def main() -> None:
    """Each size and batch in its turn; the table of what there is, after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=96)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round of the ceiling, about")
    parser.add_argument("--only", help="one size, by name")
    parser.add_argument("--others", default="75 kB", help="the size at which other formats are read too")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-clips"))
    parser.add_argument("--planning", action="store_true", help="what is done under the interpreter's lock")
    options = parser.parse_args()
    keep_freed_memory()
    if options.planning:
        report_planning(options)
        return
    rows, bars, results = [], [], []
    for sizes in SIZES:
        for batch_size in BATCHES if options.only in (None, sizes.name) else ():
            with_others = sizes.name == options.others and batch_size == BATCHES[0]
            rates = measure(sizes, batch_size, options, with_others)
            clip_bytes = CLIP * sizes.frame_bytes
            medians = {name: statistics.median(found) for name, found in rates.items()}
            shares = {
                name: statistics.median(a / b for a, b in zip(found, rates[CHECKED], strict=True))
                for name, found in rates.items()
            }
            for name, rate in medians.items():
                span = f"{min(rates[name]) * clip_bytes / 1e9:.2f} to {max(rates[name]) * clip_bytes / 1e9:.2f}"
                rows.append([sizes.name, batch_size, name, f"{rate * clip_bytes / 1e9:.2f}", span,
                             f"{shares[name]:.2f}"])  # fmt: skip
            label = f"{sizes.name}, batches of {batch_size}"
            of_reader = statistics.median(a / b for a, b in zip(rates[LOADER], rates[NATIVE], strict=True))
            bars.append(check_bar(f"{label}: s4v of the ceiling", shares[NATIVE], BARS[sizes.name], most=False))
            bars.append(check_bar(f"{label}: loader of the reader", of_reader, 0.9, most=False))
            of_turns = statistics.median(a / b for a, b in zip(rates[LOADER], rates[TURNS], strict=True))
            bars.append(check_bar(f"{label}: loader of the reader in turns", of_turns, 0.9, most=False))
            results.append({"sizes": sizes.name, "batch": batch_size, "clips_per_second": rates})
            heads = ["chunk of patches", "clips in a batch", "reader", "GB/s", "lowest to highest", "of the ceiling"]
            machine = describe_machine("numpy", "tensorstore", "zarr", "h5py", "webdataset", "mosaicml-streaming")
            result: dict[str, Any] = {"machine": machine, "frames": FRAMES, "clip": CLIP, "results": results}
            keep("clips", result, format_table(heads, rows), bars)


if __name__ == "__main__":
    main()
