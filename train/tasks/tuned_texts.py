"""Texts as a run's own text tower embeds them: those of released checkpoints were tuned together with their videos."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from ...backbone.text_tower import TextTower, load_text_tower
from ...errors import ConfigError
from ...store.reader import StoreReader
from ...store.text_choice import TEXT_ARRAYS
from ...store.texts import MAX_WORDS, Texts
from ..run_folder import TEXT_NAME, Run

_log = logging.getLogger(__name__)


def load_tuned_text_tower(run: Run, store: StoreReader, *, device: torch.device | None = None) -> TextTower:
    """The text tower that an imported run has brought along.

    Raises:
        ConfigError: If its checkpoint held none.
        WeightsError: If it is not of the store's architecture.
    """
    weights = run.path / TEXT_NAME
    if not weights.is_file():
        raise ConfigError(f"{run.path}: its checkpoint held no text tower, and no other one belongs to its videos")
    name = store.facts.backbone.name
    return load_text_tower(name, weights=str(weights), device=device or torch.device("cpu"))


class TunedTexts:
    """The captions of a store, embedded when they are read; what `TextReader` is for the frozen tower's."""

    def __init__(self, run: Run, store: StoreReader, *, device: torch.device | None = None) -> None:
        self._tower = load_tuned_text_tower(run, store, device=device)
        self._captions = store.read_captions()["text"].to_pylist()
        self.num_words = min(MAX_WORDS, self._tower.context_length)
        """M."""
        if cut := self._tower.find_cut(self._captions, self.num_words):
            number = sum(caption in cut for caption in self._captions)
            _log.warning("%d of %d captions are longer than %d words", number, len(self._captions), self.num_words - 2)

    def read(self, captions: Sequence[int] | np.ndarray, arrays: Sequence[str] = TEXT_ARRAYS) -> Texts:
        """Texts by their rows, in the order asked for; all arrays, whichever are asked for."""
        return self._tower.encode_words([self._captions[row] for row in captions], self.num_words, is_cut_known=True)
