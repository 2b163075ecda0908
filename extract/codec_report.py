"""What a store's codecs cost: a sample of frames that they were not fitted on is coded, decoded and compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from ..store.codecs.affine import round_mantissas
from ..store.codecs.contract import Codec
from ..store.fidelity import FIDELITY_NAME, FidelityMeter, LayerFidelity, count_clipped, measure_pixels, write_fidelity
from ..store.reader import StoreReader, is_store, open_store
from ..store.records import name_views
from .class_tokens import ClassTokenRecorder, Tower
from .codec_fit import (
    FrameSample,
    SampleTokens,
    fits_codec,
    frames_per_video,
    gather_sample,
    group_for_calibration,
)
from .job import Job
from .meter import ReportProgress

_MEASURED_VIDEOS = 16


def write_codec_report(job: Job, store: StoreReader, table: pa.Table) -> None:
    """Leave in the store what its codecs and its pixel format cost, once it is complete, where they lose anything.

    Args:
        job: The extraction.
        store: What it made.
        table: The manifest as it is now.
    """
    if not _wants_measuring(job, table):
        return
    if not _are_tokens_exact(job):
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
        videos = (unseen or first)[:_MEASURED_VIDEOS]
        num_frames = frames_per_video(len(videos), job.layout)
        decoded = zip(videos, job.decode(videos, num_frames), strict=True)
        sample = gather_sample([decoded], len(videos), patch_size=job.backbone.info.patch_size)
        layers, cls_layers = ([], None) if _are_tokens_exact(job) else _measure(job, store, sample)
        is_rgb = job.layout.pixel_format == "rgb"
        pixels = None if is_rgb else measure_pixels(sample.pixels, job.layout.pixel_format)
        clipped = _measure_clipping(store, table) if job.layout.patch_dtype == "int8" else {}
    write_fidelity(
        store.path,
        layers,
        videos=len(set(sample.video_ids)),
        is_held_out=bool(unseen),
        clipped=clipped,
        cls_layers=cls_layers,
        pixels=pixels,
    )


def _measure(
    job: Job, store: StoreReader, sample: FrameSample
) -> tuple[list[LayerFidelity], list[LayerFidelity] | None]:
    """Of patches, and of class tokens; None where those are not coded."""
    layout, batch_size = job.layout, job.config.batch_size
    tower: Tower = job.backbone
    if store.cls_codec is not None:
        tower = ClassTokenRecorder(job.backbone, sample.pixels, layout.layers, layout.class_tokens, sample.padding)
    layers = measure_codec(
        store.codec, layout.keep_bits, sample, tower, layout.layers, batch_size=batch_size, report=job.report
    )
    if store.cls_codec is None:
        return layers, None
    assert isinstance(tower, ClassTokenRecorder)
    table = tower.finish(batch_size)
    own = FrameSample(table.frames, sample.video_ids)
    return layers, measure_codec(store.cls_codec, None, own, table, layout.layers, batch_size=len(table.frames))


def _measure_clipping(store: StoreReader, table: pa.Table) -> dict[str, float]:
    """The share of clipped codes of each view of some training rows; nothing where they have no views that are drawn.

    Views that were drawn look otherwise than what most codecs were fitted on, where they were taken over.
    """
    if not store.facts.is_augmented("train"):
        return {}
    is_good = pa.compute.and_(pa.compute.equal(table["status"], "ok"), pa.compute.equal(table["split"], "train"))
    rows = np.flatnonzero(is_good.to_numpy())
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), _MEASURED_VIDEOS), dtype=np.int64)] if len(rows) else rows
    middles = table["num_cached_frames"].take(rows).to_numpy() // 2
    return count_clipped(store, rows.tolist(), middles.tolist(), name_views(store.facts.views_of("train")))


def _wants_measuring(job: Job, table: pa.Table) -> bool:
    """Whether the store is complete, its codec or its pixel format loses anything, and no one has said how much."""
    statuses = set(table["status"].to_pylist())
    is_exact = _are_tokens_exact(job) and job.layout.pixel_format == "rgb"
    is_measured = (job.config.out / FIDELITY_NAME).exists()
    return not is_exact and "ok" in statuses and "pending" not in statuses and not is_measured


def _are_tokens_exact(job: Job) -> bool:
    """Whether coding loses nothing of patches and class tokens."""
    layouts = [job.layout, *([job.layout.of_cls()] if job.layout.is_cls_coded else [])]
    return all(one.patch_dtype == "float32" and one.channels == one.width for one in layouts)


def _fitted_on(job: Job) -> tuple[int, int]:
    """The seed of the order in which the codec's fit took videos, and how many; of another store's codec, that one's.

    A source that is gone by now is taken to have been fitted as this run would.
    """
    config = job.config
    if config.codec_from is not None and is_store(config.codec_from):
        source = open_store(config.codec_from).facts
        return source.seed, source.calibration_videos
    return config.seed, config.calibration_videos if config.codec_from is not None or fits_codec(job) else 0


def measure_codec(
    codec: Codec,
    keep_bits: int | None,
    sample: FrameSample,
    backbone: Tower,
    layers: Sequence[int],
    *,
    batch_size: int,
    report: ReportProgress = lambda *_: None,
) -> list[LayerFidelity]:
    """Code and decode a sample of frames, and compare them with the live tokens.

    Args:
        codec: Of the store, numpy arrays.
        keep_bits: Mantissa bits that the store keeps of float16 codes; None keeps all.
        sample: Frames that the codec was not fitted on, where there are any.
        backbone: With weights.
        layers: Blocks that are tapped.
        batch_size: The most frames in one pass.
        report: Told of frames that went through the backbone.

    Returns:
        One for each layer.
    """
    meters = [FidelityMeter(layer) for layer in layers]

    def count_mean(tokens: list[torch.Tensor]) -> None:
        for meter, values in zip(meters, tokens, strict=True):
            meter.count_mean(values.float().cpu().numpy())

    def compare(tokens: list[torch.Tensor]) -> None:
        for place, (meter, values) in enumerate(zip(meters, tokens, strict=True)):
            live = values.float().cpu().numpy()
            codes = round_mantissas(codec.encode(live, place), keep_bits)
            meter.compare(live, codec.decode(codes, place))

    tokens_of = SampleTokens("measuring the codec", sample, backbone, layers, batch_size, 2, report)
    tokens_of.hand_to(count_mean)
    tokens_of.hand_to(compare)
    return [meter.summarise() for meter in meters]
