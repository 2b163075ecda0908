"""The operations of RandAugment on a picture, and how they are drawn: `rand-m7-n4-mstd0.5-inc1`, in timm's words.

timm draws from global state, anew for each picture, and importing it loads torch, which decoder processes do without.
Here a draw is a list of operations that holds for all frames of a view, and stands in the manifest.

Source:
    timm 1.0.31, timm/data/auto_augment.py, of which every operation and magnitude here is held to by a test. The
    interpolation is bicubic, as in https://github.com/HJYao00/Side4Video at 5d72352; timm's own default draws it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from statistics import NormalDist
from typing import Any

from PIL import Image, ImageEnhance, ImageOps

from ...store.records import Operation

MAGNITUDE, MAGNITUDE_DEVIATION, NUM_OPERATIONS, PROBABILITY = 7, 0.5, 4, 0.5
_MOST = 10.0
"""A magnitude lies between 0 and this."""
_GREY = (128, 128, 128)
"""Fills what a shifted picture leaves empty."""
_LEAST = 2.0**-53
"""Of a drawn number, where 0 would be infinitely far out."""


def draw_operations(chance: random.Random) -> tuple[Operation, ...]:
    """Draw four operations with replacement; each of them is done with a probability of a half.

    Args:
        chance: Where it is drawn from; nothing else plays a part.
    """
    names = list(OPERATIONS)
    drawn = []
    for _ in range(NUM_OPERATIONS):
        name = names[int(chance.random() * len(names))]
        is_done, is_negative = chance.random() < PROBABILITY, chance.random() < 0.5
        # Not `random.gauss`: what it makes of a seed may change with Python.
        magnitude = NormalDist(MAGNITUDE, MAGNITUDE_DEVIATION).inv_cdf(max(chance.random(), _LEAST))
        if is_done:
            drawn.append(Operation(name=name, argument=find_argument(name, magnitude, is_negative=is_negative)))
    return tuple(drawn)


def find_argument(name: str, magnitude: float, *, is_negative: bool) -> float | None:
    """What an operation of a magnitude is called with; None where it takes nothing.

    Args:
        name: In `OPERATIONS`.
        magnitude: Cut to 0 to 10.
        is_negative: Whether it goes the other way, of operations that have two.
    """
    level = max(0.0, min(magnitude, _MOST)) / _MOST
    argument = _ARGUMENTS[name]
    return None if argument is None else argument(level, -1.0 if is_negative else 1.0)


def apply_operations(picture: Image.Image, operations: Iterable[Operation]) -> Image.Image:
    """Do operations one after another.

    Args:
        picture: RGB.
        operations: As they were drawn.

    Raises:
        KeyError: If one is not known.
    """
    for operation in operations:
        picture = OPERATIONS[operation.name](picture, operation.argument)
    return picture


def _transform(picture: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=_GREY
    )


def _rotate(picture: Image.Image, degrees: float) -> Image.Image:
    return picture.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=_GREY)


def _posterize(picture: Image.Image, bits: float) -> Image.Image:
    if bits < 1:  # Pillow refuses to leave nothing, and timm would with it: six deviations away from the mean
        return Image.new("RGB", picture.size)
    return picture if bits >= 8 else ImageOps.posterize(picture, int(bits))


def _solarize_add(picture: Image.Image, addend: float) -> Image.Image:
    """Dark values get lighter, by a whole number; light ones stay."""
    table = [min(255, value + int(addend)) if value < 128 else value for value in range(256)]
    return picture.point(table * 3)


OPERATIONS: dict[str, Callable[[Image.Image, Any], Image.Image]] = {
    "AutoContrast": lambda picture, _: ImageOps.autocontrast(picture),
    "Equalize": lambda picture, _: ImageOps.equalize(picture),
    "Invert": lambda picture, _: ImageOps.invert(picture),
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": lambda picture, threshold: ImageOps.solarize(picture, int(threshold)),
    "SolarizeAdd": _solarize_add,
    "Color": lambda picture, factor: ImageEnhance.Color(picture).enhance(factor),
    "Contrast": lambda picture, factor: ImageEnhance.Contrast(picture).enhance(factor),
    "Brightness": lambda picture, factor: ImageEnhance.Brightness(picture).enhance(factor),
    "Sharpness": lambda picture, factor: ImageEnhance.Sharpness(picture).enhance(factor),
    "ShearX": lambda picture, factor: _transform(picture, (1, factor, 0, 0, 1, 0)),
    "ShearY": lambda picture, factor: _transform(picture, (1, 0, 0, factor, 1, 0)),
    "TranslateX": lambda picture, share: _transform(picture, (1, 0, share * picture.width, 0, 1, 0)),
    "TranslateY": lambda picture, share: _transform(picture, (1, 0, 0, 0, 1, share * picture.height)),
}
"""By name, in the order in which they are drawn: (RGB picture, argument) -> RGB picture."""


def _enhancement(level: float, sign: float) -> float:
    return max(0.1, 1.0 + sign * (level * 0.9))


_ARGUMENTS: dict[str, Callable[[float, float], float] | None] = {
    "AutoContrast": None,
    "Equalize": None,
    "Invert": None,
    "Rotate": lambda level, sign: sign * (level * 30.0),  # degrees
    "Posterize": lambda level, sign: 4.0 - int(level * 4),  # bits that stay
    "Solarize": lambda level, sign: 256.0 - min(256, int(level * 256)),  # threshold
    "SolarizeAdd": lambda level, sign: float(min(128, int(level * 110))),
    "Color": _enhancement,
    "Contrast": _enhancement,
    "Brightness": _enhancement,
    "Sharpness": _enhancement,
    "ShearX": lambda level, sign: sign * (level * 0.3),
    "ShearY": lambda level, sign: sign * (level * 0.3),
    "TranslateX": lambda level, sign: sign * (level * 0.45),  # of the width
    "TranslateY": lambda level, sign: sign * (level * 0.45),  # of the height
}
"""By the same names: (level from 0 to 1, sign) -> argument, growing in effect with the level (timm's `inc1`)."""
