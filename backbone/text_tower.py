"""The frozen text tower of a backbone, by its model's name: texts to embeddings, or to one token a word."""

from __future__ import annotations

import torch

from ..errors import WeightsError
from ..store.reader import StoreReader
from . import find_library
from .contract import TextTower

__all__ = ["TextTower", "load_store_text_tower", "load_text_tower"]


def load_text_tower(
    name: str, *, weights: str | None, device: torch.device, seed: int = 0, expected_sha256: str | None = None
) -> TextTower:
    """Build a model's text tower in float32 and load its weights.

    Args:
        name: As for `build_backbone`.
        weights: As for `build_backbone`.
        device: Where it runs.
        seed: Of random weights.
        expected_sha256: Refuse weights with another hash.

    Raises:
        WeightsError: If the weights cannot be had, do not fit, or have another hash.
        BackboneError: If there is no such model, it has no text tower, or its tokenizer cannot be had.
    """
    library = find_library(name)
    return library.load_text_tower(name, weights=weights, device=device, seed=seed, expected_sha256=expected_sha256)


def load_store_text_tower(
    store: StoreReader, *, weights: str | None = None, device: torch.device | None = None
) -> TextTower:
    """The text tower that belongs to a store's embeddings.

    Raises:
        WeightsError: If the weights cannot be had, or are not those that the store was made with.
    """
    backbone = store.facts.backbone
    found = find_library(backbone.name).find_architecture(backbone.name)
    if found not in (None, backbone.architecture) and "@" in backbone.architecture:
        raise WeightsError(
            f"{store.path} was made with the configuration {backbone.architecture}; {backbone.name} is {found} by now. "
            "Put the file back as it was."
        )
    return load_text_tower(
        backbone.name,
        weights=weights or backbone.weights,
        device=device or torch.device("cpu"),
        expected_sha256=backbone.weights_sha256,
    )
