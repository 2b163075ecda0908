"""The group of a store's texts: its arrays, and what was asked for of captions, as its attributes record it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StoreDamagedError
from . import names

TEXT_NAME = "text"
"""The group of texts."""
TEXT_ARRAYS = ("tokens", "mask", "embedding")
"""That all texts have."""
LAYERS_NAME = "layers"
"""The array that texts have where somebody asked for it."""
CLASSES_NAME = "classes"
"""The array of the same group that belongs to no caption: see class_texts.py."""

MOST_WORDS = 2**12
_MOST_BLOCKS = 2**10
_MOST_WIDTH = 2**20
_MEND = "The command that began the store mends it, with --repair."


@dataclass(frozen=True, kw_only=True, slots=True)
class TextChoice:
    """What is kept of captions beside what every store keeps; as their group's attributes record it."""

    layers: tuple[int, ...] = ()
    """0-based blocks of the text tower whose raw outputs are kept, ascending; Lt is their number."""
    width: int | None = None
    """Dt, of those outputs; None without blocks."""
    num_words: int | None = None
    """The most words of a caption, where somebody said it: M is that, or what the longest caption has. None is
    `MAX_WORDS`, however long the captions are."""

    def describe(self) -> dict[str, Any]:
        """As attributes; nothing where nothing was asked for, as in stores from before there was a choice."""
        blocks = {"text_layers": list(self.layers), "text_width": self.width} if self.layers else {}
        return {**blocks, **({} if self.num_words is None else {"text_words": self.num_words})}

    @classmethod
    def parse(cls, attributes: dict[str, Any]) -> TextChoice:
        """From attributes.

        Raises:
            ValueError: If they are none that `describe` gives.
        """
        layers, width, num_words = (attributes.get(name) for name in ("text_layers", "text_width", "text_words"))
        blocks = [] if layers is None else layers
        if not isinstance(blocks, list) or not all(type(one) is int and 0 <= one < _MOST_BLOCKS for one in blocks):
            raise ValueError(f"text_layers {ascii(layers)[:80]}")
        if blocks != sorted(set(blocks)) or (layers is not None and not blocks):
            raise ValueError(f"text_layers {ascii(layers)[:80]}")
        if not (type(width) is int and 0 < width <= _MOST_WIDTH if blocks else width is None):
            raise ValueError(f"text_width {ascii(width)[:80]}")
        if num_words is not None and not (type(num_words) is int and 0 < num_words <= MOST_WORDS):
            raise ValueError(f"text_words {ascii(num_words)[:80]}")
        return cls(layers=tuple(blocks), width=width, num_words=num_words)

    @property
    def arrays(self) -> tuple[str, ...]:
        """Of the texts."""
        return (*TEXT_ARRAYS, LAYERS_NAME) if self.layers else TEXT_ARRAYS


def read_text_choice(root: Path) -> TextChoice:
    """What was asked for of a store's captions, whether its texts are current or not.

    Raises:
        StoreDamagedError: If what is recorded is not readable.
    """
    if not os.path.lexists(root / TEXT_NAME / "zarr.json"):
        return TextChoice()
    attributes = names.read_json(root, f"{TEXT_NAME}/zarr.json").get("attributes")
    try:
        return TextChoice.parse(attributes if isinstance(attributes, dict) else {})
    except ValueError as error:
        raise StoreDamagedError(f"{root / TEXT_NAME / 'zarr.json'} cannot be: {error}. {_MEND}") from error
