"""Frozen towers: the image tower whose tokens are stored, the text tower that asks for them, and their weights.

A library of towers (open_clip's, say) is one file that keeps to `contract.py`, and a line in the table here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import BackboneError

if TYPE_CHECKING:
    from .contract import TowerLibrary

__all__ = ["LIBRARIES", "find_library"]


def _library_of(module: str) -> Callable[[], TowerLibrary]:
    """The `LIBRARY` of a module of this folder, imported when it is asked for: stage two needs no tower's library."""
    return lambda: import_module(f".{module}", __name__).LIBRARY


LIBRARIES: dict[str, Callable[[], TowerLibrary]] = {
    "open_clip": _library_of("open_clip_towers"),
    "timm": _library_of("timm_towers"),
}
"""By name, in the order in which they are asked for a model: of a name that two know, it is the first one's."""


def find_library(model: str) -> TowerLibrary:
    """The library that builds a model.

    Raises:
        BackboneError: If there is no such model, with the closest names.
    """
    libraries = []
    for load in LIBRARIES.values():
        library = load()
        if library.has_model(model):
            return library
        libraries.append(library)
    short = [name for library in libraries for name in library.short_names]
    by_lower = {name.lower(): name for name in [*short, *(name for one in libraries for name in one.list_models())]}
    close = difflib.get_close_matches(model.lower(), by_lower, n=4, cutoff=0.5)
    hint = f"Closest: {', '.join(by_lower[name] for name in close)}. " if close else ""
    titles = " or ".join(library.title for library in libraries)
    raise BackboneError(
        f"unknown model {model!r}. {hint}Short names: {', '.join(short)}; others are {titles} architectures."
    )
