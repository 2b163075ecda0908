"""s4v: run the frozen giant ViT once, train video models from its cached tokens.

`extract` turns videos into a store of multi-layer tokens, `train` trains a side network from that store alone,
`retrieve` searches the store's videos by text. Attributes load on first use, so that importing s4v is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .moved import install as _find_moved_modules

if TYPE_CHECKING:
    from .extract.config import ExtractConfig
    from .extract.extraction import extract_dataset
    from .retrieve.search import search_store
    from .store.reader import StoreReader, open_store
    from .train.config import TrainConfig
    from .train.evaluate import evaluate_run
    from .train.loop import train_run

__version__ = "0.1.0"

_find_moved_modules()

_HOME_OF = {
    "ExtractConfig": ".extract.config",
    "StoreReader": ".store.reader",
    "TrainConfig": ".train.config",
    "evaluate_run": ".train.evaluate",
    "extract_dataset": ".extract.extraction",
    "open_store": ".store.reader",
    "search_store": ".retrieve.search",
    "train_run": ".train.loop",
}

__all__ = [
    "ExtractConfig",
    "StoreReader",
    "TrainConfig",
    "__version__",
    "evaluate_run",
    "extract_dataset",
    "open_store",
    "search_store",
    "train_run",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name], __name__), name)
    raise AttributeError(f"module 's4v' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
