"""R2-Tuning's recipes by name, such as `r2-qvhighlights`: what is trained how, on each of its six data sets.

Source:
    https://arxiv.org/abs/2404.00801; configurations of yeliudev/R2-Tuning at 03fbcf6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..recipe import Preset, Recipe

Suppression = Literal["normal", "linear"]
"""What becomes of moments that overlap a better one: none is left from an IoU of 0.7 on, or all lose by their IoU."""

_WARMUP_FLOOR = 0.001
"""Of the rate, in the first step."""
_FALL = 0.1
"""What is left of the rate after its fall."""
_BATCH = 32


@dataclass(frozen=True, slots=True)
class GroundingRecipe:
    """What no other task has in its recipe."""

    fps: float | None
    """Frames a second; None has one frame for each label of a video."""
    saliency_weight: float = 0.1
    """Of the loss of saliency."""
    has_columns: bool = True
    """Whether that loss contrasts videos too."""
    unit_s: float | None = None
    """Seconds that ends of moments are rounded to multiples of; None leaves them."""
    suppression: Suppression | None = None
    """None of highlights."""
    repeats: int = 1
    """How often an epoch has each query."""
    warmup_steps: int = 500
    """Steps over which the rate rises."""
    fall_epoch: int | None = None
    """Epochs after which the rate falls to a tenth; None never."""
    min_duration_s: float = 5.0
    """Training leaves out shorter videos."""
    is_of_domain: bool = False
    """Whether each domain of the data set has a model of its own."""


@dataclass(frozen=True)
class GroundingPreset(Preset):
    """A preset, and what grounding has beside."""

    grounding: GroundingRecipe = GroundingRecipe(fps=None)


def share_of_rate(step: int, epoch: int, recipe: GroundingRecipe) -> float:
    """The share of the base rate in a step of the optimiser.

    Args:
        step: From 0, of the whole training.
        epoch: From 0, that it is in.
        recipe: How the rate rises and falls.
    """
    share = 1.0 if recipe.fall_epoch is None or epoch < recipe.fall_epoch else _FALL
    rest = 1 - step / recipe.warmup_steps
    return share if rest <= 0 else share * (1 - (1 - _WARMUP_FLOOR) * rest)


def _make_preset(
    dataset: str, epochs: int, rate: float, batch_size: int, dropout: float, grounding: GroundingRecipe
) -> GroundingPreset:
    """Beside CLIP B/32, its last four blocks."""
    return GroundingPreset(
        name=f"r2-{dataset}",
        task="grounding",
        dataset=dataset,
        family="clip",
        width=768,
        depth=12,
        patch_px=32,
        layers=(8, 9, 10, 11),
        recipe=Recipe(
            epochs,
            rate,
            warmup_epochs=0.0,  # counted in steps: `grounding`
            weight_decay=1e-4,
            label_smoothing=None,
            batch_size=batch_size,
            clip_norm=35.0,
            is_batch_of_all=True,
            step_clips=batch_size,
        ),
        sizes={
            "side_width": 256,
            "dropout": dropout,
            "variant": "moments" if grounding.suppression is not None else "highlights",
        },
        grounding=grounding,
    )


def _highlights(fps: float | None) -> GroundingRecipe:
    return GroundingRecipe(fps, has_columns=False, warmup_steps=50, is_of_domain=True)


R2_TUNING_PRESETS = (
    _make_preset(
        *("qvhighlights", 30, 5e-4, 128, 0.5),
        GroundingRecipe(0.5, unit_s=2.0, suppression="normal", repeats=4, fall_epoch=20),
    ),
    _make_preset(
        *("charades", 50, 2.5e-4, _BATCH, 0.35),
        GroundingRecipe(1.0, saliency_weight=0.01, unit_s=0.1, suppression="linear", fall_epoch=30),
    ),
    _make_preset("ego4d", 30, 2.5e-4, _BATCH, 0.3, GroundingRecipe(0.5, suppression="linear", fall_epoch=20)),
    _make_preset(
        *("tacos", 100, 2.5e-4, _BATCH, 0.5),
        GroundingRecipe(0.5, saliency_weight=0.05, suppression="linear", fall_epoch=50),
    ),
    _make_preset("youtube", 200, 5e-4, 4, 0.5, _highlights(None)),
    _make_preset("tvsum", 500, 5e-4, 4, 0.5, _highlights(0.5)),
)
"""Of its data sets; AdamW with torch's moments and eps decays all parameters, norms, biases and gates among them."""
