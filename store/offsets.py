"""Which pixel frames a store holds around each cached one: offsets with their units, as options and stores write them.

A bare number counts frames of the source file, whatever its rate: `-2`. `0.5step` is half a step, a step being the
distance of neighbouring cached frames of one clip. What a step comes to in frames is the sampling's matter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from ..errors import ConfigError

MOST_OFFSETS = 2**10
"""How many a store may have, and how far each may lie from its frame, in its unit."""

DEFAULT_PIXEL_EDGE = "clamp"
"""Of a store that names none: what lies beyond a row's ends is its first or its last frame."""

_STEP = re.compile(r"([+-]?)(?:(\d{1,4})(?:\.(\d{1,6}))?|(\d{1,4})/([1-9]\d{0,3}))step", re.ASCII)
_FRAME = re.compile(r"[+-]?\d{1,6}", re.ASCII)
_RANGE = re.compile(rf"({_FRAME.pattern})\.\.({_FRAME.pattern})", re.ASCII)
_FEWEST_IN_RANGE = 3


@dataclass(frozen=True, slots=True)
class PixelOffset:
    """How far a pixel frame lies from the cached frame that it belongs to. None at all is told in frames."""

    distance: Fraction
    """In its unit; of frames a whole number."""
    unit: Literal["frame", "step"] = "frame"

    def __post_init__(self) -> None:
        object.__setattr__(self, "distance", Fraction(self.distance))
        if not self.distance:
            object.__setattr__(self, "unit", "frame")
        if self.unit == "frame" and self.distance.denominator != 1:
            raise ValueError(f"expected whole frames, found {self.distance}")

    @classmethod
    def of(cls, value: PixelOffset | int | str) -> PixelOffset:
        """An offset as a store records it or an option has it: `-2` as a number or a text, `0.5step`.

        Raises:
            ValueError: If it is none, or lies too far away.
        """
        if isinstance(value, bool) or not isinstance(value, PixelOffset | int | str):
            raise ValueError(f"expected an offset, found {value!r}")
        offset = cls._parse(str(value).strip())  # one that was computed may be none that can be written
        if abs(offset.distance) > MOST_OFFSETS:
            raise ValueError(f"expected an offset from -{MOST_OFFSETS} to {MOST_OFFSETS}, found {value}")
        return offset

    @classmethod
    @lru_cache(MOST_OFFSETS)  # a reader asks for the same ones with every batch
    def _parse(cls, text: str) -> PixelOffset:
        if _FRAME.fullmatch(text):
            return cls(Fraction(int(text)))
        if (match := _STEP.fullmatch(text)) is None:
            raise ValueError(f"expected an offset, found {text!r}")
        sign, whole, decimals, numerator, denominator = match.groups()
        size = Fraction(f"{numerator}/{denominator}" if whole is None else f"{whole}.{decimals or 0}")
        return cls(-size if sign == "-" else size, "step")

    def __str__(self) -> str:
        if self.unit == "frame":
            return str(self.distance)
        # As a decimal where that says it whole, and is one that is read again.
        decimal = f"{float(self.distance):.6f}".rstrip("0").rstrip(".")
        return f"{decimal if Fraction(decimal) == self.distance else self.distance}step"

    @property
    def recorded(self) -> int | str:
        """As a store records it: frames as a number, as all stores had them before there were steps."""
        return int(self.distance) if self.unit == "frame" else str(self)


SEEN_FRAME = PixelOffset(Fraction(0))
"""The cached frame itself, which the backbone saw."""


def order_offsets(values: Iterable[PixelOffset | int | str]) -> tuple[PixelOffset, ...]:
    """The offsets of a store in the one order that it has them in: frames ascending, then steps ascending.

    Raises:
        ConfigError: If one is none, is named twice or lies too far away, if there are too many, or if 0 is not there.
    """
    offsets = []
    for value in values:
        try:
            offsets.append(PixelOffset.of(value))
        except ValueError:
            raise ConfigError(
                "--pixel-offsets takes frames of the source (-2..2, or -1,0,1) and shares of the step between cached "
                f"frames (0.5step), none beyond {MOST_OFFSETS}; found {str(value)[:40]!r}"
            ) from None
    shown = ",".join(map(str, offsets[:20])) + ",..." * (len(offsets) > 20)
    if twice := [str(offset) for offset, count in Counter(offsets).items() if count > 1]:
        raise ConfigError(f"--pixel-offsets names {', '.join(twice[:3])} more than once; found {shown}")
    if SEEN_FRAME not in offsets:
        raise ConfigError(f"--pixel-offsets must name 0, the frame that the backbone sees; found {shown}: add 0")
    if len(offsets) > MOST_OFFSETS:
        raise ConfigError(f"--pixel-offsets takes at most {MOST_OFFSETS} offsets; found {len(offsets)}")
    return tuple(sorted(offsets, key=lambda offset: (offset.unit == "step", offset.distance)))


def parse_offsets(text: str) -> tuple[PixelOffset, ...]:
    """Read `--pixel-offsets`: `-2..2`, `-1,0,1`, `0,0.5step`, or a mixture.

    Raises:
        ConfigError: As `order_offsets`, or if a range is none.
    """
    values: list[str | int] = []
    for part in text.split(","):
        bounds = _RANGE.fullmatch(part.strip())
        if bounds is None:
            values.append(part.strip())
            continue
        first, last = int(bounds[1]), int(bounds[2])
        if not -MOST_OFFSETS <= first < last <= MOST_OFFSETS:
            raise ConfigError(
                f"--pixel-offsets takes a range from its lowest to its highest offset, such as -2..2, none beyond "
                f"{MOST_OFFSETS}; found {part.strip()}"
            )
        values += range(first, last + 1)
    return order_offsets(values)


def describe_offsets(offsets: Sequence[PixelOffset]) -> str:
    """Offsets as `--pixel-offsets` takes them, in the order of a store: `-2..2,0.5step`."""
    frames = sorted({int(offset.distance) for offset in offsets if offset.unit == "frame"})
    runs: list[list[int]] = []
    for frame in frames:
        if runs and frame == runs[-1][-1] + 1:
            runs[-1].append(frame)
        else:
            runs.append([frame])
    told = [
        part for run in runs for part in ([f"{run[0]}..{run[-1]}"] if len(run) >= _FEWEST_IN_RANGE else map(str, run))
    ]
    steps = sorted({offset.distance for offset in offsets if offset.unit == "step"})
    return ",".join([*told, *(str(PixelOffset(step, "step")) for step in steps)])
