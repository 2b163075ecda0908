"""Words that options take, light to import: a command's help needs no torch."""

from __future__ import annotations

from typing import Literal

from ..backbone.facts import Family

__all__ = ["Family", "Inputs", "Negatives", "Precision", "Similarity"]

Inputs = Literal["all", "tokens", "pixels"]
"""What a side network sees."""

Similarity = Literal["mean", "wti"]
"""How a video and a text are compared: by their means, or word by word (train/networks/text_interaction.py)."""

Negatives = Literal["step", "all"]
"""The other captions of a step, as in the reference, or all captions of the training split: they are cached."""

Precision = Literal["fp32", "fp16", "bf16"]
