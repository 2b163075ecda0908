"""What an extraction left behind: counts, failures, and when they make an error of the whole command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from ..errors import NoGoodVideoError, StoreDamagedError
from ..store.info import count_reasons, count_table
from ..store.verify import Damage


@dataclass(frozen=True, slots=True)
class ExtractSummary:
    """What an extraction left behind."""

    store: Path
    videos: dict[str, int]
    """Rows by status: ok, failed, pending."""
    failed: list[dict[str, str]]
    """video_id, path and reason of every failed row."""
    seconds: float
    files: dict[str, int]
    """Files with a row of that status: a file's segments are rows of their own."""
    pending: list[dict[str, str]]
    """The same as `failed`, of rows that the machine kept from being done."""
    pending_reasons: dict[str, int]
    """How many of them, by the code of their reason."""
    changed: list[str] = field(default_factory=list)
    """video_id of every good row whose video was replaced since."""


def summarise_store(path: Path, table: pa.Table, seconds: float, changed: list[str]) -> ExtractSummary:
    """Count what a store's manifest holds.

    Args:
        path: The store.
        table: Its manifest.
        seconds: That the extraction took.
        changed: video_id of every good row whose video was replaced since.
    """
    counts = count_table(table)
    failed = _select(table, pa.compute.equal(table["status"], "failed"))
    is_kept_off = pa.compute.and_(pa.compute.equal(table["status"], "pending"), pa.compute.is_valid(table["reason"]))
    return ExtractSummary(
        store=path,
        videos=counts.rows,
        failed=failed,
        seconds=round(seconds, 3),
        files=counts.files,
        pending=_select(table, is_kept_off),
        pending_reasons=count_reasons(table, "pending"),
        changed=changed,
    )


def refuse_damage(path: Path, unmended: Sequence[Damage]) -> None:
    """Tell of damage that a repair had to leave.

    Raises:
        StoreDamagedError: If there is any.
    """
    if unmended:
        damaged = sorted({one.shard for one in unmended if one.shard is not None})
        raise StoreDamagedError(
            f"{path}: damage stays in shards {', '.join(map(str, damaged))}; all else is mended. Their damaged "
            "rows were made of other videos than lie there now: bring those back, or take the new ones with "
            "--redo-changed."
        )


def refuse_no_good_video(summary: ExtractSummary, num_rows: int) -> None:
    """Tell of a store that nothing can be done with.

    Raises:
        NoGoodVideoError: If not one of its rows is good, and none may become so.
    """
    if summary.videos["ok"] == 0 and summary.videos["pending"] == 0:
        reasons = "; ".join(sorted({row["reason"] for row in summary.failed})[:3])
        num_files = summary.files["failed"]
        rows = f"{num_rows} videos" if num_files == num_rows else f"{num_rows} rows of {num_files} files"
        raise NoGoodVideoError(
            f"not one of {rows} decodes. First reasons: {reasons}. {summary.store} keeps every reason, nothing to "
            "train on or to search: mend the files and run the same command with --retry-failed, or remove it."
        )


def _select(table: pa.Table, chosen: pa.ChunkedArray) -> list[dict[str, str]]:
    return table.filter(chosen).select(["video_id", "path", "reason"]).to_pylist()
