"""Shards on their way to a cache, in the order of an epoch, before a step needs them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from ..store.reader import StoreReader

_log = logging.getLogger(__name__)


class Plan(Protocol):
    """Of a batch, what decides which files it is read of."""

    @property
    def rows(self) -> np.ndarray:
        """(B,) rows of the store."""
        ...

    @property
    def views(self) -> np.ndarray:
        """(B,) on the axis A."""
        ...

    @property
    def places(self) -> np.ndarray:
        """(B, T) places on the axis F."""
        ...


_NUM_THREADS = 2
"""One reads while another one writes."""


class ShardPrefetch:
    """Threads that copy shards, each once, no further ahead of the batch that is read than the store says.

    Args:
        store: Reads through a cache.
        plans: The batches, in their order.
        arrays: What of a store they are read of.
    """

    def __init__(self, store: StoreReader, plans: Sequence[Plan], arrays: Sequence[str]) -> None:
        self._store = store
        self._plans = plans
        self._arrays = arrays
        self._ahead_bytes = store.ahead_bytes
        self._ahead: deque[tuple[int, int]] = deque()  # place of the batch, bytes
        self._reached, self._is_closed = 0, False
        self._moved = threading.Condition()
        self._files, self._listing = self._list_files(), threading.Lock()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(_NUM_THREADS)]
        for thread in self._threads:
            thread.start()

    def reach(self, place: int) -> None:
        """The batch that is read now."""
        with self._moved:
            self._reached = place
            while self._ahead and self._ahead[0][0] <= place:
                self._ahead.popleft()
            self._moved.notify_all()

    def close(self) -> None:
        """Begin no other copy."""
        with self._moved:
            self._is_closed = True
            self._moved.notify_all()

    def _list_files(self) -> Iterator[tuple[int, tuple[str, int, str]]]:
        """Each file once, with the place of the first batch that is read of it."""
        seen: set[tuple[str, int, str]] = set()
        for place, plan in enumerate(self._plans):
            if self._is_closed:
                return
            for file in self._store.list_files(plan.rows, plan.views, plan.places, self._arrays):
                if file not in seen:
                    seen.add(file)
                    yield place, file

    def _run(self) -> None:
        try:
            while (wanted := self._take()) is not None:
                place, file = wanted
                num_bytes = self._store.bring(*file)
                with self._moved:
                    if place > self._reached:
                        self._ahead.append((place, num_bytes))
        except Exception:  # of a daemon nobody else would tell; whoever reads meets the same and says what it is
            _log.warning("shards are not fetched ahead any more", exc_info=True)
            self.close()

    def _take(self) -> tuple[int, tuple[str, int, str]] | None:
        """The next file, when there is room for it; None where there is none."""
        with self._moved:
            self._moved.wait_for(lambda: self._is_closed or sum(size for _, size in self._ahead) < self._ahead_bytes)
            if self._is_closed:
                return None
        with self._listing:  # not the other lock, which steps take: this may look through the rest of an epoch
            return next(self._files, None)
