"""How the fields of an extraction are written on the command line, for all commands that take some of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..extract.config import RECIPE_FIELDS
from ..extract.datasets import PLAIN_RECIPE, find_reader
from ..extract.decode.sampling import parse_clips, parse_frames, parse_views
from ..store.offsets import describe_offsets, order_offsets, parse_offsets
from ._options import Options, Spelling

DATA_FIELDS = ("root", "annotations", "columns", "protocol", "with_classes")
"""What says which videos there are, beside the data set's name."""

DECODING_FIELDS = (
    *("splits", "frames", "segment_s", "sampling", "clips", "validation_clip", "resize", "views"),
    *("pixel_offsets", "pixel_edge"),
    *("num_decoders", "decoder", "decode_timeout_s", "allow_loss"),
)
"""What says which frames of them are decoded, and how."""


def _parse_columns(pairs: list[str] | None) -> dict[str, str]:
    columns = {}
    for pair in pairs or []:
        role, equals, name = pair.partition("=")
        if not (role and equals and name):
            raise ConfigError(f"--column takes ROLE=NAME, such as path=video_file; found {pair!r}")
        columns[role] = name
    return columns


def _parse_splits(splits: list[str] | None) -> tuple[str, ...] | None:
    return tuple(splits) if splits else None


def _parse_steps(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(","))


def _parse_part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    part, slash, count = text.partition("/")
    if not (slash and part.isdecimal() and count.isdecimal()):
        raise ConfigError(f"--part takes I/N such as 2/8; found {text!r}")
    return int(part), int(count)


def _parse_input(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, times, width = text.partition("x")
    if not (height.isdecimal() and height.isascii()) or (times and not (width.isdecimal() and width.isascii())):
        raise ConfigError(f"--input takes HxW such as 480x864, height first, or N for a square; found {text!r}")
    return int(height), int(width or height)


def _show_by_split(values: Mapping[str, Any]) -> str:
    """`train=16,8` of `{"train": 16, "": 8}`."""
    return ",".join(f"{split}={value}" if split else str(value) for split, value in values.items())


SPELLINGS: Mapping[str, Spelling] = {
    "root": Spelling(type=Path | None, default=None),
    "out": Spelling(type=Path | None, default=None),
    "columns": Spelling(option="column", type=list[str] | None, default=None, parse=_parse_columns),
    "splits": Spelling(option="split", type=list[str] | None, parse=_parse_splits),
    "frames": Spelling(type=str, default=_show_by_split(PLAIN_RECIPE.frames), parse=parse_frames, is_open=True),
    "sampling": Spelling(type=str, default=PLAIN_RECIPE.sampling, is_open=True),
    "clips": Spelling(type=str, default=_show_by_split(PLAIN_RECIPE.clips), parse=parse_clips, is_open=True),
    "validation_clip": Spelling(type=list[str] | None, parse=_parse_splits),
    "resize": Spelling(type=str, default=PLAIN_RECIPE.resize, is_open=True),
    "views": Spelling(type=str, default=_show_by_split(PLAIN_RECIPE.views), parse=parse_views, is_open=True),
    "input_size": Spelling(option="input", type=str | None, parse=_parse_input),
    "augmentation": Spelling(type=str | None, default=None, parse=_parse_steps),
    "part": Spelling(type=str | None, parse=_parse_part),
    "with_classes": Spelling(option="no-classes"),
    "with_pixels": Spelling(option="no-pixels"),
    "pixel_offsets": Spelling(type=str | None, parse=lambda text: None if text is None else parse_offsets(text)),
    "with_compile": Spelling(option="compile"),
    "segment_s": Spelling(option="segment"),
    "decode_timeout_s": Spelling(option="decode-timeout"),
    "num_decoders": Spelling(option="decoders"),
    "num_workers": Spelling(option="workers"),
}
"""By field of ExtractConfig."""


Purpose = Annotated[
    str | None,
    typer.Option(
        "--for", help="Set what a network needs: side4video, linear, attentive, tds-clip, zero-shot, dist, r2-tuning."
    ),
]
"""Of the commands that make or plan a store; options that are given win."""


def take_purpose(purpose: str | None, options: Options, values: dict[str, Any]) -> str | None:
    """Fill in what a network needs of a store, but for what the user gave.

    Args:
        purpose: The network; None takes what the data set's recipe is for, of which the recipe says how frames are
            chosen.
        options: As they were given.
        values: The config's fields, the data set's name among them, which are filled in.

    Returns:
        What was set, in a line; None where nothing was.

    Raises:
        ConfigError: If no such network is known.
    """
    recipe = find_reader(values["dataset"]).recipe
    is_of_recipe, purpose = purpose is None, purpose or recipe.network
    if purpose is None:
        return None
    from ..train.paper.planned import find_extraction

    needed = find_extraction(purpose, recipe.name)
    if is_of_recipe:  # a store that is gone on with has its own
        needed = {name: value for name, value in needed.items() if name not in RECIPE_FIELDS}
    taken = {name: value for name, value in needed.items() if name not in values or not options.is_typed(name)}
    values.update({name: value for name, value in taken.items() if name in values})
    told = [_tell(name, value) for name, value in taken.items() if name in values]
    return f"for {purpose}: {' '.join(told)}" if told else None


def _tell(name: str, value: Any) -> str:
    """A field's value as the command line says it."""
    option = SPELLINGS[name].option if name in SPELLINGS else None
    option = option or name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}"
    if isinstance(value, Mapping):
        return f"--{option} {_show_by_split(value)}"
    text = describe_offsets(order_offsets(value)) if name == "pixel_offsets" else value
    return f"--{option} {','.join(text) if isinstance(text, tuple) else text}"


def spellings_of(*names: str) -> dict[str, Spelling]:
    """Those of some fields; of others the config's own name and type do."""
    return {name: SPELLINGS[name] for name in names if name in SPELLINGS}
