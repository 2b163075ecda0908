"""Classify videos without training: class names as texts, beside the frames' stored embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ...errors import ConfigError, StoreMismatchError
from ...store.class_texts import has_current_class_texts, read_class_texts
from ...store.needs import StoreNeeds, require_needs
from ...store.reader import StoreReader
from ...vectors import normalise_rows, pool_frames
from .contract import NetworkKind, NetworkShape, Outputs

if TYPE_CHECKING:
    from ...backbone.text_tower import TextTower


_NEEDS = StoreNeeds(arrays=("embedding",), text_tower=True)


@dataclass(frozen=True, slots=True)
class ZeroShot:
    """How well each text fits each video of a split."""

    rows: np.ndarray
    """(n,) rows of the store."""
    names: tuple[str, ...]
    """Of the classes that were asked for."""
    scores: np.ndarray
    """(n, classes) cosine of a video's embedding and a class's."""
    frame_scores: list[np.ndarray]
    """For each video (frames, classes): the same for each cached frame of its first view."""

    @property
    def answers(self) -> list[str]:
        """The likeliest class of each video; of equal ones the first."""
        return [self.names[place] for place in self.scores.argmax(axis=1)]


def classify_zero_shot(
    store: StoreReader,
    prompts: Mapping[str, Sequence[str]],
    *,
    split: str = "val",
    weights: str | None = None,
    device: torch.device | None = None,
) -> ZeroShot:
    """Score the good videos of a split against classes described in words.

    A class's embedding is the mean of its prompts' normalised embeddings, normalised again; a video's is that of its
    frames, as in `search_store`.

    Args:
        store: Of a backbone with a text tower; embeddings every store has.
        prompts: Texts of each class, one or more.
        split: Which videos.
        weights: Where the backbone's weights are now; None takes the texts of classes that the store holds, if they
            are these prompts, else the weights that it recorded.
        device: Where the text tower runs; None takes the CPU.

    Raises:
        ConfigError: If a class has no prompt.
        StoreMismatchError: If the split has no good video, or there is no text tower.
        WeightsError: If the weights cannot be had, or are not those that the store was made with.
    """
    require_needs(store, _NEEDS, "zero-shot")
    if not prompts or not all(prompts.values()):
        without = [name for name, texts in prompts.items() if not texts]
        raise ConfigError(f"every class needs a prompt; found none for {', '.join(without) or 'any'}")
    table = store.read_manifest(["split", "status"])
    is_of_split = [s == split and status == "ok" for s, status in zip(*table.to_pydict().values(), strict=True)]
    rows = np.flatnonzero(is_of_split)
    if not len(rows):
        splits = ", ".join(sorted(set(table["split"].to_pylist())))
        raise StoreMismatchError(f"{store.path} has no good video in split {split!r}; it has {splits}")
    stored = _find_stored_texts(store, prompts) if weights is None else None
    if stored is None:
        from ...backbone.text_tower import load_store_text_tower  # and with it open_clip

        classes = embed_classes(load_store_text_tower(store, weights=weights, device=device), prompts)
    else:
        classes = _average_prompts(stored, prompts)
    scores: list[np.ndarray] = []
    own: list[np.ndarray] = []
    for shard in range(store.layout.num_shards):  # all embeddings of K400 are 16 GB
        span = store.layout.shard_rows(shard)
        own_rows = rows[(rows >= span.start) & (rows < span.stop)]
        if len(own_rows):
            frames = normalise_rows(store.read_shown_embeddings(span)[own_rows - span.start])  # (rows, A, F, E)
            scores.append(pool_frames(frames) @ classes.T)
            own += [video[0][~np.isnan(video[0, :, 0])] @ classes.T for video in frames]
    return ZeroShot(rows, tuple(prompts), np.concatenate(scores), own)


def score_class_names(
    store: StoreReader, split: str, *, prompt: str = "a video of {}", weights: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Score the good, labelled videos of a split against the store's own class names.

    Args:
        store: With classes.
        split: Which videos.
        prompt: {} stands for a class's name.
        weights: As for `classify_zero_shot`.

    Returns:
        Scores (n, classes) and labels (n,).

    Raises:
        ConfigError: If the prompt has no place for a name, or the backbone's weights are random.
        WeightsError: As for `classify_zero_shot`.
    """
    if "{}" not in prompt:
        raise ConfigError(f"--prompt must hold {{}}, the place of a class's name; found {prompt!r}")
    if store.facts.backbone.has_random_weights:
        raise ConfigError("the backbone of this store has random weights")
    asked = classify_zero_shot(
        store, {name: [prompt.format(name)] for name in store.classes.names}, split=split, weights=weights
    )
    labels = store.read_manifest(["label"])["label"].take(asked.rows).to_numpy(zero_copy_only=False)
    is_labelled = ~np.isnan(labels.astype(float))
    return asked.scores[is_labelled], labels[is_labelled].astype(np.int64)


def embed_classes(tower: TextTower, prompts: Mapping[str, Sequence[str]]) -> np.ndarray:
    """The mean of each class's prompts' normalised embeddings, normalised again: (classes, E)."""
    from ...backbone.text_tower import encode_class_texts

    return _average_prompts(encode_class_texts(tower, _list_texts(prompts)), prompts)


def _list_texts(prompts: Mapping[str, Sequence[str]]) -> list[str]:
    return [text for one in prompts.values() for text in one]


def _find_stored_texts(store: StoreReader, prompts: Mapping[str, Sequence[str]]) -> np.ndarray | None:
    """What the store holds of exactly these texts, (n, E), as its own text tower made it; None where it does not."""
    if not has_current_class_texts(store):
        return None
    classes = read_class_texts(store)
    return classes.embedding if list(classes.texts) == _list_texts(prompts) else None


def _average_prompts(embeddings: np.ndarray, prompts: Mapping[str, Sequence[str]]) -> np.ndarray:
    texts = normalise_rows(embeddings)
    ends = np.cumsum([len(one) for one in prompts.values()])
    return normalise_rows(np.stack([one.mean(axis=0) for one in np.split(texts, ends[:-1])]))


class ZeroShotText(NetworkKind):
    """The frozen backbone, asked with the names of classes: see above."""

    name = "zero-shot"
    tasks = ("recognition",)
    extraction: ClassVar[Mapping[str, Any]] = {"with_pixels": False}
    reads = "the backbone's embeddings and class names; nothing trained"
    is_trained = False
    needs: ClassVar[Mapping[str, StoreNeeds]] = {"recognition": _NEEDS}

    def plan(self, store: StoreReader, outputs: Outputs, options: Any, layers: tuple[int, ...]) -> NetworkShape:
        """It has no sizes of its own."""
        return self.describe_shape(store, outputs, layers)

    def score(self, store: StoreReader, split: str, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """What `score_class_names` says, with its options."""
        return score_class_names(store, split, **options)
