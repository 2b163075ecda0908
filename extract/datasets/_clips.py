"""How papers take clips of several data sets: in words, and as recipes of an extraction.

Source:
    HJYao00/Side4Video at 5d72352. Its training draws frames of the whole video anew in each epoch; rows of the split
    `train` cache two for each frame of a clip, from which a clip draws.
"""

from __future__ import annotations

from .contract import ExtractionRecipe

RETRIEVAL_CLIPS = "Side4Video: 12 frames, 32 words, one centre crop"
SMALL_CLIPS = "top-1 on each of the three splits, and their mean; clips as for Kinetics"

_FRAMES = 8
"""S of recognition, as released; the paper reports 16 too."""
_RETRIEVAL_FRAMES = 12


def make_test_recipe(
    name: str, told_as: str, *, clips: int, sampling: str, resize: str, holds_validation_clip: bool
) -> ExtractionRecipe:
    """Recognition as Side4Video tests it: several clips and three crops of the split that has labels, `val`."""
    return ExtractionRecipe(
        name=name,
        told_as=told_as,
        frames={"train": 2 * _FRAMES, "val": (clips + holds_validation_clip) * _FRAMES, "": _FRAMES},
        sampling=sampling,
        clips={"val": clips, "": 1},
        validation_clip=("val",) if holds_validation_clip else (),
        resize=resize,
        views={"val": "three", "": "centre"},
    )


def make_retrieval_recipe(name: str) -> ExtractionRecipe:
    """Retrieval as Side4Video trains and tests it: one clip of 12 frames, one crop."""
    return ExtractionRecipe(
        name=name,
        told_as="Side4Video's of text-video retrieval",
        frames={"train": 2 * _RETRIEVAL_FRAMES, "": _RETRIEVAL_FRAMES},
        sampling="reference-retrieval",
        resize="224",
        augmentation=("crop",),  # captions tell left from right, and colours
    )
