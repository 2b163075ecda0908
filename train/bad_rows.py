"""Rows with bytes that stay damaged: a training goes on without their clips, as far as it was told that it may."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

import torch.distributed as dist

from ..errors import StoreDamagedError

_log = logging.getLogger(__name__)


class BadRows:
    """The rows that have clips which cannot be read, the same in all processes after each epoch; thread-safe.

    Args:
        most: So many at most; one more ends the training.
    """

    def __init__(self, most: int = 0) -> None:
        self._most = most
        self._lock = threading.Lock()
        self.rows: frozenset[int] = frozenset()

    def note(self, error: StoreDamagedError) -> None:
        """Count the row that could not be read, once, and say so.

        Raises:
            StoreDamagedError: The same, if it says of no row, or too many are bad.
        """
        with self._lock:
            if error.row is None:
                raise error
            if error.row in self.rows:
                return
            if len(self.rows) >= self._most:
                allowed = f"--max-bad allows {self._most}" if self._most else "--max-bad N trains on without up to N"
                raise StoreDamagedError(f"{error} ({allowed} such videos.)", row=error.row) from error
            self.rows |= {error.row}
            _log.warning(
                "%s Other clips stand in for those: video %d of at most %d.", error, len(self.rows), self._most
            )

    def take_over(self, rows: Iterable[int]) -> None:
        """Count what a training counted before, however many."""
        with self._lock:
            self.rows |= set(rows)

    def share(self) -> None:
        """Let all processes know what each has found; called by all of them.

        Raises:
            StoreDamagedError: If together they are too many.
        """
        found: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, sorted(self.rows))
        self.take_over(row for own in found for row in own)
        if len(self.rows) > self._most:
            raise StoreDamagedError(
                f"{len(self.rows)} videos of the store cannot be read, --max-bad allows {self._most}: rows "
                f"{', '.join(map(str, sorted(self.rows)))}. `s4v verify` says what is wrong with them."
            )
