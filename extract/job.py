"""What all parts of an extraction share: its rows, the backbone, the store's sizes, decoders and clock."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Generic, TypeVar

from ..backbone.vision_tower import Backbone, build_backbone, find_peak_flops
from ..device import find_device
from ..files import hash_text
from ..store.layout import StoreLayout
from ..store.manifest import ClassList
from ..store.offsets import DEFAULT_PIXEL_EDGE
from ..store.reader import StoreReader
from ..store.records import VideoRecord, count_augmented
from ..store.spec import StoreSpec
from .config import ALLOWED_LOSS_SHARE, ExtractConfig
from .datasets import PLAIN_RECIPE, Listing, find_reader, resolve_protocol
from .decode.pool import DecodedVideo, DecoderPool, decode_records
from .decode.views import count_views
from .meter import Meter, ReportProgress, StageClock
from .row_frames import count_frames
from .store_layout import plan_layout
from .target import Target

_log = logging.getLogger(__name__)

Row = TypeVar("Row")


class RowsAtHand(Sequence[Row], Generic[Row]):
    """What is known of a store's rows, by row number, where only some are known: those of a worker's shards."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._at_hand: dict[int, Row] = {}

    def hold(self, rows: Mapping[int, Row]) -> None:
        """Know these, and no longer the ones before."""
        self._at_hand = dict(rows)

    def __getitem__(self, row: Any) -> Any:
        return self._at_hand[row]

    def __len__(self) -> int:
        return self._num_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run over a store; `set_up_job` makes one, or `join_job`, its backbone without weights as yet."""

    config: ExtractConfig
    target: Target
    """What there was when the run began."""
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
    missing: frozenset[str] = frozenset()
    """Paths that were not there when the videos were listed."""

    @property
    def spec(self) -> StoreSpec:
        """What the store is made of; its codec and the tower's end come with the weights."""
        return StoreSpec(layout=self.layout, attributes=self.attributes, records=self.records)

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

        A file that was listed and is gone leaves its row pending, as whatever else the machine did not let happen.

        Raises:
            EnvironmentFailedError: If the folder of all videos is gone, or so many in a row are lost to the machine
                that it is not about them.
        """
        return decode_records(
            self.pool,
            records,
            self.config,
            image_size=self.layout.image_size,
            padding=self.backbone.info.mean_colour,
            num_frames=num_frames,
            missing=self.missing,
        )

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

    @property
    def part_bounds(self) -> tuple[int, int] | None:
        """First shard of this machine's part and the first after it; None where all shards are this machine's."""
        if self.config.part is None:
            return None
        own = self.config.find_part(self.layout.num_shards)
        return own.start, own.stop

    def limit_shards(self, shards: Sequence[int]) -> list[int]:
        """Those of this machine's part, of them the first that hold `limit` rows together, the last one whole."""
        shards = list(shards)
        if self.part_bounds is not None:
            first, stop = self.part_bounds
            shards = [shard for shard in shards if first <= shard < stop]
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
    target: Target,
    listing: Listing,
    pool: DecoderPool,
    clock: StageClock,
    report: ReportProgress = lambda *_: None,
    *,
    num_frames: Sequence[int] | None = None,
) -> Job:
    """Build the backbone, without its weights, and work out the store's sizes.

    Args:
        config: The extraction.
        target: What there is at its place: a store that is there keeps its number of rows in a shard.
        listing: The rows, and the paths that were not on the disk.
        pool: Decodes them.
        clock: Counts seconds by stage.
        report: Told about progress.
        num_frames: Of each row; None counts them.

    Raises:
        S4vError: If model, device, data set or options do not fit together.
    """
    records = listing.records
    if num_frames is None:
        num_frames = count_frames(config, records, target, pool, report)
    num_views = [count_views(config.views_of(record.split)) for record in records]
    lengths: Counter[int] = Counter()
    for frames, views in zip(num_frames, num_views, strict=True):
        lengths[frames] += views
    _warn_of_unused_splits(config, {record.split for record in records})
    with clock.stage("start"):
        backbone = _build_backbone(config)
        layout = plan_layout(
            config,
            backbone,
            len(records),
            _find_longest(config, num_frames, target),
            max(num_views),
            lengths=lengths,
            like=None if target.reader is None else target.reader.layout,
        )
        if target.reader is None:
            _tell_class_tokens(config, layout)
        recipe = config.recipe.name if target.reader is None else target.reader.facts.recipe
        attributes = _describe(config, backbone, ClassList.of(records).names, pool.library_versions(), recipe)
    return Job(
        config=config,
        target=target,
        records=records,
        num_frames=num_frames,
        num_views=num_views,
        backbone=backbone,
        layout=layout,
        attributes=attributes,
        pool=pool,
        clock=clock,
        report=report,
        missing=listing.missing,
    )


def _find_longest(config: ExtractConfig, num_frames: Sequence[int], target: Target) -> int:
    """F: the most frames of a row; where rows are as long as their videos, at least what the store has room for."""
    room = 1 if target.reader is None else target.reader.layout.num_frames
    return max(room, *num_frames) if config.is_open_ended else max(num_frames)


def join_job(config: ExtractConfig, store: StoreReader, pool: DecoderPool, clock: StageClock) -> Job:
    """A worker's part in a run over a store that another process holds. Its rows come later (`RowsAtHand.hold`).

    Layout and attributes are worked out anew, as this process has them, so that the store can be compared with them;
    what follows from all rows together (their number, most frames, classes) is the store's.

    Raises:
        S4vError: If model, device or options do not fit together.
    """
    sizes = store.layout
    with clock.stage("start"):
        backbone = _build_backbone(config)
        layout = plan_layout(config, backbone, sizes.num_rows, sizes.num_frames, sizes.num_views, like=sizes)
        versions = pool.library_versions()
        attributes = _describe(config, backbone, store.classes.names, versions, store.facts.recipe)
    return Job(
        config=config,
        target=Target(config.out, store),
        records=RowsAtHand(sizes.num_rows),
        num_frames=RowsAtHand(sizes.num_rows),
        num_views=RowsAtHand(sizes.num_rows),
        backbone=backbone,
        layout=layout,
        attributes=attributes,
        pool=pool,
        clock=clock,
        report=lambda *_: None,
    )


def _build_backbone(config: ExtractConfig) -> Backbone:
    backbone = build_backbone(
        config.model,
        weights=config.weights,
        device=find_device(config.device),
        precision=config.precision,
        seed=config.seed,
        image_size=config.input_size,
    )
    if config.with_compile:
        backbone.compile(config.batch_size)
    return backbone


def _tell_class_tokens(config: ExtractConfig, layout: StoreLayout) -> None:
    """Say before the work what a new store will lack."""
    if layout.class_tokens == "none":
        _log.warning(
            "%s has no class token: the store will have no `cls`, which most networks read. --cls mean keeps the mean "
            "of a layer's patch tokens in its place.",
            config.model,
        )


def _warn_of_unused_splits(config: ExtractConfig, splits: set[str]) -> None:
    """Tell of splits that options name and that no video is in; recipes may name them."""
    known = {"", *splits, *PLAIN_RECIPE.frames, *find_reader(config.dataset).recipe.frames}
    recipe = config.recipe
    if config.augmentation is not None and not any(map(count_augmented, recipe.views.values())):
        _log.warning("--augmentation has no effect without --views train=augment:N,centre")
    by_option = {
        "--frames": recipe.frames,
        "--clips": recipe.clips,
        "--validation-clip": recipe.validation_clip,
        "--views": recipe.views,
    }
    for option, named in by_option.items():
        if unused := sorted(set(named) - known):
            _log.warning("%s names %s: no video is in such a split", option, ", ".join(unused))


def _describe(
    config: ExtractConfig,
    backbone: Backbone,
    classes: Sequence[str],
    decoder_versions: dict[str, str],
    recipe_name: str | None,
) -> dict[str, Any]:
    """All that must agree for a resume."""
    recipe = config.recipe
    info = backbone.info.describe()
    libraries = {name: version(name) for name in ("numpy", "torch", *backbone.packages)}
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
        "frames": dict(sorted(recipe.frames.items())),
        **({} if config.segment_s is None else {"segment_s": config.segment_s}),
        **({} if config.allow_loss == ALLOWED_LOSS_SHARE else {"allow_loss": config.allow_loss}),
        **({} if set(recipe.clips.values()) == {1} else {"clips": dict(sorted(recipe.clips.items()))}),
        **({"validation_clip": sorted(recipe.validation_clip)} if recipe.validation_clip else {}),
        **({} if set(recipe.views.values()) == {"centre"} else {"views": dict(sorted(recipe.views.items()))}),
        **({"augmentation": list(recipe.augmentation)} if any(map(count_augmented, recipe.views.values())) else {}),
        **({} if recipe_name is None else {"recipe": recipe_name}),
        **({} if config.cached_edge == DEFAULT_PIXEL_EDGE else {"pixel_edge": config.cached_edge}),
        "sampling": recipe.sampling,
        "resize": recipe.resize,
        "decoder": config.decoder,
        "seed": config.seed,
        "calibration_videos": config.calibration_videos,
        "codec_from": None if config.codec_from is None else str(config.codec_from.resolve()),
        "libraries": dict(sorted({**libraries, **decoder_versions}.items())),
    }
