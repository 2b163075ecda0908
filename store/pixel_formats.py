"""How a store holds frames: as RGB, or as planes of YCbCr 4:2:0 in half the bytes, without entropy coding.

    Y  =  0.299 R    + 0.587 G    + 0.114 B             of each pixel
    Cb = -0.168736 R - 0.331264 G + 0.5 B      + 128    of the mean of 2 x 2 pixels
    Cr =  0.5 R      - 0.418688 G - 0.081312 B + 128    of the same

    R = Y                        + 1.402 (Cr - 128)
    G = Y - 0.344136 (Cb - 128) - 0.714136 (Cr - 128)
    B = Y + 1.772 (Cb - 128)

These are BT.601's weights over the whole range of a byte, as JPEG takes them. Values are rounded to the nearest. A
frame is its plane Y, then Cb, then Cr, each row after row: P = 3/2 H W bytes.

Chroma is made bilinear again: of each four pixels that share a value, each takes 9/16 of its own and 3/16, 3/16 and
1/16 of its neighbours'. At the edges the own value stands for what is not there.
"""

from __future__ import annotations

import numpy as np

from .layout import PixelFormat

_SHIFT = 16
"""Weights are whole 65536ths, so that a frame has the same bytes on every machine."""
_LUMA = (19595, 38470, 7471)
_BLUE_DIFFERENCE = (-11058, -21710, 32768)
_RED_DIFFERENCE = (32768, -27439, -5329)
_GREY = 128
"""What Cb and Cr are of a pixel without colour."""


def encode_pixels(pixels: np.ndarray, pixel_format: PixelFormat) -> np.ndarray:
    """Frames as a store holds them.

    Args:
        pixels: (..., H, W, 3) uint8, H and W even unless they stay RGB.
        pixel_format: Of the store.

    Returns:
        (..., P) uint8; of `rgb` the pixels themselves.
    """
    if pixel_format == "rgb":
        return pixels
    *lead, height, width, _ = pixels.shape
    frames = pixels.reshape(-1, height, width, 3)
    planes = np.empty((len(frames), height * width * 3 // 2), np.uint8)
    for frame, row in zip(frames, planes, strict=True):  # one by one: thousands at once would take gigabytes
        _fill_planes(frame, row)
    return planes.reshape(*lead, planes.shape[1])


def _fill_planes(frame: np.ndarray, planes: np.ndarray) -> None:
    """Y, Cb and Cr of a frame (H, W, 3), into its P bytes."""
    height, width, _ = frame.shape
    colours = np.moveaxis(frame, -1, 0).astype(np.int32)
    planes[: height * width] = _weigh(colours, _LUMA, 0, _SHIFT).ravel()
    # Sums of four pixels: their mean is not rounded before it is weighed.
    sums = colours.reshape(3, height // 2, 2, width // 2, 2).sum(axis=(2, 4), dtype=np.int32)
    chroma = planes[height * width :].reshape(2, -1)
    for plane, weights in zip(chroma, (_BLUE_DIFFERENCE, _RED_DIFFERENCE), strict=True):
        plane[:] = _weigh(sums, weights, _GREY, _SHIFT + 2).ravel()


def _weigh(colours: np.ndarray, weights: tuple[int, int, int], offset: int, shift: int) -> np.ndarray:
    """A weighed sum of three colours, rounded to the nearest byte."""
    red, green, blue = (weight * colour for weight, colour in zip(weights, colours, strict=True))
    # Half a step beyond white is rounded to 256, which is no byte.
    return np.minimum((red + green + blue + (offset << shift) + (1 << (shift - 1))) >> shift, 255)


def decode_pixels(stored: np.ndarray, pixel_format: PixelFormat, image_size: tuple[int, int]) -> np.ndarray:
    """Frames from what a store holds of them.

    Args:
        stored: (..., P) uint8; of `rgb` (..., H, W, 3).
        pixel_format: Of the store.
        image_size: H, W.

    Returns:
        (..., H, W, 3) uint8.
    """
    if pixel_format == "rgb":
        return stored
    *lead, size = stored.shape
    height, width = image_size
    pixels = np.empty((*lead, height, width, 3), np.uint8)
    for planes, frame in zip(stored.reshape(-1, size), pixels.reshape(-1, height, width, 3), strict=True):
        _fill_frame(planes, frame)
    return pixels


def _fill_frame(planes: np.ndarray, frame: np.ndarray) -> None:
    """The pixels (H, W, 3) of a frame, of its P bytes."""
    height, width, _ = frame.shape
    size = height * width
    luma = planes[:size].reshape(height, width).astype(np.float32)
    chroma = planes[size:].reshape(2, height // 2, width // 2).astype(np.float32) - _GREY
    blue, red = np.swapaxes(_double_rows(np.swapaxes(_double_rows(chroma), 1, 2)), 1, 2)
    colours = (luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue)
    for place, colour in enumerate(colours):
        frame[..., place] = np.rint(np.clip(colour, 0, 255))


def _double_rows(values: np.ndarray) -> np.ndarray:
    """(n, h, w) to (n, 2 h, w): rows a quarter of the way to the one before, and to the one behind."""
    num_planes, height, width = values.shape
    padded = np.pad(values, ((0, 0), (1, 1), (0, 0)), mode="edge")
    pairs = [0.75 * values + 0.25 * padded[:, :-2], 0.75 * values + 0.25 * padded[:, 2:]]
    return np.stack(pairs, axis=2).reshape(num_planes, 2 * height, width)
