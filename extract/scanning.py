"""`s4v scan`: decode what an extraction would decode, without a backbone."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..store._files import write_atomic
from .config import ExtractConfig
from .decoding import DecodeRequest, DecoderPool

_FACTS = ("decoder", "num_frames", "fps", "duration_s", "width", "height")
_SMALLEST_PX = 32
"""Side of the crop that decoders are asked for: resizing is not what is looked at."""


def _size_of(path: str) -> int | None:
    try:
        status = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def scan_dataset(
    config: ExtractConfig, out: Path, report: Callable[[str, int, int], None] = lambda *_: None
) -> dict[str, Any]:
    """Decode the frames of every video that an extraction would take.

    Args:
        config: The extraction; its model and store play no part.
        out: Parquet file to write: video_id, path, split, class_name, bytes, status, reason, decoder, num_frames, fps,
            duration_s, width, height.
        report: Told about progress.

    Returns:
        out, videos (ok, failed), reasons (videos by code), failed (video_id, path, reason of each).

    Raises:
        EnvironmentFailedError: If the folder of the videos disappears.
    """
    records = config.read_records()
    rows: list[dict[str, Any]] = []
    requests = (
        DecodeRequest.of(record, config, num_frames=config.frames_of(record.split), crop_px=_SMALLEST_PX)
        for record in records
    )
    with DecoderPool(config.num_decoders) as pool:
        for record, video in zip(records, pool.decode_ahead(requests), strict=True):
            # os.path: what we may not look at, and a name that no disk can have, is a row like any other.
            path = os.path.join(config.root, record.path)  # noqa: PTH118
            if not os.path.exists(path):  # noqa: PTH110
                config.require_root()
            rows.append(
                {
                    "video_id": record.video_id,
                    "path": record.path,
                    "split": record.split,
                    "class_name": record.class_name,
                    "bytes": _size_of(path),
                    "status": "ok" if video.pixels is not None else "failed",
                    "reason": video.facts.get("reason"),
                    **{name: video.facts.get(name) for name in _FACTS},
                }
            )
            report("scanning", len(rows), len(records))
    table = pa.Table.from_pylist(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, lambda temporary: pq.write_table(table, temporary))
    failed = [{n: row[n] for n in ("video_id", "path", "reason")} for row in rows if row["status"] == "failed"]
    reasons = Counter(row["reason"].partition(":")[0] for row in failed)
    return {
        "out": str(out),
        "videos": {"ok": len(rows) - len(failed), "failed": len(failed)},
        "reasons": dict(reasons.most_common()),
        "failed": failed,
    }
