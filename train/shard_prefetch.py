"""Shards on their way to a cache, in the order of an epoch, before a step needs them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
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


class ShardPrefetch:
    """A thread that copies shards, each once, no further ahead of the batch that is read than so many bytes.

    Args:
        store: Reads through a cache.
        plans: The batches, in their order.
        arrays: What of a store they are read of.
        ahead_bytes: Of copies whose first batch has not come yet; one is always made.
    """

    def __init__(self, store: StoreReader, plans: Sequence[Plan], arrays: Sequence[str], ahead_bytes: int) -> None:
        self._store = store
        self._plans = plans
        self._arrays = arrays
        self._ahead_bytes = ahead_bytes
        self._ahead: deque[tuple[int, int]] = deque()  # place of the batch, bytes
        self._reached, self._is_closed = 0, False
        self._moved = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="s4v-prefetch", daemon=True)
        self._thread.start()

    def reach(self, place: int) -> None:
        """The batch that is read now."""
        with self._moved:
            self._reached = place
            while self._ahead and self._ahead[0][0] <= place:
                self._ahead.popleft()
            self._moved.notify()

    def close(self) -> None:
        """Begin no other copy."""
        with self._moved:
            self._is_closed = True
            self._moved.notify()

    def _run(self) -> None:
        seen: set[tuple[str, int, str]] = set()
        try:
            for place, plan in enumerate(self._plans):
                for file in self._store.list_files(plan.rows, plan.views, plan.places, self._arrays):
                    if file in seen:
                        continue
                    seen.add(file)
                    if not self._wait_for_room():
                        return
                    self._note(place, self._store.bring(*file))
        except Exception:  # of a daemon nobody else would tell; whoever reads meets the same and says what it is
            _log.warning("shards are not fetched ahead any more", exc_info=True)

    def _wait_for_room(self) -> bool:
        """Whether there is more to do."""
        with self._moved:
            self._moved.wait_for(lambda: self._is_closed or sum(size for _, size in self._ahead) < self._ahead_bytes)
            return not self._is_closed

    def _note(self, place: int, num_bytes: int) -> None:
        with self._moved:
            if place > self._reached:
                self._ahead.append((place, num_bytes))
