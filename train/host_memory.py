"""Room for batches in the host's memory that is used again: of fresh memory the kernel clears every page."""

from __future__ import annotations

import math
import threading
import weakref
from collections import defaultdict

import numpy as np

_SMALLEST_BYTES = 2**18
"""Below it malloc is as good."""


class HostMemory:
    """Gives arrays whose memory it takes back when nobody holds them, or a view of them, any more; thread-safe.

    malloc does the same for one thread alone. Batches are read by several threads, each with a heap of its own, and
    what another one lets go of is not used again.

    Args:
        most_bytes: That are kept while nobody uses them; what is above goes back to the system.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: dict[int, list[np.ndarray]] = defaultdict(list)
        self._kept_bytes = 0
        # A callback may come while this thread holds the lock: whatever is allocated inside may begin a collection.
        self._lock = threading.RLock()

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of whatever values, contiguous."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if num_bytes < _SMALLEST_BYTES:
            return np.empty(shape, dtype)
        size = _round_up(num_bytes)
        with self._lock:
            kept = self._kept[size]
            block = kept.pop() if kept else None
            self._kept_bytes -= 0 if block is None else size
        if block is None:
            block = np.empty(size, np.uint8)
        # A view of a memoryview's array holds that array, where a view of an array would hold the block behind it.
        root: np.ndarray = np.frombuffer(block.data, np.uint8, count=num_bytes)
        weakref.finalize(root, self._take_back, block).atexit = False
        return root.view(dtype).reshape(shape)

    def _take_back(self, block: np.ndarray) -> None:
        with self._lock:
            if self._kept_bytes + block.nbytes <= self._most_bytes:
                self._kept[block.nbytes].append(block)
                self._kept_bytes += block.nbytes


def _round_up(num_bytes: int) -> int:
    """To one of eight sizes between powers of two: batches that are padded differ a little."""
    step = 1 << max(0, num_bytes.bit_length() - 4)
    return -(-num_bytes // step) * step
