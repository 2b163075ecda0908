"""What all parts of an extraction share: its rows, the backbone, the store's sizes, decoders and clock."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from ..store._files import hash_text
from ..store.layout import StoreLayout
from ..store.manifest import ClassList
from ..store.reader import is_store, open_store
from ..store.records import VideoRecord
from .backbone import Backbone, build_backbone, find_peak_flops, resolve_device
from .config import DEFAULT_FRAMES, ExtractConfig
from .datasets import resolve_protocol
from .decoding import DecodedVideo, DecodeRequest, DecoderPool
from .planning import plan_layout
from .resizing import NUM_VIEWS
from .stats import Meter, ReportProgress, StageClock

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run over a store; `set_up_job` makes one, its backbone without weights as yet."""

    config: ExtractConfig
    records: Sequence[VideoRecord]
    num_frames: Sequence[int]
    """Cached frames of each row."""
    num_views: Sequence[int]
    """Views of each row."""
    backbone: Backbone
    layout: StoreLayout
    attributes: dict[str, Any]
    """The store's `s4v` attribute, beside what the store itself adds."""
    pool: DecoderPool
    clock: StageClock
    report: ReportProgress

    @property
    def goes_on(self) -> bool:
        """Whether there is a store to go on with."""
        return is_store(self.config.out) and not self.config.overwrite

    @property
    def passes(self) -> list[int]:
        """Frames of each row that go through the backbone."""
        return [frames * views for frames, views in zip(self.num_frames, self.num_views, strict=True)]

    def load_weights(self) -> None:
        """Give the backbone its weights, unless it has them."""
        if not self.backbone.has_weights:
            self.report(f"loading the weights: {self.backbone.info.weights}", 0, 0)
            with self.clock.stage("start"):
                self.backbone.load_weights()

    def decode(self, records: Iterable[VideoRecord], num_frames: int | None = None) -> Iterator[DecodedVideo]:
        """Videos to pixels, in order, a few ahead: what is cached of them, or so many frames.

        Raises:
            EnvironmentFailedError: If not a file is missing, but the folder of all of them.
        """
        side_px = self.layout.image_size[0]
        requests = (DecodeRequest.of(record, self.config, crop_px=side_px, num_frames=num_frames) for record in records)
        for video in self.pool.decode_ahead(requests):
            if video.pixels is None and video.facts["reason"].startswith("missing-file"):
                self.config.require_root()
            yield video

    def start_meter(self, shards: Sequence[int]) -> Meter:
        """Count the work on some shards from now on."""
        return Meter(
            layout=self.layout,
            passes=self.passes,
            total=sum(len(self.layout.shard_rows(shard)) for shard in shards),
            flops_per_frame=self.backbone.flops_per_frame,
            peak_flops=find_peak_flops(self.backbone.device, self.backbone.info.precision),
            clock=self.clock,
            report=self.report,
        )

    def limit_shards(self, shards: Sequence[int]) -> list[int]:
        """Those of this machine's part, of them the first that hold `limit` rows together, the last one whole."""
        shards = list(shards)
        if self.config.part is not None:
            part, num_parts = self.config.part
            bounds = [place * self.layout.num_shards // num_parts for place in (part - 1, part)]
            shards = [shard for shard in shards if bounds[0] <= shard < bounds[1]]
        if self.config.limit is None:
            return shards
        taken, num_rows = [], 0
        for shard in shards:
            if num_rows >= self.config.limit:
                break
            taken.append(shard)
            num_rows += len(self.layout.shard_rows(shard))
        return taken


def set_up_job(
    config: ExtractConfig,
    records: Sequence[VideoRecord],
    pool: DecoderPool,
    clock: StageClock,
    report: ReportProgress = lambda *_: None,
) -> Job:
    """Build the backbone, without its weights, and work out the store's sizes.

    Raises:
        S4vError: If model, device, data set or options do not fit together.
    """
    num_frames = [config.frames_of(record.split) for record in records]
    num_views = [NUM_VIEWS[config.views_of(record.split)] for record in records]
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
            backbone.compile(config.batch_size)
        layout = plan_layout(config, backbone, len(records), max(num_frames), max(num_views))
        if is_store(config.out) and not config.overwrite:
            layout = replace(layout, rows_per_shard=open_store(config.out).layout.rows_per_shard)
        attributes = _describe(config, backbone, records, pool.library_versions())
    return Job(
        config=config,
        records=records,
        num_frames=num_frames,
        num_views=num_views,
        backbone=backbone,
        layout=layout,
        attributes=attributes,
        pool=pool,
        clock=clock,
        report=report,
    )


def _describe(
    config: ExtractConfig, backbone: Backbone, records: Sequence[VideoRecord], decoder_versions: dict[str, str]
) -> dict[str, Any]:
    """All that must agree for a resume."""
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
