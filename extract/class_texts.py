"""The classes of a store as texts: what the text tower makes of their names."""

from __future__ import annotations

import logging
from functools import partial

from ..backbone.text_tower import encode_class_texts
from ..errors import BackboneError, WeightsError
from ..store.class_texts import has_current_class_texts, read_class_template, write_class_texts
from ..store.reader import StoreReader
from .caption_texts import load_job_text_tower
from .job import Job

_log = logging.getLogger(__name__)


def embed_classes(job: Job, store: StoreReader) -> None:
    """Leave the texts of classes in the store, where they were asked for and it does not hold them as they are wanted.

    Who asked for them once gets them anew when classes are added.

    Args:
        job: The extraction.
        store: What it made.

    Raises:
        WeightsError: If they were asked for now and the text tower's weights cannot be had.
        BackboneError: If they were asked for now and there is no text tower.
    """
    recorded = read_class_template(store.path)
    template = recorded if job.config.class_template is None else job.config.class_template
    if template is None or (template == recorded and has_current_class_texts(store)):
        return
    job.report("embedding class names", 0, 0)
    with job.clock.stage("captions"):
        try:
            encode = partial(encode_class_texts, load_job_text_tower(job))
        except (WeightsError, BackboneError) as error:
            if job.config.class_template is not None:
                raise
            _log.warning("%s: its classes have no texts, for lack of a text tower: %s", store.path, error)
            return
        write_class_texts(store, template, encode)
