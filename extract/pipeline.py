"""`s4v extract`: decode -> forward -> encode -> write, one shard of whole videos after another.

    decoder processes      pixels, a few videos ahead of the backbone
    backbone               tokens, in batches across the videos of a shard
    codec                  codes, on the backbone's device
    writer thread          one shard behind
    text tower             once over all captions, where there are any
    at the end             what the codec costs, measured on videos that it was not fitted on

What is batched together depends on row numbers alone: batches restart at each shard, have a fixed size, the last is
padded with zeros, and a video that failed leaves its slots zero. So a store does not depend on timing or on resumes.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..errors import BackboneError, DataNotFoundError, NoGoodVideoError, StoreDamagedError, WeightsError
from ..store._files import hash_text, write_json
from ..store.appending import append_rows
from ..store.codec import Codec, check_finite, round_mantissas
from ..store.fidelity import FIDELITY_NAME, write_fidelity
from ..store.layout import STATS_NAME, StoreLayout
from ..store.manifest import ClassList
from ..store.reader import StoreReader, is_store, open_store
from ..store.records import VideoRecord, VideoResult
from ..store.texts import MAX_WORDS, has_current_texts, write_texts
from ..store.verify import verify_store
from ..store.writer import RowTokens, StoreWriter, create_store, refuse_existing, repair_store, resume_store
from .backbone import Backbone, build_backbone, find_peak_flops, resolve_device
from .calibration import (
    fit_codec,
    frames_per_video,
    gather_sample,
    group_for_calibration,
    measure_codec,
)
from .cluster import run_on_workers
from .config import DEFAULT_FRAMES, ExtractConfig
from .datasets import resolve_protocol
from .decoding import DecodedVideo, DecodeRequest, DecoderPool
from .planning import plan_layout, require_space
from .resizing import NUM_VIEWS
from .segments import list_rows
from .text_tower import load_text_tower

ReportProgress = Callable[..., None]
"""Called with what is under way, how many videos are done, how many there are and, where it is known, how fast."""

_MEASURED_VIDEOS = 16

_BOTTLENECKS = {
    "decoding": ("waiting for decoders",),
    "backbone": ("backbone", "encoding"),
    "writing": ("waiting for the writer",),
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExtractSummary:
    """What an extraction left behind."""

    store: Path
    videos: dict[str, int]
    """Rows by status: ok, failed, pending."""
    failed: list[dict[str, str]]
    """video_id, path and reason of every failed row."""
    seconds: float


@dataclass(slots=True)
class StageClock:
    """Seconds that the main thread spends on, or waits for, each stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def bottleneck(self) -> str | None:
        """What the main thread spent most of its time on, of what a longer run has more of."""
        shares = {name: sum(self.seconds.get(stage, 0.0) for stage in stages) for name, stages in _BOTTLENECKS.items()}
        return max(shares, key=lambda name: shares[name]) if any(shares.values()) else None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of a block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class _Meter:
    """Counts what gets done, from its making on."""

    def __init__(
        self,
        layout: StoreLayout,
        passes: Sequence[int],
        shards: Sequence[int],
        clock: StageClock,
        report: ReportProgress,
    ) -> None:
        self._layout = layout
        self._passes = passes
        self._total = sum(len(layout.shard_rows(shard)) for shard in shards)
        self._clock = clock
        self._report = report
        self._start = time.perf_counter()
        self.rows = 0
        self.frames = 0
        self.seconds = 0.0

    def count(self, shard: int) -> None:
        """One more shard is done."""
        rows = self._layout.shard_rows(shard)
        self.rows += len(rows)
        self.frames += sum(self._passes[row] for row in rows)
        self.seconds = time.perf_counter() - self._start
        rate = f"{self.frames_per_second:.1f} frames/s, held up by {self._clock.bottleneck}"
        self._report("extracting", self.rows, self._total, rate)

    @property
    def frames_per_second(self) -> float:
        return self.frames / self.seconds if self.seconds else 0.0


def extract_dataset(config: ExtractConfig, report: ReportProgress = lambda *_: None) -> ExtractSummary:
    """Run the backbone once over a data set's videos and write the store.

    The same call on an unfinished store goes on with it; on a finished one it changes nothing.

    Args:
        config: What to extract, and how.
        report: Told about progress.

    Returns:
        Counts and failures of the whole store, earlier runs included.

    Raises:
        S4vError: One of `s4v.errors`, before anything is written unless the machine itself fails.
    """
    start = time.perf_counter()
    clock = StageClock()
    if not is_store(config.out):
        refuse_existing(config.out, overwrite=config.overwrite)
    with DecoderPool(config.num_decoders) as pool:
        records = list_rows(config, pool, report)
        report("building the backbone", 0, len(records))
        job, attributes = _set_up(config, records, pool, clock, report)
        with job.open_store(attributes) as writer:
            shards = [] if config.prepare else job.undone_shards(writer)
            is_alone = config.num_workers is None and config.scheduler is None
            meter = job.run(writer, shards) if is_alone else job.run_on_workers(shards)
            table = writer.consolidate()
        if job.wants_measuring(table):
            job.measure(table)
        job.embed_captions()
    summary = _summarise(config.out, table, time.perf_counter() - start)
    if meter.rows:  # a run that had nothing to do leaves the last one's figures
        _write_stats(config.out, clock, meter, job.describe_work(meter) if is_alone else {}, summary.seconds)
    if summary.videos["ok"] == 0 and summary.videos["pending"] == 0:
        reasons = "; ".join(sorted({row["reason"] for row in summary.failed})[:3])
        raise NoGoodVideoError(f"not one of {len(records)} videos decodes. First reasons: {reasons}")
    return summary


def _set_up(
    config: ExtractConfig, records: Sequence[VideoRecord], pool: DecoderPool, clock: StageClock, report: ReportProgress
) -> tuple[_Extraction, dict[str, Any]]:
    """An extraction without its weights as yet, and what its store records of it."""
    num_frames = [config.frames_of(record.split) for record in records]
    splits = {"", *DEFAULT_FRAMES, *(record.split for record in records)}
    for option, by_split in (("--frames", config.frames), ("--clips", config.clips), ("--views", config.views)):
        if unused := sorted(set(by_split) - splits):
            _log.warning("%s names %s: no video is in such a split", option, ", ".join(unused))
    with clock.stage("start"):
        backbone = build_backbone(
            config.model,
            weights=config.weights,
            device=resolve_device(config.device),
            precision=config.precision,
            seed=config.seed,
        )
        if config.with_compile:
            backbone.compile()
        num_views = [NUM_VIEWS[config.views_of(record.split)] for record in records]
        layout = plan_layout(config, backbone, len(records), max(num_frames), max(num_views))
        if is_store(config.out) and not config.overwrite:
            layout = replace(layout, rows_per_shard=open_store(config.out).layout.rows_per_shard)
        attributes = _describe(config, backbone, records, pool.library_versions())
    return _Extraction(config, records, num_frames, num_views, backbone, layout, pool, clock, report), attributes


class WorkerJob:
    """An extraction in a worker of a cluster, one shard after another; a context manager."""

    def __init__(self, config: ExtractConfig) -> None:
        self._config = config
        self._open = ExitStack()

    def __enter__(self) -> WorkerJob:
        config = self._config
        pool = self._open.enter_context(DecoderPool(config.num_decoders))
        records = list_rows(config, pool)
        self._clock = StageClock()
        self._job, attributes = _set_up(config, records, pool, self._clock, lambda *_: None)
        writer = resume_store(
            config.out, layout=self._job.layout, attributes=attributes, records=records, is_worker=True
        )
        self._writer = self._open.enter_context(writer)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def process(self, shard: int) -> dict[str, float]:
        """Do one shard; seconds by stage."""
        self._job.run(self._writer, [shard])
        seconds = dict(self._clock.seconds)
        self._clock.seconds.clear()
        return seconds


def batch_slots(
    num_frames: Sequence[int], num_views: Sequence[int], batch_size: int
) -> list[list[tuple[int, int, int]]]:
    """Group the frames of a shard's rows into batches: a pure function of counts.

    Args:
        num_frames: Cached frames of each row of the shard.
        num_views: Views of each row.
        batch_size: Frames in one pass.

    Returns:
        Batches of (place of the row in the shard, view, place on the axis F), in order; the last may be short.
    """
    slots = [
        (row, view, frame)
        for row, (frames, views) in enumerate(zip(num_frames, num_views, strict=True))
        for view in range(views)
        for frame in range(frames)
    ]
    return [slots[first : first + batch_size] for first in range(0, len(slots), batch_size)]


class _Extraction:
    """One run over the pending shards of a store."""

    def __init__(
        self,
        config: ExtractConfig,
        records: Sequence[VideoRecord],
        num_frames: Sequence[int],
        num_views: Sequence[int],
        backbone: Backbone,
        layout: StoreLayout,
        pool: DecoderPool,
        clock: StageClock,
        report: ReportProgress,
    ) -> None:
        self._config = config
        self._records = records
        self._num_frames = num_frames
        self._num_views = num_views
        self._passes = [frames * views for frames, views in zip(num_frames, num_views, strict=True)]
        self._backbone = backbone
        self.layout = layout
        self._pool = pool
        self._clock = clock
        self._report = report
        self._weights_loaded = False
        self._codec: Codec | None = None

    def open_store(self, attributes: dict[str, Any]) -> StoreWriter:
        """Go on with the store that is there, or calibrate and create one."""
        config = self._config
        if is_store(config.out) and not config.overwrite:
            if config.repair:
                self._repair(attributes)
            store = open_store(config.out)
            if config.append and len(self._records) > store.layout.num_rows:
                self._require_appendable(store)
                append_rows(config.out, layout=self.layout, attributes=attributes, records=self._records)
            return resume_store(config.out, layout=self.layout, attributes=attributes, records=self._records)
        if not (config.overwrite or config.prepare):  # what is overwritten makes room first
            self._require_space(self._limit(list(range(self.layout.num_shards))))
        self._load_weights()
        self._report("calibrating the codec", 0, len(self._records))
        with self._clock.stage("calibration"):
            codec = self._make_codec()
        return create_store(
            config.out,
            layout=self.layout,
            attributes=attributes,
            records=self._records,
            codec=codec,
            head=self._backbone.read_head(),
            overwrite=config.overwrite,
        )

    def _require_appendable(self, store: StoreReader) -> None:
        """Refuse new rows that do not fit on the disk, and old ones of a last shard that cannot be done again."""
        first = store.layout.num_rows // store.layout.rows_per_shard
        self._require_space(self._limit(list(range(first, self.layout.num_shards))))
        begun = range(first * store.layout.rows_per_shard, store.layout.num_rows)
        statuses = store.read_manifest(["status"])["status"].slice(begun.start, len(begun)).to_pylist()
        gone = [
            self._records[row].path
            for row, status in zip(begun, statuses, strict=True)
            if status == "ok" and not (self._config.root / self._records[row].path).exists()
        ]
        if gone:
            raise DataNotFoundError(
                f"the last shard of {store.path} is not full: with new rows its {len(begun)} old ones are done again, "
                f"and {', '.join(gone[:3])} {'are' if len(gone) > 1 else 'is'} no longer below {self._config.root}. "
                "Nothing was changed: bring them back, or extract the new videos into a store of their own."
            )

    def _repair(self, attributes: dict[str, Any]) -> None:
        """Put back what is damaged of the whole store, and mark damaged shards undone."""
        store = open_store(self._config.out)
        damage = verify_store(store, self._report)
        if not damage:
            return
        self._load_weights()
        try:
            codec = store.codec
        except StoreDamagedError:
            with self._clock.stage("calibration"):
                codec = self._make_codec()
        repair_store(
            store.path,
            damage,
            layout=self.layout,
            attributes={**attributes, "created": store.attributes["created"]},
            records=self._records,
            codec=codec,
            head=self._backbone.read_head(),
        )
        shards = sorted({one.shard for one in damage if one.shard is not None})
        _log.warning("%s: %d damages; doing %d shards anew", store.path, len(damage), len(shards))

    def _make_codec(self) -> Codec:
        config, layout = self._config, self.layout
        if config.codec_from is not None:
            return open_store(config.codec_from).codec
        if not self._is_fitted_here:
            return Codec(dtype=config.dtype)
        groups = group_for_calibration(self._records, config.seed)
        num_frames = frames_per_video(len(groups[0]) or len(self._records))
        decoded = (self._decode_records(group, num_frames) for group in groups)
        return fit_codec(
            config.dtype,
            gather_sample(decoded, config.calibration_videos),
            self._backbone,
            layout.layers,
            channels=layout.channels,
            batch_size=config.batch_size,
        )

    def wants_measuring(self, table: pa.Table) -> bool:
        """Whether the store is complete, its codec loses anything, and no one has said how much."""
        statuses = set(table["status"].to_pylist())
        is_exact = self.layout.patch_dtype == "float32" and self.layout.channels == self.layout.width
        return not is_exact and "ok" in statuses and "pending" not in statuses and not self._fidelity_path.exists()

    def embed_captions(self) -> None:
        """Leave the texts of all captions in the store, where it has captions and does not hold them yet."""
        store = open_store(self._config.out)
        if not len(store.read_captions()) or has_current_texts(store.path):
            return
        self._report("embedding captions", 0, len(store.read_captions()))
        info = self._backbone.info
        with self._clock.stage("captions"):
            try:
                tower = load_text_tower(
                    info.name,
                    weights=self._config.weights,
                    device=self._backbone.device,
                    seed=self._config.seed,
                    expected_sha256=info.weights_sha256,
                )
                num_words = min(MAX_WORDS, tower.context_length)
                encode = partial(tower.encode_words, num_words=num_words)
                write_texts(store, encode, num_words=num_words, report=self._report)
            except (WeightsError, BackboneError) as error:
                _log.warning("%s: its captions cannot train retrieval, for lack of a text tower: %s", store.path, error)

    @property
    def _fidelity_path(self) -> Path:
        return self._config.out / FIDELITY_NAME

    def measure(self, table: pa.Table) -> None:
        """Code and decode videos that calibration did not see, and leave in the store what that cost."""
        self._load_weights()
        self._report("measuring the codec", 0, len(self._records))
        with self._clock.stage("measuring"):
            good = set(table.filter(pa.compute.equal(table["status"], "ok"))["video_id"].to_pylist())
            ordered = [
                [record for record in group if record.video_id in good]
                for group in group_for_calibration(self._records, self._config.seed)
            ]
            first = next(group for group in ordered if group)
            num_fitted = self._config.calibration_videos if self._is_fitted_here else 0
            unseen = [record for group in ordered for record in (group[num_fitted:] if group is first else group)]
            chosen = (unseen or first)[:_MEASURED_VIDEOS]
            num_frames = frames_per_video(len(chosen))
            sample = gather_sample([self._decode_records(chosen, num_frames)], len(chosen))
            store = open_store(self._config.out)
            layers = measure_codec(
                store.codec,
                self.layout.keep_bits,
                sample,
                self._backbone,
                self.layout.layers,
                batch_size=self._config.batch_size,
            )
        write_fidelity(store.path, layers, videos=len(set(sample.video_ids)), is_held_out=bool(unseen))

    @property
    def _is_fitted_here(self) -> bool:
        is_identity = self.layout.patch_dtype != "int8" and self.layout.channels == self.layout.width
        return self._config.codec_from is None and not is_identity

    def undone_shards(self, writer: StoreWriter) -> list[int]:
        """What this run has to do; there is room for it on the disk."""
        undone = {*writer.pending_shards(), *(writer.failed_shards() if self._config.retry_failed else ())}
        shards = self._limit(sorted(undone))
        self._require_space(shards)
        return shards

    def run_on_workers(self, shards: Sequence[int]) -> _Meter:
        """Have shards done by Dask's workers; the seconds of all of them are counted together."""
        meter = self._start_meter(shards)

        def count(shard: int, seconds: dict[str, float]) -> None:
            for name, value in seconds.items():
                self._clock.seconds[name] = self._clock.seconds.get(name, 0.0) + value
            meter.count(shard)

        if shards:
            run_on_workers(self._config, shards, count)
        return meter

    def _start_meter(self, shards: Sequence[int]) -> _Meter:
        return _Meter(self.layout, self._passes, shards, self._clock, self._report)

    def describe_work(self, meter: _Meter) -> dict[str, Any]:
        """The backbone's work, and how much of what the device could do that is: None where it is not known."""
        flops = self._backbone.flops_per_frame
        peak = find_peak_flops(self._backbone.device, self._backbone.info.precision)
        share = None if peak is None else meter.frames_per_second * flops / peak
        return {"flops_per_frame": flops, "flop_utilisation": share}

    def run(self, writer: StoreWriter, shards: Sequence[int]) -> _Meter:
        """Work through some shards."""
        rows = [row for shard in shards for row in self.layout.shard_rows(shard)]
        if rows:
            self._load_weights()
        meter = self._start_meter(shards)
        if not rows:
            return meter
        device = self._backbone.device
        self._codec = writer.codec.map_parts(lambda array: torch.from_numpy(np.asarray(array)).to(device))
        videos = self._decode(self._records[row] for row in rows)
        with ThreadPoolExecutor(1, thread_name_prefix="s4v-write") as thread:
            writing: Future[None] | None = None
            for shard in shards:
                tokens, results = self._process_shard(self.layout.shard_rows(shard), videos)
                with self._clock.stage("waiting for the writer"):
                    if writing is not None:
                        writing.result()
                writing = thread.submit(writer.write_shard, shard, tokens, results)
                meter.count(shard)
            with self._clock.stage("waiting for the writer"):
                if writing is not None:
                    writing.result()
        return meter

    def _process_shard(
        self, rows: range, videos: Iterator[DecodedVideo]
    ) -> tuple[dict[int, RowTokens], list[VideoResult]]:
        """Decode, forward and encode the rows of one shard."""
        decoded: list[DecodedVideo] = []
        tokens: dict[int, RowTokens] = {}
        num_frames, num_views = ([counts[row] for row in rows] for counts in (self._num_frames, self._num_views))
        batches = batch_slots(num_frames, num_views, self._config.batch_size)
        # A shard smaller than a batch is one batch of its own size.
        batch_size = min(self._config.batch_size, len(batches[0]))
        for batch in batches:
            while len(decoded) <= batch[-1][0]:
                with self._clock.stage("waiting for decoders"):
                    video = next(videos)
                if video.pixels is not None:
                    tokens[rows[len(decoded)]] = self._allocate(video.pixels)
                decoded.append(video)
            self._run_batch(batch, batch_size, rows, decoded, tokens)
        results = [_as_result(self._records[row], video) for row, video in zip(rows, decoded, strict=True)]
        return tokens, results

    def _run_batch(
        self,
        batch: Sequence[tuple[int, int, int]],
        batch_size: int,
        rows: range,
        decoded: Sequence[DecodedVideo],
        tokens: dict[int, RowTokens],
    ) -> None:
        """Forward one padded batch and put codes, class tokens and embeddings where they belong."""
        height, width = self.layout.image_size
        shown = self.layout.pixel_offsets.index(0)
        pixels = np.zeros((batch_size, height, width, 3), dtype=np.uint8)
        filled = []
        for slot, (place, view, frame) in enumerate(batch):
            video = decoded[place]
            if video.pixels is not None:
                pixels[slot] = video.pixels[view, frame, shown]
                filled.append((slot, tokens[rows[place]], view, frame))
        if not filled:
            return
        with self._clock.stage("backbone"):
            output = self._backbone.encode_frames(torch.from_numpy(pixels), self.layout.layers)
        with self._clock.stage("encoding"):
            ids = [self._records[rows[place]].video_id for place, _, _ in batch]
            codes = self._encode(output.patches, ids)
            cls = self._cast_class_tokens(output.cls, ids)
            check_finite(output.embedding, output.embedding, self._backbone.info.depth - 1, ids)
            embedding = output.embedding.cpu().numpy()
            for slot, row_tokens, view, frame in filled:
                row_tokens.patches[view, frame] = codes[slot]
                row_tokens.cls[view, frame] = cls[slot]
                row_tokens.embedding[view, frame] = embedding[slot]

    def _encode(self, patches: Sequence[torch.Tensor], video_ids: Sequence[str]) -> np.ndarray:
        """(B, L, N, K) codes from one (B, N, D) for each layer."""
        assert self._codec is not None
        coded = []
        for place, values in enumerate(patches):
            codes = self._codec.encode(values, place)
            check_finite(codes, values, self.layout.layers[place], video_ids)
            coded.append(codes)
        return round_mantissas(torch.stack(coded, dim=1).cpu().numpy(), self.layout.keep_bits)

    def _cast_class_tokens(self, tokens: torch.Tensor, video_ids: Sequence[str]) -> np.ndarray:
        """(B, L, D) in the dtype that the store keeps class tokens in."""
        cast = tokens.to(getattr(torch, self.layout.cls_dtype))
        for place, block in enumerate(self.layout.layers):
            check_finite(cast[:, place], tokens[:, place], block, video_ids)
        return cast.cpu().numpy()

    def _allocate(self, pixels: np.ndarray) -> RowTokens:
        layout = self.layout
        place = pixels.shape[:2]
        num_layers = len(layout.layers)
        return RowTokens(
            patches=np.empty((*place, num_layers, layout.num_patches, layout.channels), dtype=layout.patch_dtype),
            cls=np.empty((*place, num_layers, layout.width), dtype=layout.cls_dtype),
            embedding=np.empty((*place, layout.embed_dim), dtype=np.float32),
            pixels=pixels if layout.with_pixels else None,
        )

    def _decode_records(
        self, records: Sequence[VideoRecord], num_frames: int
    ) -> Iterator[tuple[VideoRecord, DecodedVideo]]:
        yield from zip(records, self._decode(records, num_frames), strict=True)

    def _decode(self, records: Iterable[VideoRecord], num_frames: int | None = None) -> Iterator[DecodedVideo]:
        """Videos to pixels, in order: what is cached of them, or so many frames."""
        side_px = self.layout.image_size[0]
        return self._pool.decode_ahead(
            DecodeRequest.of(record, self._config, crop_px=side_px, num_frames=num_frames) for record in records
        )

    def _require_space(self, shards: Sequence[int]) -> None:
        frames = sum(self._passes[row] for shard in shards for row in self.layout.shard_rows(shard))
        num_captions = 0 if has_current_texts(self._config.out) else sum(len(r.captions) for r in self._records)
        require_space(self.layout, frames, self._config.out, num_captions=num_captions)

    def _limit(self, shards: list[int]) -> list[int]:
        """Those of this machine's part, of them the first that hold `limit` rows together, the last one whole."""
        if self._config.part is not None:
            part, num_parts = self._config.part
            bounds = [place * self.layout.num_shards // num_parts for place in (part - 1, part)]
            shards = [shard for shard in shards if bounds[0] <= shard < bounds[1]]
        if self._config.limit is None:
            return shards
        taken, num_rows = [], 0
        for shard in shards:
            if num_rows >= self._config.limit:
                break
            taken.append(shard)
            num_rows += len(self.layout.shard_rows(shard))
        return taken

    def _load_weights(self) -> None:
        if not self._weights_loaded:
            self._report("loading the weights", 0, len(self._records))
            with self._clock.stage("start"):
                self._backbone.load_weights()
            self._weights_loaded = True


def _describe(
    config: ExtractConfig, backbone: Backbone, records: Sequence[VideoRecord], decoder_versions: dict[str, str]
) -> dict[str, Any]:
    """The store's `s4v` attribute, beside what the store itself adds; all that must agree for a resume."""
    classes = ClassList.of(records).names
    info = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(backbone.info).items()}
    libraries = {name: version(name) for name in ("numpy", "open_clip_torch", "timm", "torch")}
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "dataset": {
            "name": config.dataset,
            "protocol": resolve_protocol(config.dataset, config.protocol),
            "root": str(config.root.resolve()),
        },
        "classes": {"names": list(classes), "sha256": hash_text("\n".join(classes))},
        # Only where it is so: stores from before there was a choice do not say.
        "backbone": {**info, "batch_size": config.batch_size, **({"compiled": True} if config.with_compile else {})},
        "frames": dict(sorted(config.frames.items())),
        **({} if config.segment_s is None else {"segment_s": config.segment_s}),
        **({} if set(config.clips.values()) == {1} else {"clips": dict(sorted(config.clips.items()))}),
        **({} if set(config.views.values()) == {"centre"} else {"views": dict(sorted(config.views.items()))}),
        "sampling": config.sampling,
        "resize": config.resize,
        "decoder": config.decoder,
        "seed": config.seed,
        "calibration_videos": config.calibration_videos,
        "codec_from": None if config.codec_from is None else str(config.codec_from.resolve()),
        "libraries": dict(sorted({**libraries, **decoder_versions}.items())),
    }


def _as_result(record: VideoRecord, video: DecodedVideo) -> VideoResult:
    if video.pixels is None:
        return VideoResult(video_id=record.video_id, status="failed", reason=video.facts["reason"])
    num_views, num_frames = video.pixels.shape[:2]
    return VideoResult(
        video_id=record.video_id,
        status="ok",
        num_cached_frames=num_frames,
        num_views=num_views,
        **video.facts,
    )


def _summarise(path: Path, table: pa.Table, seconds: float) -> ExtractSummary:
    counts = {row["values"]: row["counts"] for row in table["status"].value_counts().to_pylist()}
    failed = table.filter(pa.compute.equal(table["status"], "failed")).select(["video_id", "path", "reason"])
    videos = {status: counts.get(status, 0) for status in ("ok", "failed", "pending")}
    return ExtractSummary(path, videos, failed.to_pylist(), round(seconds, 3))


def _write_stats(path: Path, clock: StageClock, meter: _Meter, work: dict[str, Any], seconds: float) -> None:
    """What this run did and how fast, seconds by stage of its main thread (of all workers together)."""
    stages = {name: round(value, 3) for name, value in clock.seconds.items()}
    write_json(
        path / STATS_NAME,
        {
            "videos": meter.rows,
            "frames": meter.frames,
            "frames_per_second": round(meter.frames_per_second, 3),
            "bottleneck": clock.bottleneck,
            **work,
            "seconds": seconds,
            "seconds_by_stage": stages,
            "free_bytes": shutil.disk_usage(path).free,
        },
    )
