"""Which classes a run is evaluated on: its own or, where it classifies by text, those of a store or of a file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import ConfigError
from ...store.class_texts import fill_template, read_class_texts
from ...store.reader import StoreReader
from ...vectors import normalise_rows
from ..clips import ClipPlan
from ..networks import find_network
from ..networks.contract import TextNetwork
from ..run_folder import Run
from .contract import EvaluationOptions, refuse

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClassChoice:
    """The classes of an evaluation."""

    source: str
    """`run`, `store`, or the file that names them."""
    names: tuple[str, ...]
    """In the order of scores."""
    embedding: np.ndarray | None = None
    """(classes, E) of their texts, not normalised; None are those of the run."""

    @property
    def file_end(self) -> str:
        """What names of files of the evaluation end with; nothing where classes are the run's own."""
        if self.source == "run":
            return ""
        return "_classes-of-store" if self.source == "store" else f"_classes-{Path(self.source).stem}"


def choose_classes(run: Run, store: StoreReader, options: EvaluationOptions) -> ClassChoice:
    """The run's classes, unless a file names others or the store has others.

    Args:
        run: Of recognition.
        store: What it is evaluated on.
        options: `of_texts` may name a file.

    Raises:
        ConfigError: If the run does not classify by text and is asked for what needs it, or the file names no classes.
        StoreMismatchError: If the store has other classes and no texts of them.
        WeightsError: If the text tower cannot be had.
    """
    kind = find_network(run.shape.name)
    if not kind.classifies_by_text:
        has_no_effect = f"has no effect on a run of --head {kind.name}, whose classes are weights: leave it out"
        refuse(options.of_texts.classes is not None, f"--classes {has_no_effect}")
        refuse(options.of_texts.with_zero_shot, f"--zero-shot-average {has_no_effect}")
        return ClassChoice("run", run.classes)
    template = getattr(run.shape, "class_template", "{}")
    if options.of_texts.classes is not None:
        from ...backbone.text_tower import encode_class_texts, load_store_text_tower  # and with it open_clip

        names = read_class_names(options.of_texts.classes)
        tower = load_store_text_tower(store, device=options.device)
        return ClassChoice(
            str(options.of_texts.classes), names, encode_class_texts(tower, fill_template(template, names))
        )
    if set(run.classes) == set(store.classes.names):
        return ClassChoice("run", run.classes)
    texts = read_class_texts(store)
    if texts.template != template:
        _log.warning(
            "texts of classes of %s are %r, those that %s was trained with %r: its scores are of other sentences",
            *(store.path, texts.template, run.path, template),
        )
    return ClassChoice("store", store.classes.names, texts.embedding)


def read_class_names(path: Path) -> tuple[str, ...]:
    """Names of classes, one a line; blank lines are none.

    Raises:
        ConfigError: If the file cannot be read, names fewer than two, or one twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--classes {path} cannot be read as text: {error}. Name a file with a class a line."
        ) from error
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) < 2:
        raise ConfigError(f"--classes {path} names {len(names)} classes: a classifier needs two or more, one a line")
    if twice := sorted(name for name in set(names) if names.count(name) > 1):
        raise ConfigError(f"--classes {path} names {', '.join(map(repr, twice[:3]))} more than once: once is enough")
    return names


def score_frozen(network: TextNetwork, store: StoreReader, plans: Sequence[ClipPlan]) -> np.ndarray:
    """What the frozen backbone alone says of planned clips: (clips, classes) logits, averaged over frames with tokens.

    Args:
        network: Whose texts, factor and choice of frames count.
        store: Where the frames' embeddings are.
        plans: Batches of clips, as they are read.
    """
    rows, views = (np.concatenate([getattr(plan, name) for plan in plans]) for name in ("rows", "views"))
    places = np.concatenate([plan.places[:, :: network.frames_per_token] for plan in plans])
    texts = normalise_rows(network.class_texts.float().cpu().numpy())
    scores = np.empty((len(rows), len(texts)), np.float32)
    for shard in range(store.layout.num_shards):  # all embeddings of K400 are 16 GB
        span = store.layout.shard_rows(shard)
        here = np.flatnonzero((rows >= span.start) & (rows < span.stop))
        if len(here):
            held = store.read_embeddings(span)  # (rows, A, F, E)
            frames = held[rows[here, None] - span.start, views[here, None], places[here]]
            scores[here] = (normalise_rows(frames) @ texts.T).mean(axis=1)
    return scores * float(network.logit_scale.exp())
