"""The sizes of the store that an extraction makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

from ..backbone.facts import describe_size
from ..backbone.vision_tower import Backbone, parse_layers
from ..errors import ConfigError, StoreMismatchError
from ..store.layout import ClassTokens, PatchDtype, StoreLayout, choose_block
from ..store.reader import StoreReader, open_store
from .config import ExtractConfig
from .decode.views import SQUARE_RESIZES

_DEFAULT_INT8_CHANNELS = 256


def plan_layout(
    config: ExtractConfig,
    backbone: Backbone,
    num_rows: int,
    num_frames: int,
    num_views: int,
    *,
    lengths: Mapping[int, int] | None = None,
    like: StoreLayout | None = None,
) -> StoreLayout:
    """The sizes of the store that an extraction makes.

    Args:
        config: The extraction.
        backbone: Its weights are not needed.
        num_rows: V.
        num_frames: F.
        num_views: A.
        lengths: How many rows and views hold so many cached frames; None takes rows that are all full.
        like: Of the store that is there, which keeps the division into files that it was begun with.

    Raises:
        ConfigError: If `--channels`, `--cls-channels`, `--cls-dtype` or `--layers` ask for what the backbone does not
            have, `--resize` is for squares and its frames are none, or `--pixel-format` halves an odd number.
        StoreMismatchError: If the codec to be taken over does not fit.
    """
    info = backbone.info
    resize = config.recipe.resize
    if resize in SQUARE_RESIZES and info.image_size[0] != info.image_size[1]:
        raise ConfigError(
            f"--resize {resize} bends every video to one shape for square crops, and {config.model} sees "
            f"{describe_size(info.image_size)} pixels: take another --resize, or a square --input"
        )
    channels = config.channels or (min(info.width, _DEFAULT_INT8_CHANNELS) if config.dtype == "int8" else info.width)
    class_tokens: ClassTokens = "mean" if config.cls == "mean" else "own" if info.has_class_token else "none"
    if class_tokens == "none" and (config.cls_dtype, config.cls_channels) != (None, None):
        raise ConfigError(
            f"--cls-dtype and --cls-channels are of class tokens, and {config.model} has none: leave them out, or take "
            "--cls mean"
        )
    cls_channels = config.cls_channels
    if config.codec_from is not None:
        channels, cls_channels = _check_codec_source(config, backbone, open_store(config.codec_from), class_tokens)
    for option, count in (("--channels", channels), ("--cls-channels", cls_channels or 1)):
        if count > info.width:
            raise ConfigError(f"{option} {count} is more than the {info.width} channels of {config.model}")
    _check_pixel_format(config, info.image_size)
    layout = StoreLayout(
        num_rows=num_rows,
        num_views=num_views,
        num_frames=num_frames,
        layers=parse_layers(config.layers, info.depth),
        num_patches=info.num_patches,
        width=info.width,
        channels=channels,
        embed_dim=info.embed_dim,
        image_size=info.image_size,
        patch_dtype=config.dtype,
        keep_bits=config.keep_bits,
        with_pixels=config.with_pixels,
        pixel_offsets=config.cached_offsets,
        pixel_format=config.pixel_format,
        class_tokens=class_tokens,
    )
    layout = _code_cls(layout, config.cls_dtype, cls_channels)
    if like is not None:
        return replace(layout, rows_per_shard=like.rows_per_shard, frames_per_block=like.frames_per_block)
    frame_bytes = num_views * sum(layout.bytes_per_frame.values())
    if lengths is None:
        lengths = {num_frames: num_rows * num_views}
    rows = layout.choose_rows(sum(length * count for length, count in lengths.items()))
    return replace(layout, rows_per_shard=rows, frames_per_block=choose_block(num_frames, frame_bytes, lengths))


def _check_pixel_format(config: ExtractConfig, image_size: tuple[int, int]) -> None:
    """Refuse to halve an odd height or width: the patches of the backbones that there are have even sides."""
    if config.pixel_format != "rgb" and any(side % 2 for side in image_size):
        raise ConfigError(
            f"--pixel-format {config.pixel_format} halves colours down and across, and {config.model} sees "
            f"{describe_size(image_size)} pixels: take --pixel-format rgb, or an --input of even sides"
        )


def _code_cls(layout: StoreLayout, dtype: PatchDtype | None, channels: int | None) -> StoreLayout:
    """With class tokens coded; as it is where that comes to what they are without a codec."""
    dtype, channels = dtype or layout.plain_cls_dtype, channels or layout.width
    if (dtype, channels) == (layout.plain_cls_dtype, layout.width):
        return layout
    return replace(layout, coded_cls_dtype=dtype, coded_cls_channels=channels)


def _check_codec_source(
    config: ExtractConfig, backbone: Backbone, source: StoreReader, class_tokens: ClassTokens
) -> tuple[int, int]:
    """K of patches, and of class tokens, of a store whose codecs are to be taken.

    Raises:
        StoreMismatchError: If that codec was fitted on other tokens than this extraction makes; all differences listed.
    """
    info, theirs = asdict(backbone.info), source.attributes["backbone"]
    own = {name: info[name] for name in ("architecture", "weights_sha256", "width", "image_size", "mean", "std")}
    own |= {"layers": parse_layers(config.layers, backbone.info.depth), "dtype": config.dtype}
    there = {**theirs, "layers": source.layout.layers, "dtype": source.layout.patch_dtype}
    if config.channels is not None:
        own["channels"], there["channels"] = config.channels, source.layout.channels
    if class_tokens != "none":
        plain = replace(source.layout, patch_dtype=config.dtype).plain_cls_dtype
        own["cls_dtype"], there["cls_dtype"] = config.cls_dtype or plain, source.layout.cls_dtype
    if config.cls_channels is not None:
        own["cls_channels"], there["cls_channels"] = config.cls_channels, source.layout.cls_channels
    if source.layout.is_cls_coded:
        own["class_tokens"], there["class_tokens"] = class_tokens, source.layout.class_tokens
    differences = [
        f"{name} {there[name]} there, {value} here"
        for name, value in own.items()
        if (list(value) if isinstance(value, tuple) else value)
        != (list(there[name]) if isinstance(there[name], tuple) else there[name])
    ]
    if differences:
        raise StoreMismatchError(f"the codec of {source.path} (--codec-from) does not fit: {'; '.join(differences)}")
    return source.layout.channels, source.layout.cls_channels
