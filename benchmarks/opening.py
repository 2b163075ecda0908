"""Open a store of a million videos and read one clip, in a new process: seconds, and memory beyond the imports.

    python benchmarks/opening.py [--videos 1000000]
    python benchmarks/opening.py --long-row          # 10,000 rows of ten seconds, with and without one of two hours

The store is real but for its shards, of which only the one that is read was written: the others have its done-marker.
Stores with the long row are whole, of made-up tokens, two layers of ViT-B/32, a frame a second.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from _report import check_bar, describe_machine, format_table, keep
from _stores import begin_store, write_rows

from s4v.store import manifest
from s4v.store.checksums import write_checksums
from s4v.store.codecs.affine import AffineCodec
from s4v.store.layout import StoreLayout, choose_block
from s4v.store.markers import marker_path
from s4v.store.records import VideoResult
from s4v.store.writer import RowTokens

ROUNDS = 5
FRAMES = 8
LAYERS, PATCHES, CHANNELS = 6, 196, 256

_PROBE = """
import json, sys, time
import numpy as np
import s4v.store.reader
from s4v.store.reader import open_store
import s4v.store.codecs.affine, tensorstore, pyarrow.dataset, pyarrow.compute, pyarrow.parquet
def peak_kb():  # not ru_maxrss, which a new process takes over from the one that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
path, row = sys.argv[1], int(sys.argv[2])
start, before = time.perf_counter(), peak_kb()
store = open_store(path)
opened = time.perf_counter()
clips = store.read_clips([row], [list(range(8))])
assert clips.patches.shape[:2] == (1, 8)
end = time.perf_counter()
print(json.dumps({"open_s": opened - start, "read_s": end - opened, "more_mb": (peak_kb() - before) / 1024}))
"""


def make_store(path: Path, num_videos: int) -> int:
    """Write the store; returns the row that can be read."""
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
    )
    codec = AffineCodec(dtype="int8", scale=np.ones((LAYERS, CHANNELS), np.float32))
    classes = [f"class-{number}" for number in range(400)]
    rng = np.random.default_rng(0)
    tokens = RowTokens(
        patches=rng.integers(-127, 128, (1, FRAMES, LAYERS, PATCHES, CHANNELS), dtype=np.int8),
        cls=np.zeros((1, FRAMES, LAYERS, CHANNELS), np.float16),
        embedding=np.zeros((1, FRAMES, 8), np.float32),
        pixels=np.zeros((1, FRAMES, 1, 224, 224, 3), np.uint8),
    )
    writer, records = begin_store(path, layout, codec, classes)
    with writer:
        written = 7 * layout.num_shards // 9
        rows = write_rows(writer, records, written, lambda row: tokens)
        for shard in set(range(layout.num_shards)) - {written}:
            os.link(marker_path(path, written), marker_path(path, shard))
        # The other shards' results, as their done-markers would give them.
        inputs = manifest.input_table(records, manifest.ClassList(tuple(sorted(classes))))
        columns = {
            "status": pa.array(["ok"] * num_videos),
            "num_cached_frames": pa.array(np.full(num_videos, FRAMES, np.int32)),
            "num_views": pa.array(np.ones(num_videos, np.int32)),
            "num_frames": pa.array(rng.integers(100, 300, num_videos)),
            "frame_indices": pa.array(list(rng.integers(0, 300, (num_videos, FRAMES))), pa.list_(pa.int64())),
            "timestamps_s": pa.array(list(rng.uniform(0, 10, (num_videos, FRAMES))), pa.list_(pa.float64())),
            "eval_clips": pa.array([[list(range(FRAMES))]] * num_videos, pa.list_(pa.list_(pa.int32()))),
        }
        pending = manifest.pending_manifest(inputs)
        table = pa.table({name: columns.get(name, pending[name]) for name in pending.schema.names}, pending.schema)
        manifest.write_table(path / manifest.MANIFEST_NAME, table)
        (path / "checksums.json").unlink()
        write_checksums(path)
    return rows[3]


def make_rows(path: Path, lengths: list[int]) -> int:
    """Write a whole store of rows of so many frames, two layers of ViT-B/32's sizes; returns its bytes."""
    layout = StoreLayout(
        num_rows=len(lengths),
        num_views=1,
        num_frames=max(lengths),
        layers=(5, 11),
        num_patches=49,
        width=768,
        channels=256,
        embed_dim=512,
        image_size=(224, 224),
        patch_dtype="int8",
        with_pixels=False,
    )
    layout = replace(
        layout,
        rows_per_shard=layout.choose_rows(sum(lengths)),
        frames_per_block=choose_block(layout.num_frames, sum(layout.bytes_per_frame.values()), Counter(lengths)),
    )
    codec = AffineCodec(dtype="int8", scale=np.ones((2, 256), np.float32))
    rng = np.random.default_rng(0)
    patches = rng.integers(-127, 128, (1, max(lengths), 2, 49, 256), dtype=np.int8)
    cls, embedding = np.ones((1, max(lengths), 2, 768), np.float16), np.ones((1, max(lengths), 512), np.float32)
    writer, records = begin_store(path, layout, codec, ["a", "b"])
    with writer:
        for shard in writer.pending_shards():
            rows = layout.shard_rows(shard)
            tokens = {
                row: RowTokens(patches=patches[:, :n], cls=cls[:, :n], embedding=embedding[:, :n])
                for row, n in zip(rows, lengths[rows.start : rows.stop], strict=True)
            }
            results = [describe_row(records[row].video_id, lengths[row]) for row in rows]
            writer.write_shard(shard, tokens, results)
        writer.consolidate()
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def describe_row(video_id: str, num_frames: int) -> VideoResult:
    """A good row of a frame a second."""
    return VideoResult(
        video_id=video_id,
        status="ok",
        num_frames=25 * num_frames,
        num_cached_frames=num_frames,
        num_views=1,
        frame_indices=list(range(12, 25 * num_frames, 25)),
        timestamps_s=[0.5 + second for second in range(num_frames)],
        eval_clips=[list(range(num_frames))],
    )


def probe(path: Path, row: int) -> dict[str, float]:
    """Opening and a first clip in a new process."""
    command = [sys.executable, "-c", _PROBE, str(path), str(row)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_long_row(folder: Path) -> None:
    """What one row of two hours costs a store of short ones; rounds are interleaved."""
    short = [10] * 10_000
    stores = {"10,000 rows of ten seconds": short, "and one of two hours": [*short[:5000], 7200, *short[5000:]]}
    sizes = {name: make_rows(folder / f"{len(rows)}.zarr", rows) for name, rows in stores.items()}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in stores}
    for _ in range(ROUNDS):
        for name, rows in stores.items():
            rounds[name].append(probe(folder / f"{len(rows)}.zarr", 9000))
    shutil.rmtree(folder)
    medians = {
        name: {part: statistics.median(one[part] for one in found) for part in found[0]}
        for name, found in rounds.items()
    }
    rows = [
        [name, f"{sizes[name] / 1e6:.1f} MB", f"{1e3 * own['open_s']:.1f} ms", f"{1e3 * own['read_s']:.1f} ms",
         f"{own['more_mb']:.0f} MB"] for name, own in medians.items()
    ]  # fmt: skip
    (_, of_short), (_, of_long) = sizes.items()
    own_bytes = 7200 * (2 * 49 * 256 + 2 * 2 * 768 + 4 * 512)
    bars = [check_bar("bytes beyond the long row's own", 100 * (of_long - of_short - own_bytes) / of_short, 1, " %")]
    result = {"machine": describe_machine("pyarrow", "numpy"), "bytes": sizes, "rounds": rounds}
    heads = ["rows", "bytes", "opening", "first clip", "memory beyond the imports"]
    keep("opening_long_row", result, format_table(heads, rows), bars)


def main() -> None:
    """Make the store, probe it in new processes, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=1_000_000)
    parser.add_argument("--long-row", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-opening"))
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    if options.long_row:
        measure_long_row(options.folder)
        return
    path = options.folder / "store.zarr"
    row = make_store(path, options.videos)
    size = (path / manifest.MANIFEST_NAME).stat().st_size
    found = [probe(path, row) for _ in range(ROUNDS)]
    shutil.rmtree(options.folder)
    median = {name: statistics.median(one[name] for one in found) for name in found[0]}
    total = statistics.median(one["open_s"] + one["read_s"] for one in found)
    table = format_table(
        ["videos", "manifest", "opening", "first clip", "both", "memory beyond the imports"],
        [[f"{options.videos:,}", f"{size / 1e6:.0f} MB", f"{median['open_s']:.3f} s", f"{median['read_s']:.3f} s",
          f"{total:.3f} s", f"{median['more_mb']:.0f} MB"]],
    )  # fmt: skip
    machine = describe_machine("pyarrow", "numpy")
    bars = [
        check_bar("opening and reading a clip, median", total, 0.2, " s"),
        check_bar("memory beyond the imports, median", median["more_mb"], 300, " MB"),
    ]
    result = {"machine": machine, "videos": options.videos, "manifest_bytes": size, "rounds": found}
    keep("opening", result, table, bars)


if __name__ == "__main__":
    main()
