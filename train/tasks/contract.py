"""What a training is about: whose clips, which loss, and the figure that the best epoch is chosen by."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from ...errors import StoreMismatchError
from ...store.reader import StoreReader
from ...store.texts import TextReader
from ..clips import (
    DEFAULT_CLIP_FRAMES,
    ClipBatch,
    LabelledRows,
    find_captioned_rows,
    find_labelled_rows,
    hand_over_texts,
)
from ..config import TrainConfig
from ..evaluate import ALONE, Team, accuracy_figures, evaluate_head
from ..networks.text_interaction import TextBatch, contrastive_loss
from ..recipe import classification_loss
from ..retrieval import evaluate_retrieval
from ..side_network import RetrievalSideNetwork

Gather = Callable[[torch.Tensor], torch.Tensor]
"""(B, ...) of this process to (B of all processes, ...), gradients included; of one process the same."""

_log = logging.getLogger(__name__)

# The reference's S, T and weight of the decorrelation loss.
_RETRIEVAL_FRAMES = 12
_DECORRELATION = 1e-3

_MOST_NAMED = 5


class Task(Protocol):
    """One kind of training, on one store."""

    figure: str
    """Of a validation: the higher, the better."""
    default_frames: int
    """T, where rows hold as many and nobody said otherwise."""
    training: LabelledRows
    validation: LabelledRows
    reads_first_clips: bool
    """Whether a validation looks at the first evaluation clip of a video alone."""

    def prepare_head(self, head: Any) -> tuple[str, ...]:
        """Give a fresh head what it takes from the store; returns which arrays of texts its loss reads."""

    def compute_loss(self, head: Any, output: torch.Tensor, batch: ClipBatch, gather: Gather) -> torch.Tensor:
        """The loss (), of what the head said of a batch."""

    def validate(
        self,
        head: torch.nn.Module,
        *,
        layers: tuple[int, ...],
        num_frames: int,
        device: torch.device,
        team: Team = ALONE,
    ) -> dict[str, float]:
        """Figures of the validation videos, `val_...`; every process of the team takes part, and gets all of them.

        Raises:
            EnvironmentFailedError: If a score is not finite.
        """


class Recognition:
    """Clips to class scores."""

    figure = "val_top1"
    default_frames = DEFAULT_CLIP_FRAMES
    reads_first_clips = False

    def __init__(self, config: TrainConfig, store: StoreReader) -> None:
        self._config = config
        self._store = store
        self.training = find_labelled_rows(store, config.train_split)
        self.validation = find_labelled_rows(store, config.val_split)
        _require_rows(store, self.training, config, "labelled")
        if len(set(self.training.labels.tolist())) < 2:
            raise StoreMismatchError(
                f"the good training videos of {store.path} are all of one class: a classifier needs two or more"
            )
        _warn_of_unseen_classes(store, self.training, self.validation)

    def prepare_head(self, head: Any) -> tuple[str, ...]:
        """Nothing: it learns all that it needs."""
        return ()

    def compute_loss(self, head: Any, output: torch.Tensor, batch: ClipBatch, gather: Gather) -> torch.Tensor:
        """Cross-entropy of logits (B, classes)."""
        return classification_loss(output, batch.labels, self._config)

    def validate(
        self,
        head: torch.nn.Module,
        *,
        layers: tuple[int, ...],
        num_frames: int,
        device: torch.device,
        team: Team = ALONE,
    ) -> dict[str, float]:
        """Loss and accuracy."""
        assert self._config.batch_size is not None
        result = evaluate_head(
            head,
            self._store,
            self.validation,
            layers=layers,
            num_frames=num_frames,
            batch_size=self._config.batch_size,
            device=device,
            team=team,
        )
        return {"val_loss": result.loss, **{f"val_{k}": v for k, v in accuracy_figures(result).items()}}


class Retrieval:
    """Frames to embeddings, near those of their captions and far from those of a step's other captions."""

    figure = "val_r1"
    default_frames = _RETRIEVAL_FRAMES
    reads_first_clips = True

    def __init__(self, config: TrainConfig, store: StoreReader) -> None:
        self._config = config
        self._store = store
        self.training = find_captioned_rows(store, config.train_split)
        self.validation = find_captioned_rows(store, config.val_split)
        _require_rows(store, self.training, config, "captioned")
        if len(set(self.training.rows.tolist())) < 2:
            raise StoreMismatchError(
                f"{store.path} has one good training video with captions: retrieval needs two or more"
            )
        self._texts = TextReader(store)  # told before a run's folder is made, where there are none
        captions = store.read_captions()
        # Which video a caption is of, and which captions say the same: such pairs are nobody's negatives.
        owner = np.full(len(captions), -1, dtype=np.int64)
        owner[self.training.labels] = self.training.rows
        texts = captions["text"].combine_chunks().dictionary_encode().indices.to_numpy()
        self._identities = torch.from_numpy(np.stack([owner, texts.astype(np.int64)], axis=1))
        self._logit_scale = torch.tensor(float(store.head["logit_scale"]))
        self._bank: TextBatch | None = None
        self._bank_identities = self._identities[self.training.labels]

    def prepare_head(self, head: RetrievalSideNetwork) -> tuple[str, ...]:
        """The backbone's final norm and projection."""
        head.end.load_arrays(self._store.head)
        if self._config.negatives == "all":
            texts = self._texts.read(self.training.labels, head.interaction.text_arrays)
            self._bank = hand_over_texts(texts, torch.device("cpu"))
        return head.interaction.text_arrays

    def compute_loss(
        self, head: RetrievalSideNetwork, output: torch.Tensor, batch: ClipBatch, gather: Gather
    ) -> torch.Tensor:
        """CLIP's loss of frames (B, T, E), and a thousandth of the decorrelation loss where there is one."""
        assert batch.texts is not None
        own = (batch.texts.tokens, batch.texts.mask, batch.texts.embedding)
        texts = TextBatch(*(None if values is None else gather(values) for values in own))
        self._identities = self._identities.to(batch.labels.device)
        identities = gather(self._identities[batch.labels])  # (A, 2)
        is_same = (identities[:, None] == identities[None]).any(dim=2)
        frames = gather(output.float())
        found = head.interaction(texts, frames)
        choices = None
        if self._config.negatives == "all":
            choices = self._compare_with_all(head, frames, found.similarities.diagonal(), identities)
        loss = contrastive_loss(found.similarities, self._logit_scale.to(output.device), is_same, choices)
        return loss + _DECORRELATION * found.decorrelation

    def _compare_with_all(
        self, head: RetrievalSideNetwork, frames: torch.Tensor, own: torch.Tensor, identities: torch.Tensor
    ) -> torch.Tensor:
        """Videos (A, T, E) with their own captions, whose similarities (A,) are there, then with all others."""
        assert self._bank is not None and self._bank.embedding is not None
        if self._bank.embedding.device != frames.device:
            self._bank = TextBatch(None, None, self._bank.embedding.to(frames.device))
            self._bank_identities = self._bank_identities.to(frames.device)
        others = head.interaction(self._bank, frames).similarities.T  # (A, C)
        fits = (identities[:, None] == self._bank_identities[None]).any(dim=2)
        return torch.cat([own[:, None], others.masked_fill(fits, -torch.inf)], dim=1)

    def validate(
        self,
        head: torch.nn.Module,
        *,
        layers: tuple[int, ...],
        num_frames: int,
        device: torch.device,
        team: Team = ALONE,
    ) -> dict[str, float]:
        """Recalls and ranks of captions that look for their videos."""
        assert isinstance(head, RetrievalSideNetwork) and self._config.batch_size is not None
        result = evaluate_retrieval(
            head,
            self._store,
            self.validation,
            layers=layers,
            num_frames=num_frames,
            batch_size=self._config.batch_size,
            device=device,
            team=team,
        )
        figures = result.describe()["text_to_video"]
        return {f"val_{name}": figures[name] for name in ("r1", "r5", "r10", "median_rank")}


TASKS: dict[str, Callable[[TrainConfig, StoreReader], Task]] = {"recognition": Recognition, "retrieval": Retrieval}


def _warn_of_unseen_classes(store: StoreReader, training: LabelledRows, validation: LabelledRows) -> None:
    """Classes are the store's: one whose training videos are missing or broken is never learnt, and still counted."""
    names = store.classes.names
    unseen = sorted(set(range(len(names))) - set(training.labels.tolist()))
    if not unseen:
        return
    told = ", ".join(repr(names[label]) for label in unseen[:_MOST_NAMED])
    _log.warning(
        "%d of %d classes have no good training video and cannot be learnt: %s%s. %d validation videos are of them.",
        len(unseen),
        len(names),
        told,
        ", ..." if len(unseen) > _MOST_NAMED else "",
        int(np.isin(validation.labels, unseen).sum()),
    )


def _require_rows(store: StoreReader, training: LabelledRows, config: TrainConfig, kind: str) -> None:
    """Refuse a store without training videos or without the validation split, and warn of an unfinished one."""
    table = store.read_manifest(["split", "status", "label"])
    counts = table.group_by(["split", "status"]).aggregate([("label", "count"), ("status", "count")]).to_pylist()
    by_label = kind == "labelled"
    found = ", ".join(
        f"{c['split']}: {c['label_count'] if by_label else c['status_count']} {'labelled ' * by_label}{c['status']}"
        for c in counts
    )
    splits = set(table["split"].to_pylist())
    if not len(training):
        wanted = "labels" if by_label else "captions"
        raise StoreMismatchError(
            f"{store.path} has no good, {kind} video in split {config.train_split!r}. It has {found}. "
            f"Name another --train-split, or extract a data set with {wanted}."
        )
    if config.val_split not in splits and config.val_split != TrainConfig.__dataclass_fields__["val_split"].default:
        raise StoreMismatchError(
            f"{store.path} has no split {config.val_split!r} (--val-split); it has {', '.join(sorted(splits))}"
        )
    if any(c["status"] == "pending" for c in counts):
        _log.warning("%s is not finished: %s. Training on what is there.", store.path, found)
