"""Memory that a step frees and the next one takes again."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have this process keep what it frees, instead of giving it back and asking for it anew in each step.

    By default glibc returns large blocks at once, and the kernel clears every page of the next one: a tenth of a step's
    time on two cores. It holds for the whole process, so a library must not: commands do it. Without glibc, or where
    the user has set MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_, nothing is changed.

    Returns:
        Whether it is so.
    """
    is_set = any(f"MALLOC_{name}_THRESHOLD_" in os.environ for name in ("TRIM", "MMAP"))
    if sys.platform != "linux" or is_set:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _LARGEST) and mallopt(_MMAP_THRESHOLD, _LARGEST))
