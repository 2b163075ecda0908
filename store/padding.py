"""Which patches of a view show nothing of the picture: a whole frame fills its canvas in one direction alone."""

from __future__ import annotations

import numpy as np

from .records import View


def find_padding(view: View, patch_size: tuple[int, int]) -> np.ndarray:
    """Patches of a view without one pixel of the picture.

    Args:
        view: How its pixels were made. A box that reaches beyond the resized frame is padded there.
        patch_size: Pixels down and across.

    Returns:
        (N,) bool, row by row of the grid: true where a patch is padding.
    """
    patch_height, patch_width = patch_size
    if (drawn := view.augmentation) is not None:  # its box lies in the picture, and is scaled to the canvas
        return np.zeros(drawn.scaled_height // patch_height * (drawn.scaled_width // patch_width), dtype=bool)
    down = _shows_picture(view.y, view.height, view.resized_height, patch_height)
    across = _shows_picture(view.x, view.width, view.resized_width, patch_width)
    return ~(down[:, None] & (across[::-1] if view.flip else across)).reshape(-1)


def _shows_picture(start: int, length: int, picture: int, patch: int) -> np.ndarray:
    """Which patches of one axis show anything of a picture, (length // patch,) bool.

    Args:
        start: Of the box, in pixels of the picture.
        length: Of the box.
        picture: Its size.
        patch: Size of a patch.
    """
    edges = start + patch * np.arange(length // patch)
    return (edges < picture) & (edges + patch > 0)
