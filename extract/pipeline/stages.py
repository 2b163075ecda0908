"""Shards of whole videos through four stages, each of which runs while the next one is at work.

    decode     decoder processes: the frames of the rows that are done, resized and cropped; others are kept
      |          2n + 2 videos ahead of n decoders (decode/pool.py)
    forward    the backbone, on batches across the videos of a shard
      |          one batch at a time
    encode     codes by the store's codec, on the same device; then put where they belong in the shard
      |          beside a GPU one more batch is under way there meanwhile, with its copies (batch_buffers.py)
      |          one finished shard
    write      a thread: the shard of every array, then its done-marker

Each stage is a generator that pulls from the one before it. What is batched together depends on row numbers alone:
batches restart at each shard, share its frames evenly, and a video that failed leaves its slots zero (batching.py), as
a row that is kept does. So a store does not depend on timing or on resumes.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ...backbone.vision_tower import FrameTokens
from ...errors import StoreDamagedError
from ...store.padding import find_padding
from ...store.pixel_formats import encode_pixels
from ...store.records import WHOLE, Status, VideoRecord, VideoResult
from ...store.writer import RowTokens, StoreWriter
from ..batching import Slot, batch_slots
from ..decode.pool import DecodedVideo
from ..job import Job
from ..kept_rows import KeptRows, ShardPlan
from .batch_buffers import BatchBuffers
from .batch_encoder import BatchCoder

_log = logging.getLogger(__name__)


def batches_ahead(device: torch.device) -> int:
    """Batches that are under way on a device beside the one whose results are waited for.

    A CPU works while we wait for it: a second batch would be in memory for nothing.
    """
    return 1 if device.type == "cuda" else 0


_KEPT = DecodedVideo(None, {})
"""In the place of a video whose row is kept: nothing of it goes through the backbone."""


@dataclass(slots=True)
class _Shard:
    """A shard in the making."""

    number: int
    rows: range
    plan: ShardPlan
    videos: list[DecodedVideo] = field(default_factory=list)
    """Of its first rows, as far as they are decoded."""
    tokens: dict[int, RowTokens] = field(default_factory=dict)
    """By row number, as far as they are encoded."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """What goes through the backbone at once."""

    shard: _Shard
    slots: list[Slot]
    is_last: bool
    """Of its shard."""
    buffers: BatchBuffers
    """Free until the batch is placed."""

    @property
    def is_empty(self) -> bool:
        """Whether all its videos failed: nothing goes through the backbone."""
        return all(self.find_pixels(slot) is None for slot in self.slots)

    def find_pixels(self, slot: Slot) -> np.ndarray | None:
        """(O, H, W, 3) of one frame; None where its video failed, or has fewer frames than were counted on."""
        row, view, frame = slot
        pixels = self.shard.videos[row].pixels
        return None if pixels is None or frame >= pixels.shape[1] else pixels[view, frame]


class Pipeline:
    """Does shards of an open store, with a backbone that has its weights.

    Args:
        job: The run.
        writer: Of the store.
        kept_rows: What the store holds of shards that are done anew; None looks it up where it is needed.
    """

    def __init__(self, job: Job, writer: StoreWriter, kept_rows: KeptRows | None = None) -> None:
        device = job.backbone.device
        self._job = job
        self._layout = job.layout
        self._writer = writer
        self._coder = BatchCoder(job.backbone, writer.codec, job.layout, writer.cls_codec)
        self._kept_rows = kept_rows or KeptRows(writer.store, job.config, job.records)
        self._num_ahead = batches_ahead(device)
        buffers = [
            BatchBuffers(device, job.config.batch_size, job.layout.image_size) for _ in range(self._num_ahead + 1)
        ]
        self._buffers = itertools.cycle(buffers)

    def run(self, shards: Sequence[int], count: Callable[[int, Collection[int]], None] = lambda *_: None) -> None:
        """Do some shards, in this order.

        Args:
            shards: Which.
            count: Told of each that is done or about to be written, and of its rows that were kept.

        Raises:
            EnvironmentFailedError: If the machine fails; shards that are marked done stay so.
        """
        for shard, kept in self.write(self.encode(self.forward(self.decode(shards)))):
            count(shard, kept)

    def decode(self, shards: Sequence[int]) -> Iterator[_Batch]:
        """The batches of some shards, each as soon as its videos are decoded."""
        job = self._job
        plans: dict[int, ShardPlan] = {}  # of shards whose videos are asked for ahead

        def plan(number: int) -> ShardPlan:
            if number not in plans:
                plans[number] = self._kept_rows.plan(number)
            return plans[number]

        rows = (row for shard in shards for row in self._layout.shard_rows(shard) if row not in plan(shard).kept)
        videos = job.decode(job.records[row] for row in rows)
        for number in shards:
            shard = _Shard(number, self._layout.shard_rows(number), plan(number))
            frames, views = ([counts[row] for row in shard.rows] for counts in (job.num_frames, job.num_views))
            batches = batch_slots(frames, views, job.config.batch_size) or [[]]
            for slots in batches:
                is_last = slots is batches[-1]
                needed = len(shard.rows) if is_last else slots[-1][0] + 1
                while len(shard.videos) < needed:
                    row = shard.rows[len(shard.videos)]
                    with job.clock.stage("waiting for decoders"):
                        is_kept = row in shard.plan.kept
                        shard.videos.append(_KEPT if is_kept else _check_length(next(videos), job.num_frames[row]))
                yield _Batch(shard, slots, is_last=is_last, buffers=next(self._buffers))
            del plans[number]

    def forward(self, batches: Iterable[_Batch]) -> Iterator[tuple[_Batch, FrameTokens | None]]:
        """Batches with their tokens; None where not one frame is there."""
        for batch in batches:
            # In one expression: a name for the tokens would keep them in memory beside the next batch's.
            yield batch, None if batch.is_empty else self._run_backbone(batch)

    def encode(self, batches: Iterable[tuple[_Batch, FrameTokens | None]]) -> Iterator[_Shard]:
        """Shards whose codes, class tokens and embeddings are all where they belong."""
        under_way: deque[_Batch] = deque()
        for batch, tokens in batches:
            if tokens is not None:
                with self._job.clock.stage("encoding"):
                    batch.buffers.download(self._coder.code(tokens, self._find_pictures(batch)))
            del tokens
            under_way.append(batch)
            if len(under_way) > self._num_ahead:
                yield from self._place_results(under_way.popleft())
        for batch in under_way:
            yield from self._place_results(batch)

    def write(self, shards: Iterable[_Shard]) -> Iterator[tuple[int, Collection[int]]]:
        """Hand shards to a thread that writes them, one while the next is in the making; yields what was kept."""
        with ThreadPoolExecutor(1, thread_name_prefix="s4v-write") as thread:
            writing: Future[None] | None = None
            for shard in shards:
                with self._job.clock.stage("waiting for the writer"):
                    if writing is not None:
                        writing.result()
                writing = thread.submit(self._write_shard, shard)
                yield shard.number, shard.plan.kept
                del shard
            with self._job.clock.stage("waiting for the writer"):
                if writing is not None:
                    writing.result()

    def _write_shard(self, shard: _Shard) -> None:
        """Put what was done beside what is kept, and write it; where nothing comes of it, the shard stays as it is."""
        results, replaced = [], set()
        try:
            for row, video in zip(shard.rows, shard.videos, strict=True):
                result, is_kept = shard.plan.kept.get(row), True
                if result is None:
                    made = _as_result(self._job.records[row], video)
                    result, is_kept = shard.plan.settle(row, made, may_change=self._job.config.redo_changed)
                    if result is not made:
                        shard.tokens.pop(row, None)
                        _log.warning("%s stays as it was: %s", made.video_id, made.reason or result.reason)
                if result.status == "ok" and is_kept:
                    shard.tokens[row] = self._kept_rows.read(row, result)
                elif row in shard.plan.before and shard.plan.before[row].status == "ok":
                    replaced.add(row)
                if result.status == "ok" and not is_kept:
                    shard.tokens[row] = self._add_pixels(shard.tokens[row], video)
                results.append(result)
        except StoreDamagedError as error:
            _log.warning("shard %d of %s stays as it was: %s", shard.number, self._writer.path, error)
            self._writer.touch_marker(shard.number)
            return
        self._writer.write_shard(shard.number, shard.tokens, results, replaced=replaced)

    def _run_backbone(self, batch: _Batch) -> FrameTokens:
        """One pass; on a GPU it is only begun."""
        shown = self._layout.seen_offset
        with self._job.clock.stage("backbone"):
            pixels = batch.buffers.pixels
            for place, slot in enumerate(batch.slots):
                frame = batch.find_pixels(slot)
                pixels[place] = 0 if frame is None else frame[shown]
            return self._job.backbone.encode_frames(batch.buffers.upload(len(batch.slots)), self._layout.layers)

    def _find_pictures(self, batch: _Batch) -> torch.Tensor | None:
        """(B, N) bool, which patches show something of their picture, where means are taken of patches."""
        if self._layout.class_tokens != "mean" or self._job.config.recipe.resize != WHOLE:
            return None
        masks = np.ones((len(batch.slots), self._layout.num_patches), dtype=bool)
        patch_size = self._job.backbone.info.patch_size
        for mask, (row, view, _) in zip(masks, batch.slots, strict=True):
            video = batch.shard.videos[row]
            if video.pixels is not None:
                mask[:] = ~find_padding(video.facts["views"][view], patch_size)
        return torch.from_numpy(masks).to(self._job.backbone.device)

    def _place_results(self, batch: _Batch) -> Iterator[_Shard]:
        """Wait for a batch's results and put them where they belong; yields the shard that is complete with it."""
        if not batch.is_empty:
            with self._job.clock.stage("backbone"):
                results = batch.buffers.read()
            with self._job.clock.stage("encoding"):
                if not self._coder.finish(results):
                    ids = [self._job.records[batch.shard.rows[row]].video_id for row, _, _ in batch.slots]
                    self._coder.raise_for(batch.buffers.upload(len(batch.slots)), ids)
                self._place_rows(batch, results)
        if batch.is_last:
            yield batch.shard

    def _place_rows(self, batch: _Batch, results: Mapping[str, np.ndarray]) -> None:
        shard = batch.shard
        for place, (row, view, frame) in enumerate(batch.slots):
            pixels, number = shard.videos[row].pixels, shard.rows[row]
            if pixels is None or batch.find_pixels((row, view, frame)) is None:
                continue
            if number not in shard.tokens:
                shard.tokens[number] = self._allocate(pixels)
            for name in ("patches", "cls", "embedding"):
                if name in results:
                    getattr(shard.tokens[number], name)[view, frame] = results[name][place]

    def _allocate(self, pixels: np.ndarray) -> RowTokens:
        layout = self._layout
        place = pixels.shape[:2]
        num_layers = len(layout.layers)
        return RowTokens(
            patches=np.empty((*place, num_layers, layout.num_patches, layout.channels), dtype=layout.patch_dtype),
            cls=None
            if layout.class_tokens == "none"
            else np.empty((*place, num_layers, layout.cls_channels), dtype=layout.cls_dtype),
            embedding=np.empty((*place, layout.embed_dim), dtype=np.float32),
        )

    def _add_pixels(self, tokens: RowTokens, video: DecodedVideo) -> RowTokens:
        """With the frames as the store holds them, where it holds any."""
        layout = self._layout
        if not layout.with_pixels:
            return tokens
        assert video.pixels is not None
        return replace(tokens, **{layout.pixel_array: encode_pixels(video.pixels, layout.pixel_format)})


def _check_length(video: DecodedVideo, num_frames: int) -> DecodedVideo:
    """A video, unless it has more frames than it had when they were counted: then its row waits for the next run.

    Fewer are no surprise: some that are announced may not decode.
    """
    if video.pixels is None or video.pixels.shape[1] <= num_frames:
        return video
    why = f"source-changing: {num_frames} frames when they were counted, {video.pixels.shape[1]} now"
    return DecodedVideo(None, {"reason": why}, is_pending=True)


def _as_result(record: VideoRecord, video: DecodedVideo) -> VideoResult:
    if video.pixels is None:
        status: Status = "pending" if video.is_pending else "failed"
        return VideoResult(video_id=record.video_id, status=status, **video.facts)
    num_views, num_frames = video.pixels.shape[:2]
    return VideoResult(
        video_id=record.video_id,
        status="ok",
        num_cached_frames=num_frames,
        num_views=num_views,
        **video.facts,
    )
