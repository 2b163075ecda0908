"""After the last shard: what the codec costs is measured, and captions become texts."""

from __future__ import annotations

import logging
from functools import partial

import pyarrow as pa

from ..backbone.text_tower import TextTower, load_text_tower
from ..errors import BackboneError, WeightsError
from ..store.fidelity import FIDELITY_NAME, write_fidelity
from ..store.reader import StoreReader, is_store, open_store
from ..store.texts import MAX_WORDS, has_current_texts, write_texts
from ..terminal import quote
from .codec_fit import frames_per_video, gather_sample, group_for_calibration, measure_codec
from .job import Job
from .opening import fits_codec

_MEASURED_VIDEOS = 16

_log = logging.getLogger(__name__)


def finish_store(job: Job, table: pa.Table) -> None:
    """Add what a store gets once its shards are there, as far as it is not there yet.

    Args:
        job: The extraction.
        table: The manifest as it is now.
    """
    if _wants_measuring(job, table):
        _measure_codec(job, table)
    _embed_captions(job)


def _wants_measuring(job: Job, table: pa.Table) -> bool:
    """Whether the store is complete, its codec loses anything, and no one has said how much."""
    statuses = set(table["status"].to_pylist())
    is_exact = job.layout.patch_dtype == "float32" and job.layout.channels == job.layout.width
    is_measured = (job.config.out / FIDELITY_NAME).exists()
    return not is_exact and "ok" in statuses and "pending" not in statuses and not is_measured


def _measure_codec(job: Job, table: pa.Table) -> None:
    """Code and decode videos that calibration did not see, and leave in the store what that cost."""
    config = job.config
    job.load_weights()
    job.report("decoding to measure the codec", 0, 0)
    with job.clock.stage("measuring"):
        good = set(table.filter(pa.compute.equal(table["status"], "ok"))["video_id"].to_pylist())
        seed, num_fitted = _fitted_on(job)
        ordered = [
            [record for record in group if record.video_id in good]
            for group in group_for_calibration(job.records, seed)
        ]
        first = next(group for group in ordered if group)
        unseen = [record for group in ordered for record in (group[num_fitted:] if group is first else group)]
        chosen = (unseen or first)[:_MEASURED_VIDEOS]
        num_frames = frames_per_video(len(chosen), job.layout)
        sample = gather_sample([zip(chosen, job.decode(chosen, num_frames), strict=True)], len(chosen))
        store = open_store(config.out)
        layers = measure_codec(
            store.codec,
            job.layout.keep_bits,
            sample,
            job.backbone,
            job.layout.layers,
            batch_size=config.batch_size,
            report=job.report,
        )
    write_fidelity(store.path, layers, videos=len(set(sample.video_ids)), is_held_out=bool(unseen))


def _fitted_on(job: Job) -> tuple[int, int]:
    """The seed of the order in which the codec's fit took videos, and how many; of another store's codec, that one's.

    A source that is gone by now is taken to have been fitted as this run would.
    """
    config = job.config
    if config.codec_from is not None and is_store(config.codec_from):
        source = open_store(config.codec_from).attributes
        return source["seed"], source["calibration_videos"]
    return config.seed, config.calibration_videos if config.codec_from is not None or fits_codec(job) else 0


def _embed_captions(job: Job) -> None:
    """Leave the texts of all captions in the store, where it has captions and does not hold them yet."""
    store = open_store(job.config.out)
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
