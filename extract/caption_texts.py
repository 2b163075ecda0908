"""The captions of a store as texts: what the text tower makes of each, for retrieval and grounding to be trained on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..backbone.text_tower import TextTower, describe_text_tower, load_text_tower
from ..errors import BackboneError, ConfigError, WeightsError
from ..store.reader import StoreReader
from ..store.text_choice import TextChoice, read_text_choice
from ..store.texts import MAX_WORDS, Texts, has_current_texts, remove_unfinished_texts, write_texts
from ..terminal import quote
from .config import ExtractConfig
from .job import Job

_log = logging.getLogger(__name__)


def choose_texts(config: ExtractConfig, root: Path | None) -> TextChoice:
    """What is kept of captions: as asked for, else as the store that is there records it.

    A store that keeps more blocks than are asked for keeps them: a network reads the last ones.

    Args:
        config: The extraction.
        root: The store; None where there is none to go on with.

    Raises:
        ConfigError: If more blocks are asked for than the text tower has.
        BackboneError: If it has none that s4v can read.
    """
    recorded = TextChoice() if root is None else read_text_choice(root)
    layers, width = recorded.layers, recorded.width
    asked = config.num_text_layers or 0
    if asked > len(layers):
        tower = describe_text_tower(config.model)
        if asked > tower.depth:
            raise ConfigError(
                f"--text-layers {config.text_layers}: the text tower of {config.model} has {tower.depth} blocks"
            )
        layers, width = tuple(range(tower.depth - asked, tower.depth)), tower.width
    num_words = recorded.num_words if config.text_words is None else config.text_words
    return TextChoice(layers=layers, width=width, num_words=num_words)


def write_caption_texts(job: Job, store: StoreReader, amend: Callable[[list[str], Texts], Texts] | None = None) -> None:
    """Leave the texts of all captions in the store, where it has captions and does not hold them as they are wanted.

    Args:
        job: The extraction.
        store: What it made.
        amend: Makes of some captions and their texts what is kept of them; None keeps them as they are.

    Raises:
        BackboneError: If texts were asked for that the text tower does not give.
        WeightsError: If texts were asked for and its weights cannot be had.
    """
    captions = store.read_captions()["text"].to_pylist()
    choice = choose_texts(job.config, store.path)
    if not captions or (has_current_texts(store.path) and read_text_choice(store.path) == choice):
        remove_unfinished_texts(store.path)
        return
    job.report("embedding captions", 0, len(captions))
    with job.clock.stage("captions"):
        try:
            tower = load_job_text_tower(job)
            num_words = min(choice.num_words or MAX_WORDS, tower.context_length)
            _warn_of_cut_captions(store, tower, num_words)
            if choice.num_words is not None:
                num_words = int(tower.count_words(captions, num_words).max())
            make = partial(tower.encode_words, num_words=num_words, is_cut_known=True, blocks=choice.layers)
            encode = make if amend is None else lambda texts: amend(texts, make(texts))
            write_texts(store, encode, num_words=num_words, choice=choice, report=job.report)
        except (WeightsError, BackboneError) as error:
            if (job.config.text_layers, job.config.text_words) != (None, None):
                raise
            _log.warning("%s: its captions cannot train retrieval, for lack of a text tower: %s", store.path, error)


def load_job_text_tower(job: Job) -> TextTower:
    """The text tower of an extraction's backbone, with the same weights.

    Raises:
        WeightsError: If they cannot be had, or do not hold it.
        BackboneError: If there is none, or its tokenizer cannot be had.
    """
    info = job.backbone.info
    return load_text_tower(
        info.name,
        weights=job.config.weights,
        device=job.backbone.device,
        seed=job.config.seed,
        expected_sha256=info.weights_sha256,
    )


def _warn_of_cut_captions(store: StoreReader, tower: TextTower, num_words: int) -> None:
    """Say how many captions are longer than what is kept of them; the first one as an example."""
    captions = store.read_captions()["text"].to_pylist()
    cut = tower.find_cut(captions, num_words)
    if not cut:
        return
    example, left_out = next(iter(cut.items()))
    _log.warning(
        "%s: %d of %d captions are longer than the %d words (and parts of words) that are read of one: of %s, %s is "
        "left out",
        *(store.path, sum(caption in cut for caption in captions), len(captions), num_words - 2),
        *(quote(example), quote(left_out)),
    )
