"""How a picture is to be turned and mirrored before it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_MATRIX_BYTES = 36


@dataclass(frozen=True, slots=True)
class Turn:
    """One of the eight ways to lay a picture: exchange rows and columns, then mirror each axis or not."""

    is_transposed: bool = False
    flips_x: bool = False
    """Whether left and right change places, after the exchange."""
    flips_y: bool = False

    @property
    def is_mirrored(self) -> bool:
        """Whether it is a mirror image, which no turning makes."""
        return self.is_transposed ^ self.flips_x ^ self.flips_y

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """(H, W, 3) as it is stored -> as it is shown, a view."""
        if self.is_transposed:
            picture = picture.swapaxes(0, 1)
        return picture[:: -1 if self.flips_y else 1, :: -1 if self.flips_x else 1]


def parse_matrix(matrix: np.ndarray) -> Turn:
    """The turn nearest to a display matrix.

    Args:
        matrix: (9,) as containers hold it: a stored point (p, q) is shown at (a p + c q, b p + d q), where a, b, c and
            d are the values 0, 1, 3 and 4.
    """
    a, b, c, d = (float(matrix[place]) for place in (0, 1, 3, 4))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Turn(flips_x=a < 0, flips_y=d < 0)
    return Turn(is_transposed=True, flips_x=c < 0, flips_y=b < 0)


def turn_of(frame: Any) -> Turn:
    """How a decoded frame is to be turned, by the display matrix that it bears."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX" and data.buffer_size >= _MATRIX_BYTES:
            return parse_matrix(np.frombuffer(bytes(data)[:_MATRIX_BYTES], dtype=np.int32))
    return Turn()
