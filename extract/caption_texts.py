"""The captions of a store as texts: what the text tower makes of each, for retrieval to be trained on."""

from __future__ import annotations

import logging
from functools import partial

from ..backbone.text_tower import TextTower, load_text_tower
from ..errors import BackboneError, WeightsError
from ..store.reader import StoreReader
from ..store.texts import MAX_WORDS, has_current_texts, write_texts
from ..terminal import quote
from .job import Job

_log = logging.getLogger(__name__)


def write_caption_texts(job: Job, store: StoreReader) -> None:
    """Leave the texts of all captions in the store, where it has captions and does not hold them yet.

    Args:
        job: The extraction.
        store: What it made.
    """
    if not len(store.read_captions()) or has_current_texts(store.path):
        return
    job.report("embedding captions", 0, len(store.read_captions()))
    info = job.backbone.info
    with job.clock.stage("captions"):
        try:
            tower = load_text_tower(
                info.name,
                weights=job.config.weights,
                device=job.backbone.device,
                seed=job.config.seed,
                expected_sha256=info.weights_sha256,
            )
            num_words = min(MAX_WORDS, tower.context_length)
            _warn_of_cut_captions(store, tower, num_words)
            encode = partial(tower.encode_words, num_words=num_words, is_cut_known=True)
            write_texts(store, encode, num_words=num_words, report=job.report)
        except (WeightsError, BackboneError) as error:
            _log.warning("%s: its captions cannot train retrieval, for lack of a text tower: %s", store.path, error)


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
