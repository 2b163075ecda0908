"""Texts that an extraction was asked for: what they take, and whether it can have them, before anything is read."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..backbone.text_tower import count_text_words, describe_text_tower
from ..errors import ConfigError, StoreDamagedError
from ..store.class_texts import has_current_class_texts, read_class_template
from ..store.layout import StoreLayout
from ..store.records import VideoRecord
from ..store.text_choice import CLASSES_NAME, LAYERS_NAME, TEXT_NAME, TextChoice, read_text_choice
from ..store.texts import MAX_WORDS, count_layer_bytes, count_text_bytes, has_current_texts
from .caption_texts import choose_texts, load_job_text_tower
from .config import ExtractConfig
from .job import Job


def require_texts(job: Job) -> None:
    """Refuse options that ask for texts which this extraction cannot have.

    The text tower is loaded once to see: its lack would else be told when all videos are done.

    Raises:
        ConfigError: If no video has a caption, or a class; or the text tower has fewer blocks than are asked for.
        BackboneError: If there is no text tower, or none that s4v can read word by word.
        WeightsError: If its weights cannot be had.
    """
    config = job.config
    asks_words = (config.text_layers, config.text_words) != (None, None)
    refuse_texts_of_nothing(config, job.records, job.attributes["classes"]["names"])
    if not asks_words and config.class_template is None:
        return
    if asks_words:
        describe_text_tower(config.model)
    if not _has_all(job):
        load_job_text_tower(job)


def refuse_texts_of_nothing(config: ExtractConfig, records: Sequence[VideoRecord], class_names: Sequence[str]) -> None:
    """Refuse options that ask for texts of captions or classes that there are none of.

    Raises:
        ConfigError: All of them.
    """
    problems = []
    if config.class_template is not None and not class_names:
        problems.append(f"--class-template embeds class names, and no video of {config.dataset} has a class")
    options = {"--text-layers": config.text_layers, "--text-words": config.text_words}
    given = [option for option, value in options.items() if value is not None]
    if given and not any(record.captions for record in records):
        keeps = "keeps" if len(given) == 1 else "keep"
        problems.append(f"{' and '.join(given)} {keeps} words of captions, and no video of {config.dataset} has one")
    if problems:
        raise ConfigError(f"{'; '.join(problems)}. Leave it out, or name the columns that have them.")


def _has_all(job: Job) -> bool:
    store = job.target.reader
    if store is None:
        return False
    try:
        choice = choose_texts(job.config, store.path)
        has_words = has_current_texts(store.path) and read_text_choice(store.path) == choice
        template = read_class_template(store.path)
    except StoreDamagedError:  # about to be repaired
        return False
    is_wanted = job.config.class_template in (None, template)
    return has_words and is_wanted and (template is None or has_current_class_texts(store))


def count_missing_bytes(job: Job, *, replaces: bool) -> int:
    """What the texts take that are still to be written."""
    store = None if replaces else job.target.reader
    root = None if store is None else store.path
    try:
        choice = choose_texts(job.config, root)
        has_texts = root is not None and has_current_texts(root) and read_text_choice(root) == choice
    except StoreDamagedError:
        choice, has_texts = choose_texts(job.config, None), False
    captions = [] if has_texts else [text for record in job.records for text in record.captions]
    names = job.attributes["classes"]["names"] if job.config.class_template is not None else []
    return sum(count_bytes(job.config.model, job.layout, captions, choice, len(names)).values())


def count_bytes(
    model: str, layout: StoreLayout, captions: Sequence[str], choice: TextChoice, num_classes: int
) -> dict[str, int]:
    """What texts take, by array; the three that all captions have are `text`.

    Args:
        model: The backbone's name.
        layout: Of the store.
        captions: Of all videos.
        choice: What is kept of them.
        num_classes: Whose names are embedded; 0 where they are not.

    Raises:
        BackboneError: If words are to be counted and there is no tokenizer.
    """
    sizes, num_words = {}, MAX_WORDS
    if captions and choice != TextChoice():
        most = min(choice.num_words or MAX_WORDS, describe_text_tower(model).context_length)
        counts = count_text_words(model, captions, most)
        num_words = int(counts.max()) if choice.num_words is not None else MAX_WORDS
        sizes[f"{TEXT_NAME}/{LAYERS_NAME}"] = count_layer_bytes(int(counts.sum()), choice)
    if captions:
        sizes[TEXT_NAME] = count_text_bytes(len(captions), layout.embed_dim, num_words)
    sizes[f"{TEXT_NAME}/{CLASSES_NAME}"] = math.prod((num_classes, layout.embed_dim, 4))
    return {name: size for name, size in sorted(sizes.items()) if size}
