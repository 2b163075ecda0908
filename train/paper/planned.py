"""What `s4v extract --for NAME` sets: what networks need of a store, those that are there and papers' that are not yet.

A store that is made for a network of a paper holds what its specification says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ..networks import NETWORKS

PLANNED: Mapping[str, Mapping[str, Any]] = {
    "r2-tuning": {
        "layers": "last4",
        "sampling": "fps:0.5",
        "views": {"": "centre"},
        "resize": "224",
        "with_pixels": False,
        "text_layers": "last4",
        "text_words": 77,
    },
}
"""By the network's name: fields of an extraction's config. What is not named is as the data set's recipe has it.

Source:
    R2-Tuning: https://github.com/yeliudev/R2-Tuning at 03fbcf6, at the rate of QVHighlights; of Charades-STA it
    is one frame a second, of YouTube Highlights one for each label.
"""

_OF_RECIPE: Mapping[tuple[str, str | None], Mapping[str, Any]] = {
    ("tds-clip", "k400"): {"pixel_edge": "wrap"},
    ("r2-tuning", "charades-sta"): {"sampling": "fps:1"},
    ("r2-tuning", "youtube-highlights"): {"sampling": "fps:labels"},
}
"""By network and recipe: what the network's reader of such data sets does otherwise."""


def find_extraction(name: str, recipe: str | None) -> dict[str, Any]:
    """What a network needs of a store, by field of an extraction's config.

    Args:
        name: Of a network that is there, or in `PLANNED`.
        recipe: Of the data set, by name; None where it has none.

    Raises:
        ConfigError: If no such network is known.
    """
    known = {**{kind.name: kind.extraction for kind in NETWORKS.values()}, **PLANNED}
    if name not in known:
        raise ConfigError(f"--for takes {', '.join(known)}; found {name!r}")
    return {**known[name], **_OF_RECIPE.get((name, recipe), {})}
