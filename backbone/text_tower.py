"""The frozen text tower of a backbone, by its model's name: texts to embeddings, or to one token a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..errors import WeightsError
from ..store.reader import StoreReader
from . import find_library
from .contract import TextTower
from .facts import TextTowerInfo

__all__ = [
    "TextTower",
    "TextTowerInfo",
    "count_text_words",
    "describe_text_tower",
    "encode_class_texts",
    "encode_with_clip",
    "load_store_text_tower",
    "load_text_tower",
]

_CLASSES_PER_PASS = 1024
"""A pass of 10,000 class names would take tens of GB."""


def describe_text_tower(name: str) -> TextTowerInfo:
    """The sizes of a model's text tower, for which no weights are needed.

    Raises:
        BackboneError: If there is no such model, it has no text tower, or not one whose words and blocks s4v can tell.
    """
    return find_library(name).describe_text_tower(name)


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


def count_text_words(name: str, texts: Sequence[str], num_words: int) -> np.ndarray:
    """How many words a model's text tower finds in each text, cut at `num_words`; no weights are needed.

    Raises:
        BackboneError: As `describe_text_tower` does, or if its tokenizer cannot be had.
    """
    return find_library(name).count_words(name, texts, num_words)


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


def encode_class_texts(tower: TextTower, texts: Sequence[str]) -> np.ndarray:
    """Embed what stands for classes, as few passes as memory allows.

    Stores and the zero-shot classifier both take this way: a text's bits depend on how many others are in its pass.

    Returns:
        (len(texts), E) float32, not normalised.
    """
    passes = range(0, len(texts), _CLASSES_PER_PASS)
    return np.concatenate([tower.encode(list(texts[first : first + _CLASSES_PER_PASS])) for first in passes])


def encode_with_clip(tensors: Mapping[str, torch.Tensor], label: str, texts: Sequence[str]) -> np.ndarray:
    """Embed texts with CLIP's own text tower, from its tensors: (len(texts), E) float32, not normalised.

    Raises:
        WeightsError: As `build_clip_text_tower`, or if its words are not those of CLIP's tokenizer.
    """
    from .open_clip_texts import build_clip_text_tower  # and with it open_clip

    tower = build_clip_text_tower(tensors, label, None)
    found, known = len(tensors["token_embedding.weight"]), tower.vocab_size
    if found != known:
        raise WeightsError(
            f"{label}: its text tower knows {found} words, CLIP's tokenizer has {known}: it is not CLIP's"
        )
    return encode_class_texts(tower, texts)
