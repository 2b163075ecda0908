"""Bookkeeping of a store of a million videos in 20,000 shards: what costs time and memory beside decoding and backbone.

    python benchmarks/scale.py                       # this checkout
    python benchmarks/scale.py --before PATH         # another checkout first, or the JSON file of an earlier run
    python benchmarks/scale.py --tree PATH --json before.json   # only another checkout; nothing under docs/

The videos are made up and none is decoded. The store's skeleton is written by `extract_dataset` with `prepare`, its
done-markers by `StoreWriter.write_shard`: their rows are failed ones with all columns filled, so that no array has a
file. The index is of rows without a store. Each figure comes from a process of its own.

    consolidation     the manifest of all done-markers, none of which it holds yet
    retry             1,000 failed shards are found and done anew, while os.fsync returns at once; less what the same
                      number of shards cost when they were new
    joining           the manifest after that, which holds all other done-markers
    worker's start    `WorkerJob.__enter__` on that store, less the same on a store of 100 rows; without listing videos
    index rows        `build_index` of made-up embeddings of width 8
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from _report import check_bar, describe_machine, format_table, keep

FRAMES = 8
SMALL_ROWS, SMALL_NAME = 100, "small.zarr"
ROWS_OF_A_CHUNK = 131_072
"""Of the manifest as pyarrow reads it back."""


def make_records(num_videos: int) -> list[Any]:
    """Rows of a manifest, in its order."""
    from s4v.store.records import VideoRecord

    names = (f"class-{number % 400:03d}" for number in range(num_videos))
    return [
        VideoRecord(video_id=f"{number:09d}.mp4", path=f"{name}/{number:09d}.mp4", split="train", class_name=name)
        for number, name in enumerate(names)
    ]


def make_results(records: list[Any], rows: range, reason: str) -> list[Any]:
    """What the done-marker of a shard holds."""
    from s4v.store.records import VideoResult

    facts: dict[str, Any] = {
        **{"decoder": "pyav", "num_frames": 250, "fps": 25.0, "duration_s": 10.0, "width": 340, "height": 256},
        **{"num_cached_frames": FRAMES, "num_views": 1, "eval_clips": [list(range(FRAMES))]},
        "frame_indices": [31 * place for place in range(FRAMES)],
        "timestamps_s": [1.24 * place for place in range(FRAMES)],
    }
    return [VideoResult(video_id=records[row].video_id, status="failed", reason=reason, **facts) for row in rows]


def make_config(path: Path) -> Any:
    """The extraction that the store is said to come from: tiny-clip, no codec to be fitted."""
    from s4v.extract.config import ExtractConfig

    root = path.parent / "videos"
    root.mkdir(parents=True, exist_ok=True)
    return ExtractConfig(
        model="tiny-clip", weights="random", dataset="folder", root=root, out=path, frames={"": FRAMES}, layers="5",
        dtype="float32", with_pixels=False, device="cpu", num_decoders=1, prepare=True,
    )  # fmt: skip


def listing(records: list[Any]) -> Any:
    """In place of looking for videos on the disk, which is not measured."""
    from s4v.extract.config import ExtractConfig

    if not hasattr(ExtractConfig, "read_listing"):  # the version before
        return patch.object(ExtractConfig, "read_records", lambda _: list(records))
    from s4v.extract.datasets import Listing

    return patch.object(ExtractConfig, "read_listing", lambda *_: Listing(list(records), frozenset()))


def without_fsync() -> Any:
    """Nothing waits for the disk, whose seconds are its own."""
    return patch.object(os, "fsync", lambda _: None)


def open_writer(path: Path, records: list[Any]) -> Any:
    """The store's writer."""
    from s4v.store.reader import open_store
    from s4v.store.spec import StoreSpec
    from s4v.store.writer import resume_store

    store = open_store(path)
    spec = StoreSpec(layout=store.layout, attributes=store.attributes, records=records)
    return resume_store(store, spec)


class Stopwatch:
    """Seconds, CPU seconds, and the most memory that was taken since it was made."""

    def __init__(self) -> None:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what is taken now
        self._memory = read_peak_mb()
        self._start = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Wall seconds, CPU seconds, and how many MB more there were at most."""
        start, cpu_start = self._start
        return {
            "s": time.perf_counter() - start,
            "cpu_s": time.process_time() - cpu_start,
            # The kernel counts pages in batches: the peak may read a page or two below where it began.
            "mb": max(0.0, read_peak_mb() - self._memory),
        }


def read_peak_mb() -> float:
    """The most memory that this process had; not ru_maxrss, which it takes over from the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def make_store(path: Path, options: argparse.Namespace) -> dict[str, float]:
    """Write skeleton and done-markers; what the markers took."""
    from s4v.extract.extraction import extract_dataset
    from s4v.store import layout

    records, small = make_records(options.videos), make_records(SMALL_ROWS)
    rows_per_shard = -(-options.videos // options.shards)
    with patch.object(layout, "_MAX_VIDEOS_PER_SHARD", rows_per_shard), without_fsync():
        for target, listed in ((path, records), (path.with_name(SMALL_NAME), small)):
            with listing(listed):
                extract_dataset(make_config(target))
        with open_writer(path, records) as writer:
            num_shards = writer.layout.num_shards
            watch = Stopwatch()
            for shard in range(num_shards):
                writer.write_shard(shard, {}, make_results(records, writer.layout.shard_rows(shard), "made up"))
            told = watch.read()
    return {"of": num_shards, **told}


def measure_consolidation(path: Path, options: argparse.Namespace) -> dict[str, float]:
    with open_writer(path, make_records(options.videos)) as writer:
        watch = Stopwatch()
        table = writer.consolidate()
    assert table["status"].to_pylist().count("failed") == options.videos
    return {"of": writer.layout.num_shards, **watch.read()}


def measure_retry(path: Path, options: argparse.Namespace) -> dict[str, float]:
    """On the consolidated store; stopped when it takes too long, and said of how many shards it is."""
    records = make_records(options.videos)
    with open_writer(path, records) as writer, without_fsync():
        num_shards = writer.layout.num_shards
        shards = list(range(0, num_shards, max(1, num_shards // options.retry)))[: options.retry]
        results = [make_results(records, writer.layout.shard_rows(shard), "made up again") for shard in shards]
        watch = Stopwatch()
        failed = writer.failed_shards()
        begun, done = watch.read(), 0
        for shard, rows in zip(shards, results, strict=True):
            writer.write_shard(shard, {}, rows)
            done += 1
            if watch.read()["s"] > options.patience:
                break
        told = watch.read()
        join = Stopwatch()
        table = writer.consolidate()
        joined = join.read()
    assert len(failed) == num_shards
    assert table["reason"].to_pylist().count("made up again") == sum(len(rows) for rows in results[:done])
    for kind in ("s", "cpu_s"):  # of the shards that were not waited for
        told[kind] += (told[kind] - begun[kind]) * (len(shards) / done - 1)
    return {"of": len(shards), "measured": done, **told, "join_s": joined["s"], "join_cpu_s": joined["cpu_s"]}


def measure_worker(path: Path, options: argparse.Namespace) -> dict[str, float]:
    """A process that sets up a worker for the small store first, which loads all there is to load."""
    from s4v.files import hash_file

    try:
        from s4v.extract.pipeline.dask_worker import WorkerJob
    except ImportError:
        from s4v.extract.pipeline.dask_cluster import WorkerJob

    given = "store_sha256" in signature(WorkerJob).parameters

    def start(store: Path) -> dict[str, float]:
        job = WorkerJob(make_config(store), *((hash_file(store / "zarr.json"),) if given else ()))
        watch = Stopwatch()
        with job:
            return watch.read()

    with listing(make_records(SMALL_ROWS)):
        small = [start(path.with_name(SMALL_NAME)) for _ in range(2)][1]
    watch = Stopwatch()
    # A worker that lists all videos has their records in its memory; one that is handed its rows has not.
    with listing([] if given else make_records(options.videos)):
        whole = start(path)
    more = {kind: max(0.0, whole[kind] - small[kind]) for kind in ("s", "cpu_s")}
    return {"of": options.videos, **more, "mb": watch.read()["mb"]}


class TooLong(Exception):
    """A measurement has had its time."""


def measure_index(path: Path, options: argparse.Namespace) -> dict[str, float]:
    """Rows without a store; stopped when it takes too long, and said of how many rows it is."""
    import numpy as np
    import pyarrow as pa

    from s4v.retrieve.index_writer import build_index

    num_rows, rows_per_shard = options.index_rows, 50
    starts = range(0, num_rows, ROWS_OF_A_CHUNK)
    times = pa.array([[1.24 * place for place in range(FRAMES)]] * min(num_rows, ROWS_OF_A_CHUNK))
    clips = pa.array([[list(range(FRAMES))]] * min(num_rows, ROWS_OF_A_CHUNK))
    ids = [pa.array([f"{row:09d}.mp4" for row in range(at, min(num_rows, at + ROWS_OF_A_CHUNK))]) for at in starts]

    def chunked(values: pa.Array) -> pa.ChunkedArray:
        return pa.chunked_array([values.slice(0, len(chunk)) for chunk in ids])

    whole = min(num_rows, ROWS_OF_A_CHUNK)
    columns = {
        "video_id": pa.chunked_array(ids),
        "status": chunked(pa.array(["ok"] * whole)),
        "num_cached_frames": chunked(pa.array(np.full(whole, FRAMES, np.int32))),
        "timestamps_s": chunked(times),
        "eval_clips": chunked(clips),
        "source_hash": chunked(pa.nulls(whole, pa.string())),
    }
    table = pa.table(columns)
    values = np.random.default_rng(0).normal(size=(rows_per_shard, 1, FRAMES, 8)).astype(np.float32)
    folder = path.parent / "rows.zarr"
    (folder / "_parts").mkdir(parents=True)
    (folder / "checksums.json").write_text("{}")
    layout = SimpleNamespace(
        num_rows=num_rows, num_views=1, embed_dim=8, rows_per_shard=rows_per_shard,
        num_shards=-(-num_rows // rows_per_shard),
        shard_rows=lambda shard: range(shard * rows_per_shard, min(num_rows, (shard + 1) * rows_per_shard)),
    )  # fmt: skip
    store = SimpleNamespace(
        path=folder,
        layout=layout,
        read_manifest=lambda names: table.select(names),
        read_shown_embeddings=lambda rows: values[: len(rows)],
    )
    state = {"rows": 0}
    watch = Stopwatch()

    def report(stage: str, done: int, total: int) -> None:
        state["rows"] = done
        if watch.read()["s"] > options.patience:
            raise TooLong

    try:
        build_index(store, path.parent / "rows.index", report)  # type: ignore[arg-type]
        state["rows"] = num_rows
    except TooLong:
        pass
    told = watch.read()
    share = num_rows / state["rows"]
    return {
        "of": num_rows,
        "measured": state["rows"],
        "s": told["s"] * share,
        "cpu_s": told["cpu_s"] * share,
        "mb": told["mb"],
    }


MEASURES: dict[str, Callable[[Path, argparse.Namespace], dict[str, float]]] = {
    "make": make_store,
    "consolidation": measure_consolidation,
    "retry": measure_retry,
    "worker": measure_worker,
    "index": measure_index,
}


def measure_tree(tree: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All figures of a checkout, each in a process that imports it."""
    folder = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "imports").mkdir(parents=True)
    (folder / "imports" / "s4v").symlink_to(tree.resolve(), target_is_directory=True)
    environment = {**os.environ, "PYTHONPATH": str((folder / "imports").resolve())}
    sizes = ("videos", "shards", "retry", "index_rows", "patience")
    given = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in sizes]
    found = {}
    for name in MEASURES:
        command = [sys.executable, str(Path(__file__).resolve()), *given, f"--folder={folder}", f"--measure={name}"]
        command.append(f"--tree={tree}")
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"{tree.name}: {name}: {found[name]}", file=sys.stderr, flush=True)
    for kind in ("s", "cpu_s"):  # a shard's own writing is in a retry too: the new ones tell what it takes
        own = found["make"][kind] / found["make"]["of"] * found["retry"]["of"]
        found["retry"][kind] = max(0.0, found["retry"][kind] - own)
    shutil.rmtree(folder)
    return found


def describe(found: dict[str, float]) -> str:
    measured = found.get("measured", found["of"])
    of_part = "" if measured == found["of"] else f", from the first {measured:,.0f}"
    return f"{found['s']:.2f} s ({found['cpu_s']:.2f} CPU s), {found['mb']:.0f} MB{of_part}"


def describe_joining(found: dict[str, float]) -> str:
    return f"{found['join_s']:.2f} s ({found['join_cpu_s']:.2f} CPU s)"


def main() -> None:
    """Measure, compare, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=20_000)
    parser.add_argument("--retry", type=int, default=1_000, help="shards done anew")
    parser.add_argument("--index-rows", type=int, default=2_200_000)
    parser.add_argument(
        "--patience", type=float, default=120.0, help="seconds after which retry and index stop, to be told in part"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-scale"))
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="the checkout to measure")
    parser.add_argument("--before", type=Path, help="a checkout to compare with, or the JSON file of a run")
    parser.add_argument("--json", type=Path, help="write the figures there, and nothing under docs/")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        import s4v

        assert Path(s4v.__file__).resolve().is_relative_to(options.tree.resolve()), f"{s4v.__file__} was imported"
        print(json.dumps(MEASURES[options.measure](options.folder / "store.zarr", options)))
        return
    before = None
    if options.before is not None and options.before.is_file():
        before = json.loads(options.before.read_text())["figures"]
    elif options.before is not None:
        before = measure_tree(options.before, options)
    now = measure_tree(options.tree, options)
    rows = []
    for name, what in (
        ("consolidation", "consolidation of {:,.0f} shards"),
        ("retry", "bookkeeping of {:,.0f} shards done anew"),
        ("worker", "a worker's start at {:,.0f} rows"),
        ("index", "row tables of an index of {:,.0f} rows"),
    ):
        figures = [] if before is None else [describe(before[name])]
        rows.append([what.format(now[name]["of"]), *figures, describe(now[name])])
        if name == "retry":
            figures = [] if before is None else [describe_joining(before[name])]
            rows.append(["joining their done-markers into the manifest", *figures, describe_joining(now[name])])
    table = format_table(["", *(() if before is None else ("before",)), "now"], rows)
    bars = [
        check_bar("consolidation", now["consolidation"]["s"], 15, " s"),
        check_bar("bookkeeping of a retry", now["retry"]["s"], 2, " s"),
        check_bar("a worker's start", now["worker"]["s"], 1, " s"),
        check_bar("memory of a worker's start", now["worker"]["mb"], 100, " MB"),
        check_bar("row tables of an index", now["index"]["s"], 30, " s"),
    ]
    result = {"machine": describe_machine("pyarrow", "numpy"), "figures": now, "before": before}
    if options.json is None:
        keep("scale", result, table, bars)
    else:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(table, *bars, sep="\n")


if __name__ == "__main__":
    main()
