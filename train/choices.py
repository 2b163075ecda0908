"""Words that options take, light to import: a command's help needs no torch."""

from __future__ import annotations

from typing import Literal

Inputs = Literal["all", "tokens", "pixels"]
"""What a side network sees."""

Family = Literal["clip", "eva"]
"""Which of the reference's side blocks: the one that it puts beside CLIP, or the one beside EVA."""

Similarity = Literal["mean", "wti"]
"""How a video and a text are compared: by their means, or word by word (train/networks/text_interaction.py)."""

Negatives = Literal["step", "all"]
"""The other captions of a step, as in the reference, or all captions of the training split: they are cached."""

Precision = Literal["fp32", "fp16", "bf16"]
