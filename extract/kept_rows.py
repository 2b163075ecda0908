"""Which rows of a shard an extraction does, and the rest, which keep every byte that they have.

A shard is written whole, so doing one of its rows means copying the others. What is copied needs no video and no
backbone: a good row is never lost because its file is gone, and never mixed with another file of its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from ..errors import StoreDamagedError
from ..store import manifest
from ..store.markers import read_marker
from ..store.reader import StoreReader
from ..store.records import VideoRecord, VideoResult
from ..store.writer import RowTokens
from .config import ExtractConfig
from .decode.source import is_same_source


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """What is done of a shard, and what is kept."""

    kept: dict[int, VideoResult] = field(default_factory=dict)
    """By row number; all other rows are done."""
    before: dict[int, VideoResult] = field(default_factory=dict)
    """What rows that are done were before, where that is known."""

    def settle(self, row: int, result: VideoResult, *, may_change: bool) -> tuple[VideoResult, bool]:
        """What a row comes to that was done anew.

        Args:
            row: Its number.
            result: Of doing it.
            may_change: Whether another video may take the place of the one that the row was made of.

        Returns:
            Its result, and whether it keeps the tokens that it has.
        """
        old = self.before.get(row)
        if old is not None and old.status == "ok" and result.status != "ok":
            return old, True  # never lost, whatever became of its video
        was_good = old is not None and old.num_cached_frames is not None  # until it was damaged
        if old is not None and was_good and result.status == "pending":
            return replace(old, status="pending", reason=result.reason), False
        is_other = old is not None and was_good and old.source_hash not in (None, result.source_hash)
        if result.status == "ok" and is_other and not may_change:
            why = "source-changed: the row was made of another video; --redo-changed takes the new one"
            return VideoResult(video_id=result.video_id, status="failed", reason=why), False
        return result, False


class KeptRows:
    """The rows of a store that an extraction does not touch, shard by shard.

    Args:
        store: The store.
        config: What is asked for: `retry_failed` and `redo_changed` decide.
        records: By row number.
        known: What the manifest has of shards without a done-marker, by their number, as far as somebody else has
            looked; None reads it when such a shard is asked for.
    """

    def __init__(
        self,
        store: StoreReader,
        config: ExtractConfig,
        records: Mapping[int, VideoRecord] | Sequence[VideoRecord],
        known: Mapping[int, Sequence[VideoResult]] | None = None,
    ) -> None:
        self._config = config
        self._records = records
        self._store = store
        self._known = known

    def plan(self, shard: int) -> ShardPlan:
        """Which rows of a shard are done: pending ones and, where it is asked for, failed and changed ones."""
        first = self._store.layout.shard_rows(shard).start
        plan = ShardPlan()
        results = self._read_marker(shard)
        has_marker = bool(results)
        for row, result in enumerate(results or self.of_manifest(shard), start=first):
            if self._is_kept(row, result) and (has_marker or self._is_readable(row, result)):
                plan.kept[row] = result
            elif result.status != "pending" or result.source_hash is not None:
                plan.before[row] = result
        return plan

    def of_manifest(self, shard: int) -> Sequence[VideoResult]:
        """Results of a shard as the last consolidation left them; none where no row of it was good."""
        if self._known is not None:
            return self._known.get(shard, ())
        rows = self._store.layout.shard_rows(shard)
        if "ok" not in self._statuses[rows.start : rows.stop]:
            return ()
        return manifest.read_results(self._table.slice(rows.start, len(rows)))

    @cached_property
    def _statuses(self) -> list[str]:
        with suppress(StoreDamagedError):
            path = self._store.path / manifest.MANIFEST_NAME
            return manifest.read_table(path, ["status"])["status"].to_pylist()
        return []

    @cached_property
    def _table(self) -> pa.Table:
        return manifest.read_table(self._store.path / manifest.MANIFEST_NAME, manifest.PART_SCHEMA.names)

    def _read_marker(self, shard: int) -> list[VideoResult]:
        with suppress(StoreDamagedError):
            marker = read_marker(self._store.path, shard, self._store.facts.codecs_sha256)
            return [] if marker is None else marker.as_results()
        return []

    def read(self, row: int, result: VideoResult) -> RowTokens:
        """The tokens of a good row.

        Raises:
            StoreDamagedError: If they are not as they were written.
        """
        assert result.num_views is not None and result.num_cached_frames is not None
        return RowTokens(**self._store.read_row(row, result.num_views, result.num_cached_frames))

    def _is_kept(self, row: int, result: VideoResult) -> bool:
        if result.status == "pending":
            return False
        if result.status == "failed":
            return not self._config.retry_failed
        return not (self._config.redo_changed and is_changed(result, self._config.root / self._records[row].path))

    def _is_readable(self, row: int, result: VideoResult) -> bool:
        """Of a row whose marker is gone: whether the shard still holds what the manifest says."""
        if result.status != "ok":
            return True
        try:
            self.read(row, result)
        except StoreDamagedError:
            return False
        return True


def is_changed(result: VideoResult, path: Path) -> bool:
    """Whether a row was made of another video than lies at its path; one that is gone has not changed."""
    if result.source_hash is None or result.source_bytes is None or result.source_mtime_ns is None:
        return False
    try:
        return not is_same_source(result.source_bytes, result.source_mtime_ns, result.source_hash, path)
    except OSError:
        return False
