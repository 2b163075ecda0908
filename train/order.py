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


def resolve_window(wanted: int | None, store: StoreReader, cache: ShardCache, frames_per_row: float) -> int:
    """The window of a training that reads through a cache: what was asked for, else an eighth of the shards, or eight.

    It does not depend on the cache, whose room may look different to processes that train together.

    Args:
        wanted: Shards.
        store: Whose shards.
        cache: Which is to hold the window, and one shard more.
        frames_per_row: Cached frames of a row, on average.

    Raises:
        ConfigError: If the cache is too small.
    """
    layout = store.layout
    window = wanted or min(layout.num_shards, max(layout.num_shards // _SHARE, _FEWEST))
    row_bytes = layout.num_views * frames_per_row * sum(layout.bytes_per_frame.values())
    needed = round((window + 1) * layout.rows_per_shard * row_bytes)
    if cache.most_bytes < needed:
        raise ConfigError(
            f"the cache may hold {describe_bytes(cache.most_bytes)}; {window} shards of {store.path} that are mixed at "
            f"a time, and one more, take {describe_bytes(needed)}: raise --cache-size or lower --window"
        )
    return window
