"""Frames and comparisons of a trained retrieval network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ..errors import ConfigError, RunNotFoundError
from ..files import read_json
from ..store.reader import StoreReader
from ..train.clips import LabelledRows, thin
from ..train.networks.contract import FrameNetwork
from ..train.networks.text_interaction import TextBatch
from ..train.run_folder import Run, open_run, open_store_of_run
from ..train.scorer import Scorer
from ..train.tasks import find_task
from ..train.tasks.retrieval import embed_clips


@dataclass(frozen=True, slots=True)
class EmbeddedClips:
    """Some videos' frames."""

    frames: np.ndarray
    """(n, T, E) float32, not normalised."""
    places: np.ndarray
    """(n, T) on the axis F of the store."""


class TrainedFrames:
    """A run's network beside a store that it fits.

    Args:
        run: The run's folder.
        features: The store; None takes the one that the run was trained on.
        device: Where it computes; None takes the CPU.
        checkpoint: `best` or `last`.

    Raises:
        ConfigError: If the run is not of retrieval.
        RunNotFoundError: If it has no such checkpoint.
        StoreMismatchError: If the store does not fit the run.
    """

    def __init__(
        self,
        run: Path,
        features: Path | None = None,
        device: torch.device | None = None,
        checkpoint: str = "best",
    ) -> None:
        self.run: Run
        self.store: StoreReader
        self.run = open_run(run)
        self.store = open_store_of_run(self.run, features)
        if not find_task(self.run.shape.task).embeds_frames:
            raise ConfigError(f"{run} knows classes: a search wants a run of `s4v train --task retrieval`")
        self._checkpoint = checkpoint
        metadata = self.run.path / f"{checkpoint}.json"
        if not metadata.is_file():
            raise RunNotFoundError(f"{run} has no checkpoint {checkpoint!r} yet: wait for its first epoch")
        self.sha256: str = read_json(metadata)["sha256"]
        self._device = device or torch.device("cpu")
        self._scorer: Scorer | None = None

    @property
    def scorer(self) -> Scorer:
        """With the network, its checkpoint loaded when it is first needed."""
        if self._scorer is None:
            self._scorer = Scorer.of_run(self.run, self.store, checkpoint=self._checkpoint, device=self._device)
        return self._scorer

    @cached_property
    def _centre_views(self) -> np.ndarray:
        """(V,) which view of each row of the store is the centre."""
        splits = self.store.input_columns()["split"].combine_chunks().dictionary_encode()
        places = np.asarray([self.store.facts.centre_view(split) for split in splits.dictionary.to_pylist()])
        return places[splits.indices.to_numpy()]

    @property
    def network(self) -> FrameNetwork:
        """What embeds frames."""
        return self.scorer.network  # type: ignore[return-value]

    @property
    def reads_words(self) -> bool:
        """Whether it compares word by word, so that its best answers are to be ranked again."""
        return self.run.shape.compares_words

    def embed(self, rows: np.ndarray, clips: Sequence[Sequence[int]]) -> EmbeddedClips:
        """Embed good rows, each by one clip of its cached frames, thinned to what the network was trained with."""
        places = np.asarray([thin(clip, self.run.frames) for clip in clips])
        ones, recorded = np.ones(len(rows), dtype=np.int64), [[list(clip)] for clip in clips]
        centres = self._centre_views[rows]
        data = LabelledRows(rows, rows, places.max(axis=1) + 1, ones, recorded, centre_views=centres)
        frames = embed_clips(self.scorer, data)
        return EmbeddedClips(frames, places)

    @torch.inference_mode()
    def compare_words(self, tokens: np.ndarray, mask: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """A text (M, E), (M,) with videos (n, T, E), not normalised: similarities (n,)."""
        words, is_word, videos = (torch.from_numpy(x).to(self._device) for x in (tokens[None], mask[None], frames))
        interaction = self.network.interaction(TextBatch(words.float(), is_word, None), videos)
        return interaction.similarities[0].cpu().numpy()
