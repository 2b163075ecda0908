"""Words that options take, light to import: a command's help needs no torch."""

from __future__ import annotations

from typing import Literal

from ..backbone.facts import Family

__all__ = [
    "Family",
    "Inputs",
    "Mix",
    "Negatives",
    "OptimizerName",
    "Precision",
    "Similarity",
    "TrainedViews",
    "Undecayed",
]

Inputs = Literal["all", "tokens", "pixels"]
"""What a side network sees."""

Mix = Literal["none", "mixup", "cutmix", "both"]
"""How training mixes clips (train/mixing.py); `both` draws one of the two for each clip."""

Similarity = Literal["mean", "wti"]
"""How a video and a text are compared: by their means, or word by word (train/networks/text_interaction.py)."""

Negatives = Literal["step", "all", "reference"]
"""The other captions of a step, or all captions of the training split, which are cached; both without those of the same
video or wording. `reference`: of a step, those too."""

OptimizerName = Literal["adamw", "uncorrected-adam"]
"""What steps: torch's AdamW, or the reference's Adam of retrieval (train/uncorrected_adam.py)."""

Undecayed = Literal["nothing", "biases", "vectors"]
"""What weight decay spares; vectors are biases and norms, all of one axis."""

TrainedViews = Literal["all", "centre", "augmented"]
"""Views of a training row that clips are taken of; `augmented` are those that were drawn."""

Precision = Literal["fp32", "fp16", "bf16"]
