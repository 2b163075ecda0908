"""Stores of random tokens, written as an extraction writes them; and stores of another one's rows, changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from s4v.store.codecs.contract import Codec
from s4v.store.layout import StoreLayout
from s4v.store.manifest import read_results
from s4v.store.reader import StoreReader, is_store, open_store
from s4v.store.records import VideoRecord, VideoResult
from s4v.store.spec import StoreSpec
from s4v.store.writer import RowTokens, StoreWriter, create_store, resume_store


def begin_store(
    path: Path, layout: StoreLayout, codec: Codec, classes: list[str], *, backbone: dict[str, Any] | None = None
) -> tuple[StoreWriter, list[VideoRecord]]:
    """The skeleton of a store: all videos for training, the classes in turns; `backbone` has what a run asks for."""
    records = []
    for row in range(layout.num_rows):
        class_name = classes[row % len(classes)]
        name = f"{class_name}/{row:08d}.mp4"
        records.append(VideoRecord(video_id=name, path=name, split="train", class_name=class_name))
    attributes: dict[str, Any] = {
        "created": "now",
        "dataset": {"name": "benchmark", "root": "."},
        "classes": {"names": sorted(classes)},
        "backbone": {"name": "none", "width": layout.width, "mean": [0.5] * 3, "std": [0.5] * 3, **(backbone or {})},
        "frames": {"": layout.num_frames},
        "sampling": "uniform",
        "resize": "224",
        "libraries": {},
    }
    spec = StoreSpec(layout=layout, attributes=attributes, records=records, codec=codec, head={})
    return create_store(path, spec), records


def write_rows(
    writer: StoreWriter, records: list[VideoRecord], shard: int, make_tokens: Callable[[int], RowTokens]
) -> range:
    """One shard, all its videos good; returns its rows."""
    rows, frames = writer.layout.shard_rows(shard), list(range(writer.layout.num_frames))
    facts: dict[str, Any] = {"num_cached_frames": len(frames), "num_views": 1, "eval_clips": [frames]}
    results = [VideoResult(video_id=records[row].video_id, status="ok", **facts) for row in rows]
    writer.write_shard(shard, {row: make_tokens(row) for row in rows}, results)
    return rows


def read_records(store: StoreReader) -> list[VideoRecord]:
    """What the store's rows were made of; captions aside, which nothing here reads."""
    names = ("video_id", "path", "split", "class_name", "source_id", "start_s", "end_s")
    return [VideoRecord(**row) for row in store.read_manifest(list(names)).to_pylist()]


def change_store(
    store: StoreReader,
    out: Path,
    layout: StoreLayout,
    codec: Codec,
    make_tokens: Callable[[int], RowTokens],
    change_result: Callable[[VideoResult], VideoResult] = lambda result: result,
) -> None:
    """A store of the same rows with other tokens; one that is there is gone on with.

    Args:
        store: Whose rows.
        out: The new store.
        layout: Of the new store.
        codec: Of its patches.
        make_tokens: By row, of those that are good.
        change_result: What the manifest says of such a row.
    """
    records = read_records(store)
    frames = {"frames": {"": layout.num_frames}} if layout.num_frames != store.layout.num_frames else {}
    attributes = {**store.attributes, **frames}
    spec = StoreSpec(layout=layout, attributes=attributes, records=records, codec=codec, head=store.head)
    results = [change_result(one) if one.status == "ok" else one for one in read_results(store.read_manifest())]
    with resume_store(open_store(out), spec) if is_store(out) else create_store(out, spec) as writer:
        for shard in writer.pending_shards():
            rows = layout.shard_rows(shard)
            tokens = {row: make_tokens(row) for row in rows if results[row].status == "ok"}
            writer.write_shard(shard, tokens, [results[row] for row in rows])
        writer.consolidate()
