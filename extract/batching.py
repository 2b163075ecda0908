"""Which frames go through the backbone together: a pure function of counts, so that a store never depends on timing."""

from __future__ import annotations

import math
from collections.abc import Sequence

Slot = tuple[int, int, int]
"""One frame of a batch: place of its row in the shard, view, place on the axis F."""


def split_evenly(count: int, batch_size: int) -> list[range]:
    """As few batches as hold so many frames, their sizes one apart at most.

    Full batches would leave a small last one, which is slow on a GPU whether it is padded or not.

    Args:
        count: Frames.
        batch_size: The most in one pass.

    Returns:
        The frames of each batch, in order.
    """
    num_batches = math.ceil(count / batch_size)
    return [range(count * batch // num_batches, count * (batch + 1) // num_batches) for batch in range(num_batches)]


def batch_slots(num_frames: Sequence[int], num_views: Sequence[int], batch_size: int) -> list[list[Slot]]:
    """Group the frames of a shard's rows into batches.

    Args:
        num_frames: Cached frames of each row of the shard.
        num_views: Views of each row.
        batch_size: The most frames in one pass.

    Returns:
        Batches of (place of the row in the shard, view, place on the axis F), in order.
    """
    slots = [
        (row, view, frame)
        for row, (frames, views) in enumerate(zip(num_frames, num_views, strict=True))
        for view in range(views)
        for frame in range(frames)
    ]
    return [[slots[place] for place in batch] for batch in split_evenly(len(slots), batch_size)]
