"""R2-Tuning's released files: their names for our parameters, and the sizes that follow from shapes.

A file holds `state_dict`, and `meta` beside it; names may have `module.` before them. Heads of attention, the rate of
frames, rounding and suppression are in no file.

Source:
    yeliudev/R2-Tuning at 03fbcf6, with layers of yeliudev/nncore 0.4.4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from ...errors import WeightsError
from ..networks.r2_tuning import STRIDES

_MAP = (r"0\.", "norm."), (r"2\.", "reduce."), (r"4\.", "hidden_norm."), (r"6\.", "project.")
_ATTENTION = (r"q\.", "query."), (r"k\.", "key."), (r"v\.", "value."), (r"m\.", "project.")
_BLOCK = "recurrence.block."
_STEP = (1, "convolutions"), (3, "norms")
"""Of the reference's five layers for a step of a level: those with weights."""

NAMES = tuple(
    (re.compile(r"^(?:module\.)?" + theirs), ours)
    for theirs, ours in (
        (r"coef$", "level_scale"),
        (r"adapter\.(gate|scale)$", r"recurrence.\1"),
        *((rf"adapter\.(video|query)_map\.{number}", rf"recurrence.\1_map.{part}") for number, part in _MAP),
        (r"adapter\.v_map\.", "recurrence.pooling.key."),
        (r"adapter\.q_map\.", "recurrence.pooling.query."),
        *(
            (rf"adapter\.tem\.(cross|self)_att\.{letter}", rf"{_BLOCK}\1_attention.{part}")
            for letter, part in _ATTENTION
        ),
        (r"adapter\.tem\.(cross|self)_att_norm\.", _BLOCK + r"\1_norm."),
        (r"adapter\.tem\.ffn_norm\.", _BLOCK + "ffn_norm."),
        (r"adapter\.tem\.ffn\.mapping\.0\.", _BLOCK + "widen."),
        (r"adapter\.tem\.ffn\.mapping\.2\.", _BLOCK + "narrow."),
        *(
            (rf"pyramid\.blocks\.{level}\.{5 * step + place}\.", f"levels.{level - 1}.{part}.{step}.")
            for level in range(1, len(STRIDES))
            for step in range(level)
            for place, part in _STEP
        ),
        (r"pooling\.att\.", "pooling.weigh."),
        (r"class_head\.module\.1\.", "class_head.hidden."),
        (r"class_head\.module\.3\.", "class_head.project."),
        (r"coord_head\.module\.1\.", "boundary_head.hidden."),
        (r"coord_head\.module\.3\.", "boundary_head.project."),
    )
)
"""The reference's name -> ours."""

_WIDTH_STEP = 8
"""Widths of backbones are multiples of it, so that two channels more are time features."""

UNUSED = re.compile(r"^(?:module\.)?loss\.")
"""Buffers of its losses."""


def rename(name: str) -> str | None:
    """Our name of a tensor of the reference; None where we have none."""
    for pattern, ours in NAMES:
        new_name, count = pattern.subn(ours, name)
        if count:
            return new_name
    return None


def rename_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights or gradients under our names.

    Raises:
        WeightsError: If a tensor has none, and is no buffer of a loss.
    """
    renamed, strange = {}, []
    for name, tensor in state.items():
        if (new_name := rename(name)) is not None:
            renamed[new_name] = tensor
        elif not UNUSED.match(name):
            strange.append(name)
    if strange:
        more = f" and {len(strange) - 4} more" if len(strange) > 4 else ""
        raise WeightsError(
            f"R2-Tuning has no {', '.join(strange[:4])}{more}: name a checkpoint of R2-Tuning, of one of its releases"
        )
    return renamed


def read_sizes(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What `R2Network` is built with, but for patches and heads, of tensors under our names.

    Raises:
        WeightsError: If a tensor that a size follows from is missing, or has no size that the network can have.
    """
    names = (
        "recurrence.scale",
        "level_scale",
        "recurrence.video_map.reduce.weight",
        "recurrence.query_map.reduce.weight",
    )
    if missing := [name for name in names if name not in state]:
        raise WeightsError(f"no checkpoint of R2-Tuning: it lacks {', '.join(missing)}")
    side_width, num_read = state["recurrence.video_map.reduce.weight"].shape
    num_levels = len(state["level_scale"])
    num_times = num_read % _WIDTH_STEP
    if num_times not in (0, 2) or num_levels > len(STRIDES):
        raise WeightsError(
            f"no checkpoint of R2-Tuning: it reads tokens of {num_read} channels (a backbone's width, or two more with "
            f"time features) at {num_levels} levels ({len(STRIDES)} at most)"
        )
    return {
        "num_layers": len(state["recurrence.scale"]),
        "width": num_read - num_times,
        "text_width": state["recurrence.query_map.reduce.weight"].shape[1],
        "side_width": side_width,
        "strides": STRIDES[:num_levels],
        "has_boundaries": "boundary_head.project.weight" in state,
        "has_times": num_times > 0,
    }
