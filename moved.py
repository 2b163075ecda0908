"""Modules that have another name now: scripts that import them by the old one go on, and are told so once."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "s4v.extract.backbone": "s4v.backbone.vision_tower",
    "s4v.extract.resizing": "s4v.extract.decode.views",
    "s4v.extract.sampling": "s4v.extract.decode.sampling",
    "s4v.extract.text_tower": "s4v.backbone.text_tower",
    "s4v.extract.weights": "s4v.backbone.weights",
    "s4v.retrieve.building": "s4v.retrieve.index_writer",
    "s4v.retrieve.index": "s4v.retrieve.index_reader",
    "s4v.retrieve.trained": "s4v.retrieve.trained_frames",
    "s4v.store.appending": "s4v.store.append",
    "s4v.retrieve.vectors": "s4v.vectors",
    "s4v.retrieve.zero_shot": "s4v.train.networks.zero_shot",
    "s4v.train.heads": "s4v.train.networks",
    "s4v.train.importing": "s4v.train.paper.import_checkpoint",
    "s4v.train.interaction": "s4v.train.networks.text_interaction",
    "s4v.train.official": "s4v.train.paper.checkpoint_names",
    "s4v.train.presets": "s4v.train.settings",
    "s4v.train.ranking": "s4v.train.tasks.retrieval_metrics",
    "s4v.train.retrieval": "s4v.train.tasks.retrieval",
    "s4v.train.run": "s4v.train.run_folder",
    "s4v.train.side_network": "s4v.train.networks.side4video",
}
"""Old names to new ones."""


class _Finder(MetaPathFinder, Loader):
    """The last that Python asks: no file is there for the old names."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """None for all but the old names."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module itself, not a second one: its classes are the same by both names."""
        new = MOVED[spec.name]
        warnings.warn(f"{spec.name} is {new} now: import it by that name", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It was run when it was first imported; Python has just written the old name into it."""
        module.__spec__ = self._spec


def install() -> None:
    """Have Python find modules by their old names."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
