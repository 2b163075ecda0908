"""`s4v scan`: decode what an extraction would decode, without a backbone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..files import write_atomic
from ..store.info import render_reasons
from .config import ExtractConfig
from .decode.pool import DecoderPool, decode_records
from .recipe import settle_recipe
from .segments import list_rows_and_missing
from .target import Target

_SCHEMA = pa.schema(
    [
        ("video_id", pa.string()),
        ("path", pa.string()),
        ("split", pa.string()),
        ("class_name", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("bytes", pa.int64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("decoder", pa.string()),
        ("num_frames", pa.int64()),
        ("fps", pa.float64()),
        ("duration_s", pa.float64()),
        ("width", pa.int64()),
        ("height", pa.int64()),
    ]
)
_FACTS = ("decoder", "num_frames", "fps", "duration_s", "width", "height")
_IMAGE_SIZE = (224, 224)
"""Of the crops that decoders are asked for: what the backbones of the paper see."""


def scan_dataset(
    config: ExtractConfig, out: Path, report: Callable[[str, int, int], None] = lambda *_: None
) -> dict[str, Any]:
    """Decode the frames of every video that an extraction would take.

    Args:
        config: The extraction; its model and store play no part.
        out: Parquet file to write: video_id, path, split, class_name, start_s, end_s, bytes, status, reason, decoder,
            num_frames, fps, duration_s, width, height. A row is a video or, with `segment_s`, a segment.
        report: Told about progress.

    Returns:
        out, videos (ok, failed, pending), reasons (videos by code), failed and pending: video_id, path, reason of each.

    Raises:
        EnvironmentFailedError: If the folder of the videos disappears.
    """
    report("listing the videos", 0, 0)
    rows: list[dict[str, Any]] = []
    target = Target(config.out)  # whatever store is there plays no part
    config = settle_recipe(config, target)
    with DecoderPool(config.num_decoders) as pool:
        listing = list_rows_and_missing(config, target, pool, report)
        records = listing.records
        videos = decode_records(pool, records, config, image_size=_IMAGE_SIZE, missing=listing.missing)
        for record, video in zip(records, videos, strict=True):
            rows.append(
                {
                    "video_id": record.video_id,
                    "path": record.path,
                    "split": record.split,
                    "class_name": record.class_name,
                    "start_s": record.start_s,
                    "end_s": record.end_s,
                    "bytes": video.facts.get("source_bytes"),
                    "status": "ok" if video.pixels is not None else "pending" if video.is_pending else "failed",
                    "reason": video.facts.get("reason"),
                    **{name: video.facts.get(name) for name in _FACTS},
                }
            )
            report("scanning", len(rows), len(records))
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, lambda temporary: pq.write_table(table, temporary))
    by_status = {
        status: [{n: row[n] for n in ("video_id", "path", "reason")} for row in rows if row["status"] == status]
        for status in ("failed", "pending")
    }
    lost = by_status["failed"] + by_status["pending"]
    reasons = Counter(row["reason"].partition(":")[0] for row in lost)
    counts = {status: len(of_status) for status, of_status in by_status.items()}
    return {
        "out": str(out),
        "videos": {"ok": len(rows) - len(lost), **counts},
        "reasons": dict(reasons.most_common()),
        **by_status,
    }


def render_scan(summary: Mapping[str, Any], path: Path) -> list[str]:
    """What `scan_dataset` found, in lines.

    Args:
        summary: What it returned.
        path: The file that it wrote.
    """
    lines = [f"{path}: {summary['videos']['ok']} videos decode, {summary['videos']['failed']} do not"]
    lines += [f"  {count} {code}" for code, count in summary["reasons"].items()]
    if summary["pending"]:
        lines.append(f"{len(summary['pending'])} could not be read now: the machine's trouble, not theirs")
    return lines + render_reasons([*summary["pending"], *summary["failed"]], str(path))
