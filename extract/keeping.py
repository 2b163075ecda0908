"""What a store has that doing a shard anew could lose: good rows whose videos are gone by now."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from functools import cached_property

import pyarrow as pa

from ..errors import StoreDamagedError
from ..store import manifest
from ..store.reader import StoreReader
from ..store.records import VideoResult
from .job import Job

_log = logging.getLogger(__name__)


class GoodRows:
    """The rows of a store that are ok, shard by shard.

    Args:
        store: Which.
        consolidated: Rows that the manifest has as ok, as far as somebody else has looked; None reads it when a shard
            without a done-marker is asked for.
    """

    def __init__(self, store: StoreReader, consolidated: Collection[int] | None = None) -> None:
        self._store = store
        self._layout = store.layout
        self._known = consolidated

    def of_shard(self, shard: int) -> list[int]:
        """Row numbers: as the done-marker tells or, where there is none to be read, the manifest."""
        statuses = self._read_marker(shard)
        if not statuses:
            return self.of_manifest(shard)
        return [row for row, status in zip(self._layout.shard_rows(shard), statuses, strict=False) if status == "ok"]

    def of_manifest(self, shard: int) -> list[int]:
        """Row numbers, as the last consolidation left them."""
        rows = self._layout.shard_rows(shard)
        if self._known is not None:
            return [row for row in rows if row in self._known]
        statuses = self._consolidated.slice(rows.start, len(rows)).to_pylist()
        return [row for row, status in zip(rows, statuses, strict=False) if status == "ok"]

    def without_video(self, job: Job, shard: int) -> list[int]:
        """Those of a shard that could not be made again."""
        return [row for row in self.of_shard(shard) if not (job.config.root / job.records[row].path).exists()]

    def may_replace(self, shard: int, results: Sequence[VideoResult]) -> bool:
        """Whether a shard may be written: not over a good row that it would lose. Warns of such rows.

        Args:
            shard: Done anew, or for the first time.
            results: One for each of its rows.
        """
        first, path = self._layout.shard_rows(shard).start, self._store.path
        lost = [results[row - first] for row in self.of_shard(shard) if results[row - first].status != "ok"]
        if not lost:
            return True
        told = ", ".join(f"{result.video_id} ({result.reason})" for result in lost[:3])
        marker = manifest.part_path(path, shard)
        if marker.exists():
            marker.touch()  # as it was, but seen to: who handed the shard out looks for another marker
            _log.warning("%s: shard %d stays as it was, for good rows of it do not decode now: %s", path, shard, told)
            return False
        _log.warning("%s: shard %d loses rows that were good and do not decode now: %s", path, shard, told)
        return True

    def _read_marker(self, shard: int) -> list[str]:
        try:
            part = manifest.read_part(self._store.path, shard, self._store.attributes["codec"]["sha256"])
        except StoreDamagedError:
            return []
        return [] if part is None else part["status"].to_pylist()

    @cached_property
    def _consolidated(self) -> pa.ChunkedArray:
        """Statuses of all rows as of the last consolidation; none where the manifest is damaged."""
        try:
            table = manifest.read_table(self._store.path / manifest.MANIFEST_NAME, ["status"])
        except StoreDamagedError:
            return pa.chunked_array([], pa.string())
        return table["status"]


def name_videos(job: Job, rows: Sequence[int], most: int = 3) -> str:
    """`a.mp4, b.mp4 and 4 more`."""
    paths = list(dict.fromkeys(job.records[row].path for row in rows))  # segments share a file
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")
