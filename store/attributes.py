"""What a store says of itself in its group's `s4v` attribute, checked before anything is computed from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StoreDamagedError
from .layout import CLASS_TOKENS, CODEC_GROUPS, PATCH_DTYPES, PIXEL_ARRAYS, ArraySpec, StoreLayout
from .offsets import MOST_OFFSETS, SEEN_FRAME, PixelOffset

_MOST = {
    "num_rows": 2**40,
    "num_views": 2**16,
    "num_frames": 2**20,
    "num_patches": 2**20,
    "width": 2**18,
    "channels": 2**18,
    "embed_dim": 2**18,
    "rows_per_shard": 2**20,
    "frames_per_block": 2**20,
}
"""Sizes from 1 to these; far above any model, far below what overflows."""
_MOST_LAYERS = 2**12
_MOST_PIXELS = 2**16
"""Along one side of a frame."""
_MOST_CHUNK_BYTES = 2**31 - 2**20
"""Of what one read fetches: ViT-E's 64 layers in float32 take 117 MB."""
_MOST_CHUNKS = 2**24
"""In one shard's file, of which the index takes 16 bytes each."""
_MOST_FILES = 2**18
"""Of one shard of rows in one array: a row of more than a day and a half, at 25 frames a second."""


class Attributes(dict[str, Any]):
    """A store's attributes: one that is missing is the store's fault, in one line."""

    def __init__(self, values: Any = (), path: Path = Path(), where: str = "") -> None:
        self._path = path
        self._where = where
        nested = {
            name: Attributes(value, path, f"{where}{name}.") if isinstance(value, dict) else value
            for name, value in dict(values).items()
        }
        super().__init__(nested)

    def __missing__(self, name: str) -> Any:
        raise StoreDamagedError(f"{self._path / 'zarr.json'} lacks the attribute {self._where}{name}. {_ANEW}")

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any], Path, str]]:
        return Attributes, (dict(self), self._path, self._where)


def check_attributes(path: Path, values: dict[str, Any]) -> Attributes:
    """A store's attributes, of the types that s4v gives them.

    Args:
        path: The store, for messages.
        values: The group's `s4v` attribute.

    Raises:
        StoreDamagedError: If one that every store has is missing, or any is of another type; all are named.
    """
    attributes = Attributes(values, path)
    problems = []
    for name, (kind, is_right) in _KINDS.items():
        node: Any = attributes
        for part in name.split("."):
            node = node.get(part, _NOTHING) if isinstance(node, dict) else _NOTHING
        if node is _NOTHING:
            if name in _NEEDED:
                problems.append(f"{name} is missing")
        elif not is_right(node):
            problems.append(f"{name} must be {kind}, found {_shorten(node)}")
    problems = problems or list(_find_wrong_codecs(attributes))
    if problems:
        raise StoreDamagedError(f"{path / 'zarr.json'} is not as s4v writes it: {'; '.join(problems)}. {_ANEW}")
    return attributes


def _find_wrong_codecs(attributes: Attributes) -> Iterator[str]:
    """Codecs that are not what the layout says of codes."""
    if attributes["codec"]["dtype"] != attributes["layout"].get("patch_dtype"):
        yield "the codec is of another dtype than the layout"
    recorded, dtype = attributes.get(CODEC_GROUPS["cls"]), attributes["layout"].get("coded_cls_dtype")
    if recorded is None:
        if dtype is not None:
            yield "class tokens are coded and there is no cls_codec"
    elif missing := [name for name in ("dtype", "parts", "sha256") if name not in recorded]:
        yield f"cls_codec lacks {', '.join(missing)}"
    elif recorded["dtype"] != dtype:
        yield "the cls_codec is of another dtype than the layout"


def parse_layout(path: Path, recorded: dict[str, Any]) -> StoreLayout:
    """The layout that a store records; a store that is older than a field has its default.

    Raises:
        StoreDamagedError: If a size is missing, of another type, or out of range; all are named.
    """
    sizes = {f.name: _as_tuple(recorded[f.name]) for f in fields(StoreLayout) if f.name in recorded}
    problems = list(_find_wrong_sizes(sizes))
    if not problems:
        layout = StoreLayout(**sizes)
        problems = [problem for spec in layout.array_specs() for problem in _find_wrong_chunks(spec)]
    if problems:
        raise StoreDamagedError(f"the layout in {path / 'zarr.json'} cannot be: {'; '.join(problems)}. {_ANEW}")
    return layout


def _find_wrong_sizes(sizes: dict[str, Any]) -> list[str]:
    problems = []
    for name, most in _MOST.items():
        if name in ("rows_per_shard", "frames_per_block") and not sizes.get(name, 0):
            continue  # 0, or a store from before it was recorded: a function of the others
        if not _is_int(sizes.get(name), 1, most):
            problems.append(f"{name} must be from 1 to {most}, found {_shorten(sizes.get(name))}")
    layers = sizes.get("layers")
    if not _are_ints(layers, 0, _MOST_LAYERS) or not layers or list(layers) != sorted(set(layers)):
        problems.append(f"layers must be ascending blocks, found {_shorten(layers)}")
    image_size = sizes.get("image_size")
    if image_size is None or not _are_ints(image_size, 1, _MOST_PIXELS) or len(image_size) != 2:
        problems.append(f"image_size must be height and width, found {_shorten(image_size)}")
    if sizes.get("patch_dtype") not in PATCH_DTYPES:
        problems.append(f"patch_dtype must be in {', '.join(PATCH_DTYPES)}, found {_shorten(sizes.get('patch_dtype'))}")
    problems += _find_wrong_pixels(sizes)
    if (class_tokens := sizes.get("class_tokens", "own")) not in CLASS_TOKENS:
        problems.append(f"class_tokens must be in {', '.join(CLASS_TOKENS)}, found {_shorten(class_tokens)}")
    problems += _find_wrong_cls_codes(sizes)
    keep_bits = sizes.get("keep_bits")
    if keep_bits is not None and not (_is_int(keep_bits, 0, 10) and sizes.get("patch_dtype") == "float16"):
        problems.append(f"keep_bits must be none or, of float16, 0 to 10, found {_shorten(keep_bits)}")
    offsets = sizes.get("pixel_offsets", (0,))
    if not _are_offsets(offsets):
        problems.append(f"pixel_offsets must be frames or steps, 0 among them, found {_shorten(offsets)}")
    return problems


def _find_wrong_pixels(sizes: dict[str, Any]) -> Iterator[str]:
    """Of frames: whether there are any, and how they are held."""
    with_pixels, pixel_format = sizes.get("with_pixels", True), sizes.get("pixel_format", "rgb")
    image_size: Any = sizes.get("image_size")
    if not isinstance(with_pixels, bool):
        yield f"with_pixels must be true or false, found {_shorten(with_pixels)}"
    if not _is_text(pixel_format) or pixel_format not in PIXEL_ARRAYS:
        yield f"pixel_format must be in {', '.join(PIXEL_ARRAYS)}, found {_shorten(pixel_format)}"
    elif pixel_format != "rgb":
        if not with_pixels:
            yield f"pixel_format is {pixel_format} and there are no pixels"
        if _is_pair(image_size) and any(side % 2 for side in image_size):
            yield f"pixel_format {pixel_format} wants an even height and width, found {_shorten(image_size)}"


def _find_wrong_cls_codes(sizes: dict[str, Any]) -> Iterator[str]:
    """Of class tokens that are coded: a dtype and channels, or neither."""
    dtype, channels, width = (sizes.get(name) for name in ("coded_cls_dtype", "coded_cls_channels", "width"))
    if dtype is None and channels is None:
        return
    if dtype not in PATCH_DTYPES:
        yield f"coded_cls_dtype must be in {', '.join(PATCH_DTYPES)}, found {_shorten(dtype)}"
    if not _is_int(channels, 1, int(width or 0) if _is_int(width, 1, _MOST["width"]) else 1):
        yield f"coded_cls_channels must be from 1 to the width, found {_shorten(channels)}"
    if sizes.get("class_tokens", "own") == "none":
        yield "class tokens are coded and there are none"


def _are_offsets(values: object) -> bool:
    if not isinstance(values, list | tuple) or len(values) > MOST_OFFSETS:
        return False
    try:
        return SEEN_FRAME in [PixelOffset.of(value) for value in values]
    except ValueError:
        return False


def _find_wrong_chunks(spec: ArraySpec) -> list[str]:
    chunk = math.prod(spec.chunk_shape or spec.shard_shape) * np.dtype(spec.dtype).itemsize
    if chunk > _MOST_CHUNK_BYTES:
        return [f"one chunk of {spec.name} would take {chunk:,} bytes"]
    if spec.chunks_per_shard > _MOST_CHUNKS:
        return [f"one shard of {spec.name} would have {spec.chunks_per_shard:,} chunks"]
    if spec.files_per_shard > _MOST_FILES:
        return [f"one shard of {spec.name} would have {spec.files_per_shard:,} files"]
    return []


def _is_int(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _are_ints(values: object, least: int, most: int) -> bool:
    return isinstance(values, list | tuple) and all(_is_int(value, least, most) for value in values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30  # not NaN


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: object) -> bool:
    return value is None or isinstance(value, str)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_pair(value: object) -> bool:
    return _are_ints(value, 1, 2**20) and len(value) == 2  # type: ignore[arg-type]


def _is_colour(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_number, value))


def _are_counts(value: object) -> bool:
    return isinstance(value, dict) and all(_is_int(one, 1, 2**20) for one in value.values())


_NOTHING = object()
_NEEDED = frozenset({"layout", "classes", "classes.names", "codec", "codec.dtype", "codec.parts", "codec.sha256"})
_TEXT = ("a text", _is_text)
_TEXT_OR_NONE = ("a text or none", _is_text_or_none)
_COUNT = ("a count", lambda value: _is_int(value, 1, 2**20))
_PAIR = ("two sizes", _is_pair)
_COLOUR = ("three numbers", _is_colour)
_OBJECT = ("an object", _is_object)
_YES_OR_NO = ("true or false", lambda value: isinstance(value, bool))
_TEXTS = ("a list of texts", _are_texts)
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "created": _TEXT,
    "dataset": _OBJECT,
    "dataset.name": _TEXT,
    "dataset.protocol": _TEXT_OR_NONE,
    "dataset.root": _TEXT_OR_NONE,
    "classes": _OBJECT,
    "classes.names": _TEXTS,
    "backbone": _OBJECT,
    "backbone.name": _TEXT,
    "backbone.architecture": _TEXT,
    "backbone.weights": _TEXT,
    "backbone.weights_sha256": _TEXT,
    "backbone.width": _COUNT,
    "backbone.depth": _COUNT,
    "backbone.embed_dim": _COUNT,
    "backbone.grid": _PAIR,
    "backbone.patch_size": _PAIR,
    "backbone.image_size": _PAIR,
    "backbone.own_image_size": _PAIR,
    "backbone.mean": _COLOUR,
    "backbone.std": _COLOUR,
    "backbone.precision": _TEXT,
    "backbone.device_type": _TEXT,
    "backbone.has_class_token": _YES_OR_NO,
    "backbone.has_text_tower": _YES_OR_NO,
    "layout": _OBJECT,
    "frames": ("counts by split", _are_counts),
    "clips": ("counts by split", _are_counts),
    "views": ("names by split", lambda value: isinstance(value, dict) and all(map(_is_text, value.values()))),
    "augmentation": _TEXTS,
    "validation_clip": _TEXTS,
    "recipe": _TEXT,
    "sampling": _TEXT,
    "resize": _TEXT,
    "pixel_edge": _TEXT,
    "codec": _OBJECT,
    "codec.dtype": _TEXT,
    "codec.name": _TEXT,
    "codec.parts": _TEXTS,
    "codec.sha256": _TEXT,
    "cls_codec": _OBJECT,
    "cls_codec.dtype": _TEXT,
    "cls_codec.name": _TEXT,
    "cls_codec.parts": _TEXTS,
    "cls_codec.sha256": _TEXT,
    "codecs": _OBJECT,
    "codec_from": _TEXT_OR_NONE,
    "libraries": _OBJECT,
}
"""What attributes are, where they are there; others are a later version's and nobody's business here."""


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _shorten(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_ANEW = "Take it from where it came from once more, or extract the store anew."
