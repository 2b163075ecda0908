"""Open a store of a million videos and read one clip, in a new process: seconds, and memory beyond the imports.

    python benchmarks/opening.py [--videos 1000000]

The store is real but for its shards, of which only the one that is read was written: the others have its done-marker.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
from _report import check_bar, describe_machine, format_table, keep
from _stores import begin_store, write_rows

from s4v.store import manifest
from s4v.store.checksums import write_checksums
from s4v.store.codecs.affine import AffineCodec
from s4v.store.layout import StoreLayout
from s4v.store.markers import marker_path
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
assert clips.patches.shape == (1, 8, 6, 196, 256)
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


def main() -> None:
    """Make the store, probe it in new processes, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-opening"))
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    path = options.folder / "store.zarr"
    row = make_store(path, options.videos)
    size = (path / manifest.MANIFEST_NAME).stat().st_size
    found = []
    for _ in range(ROUNDS):
        command = [sys.executable, "-c", _PROBE, str(path), str(row)]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
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
