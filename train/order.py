"""The order of an epoch's clips: any at all, or one that reads a few shards at a time, as disks like it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError
from ..files import describe_bytes
from ..store.reader import StoreReader
from ..store.shard_cache import ShardCache

_SHARE, _FEWEST = 8, 8
"""A window that nobody chose has one of so many shards, and so many at least."""
_SPARE = 4
"""Shards that a cache holds beside the window: ahead of it, and under way."""


@dataclass(frozen=True, slots=True)
class ShardWindow:
    """Clips are mixed among so many shards at a time."""

    num_shards: int
    rows_per_shard: int
    """Of the store."""


def draw_order(rows: np.ndarray, generator: np.random.Generator, window: ShardWindow | None = None) -> np.ndarray:
    """An order of clips: a pure function of rows, window and the generator's state.

    Shards stand on a circle in a random order. A clip's place is that of its shard, moved on by a random share of the
    window. So at any time about as many shards are read as the window has, each clip is equally likely early or late
    among them, and no shard is come back to, but where the circle closes.

    Args:
        rows: (n,) the store's row of each clip.
        generator: Drawn from.
        window: None mixes all.

    Returns:
        (n,) places of clips.
    """
    if window is None:
        return generator.permutation(len(rows))
    shards, shard_of = np.unique(rows // window.rows_per_shard, return_inverse=True)
    place = generator.permutation(len(shards))[shard_of]
    moved = place + min(window.num_shards, len(shards)) * generator.random(len(rows))
    return np.argsort(moved % max(1, len(shards)), kind="stable")


def read_through_cache(
    store: StoreReader, cache: ShardCache, frames_per_row: float, *, wanted: int | None, mixes_all: bool
) -> int | None:
    """Have a training read through a cache; the window is what was asked for, else an eighth of the shards, or eight.

    It does not depend on the cache, whose room may look different to processes that train together.

    Args:
        store: Whose shards.
        cache: Which is to hold the window, and some shards more.
        frames_per_row: Cached frames of a row, on average.
        wanted: Shards.
        mixes_all: Whether all shards stay mixed at once. Then the first batches would wait for copies of nearly all of
            them: what is not there yet is read from the store.

    Returns:
        The window; None where all are mixed.

    Raises:
        ConfigError: If the cache is too small.
    """
    layout = store.layout
    window = None if mixes_all else wanted or min(layout.num_shards, max(layout.num_shards // _SHARE, _FEWEST))
    row_bytes = layout.num_views * frames_per_row * sum(layout.bytes_per_frame.values())
    shard_bytes = round(layout.rows_per_shard * row_bytes)
    num_shards = min((window or 1) + _SPARE, layout.num_shards)
    if cache.most_bytes < num_shards * shard_bytes:
        mixed = "" if window is None else f", {min(window, num_shards)} of them mixed at a time"
        raise ConfigError(
            f"the cache may hold {describe_bytes(cache.most_bytes)}, and {num_shards} shards of {store.path}{mixed} "
            f"take {describe_bytes(num_shards * shard_bytes)}: raise --cache-size, leave out --cache, or "
            "begin a run with a lower --window"
        )
    ahead = max(1, min(cache.most_bytes // 8, (cache.most_bytes - (window or 1) * shard_bytes) // 2))
    store.read_through(cache, waits=window is not None, ahead_bytes=ahead)
    return window
