"""Which frames of a video are cached: pure functions of counts."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import ConfigError


def sample_uniform(num_frames: int, num_steps: int) -> list[int]:
    """Pick the middle frame of each of `num_steps` equal parts of a video.

    A video with fewer frames than steps repeats frames; it is not padded.

    Args:
        num_frames: Frames of the video, at least 1.
        num_steps: Frames wanted, at least 1.

    Returns:
        `num_steps` indices in [0, num_frames), never decreasing.

    Raises:
        ValueError: If either count is below 1.

    Source:
        Sparse sampling of Temporal Segment Networks, https://arxiv.org/abs/1608.00859
    """
    if num_frames < 1 or num_steps < 1:
        raise ValueError(f"both counts must be at least 1; found {num_frames} frames, {num_steps} steps")
    return [(2 * step + 1) * num_frames // (2 * num_steps) for step in range(num_steps)]


SAMPLINGS: dict[str, Callable[[int, int], list[int]]] = {"uniform": sample_uniform}
"""By the name that `--sampling` takes: (frames of the video, frames wanted) -> indices."""


def parse_frames(text: str) -> dict[str, int]:
    """Read `--frames`: one number for all splits, or `train=16,val=8`.

    Returns:
        Frames by split; the key "" holds the number for splits that are not named.

    Raises:
        ConfigError: If it is neither.
    """
    frames: dict[str, int] = {}
    for part in text.split(","):
        split, _, count = part.strip().rpartition("=")
        if not count.isdecimal() or int(count) < 1 or split in frames or "=" in split:
            raise ConfigError(f"--frames takes a number (8) or one for each split (train=16,val=8); found {text!r}")
        frames[split] = int(count)
    return frames
