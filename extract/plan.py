"""`s4v plan`: what an extraction will take in bytes, hours and money, and whether the cache pays."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..backbone.vision_tower import Backbone, build_backbone
from ..device import find_device
from ..errors import ConfigError
from ..files import describe_bytes
from ..store.layout import PIXEL_ARRAYS, StoreLayout
from ..store.manifest import ClassList
from ..store.records import VideoRecord
from ..store.text_choice import TEXT_NAME
from .caption_texts import choose_texts
from .config import ExtractConfig
from .decode.pool import DecoderPool
from .decode.views import count_views
from .disk_space import free_bytes
from .recipe import settle_recipe
from .row_frames import count_frames
from .segments import list_rows
from .store_layout import plan_layout
from .target import Target
from .text_needs import count_bytes, refuse_texts_of_nothing

_READ_BYTES_PER_S = 500e6
"""What a cheap solid-state disk reads at random; the default where the user states none."""


_LARGE_ROW_BYTES = 2 * 10**9
"""From there on `plan` tells how large a row is: two of them are in memory at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitPlan:
    """What one split adds to an extraction."""

    videos: int
    frames_per_video: float
    """Cached, of one view; a mean where rows are as long as their videos."""
    views: int
    """Of each video."""
    share: float
    """Of all cached frames, and so of the bytes of all arrays."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """An extraction before it is paid for."""

    videos: int
    frames: int
    """Cached, of all videos and views."""
    splits: dict[str, SplitPlan]
    """By name: what each adds to that."""
    bytes_by_array: dict[str, int]
    bytes_per_row: int
    """Of a row that uses all views and frames: an extraction holds two at least, one written while the next is made."""
    image_size: tuple[int, int]
    """H, W of what the backbone sees."""
    num_patches: int
    """N."""
    free_bytes: int | None
    """Where the store would lie; None where that is not known."""
    frames_per_second: float | None
    """Of the backbone on one device; None where nobody said."""
    hours: float | None
    """On one device."""
    price: float | None
    read_seconds_per_epoch: float
    """Of one training epoch's clips from disk."""
    forward_seconds_per_epoch: float | None
    """Of the backbone, if it ran on the clips of every epoch instead."""
    break_even_epochs: float | None
    """Epochs after which the cache has cost less time than running the backbone in each of them; infinite where
    reading takes longer than running it. None where the backbone's rate is not known."""

    @property
    def total_bytes(self) -> int:
        """Of all arrays."""
        return sum(self.bytes_by_array.values())

    @property
    def bytes_per_frame(self) -> float:
        """Of all arrays of frames."""
        of_frames = (size for name, size in self.bytes_by_array.items() if name.partition("/")[0] != TEXT_NAME)
        return sum(of_frames) / max(1, self.frames)

    @property
    def fits(self) -> bool | None:
        """Whether the store fits on the disk; None where the free space is not known."""
        return None if self.free_bytes is None else self.total_bytes <= self.free_bytes


def plan_extraction(
    layout: StoreLayout,
    frames_by_split: Mapping[str, tuple[int, float]],
    *,
    views_by_split: Mapping[str, int] | None = None,
    text_bytes: Mapping[str, int] | None = None,
    clip_frames: int = 8,
    frames_per_second: float | None = None,
    price_per_hour: float | None = None,
    read_bytes_per_s: float = _READ_BYTES_PER_S,
    folder: Path | None = None,
) -> Plan:
    """Work out what an extraction takes.

    Args:
        layout: Of the store; its number of rows does not matter.
        frames_by_split: Videos and cached frames of each video, or their mean, by split.
        views_by_split: Views of each video; None is one of all.
        text_bytes: Of texts, by array: `text_needs.count_bytes`.
        clip_frames: T, frames of a training clip.
        frames_per_second: Of the backbone on one device: stated, or from `probe_backbone`.
        price_per_hour: Of that device.
        read_bytes_per_s: Of the disk in training.
        folder: Where the store would lie.
    """
    videos = sum(count for count, _ in frames_by_split.values())
    views = views_by_split or {}
    frames = round(sum(count * cached * views.get(split, 1) for split, (count, cached) in frames_by_split.items()))
    splits = {
        split: SplitPlan(
            videos=count,
            frames_per_video=cached,
            views=views.get(split, 1),
            share=count * cached * views.get(split, 1) / max(1, frames),
        )
        for split, (count, cached) in frames_by_split.items()
    }
    num_training, cached_in_training = frames_by_split.get(
        "train", (videos, max(c for _, c in frames_by_split.values()))
    )
    clips = num_training * min(clip_frames, cached_in_training)
    frame_bytes = layout.bytes_per_frame
    read_s = clips * sum(size for name, size in frame_bytes.items() if name != "embedding") / read_bytes_per_s
    extract_s = forward_s = break_even = None
    if frames_per_second is not None:
        extract_s, forward_s = frames / frames_per_second, clips / frames_per_second
        saved = forward_s - read_s
        break_even = extract_s / saved if saved > 0 else float("inf")
    hours = None if extract_s is None else extract_s / 3600
    sizes = {name: size * frames for name, size in frame_bytes.items()}
    sizes |= text_bytes or {}
    return Plan(
        videos=videos,
        frames=frames,
        splits=splits,
        bytes_by_array=sizes,
        bytes_per_row=layout.bytes_per_row,
        image_size=layout.image_size,
        num_patches=layout.num_patches,
        free_bytes=None if folder is None else free_bytes(folder),
        frames_per_second=frames_per_second,
        hours=hours,
        price=None if hours is None or price_per_hour is None else hours * price_per_hour,
        read_seconds_per_epoch=read_s,
        forward_seconds_per_epoch=forward_s,
        break_even_epochs=break_even,
    )


def plan_command(
    config: ExtractConfig,
    *,
    videos: int | None = None,
    rate: float | None = None,
    with_probe: bool = False,
    price: float | None = None,
    clip_frames: int = 8,
    read_bytes_per_s: float = _READ_BYTES_PER_S,
) -> Plan:
    """The plan of an extraction, of a data set that is there or of a number of videos.

    Args:
        config: The extraction.
        videos: How many, all for training; None counts those of the data set.
        rate: Frames per second of the backbone.
        with_probe: Measure that rate.
        price: Of the device, per hour.
        clip_frames: T, frames of a training clip.
        read_bytes_per_s: Of the disk in training.

    Raises:
        S4vError: If the model, the data set or an option is not one that an extraction could have.
    """
    if videos is not None and config.segment_s is not None:
        raise ConfigError("--segment needs the videos' lengths: name a --dataset, or count the segments in --videos")
    if videos is not None and config.is_open_ended:
        raise ConfigError(
            f"--sampling {config.recipe.sampling} needs the videos' lengths: name a --dataset, or state the frames of "
            "a video (--sampling uniform --frames N)"
        )
    if videos is not None and (config.text_layers, config.text_words, config.class_template) != (None, None, None):
        raise ConfigError(
            "--text-layers, --text-words and --class-template are of captions and classes: name the --dataset that "
            "has them"
        )
    config = settle_recipe(config, Target(config.out))
    records, counts = ([], []) if videos is not None else _read_rows(config)
    if videos is None:
        refuse_texts_of_nothing(config, records, ClassList.of(records).names)
    splits = {"train": videos} if videos is not None else Counter(record.split for record in records)
    backbone = build_backbone(
        config.model,
        weights="random",
        device=find_device(config.device),
        precision=config.precision,
        image_size=config.input_size,
    )
    by_split: dict[str, tuple[int, float]] = {}
    for split, count in splits.items():
        own = [frames for record, frames in zip(records, counts, strict=True) if record.split == split]
        by_split[split] = (count, statistics.mean(own) if config.is_open_ended else config.frames_of(split))
    num_rows = sum(splits.values())
    num_frames = max(1, *counts) if config.is_open_ended else max(config.frames_of(split) for split in splits)
    views = {split: count_views(config.views_of(split)) for split in splits}
    layout = plan_layout(config, backbone, num_rows, num_frames, max(views.values()))
    if with_probe:
        rate = probe_backbone(backbone.load_weights(), layout, config.batch_size)
    return plan_extraction(
        layout,
        by_split,
        views_by_split=views,
        text_bytes=_count_text_bytes(config, records, layout),
        clip_frames=clip_frames,
        frames_per_second=rate,
        price_per_hour=price,
        read_bytes_per_s=read_bytes_per_s,
        folder=config.out,
    )


def _count_text_bytes(config: ExtractConfig, records: Sequence[VideoRecord], layout: StoreLayout) -> dict[str, int]:
    classes = ClassList.of(records).names if config.class_template is not None else ()
    captions = [text for record in records for text in record.captions]
    return count_bytes(config.model, layout, captions, choose_texts(config, None), len(classes))


def _read_rows(config: ExtractConfig) -> tuple[list[VideoRecord], list[int]]:
    """The rows of an extraction, and their cached frames."""
    if config.segment_s is None and not config.is_open_ended:
        records = config.read_records()
        return records, [config.frames_of(record.split) for record in records]
    with DecoderPool(config.num_decoders) as pool:
        records = list_rows(config, Target.find(config), pool)
        return records, count_frames(config, records, Target(config.out), pool)


def probe_backbone(backbone: Backbone, layout: StoreLayout, batch_size: int, seconds: float = 20.0) -> float:
    """Frames per second of the backbone on the machine at hand, with random weights and random frames.

    A giant on a CPU takes minutes for a full batch, so passes begin with one frame and double, as far as they fit.

    Args:
        backbone: Weights loaded.
        layout: Which layers, and the size of the frames.
        batch_size: Frames in one pass, at most.
        seconds: To measure for; a first frame that takes longer is the measurement.

    Returns:
        Of the largest passes that there was time for.
    """
    height, width = layout.image_size
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (batch_size, height, width, 3), dtype=np.uint8))
    start = time.perf_counter()

    def run(size: int) -> float:
        before = time.perf_counter()
        backbone.encode_frames(pixels[:size], layout.layers).embedding.cpu()
        return time.perf_counter() - before

    size, took = 1, run(1)
    passes: list[float] = []  # of this size; the very first one does not count, where there is time for another
    while time.perf_counter() - start + took <= seconds:
        passes.append(run(size))
        took = min(passes)
        larger = min(2 * size, batch_size)
        if larger > size and time.perf_counter() - start + 2 * took * larger / size <= seconds:
            size, took, passes = larger, took * larger / size, []
    return size * len(passes) / sum(passes) if passes else 1 / took


def render_plan(plan: Plan, epochs: int) -> list[str]:
    """A plan in lines.

    Args:
        plan: The extraction.
        epochs: That are meant to be trained: whether the cache pays depends on them.
    """
    tokens = plan.bytes_by_array["patches"] + plan.bytes_by_array.get("cls", 0)
    kinds = "patches and class tokens" if "cls" in plan.bytes_by_array else "patches (the model has no class token)"
    pixels = next((plan.bytes_by_array[name] for name in PIXEL_ARRAYS.values() if name in plan.bytes_by_array), None)
    with_pixels = "" if pixels is None else f", {describe_bytes(tokens + pixels)} with pixels"
    height, width = plan.image_size
    free = "" if plan.free_bytes is None else f"; {describe_bytes(plan.free_bytes)} free there"
    verdict = ": it does not fit" if plan.fits is False else ""
    return [
        f"{'videos':13} {plan.videos:,}, {plan.frames:,} cached frames",
        f"{'frames':13} {height} x {width} pixels, {plan.num_patches:,} patches",
        *(_render_split(name, split) for name, split in sorted(plan.splits.items()) if len(plan.splits) > 1),
        *(f"  {name:11} {describe_bytes(size)}" for name, size in plan.bytes_by_array.items()),
        f"{'tokens':13} {describe_bytes(tokens)} of {kinds}{with_pixels}",
        f"{'a frame':13} {describe_bytes(plan.bytes_per_frame)} of all arrays",
        f"{'in all':13} {describe_bytes(plan.total_bytes)}{free}{verdict}",
        *([_render_large_row(plan.bytes_per_row)] if plan.bytes_per_row > _LARGE_ROW_BYTES else []),
        *_render_time(plan, epochs),
    ]


def _render_large_row(size: int) -> str:
    """Of rows that fill a memory: what would make them smaller."""
    return (
        f"{'a row':13} up to {describe_bytes(size)}, and an extraction holds two in memory. Fewer --layers, --channels "
        "or --frames, --dtype int8, --segment or a smaller --input make it smaller"
    )


def _render_split(name: str, split: SplitPlan) -> str:
    """Views beyond the first are for tests, but in training: their share is told apart."""
    views = f" x {split.views} views" if split.views > 1 else ""
    frames = f"{split.videos:,} x {split.frames_per_video:.4g} frames{views}"
    return f"  {name:11} {frames}: {split.share:.1%} of the frames and bytes"


def _render_time(plan: Plan, epochs: int) -> list[str]:
    if plan.hours is None:
        return [f"{'time':13} not known: state --rate FRAMES_PER_SECOND, or measure it here with --probe"]
    assert plan.forward_seconds_per_epoch is not None and plan.break_even_epochs is not None
    price = "" if plan.price is None else f", {plan.price:,.2f} at that price"
    read, forward = (_describe_hours(s / 3600) for s in (plan.read_seconds_per_epoch, plan.forward_seconds_per_epoch))
    if plan.break_even_epochs == float("inf"):
        verdict = "does not pay: reading its tokens takes longer than making them. Store fewer bytes"
    else:
        pays = "it pays" if plan.break_even_epochs < epochs else f"it does not pay for {epochs} epochs in one training"
        verdict = f"breaks even after {plan.break_even_epochs:.1f} epochs: {pays}"
    return [
        f"{'time':13} {_describe_hours(plan.hours)} on one device at {plan.frames_per_second:,.1f} frames/s{price}",
        f"{'each epoch':13} {read} of reading, or {forward} of running the backbone",
        f"{'the cache':13} {verdict}",
    ]


def _describe_hours(hours: float) -> str:
    """With the unit that suits it: `3.2 hours`, `4.0 minutes`, `0.5 seconds`."""
    units = ((1.0, "hours"), (60.0, "minutes"), (3600.0, "seconds"))
    factor, unit = next((one for one in units if hours * one[0] >= 1), units[-1])
    return f"{hours * factor:,.1f} {unit}"
