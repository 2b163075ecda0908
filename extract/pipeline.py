"""`s4v extract`: decode -> forward -> encode -> write, one shard of whole videos after another.

    decoder processes      pixels, a few videos ahead of the backbone
    backbone               tokens, in batches across the videos of a shard
    codec                  codes, on the backbone's device
    writer thread          one shard behind

What is batched together depends on row numbers alone: batches restart at each shard, have a fixed size, the last is
padded with zeros, and a video that failed leaves its slots zero. So a store does not depend on timing or on resumes.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..errors import NoGoodVideoError
from ..store._files import hash_text, write_json
from ..store.codec import Codec, check_finite
from ..store.layout import StoreLayout
from ..store.manifest import ClassList
from ..store.records import VideoRecord, VideoResult
from ..store.writer import RowTokens, StoreWriter, create_store, refuse_existing, resume_store
from .backbone import Backbone, build_backbone, parse_layers, resolve_device
from .calibration import FRAMES_PER_VIDEO, fit_codec, group_for_calibration
from .config import DEFAULT_FRAMES, ExtractConfig
from .datasets import read_dataset
from .decoding import DecodedVideo, DecodeRequest, DecoderPool

ReportProgress = Callable[[str, int, int], None]
"""Called with what is under way, how many videos are done, and how many there are."""

_NUM_VIEWS = 1

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

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of a block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


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
    records = read_dataset(
        config.dataset,
        config.root,
        annotations=config.annotations,
        columns=config.columns,
        splits=config.splits,
        seed=config.seed,
    )
    if not _is_store(config.out):
        refuse_existing(config.out, overwrite=config.overwrite)
    num_frames = [config.frames_of(record.split) for record in records]
    if unused := sorted(set(config.frames) - {""} - {record.split for record in records} - set(DEFAULT_FRAMES)):
        _log.warning("--frames names %s: no video is in such a split", ", ".join(unused))
    device = resolve_device(config.device)
    num_decoders = config.num_decoders or os.cpu_count() or 1
    with DecoderPool(num_decoders) as pool:
        report("building the backbone", 0, len(records))
        with clock.stage("start"):
            backbone = build_backbone(
                config.model, weights=config.weights, device=device, precision=config.precision, seed=config.seed
            )
            layout = _plan_layout(config, backbone, len(records), max(num_frames))
            attributes = _describe(config, backbone, records, pool.library_versions())
        job = _Extraction(config, records, num_frames, backbone, layout, pool, clock, report)
        with job.open_store(attributes) as writer:
            num_done = job.run(writer)
            table = writer.consolidate()
    summary = _summarise(config.out, table, time.perf_counter() - start)
    _write_stats(config.out, clock, num_done, summary.seconds)
    if summary.videos["ok"] == 0 and summary.videos["pending"] == 0:
        reasons = "; ".join(sorted({row["reason"] for row in summary.failed})[:3])
        raise NoGoodVideoError(f"not one of {len(records)} videos decodes. First reasons: {reasons}")
    return summary


def batch_slots(num_frames: Sequence[int], num_views: int, batch_size: int) -> list[list[tuple[int, int, int]]]:
    """Group the frames of a shard's rows into batches: a pure function of counts.

    Args:
        num_frames: Cached frames of each row of the shard.
        num_views: Views of each row.
        batch_size: Frames in one pass.

    Returns:
        Batches of (place of the row in the shard, view, place on the axis F), in order; the last may be short.
    """
    slots = [(row, view, f) for row, count in enumerate(num_frames) for view in range(num_views) for f in range(count)]
    return [slots[first : first + batch_size] for first in range(0, len(slots), batch_size)]


class _Extraction:
    """One run over the pending shards of a store."""

    def __init__(
        self,
        config: ExtractConfig,
        records: Sequence[VideoRecord],
        num_frames: Sequence[int],
        backbone: Backbone,
        layout: StoreLayout,
        pool: DecoderPool,
        clock: StageClock,
        report: ReportProgress,
    ) -> None:
        self._config = config
        self._records = records
        self._num_frames = num_frames
        self._backbone = backbone
        self._layout = layout
        self._pool = pool
        self._clock = clock
        self._report = report
        self._weights_loaded = False
        self._codec: Codec | None = None

    def open_store(self, attributes: dict[str, Any]) -> StoreWriter:
        """Go on with the store that is there, or calibrate and create one."""
        config = self._config
        if _is_store(config.out) and not config.overwrite:
            return resume_store(config.out, layout=self._layout, attributes=attributes, records=self._records)
        self._load_weights()
        self._report("calibrating the codec", 0, len(self._records))
        with self._clock.stage("calibration"):
            groups = group_for_calibration(self._records, config.seed)
            codec = fit_codec(
                config.dtype,
                (self._decode_ahead(self._request(r, FRAMES_PER_VIDEO) for r in group) for group in groups),
                self._backbone,
                self._layout.layers,
                num_videos=config.calibration_videos,
                batch_size=config.batch_size,
            )
        return create_store(
            config.out,
            layout=self._layout,
            attributes=attributes,
            records=self._records,
            codec=codec,
            head=self._backbone.read_head(),
            overwrite=config.overwrite,
        )

    def run(self, writer: StoreWriter) -> int:
        """Work through the pending shards; returns the number of videos done."""
        shards = self._limit(writer.pending_shards())
        rows = [row for shard in shards for row in self._layout.shard_rows(shard)]
        if not rows:
            return 0
        self._load_weights()
        device = self._backbone.device
        self._codec = writer.codec.map_parts(lambda array: torch.from_numpy(np.asarray(array)).to(device))
        requests = (self._request(self._records[row], self._num_frames[row]) for row in rows)
        videos = self._decode_ahead(requests)
        done = 0
        with ThreadPoolExecutor(1, thread_name_prefix="s4v-write") as thread:
            writing: Future[None] | None = None
            for shard in shards:
                tokens, results = self._process_shard(self._layout.shard_rows(shard), videos)
                with self._clock.stage("waiting for the writer"):
                    if writing is not None:
                        writing.result()
                writing = thread.submit(writer.write_shard, shard, tokens, results)
                done += len(results)
                self._report("extracting", done, len(rows))
            with self._clock.stage("waiting for the writer"):
                if writing is not None:
                    writing.result()
        return done

    def _process_shard(
        self, rows: range, videos: Iterator[DecodedVideo]
    ) -> tuple[dict[int, RowTokens], list[VideoResult]]:
        """Decode, forward and encode the rows of one shard."""
        decoded: list[DecodedVideo] = []
        tokens: dict[int, RowTokens] = {}
        batches = batch_slots([self._num_frames[row] for row in rows], _NUM_VIEWS, self._config.batch_size)
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
        height, width = self._layout.image_size
        shown = self._layout.pixel_offsets.index(0)
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
            output = self._backbone.encode_frames(torch.from_numpy(pixels), self._layout.layers)
        with self._clock.stage("encoding"):
            codes = self._encode(output.patches)
            cls = self._cast_class_tokens(output.cls)
            check_finite(output.embedding, output.embedding, self._backbone.info.depth - 1)
            embedding = output.embedding.cpu().numpy()
            for slot, row_tokens, view, frame in filled:
                row_tokens.patches[view, frame] = codes[slot]
                row_tokens.cls[view, frame] = cls[slot]
                row_tokens.embedding[view, frame] = embedding[slot]

    def _encode(self, patches: Sequence[torch.Tensor]) -> np.ndarray:
        """(B, L, N, K) codes from one (B, N, D) for each layer."""
        assert self._codec is not None
        coded = []
        for place, values in enumerate(patches):
            codes = self._codec.encode(values, place)
            check_finite(codes, values, self._layout.layers[place])
            coded.append(codes)
        return torch.stack(coded, dim=1).cpu().numpy()

    def _cast_class_tokens(self, tokens: torch.Tensor) -> np.ndarray:
        """(B, L, D) in the dtype that the store keeps class tokens in."""
        cast = tokens.to(getattr(torch, self._layout.cls_dtype))
        for place, block in enumerate(self._layout.layers):
            check_finite(cast[:, place], tokens[:, place], block)
        return cast.cpu().numpy()

    def _allocate(self, pixels: np.ndarray) -> RowTokens:
        layout = self._layout
        place = pixels.shape[:2]
        num_layers = len(layout.layers)
        return RowTokens(
            patches=np.empty((*place, num_layers, layout.num_patches, layout.channels), dtype=layout.patch_dtype),
            cls=np.empty((*place, num_layers, layout.width), dtype=layout.cls_dtype),
            embedding=np.empty((*place, layout.embed_dim), dtype=np.float32),
            pixels=pixels if layout.with_pixels else None,
        )

    def _decode_ahead(self, requests: Iterable[DecodeRequest]) -> Iterator[DecodedVideo]:
        """Decoded videos in the order of the requests, a bounded number of them ahead of the consumer."""
        ahead = 2 * (self._config.num_decoders or os.cpu_count() or 1) + 2
        futures: deque[Future[DecodedVideo]] = deque()
        for request in requests:
            futures.append(self._pool.submit(request))
            if len(futures) > ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()

    def _request(self, record: VideoRecord, num_frames: int) -> DecodeRequest:
        config = self._config
        return DecodeRequest(
            path=str(config.root.resolve() / record.path),
            num_frames=num_frames,
            sampling=config.sampling,
            resize=config.resize,
            crop_px=self._layout.image_size[0],
            start_s=record.start_s,
            end_s=record.end_s,
            decoder=config.decoder,
            timeout_s=config.decode_timeout_s,
        )

    def _limit(self, shards: list[int]) -> list[int]:
        """The first shards that hold `limit` rows together, the last one whole."""
        if self._config.limit is None:
            return shards
        taken, num_rows = [], 0
        for shard in shards:
            if num_rows >= self._config.limit:
                break
            taken.append(shard)
            num_rows += len(self._layout.shard_rows(shard))
        return taken

    def _load_weights(self) -> None:
        if not self._weights_loaded:
            self._report("loading the weights", 0, len(self._records))
            with self._clock.stage("start"):
                self._backbone.load_weights()
            self._weights_loaded = True


def _is_store(path: Path) -> bool:
    return (path / "zarr.json").is_file()


def _plan_layout(config: ExtractConfig, backbone: Backbone, num_rows: int, num_frames: int) -> StoreLayout:
    info = backbone.info
    return StoreLayout(
        num_rows=num_rows,
        num_views=_NUM_VIEWS,
        num_frames=num_frames,
        layers=parse_layers(config.layers, info.depth),
        num_patches=info.num_patches,
        width=info.width,
        channels=info.width,
        embed_dim=info.embed_dim,
        image_size=info.image_size,
        patch_dtype=config.dtype,
        with_pixels=config.with_pixels,
    )


def _describe(
    config: ExtractConfig, backbone: Backbone, records: Sequence[VideoRecord], decoder_versions: dict[str, str]
) -> dict[str, Any]:
    """The store's `s4v` attribute, beside what the store itself adds; all that must agree for a resume."""
    classes = ClassList.of(records).names
    info = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(backbone.info).items()}
    libraries = {name: version(name) for name in ("numpy", "open_clip_torch", "timm", "torch")}
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "dataset": {"name": config.dataset, "root": str(config.root.resolve())},
        "classes": {"names": list(classes), "sha256": hash_text("\n".join(classes))},
        "backbone": {**info, "batch_size": config.batch_size},
        "frames": dict(sorted(config.frames.items())),
        "sampling": config.sampling,
        "resize": config.resize,
        "decoder": config.decoder,
        "seed": config.seed,
        "calibration_videos": config.calibration_videos,
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
        eval_clips=[list(range(num_frames))],
        **video.facts,
    )


def _summarise(path: Path, table: pa.Table, seconds: float) -> ExtractSummary:
    counts = {row["values"]: row["counts"] for row in table["status"].value_counts().to_pylist()}
    failed = table.filter(pa.compute.equal(table["status"], "failed")).select(["video_id", "path", "reason"])
    videos = {status: counts.get(status, 0) for status in ("ok", "failed", "pending")}
    return ExtractSummary(path, videos, failed.to_pylist(), round(seconds, 3))


def _write_stats(path: Path, clock: StageClock, num_videos: int, seconds: float) -> None:
    """Seconds of this run by stage; a run that had nothing to do leaves the last one's figures."""
    if num_videos == 0:
        return
    stages = {name: round(value, 3) for name, value in clock.seconds.items()}
    size = shutil.disk_usage(path)
    write_json(
        path / "stats.json",
        {"videos": num_videos, "seconds": seconds, "seconds_by_stage": stages, "free_bytes": size.free},
    )
