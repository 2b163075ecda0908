"""What is said of a video: partial descriptions in many wordings."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from .scenes import COLOURS, LANDMARK_COLOURS, LANDMARKS, MOTIONS, RELATIONS, SHAPES, Scene

VERBS: dict[str, tuple[str, ...]] = {
    "left": ("moves left", "slides to the left", "goes left", "drifts leftwards"),
    "right": ("moves right", "slides to the right", "goes right", "drifts rightwards"),
    "up": ("moves up", "rises", "goes up", "climbs upwards"),
    "down": ("moves down", "sinks", "goes down", "falls downwards"),
    "growing": ("grows", "gets bigger", "swells", "becomes larger"),
    "shrinking": ("shrinks", "gets smaller", "dwindles", "becomes smaller"),
    "turning-left": ("turns left", "turns counterclockwise", "rotates anticlockwise", "spins to the left"),
    "turning-right": ("turns right", "turns clockwise", "rotates clockwise", "spins to the right"),
    "approaching": ("approaches {}", "moves towards {}", "comes closer to {}", "draws near to {}"),
    "parting": ("leaves {}", "moves away from {}", "parts from {}", "gets away from {}"),
    "hiding": ("slips behind {}", "hides behind {}", "disappears behind {}", "goes behind {}"),
    "emerging": ("emerges from behind {}", "comes out from behind {}", "appears from behind {}", "shows up behind {}"),
}  # fmt: skip
"""Wordings of each motion; {} stands for the landmark."""

_TEXTURE_WORDS = {
    "checks": "a checkered ground",
    "clouds": "a cloudy ground",
    "dots": "a dotted ground",
    "grid": "a grid",
    "stripes": "a striped ground",
    "waves": "a wavy ground",
}
_SIZE_WORDS = {"small": ("small", "little"), "big": ("big", "large")}
_FRAMES = ("a photo of {}", "a video of {}", "here is {}", "we see {}")
_FRAMED_SHARE = 0.4
_BESIDE = ("and there is", "where there is")

Meaning = Mapping[str, str]
"""What is said, by part: colour, shape, size, motion, landmark (its colour and kind), texture; not all are named."""


def describe_scene(scene: Scene) -> Meaning:
    """All that could be said of a scene."""
    meaning = {
        "colour": scene.colour,
        "shape": scene.shape,
        "motion": scene.motion,
        "texture": scene.ground.texture,
    }
    if scene.landmark is not None:
        meaning["landmark"] = f"{scene.landmark_colour} {scene.landmark}"
    if scene.size is not None:
        meaning["size"] = scene.size
    return MappingProxyType(meaning)


def word_caption(meaning: Meaning, rng: np.random.Generator) -> tuple[str, Meaning]:
    """Put a meaning into words; the shape is always named and so is the motion, the rest by chance.

    Args:
        meaning: What may be said; without a motion, the caption names none.
        rng: The source of chance.

    Returns:
        The caption and what it says.
    """
    said = {name: meaning[name] for name in ("shape", "motion") if name in meaning}
    subject = meaning["shape"]
    if rng.random() < 0.85:
        said["colour"] = meaning["colour"]
        subject = f"{meaning['colour']} {subject}"
    size = meaning.get("size")
    if size in _SIZE_WORDS and rng.random() < 0.7:
        said["size"] = size
        subject = f"{_pick(_SIZE_WORDS[size], rng)} {subject}"
    text = with_article(subject)
    frame = _pick(_FRAMES, rng) if rng.random() < _FRAMED_SHARE else "{}"
    motion = meaning.get("motion")
    is_relation = motion in RELATIONS
    landmark = meaning.get("landmark")
    if motion is not None:
        # "a red ring moves left", but "a photo of a red ring that moves left"
        text = f"{text}{' that' if frame != '{}' or rng.random() < 0.2 else ''} {_pick(VERBS[motion], rng)}"
    if is_relation:
        other = "something"
        if landmark is not None and rng.random() < 0.85:
            said["landmark"] = landmark
            other = with_article(landmark)
        text = text.format(other)
    elif landmark is not None and rng.random() < 0.4:
        said["landmark"] = landmark
        text = f"{text} {_pick(_BESIDE, rng)} {with_article(landmark)}"
    if "texture" in meaning and rng.random() < 0.3:
        said["texture"] = meaning["texture"]
        text = f"{text} on {_TEXTURE_WORDS[meaning['texture']]}"
    return frame.format(text), MappingProxyType(said)


def prompt_motion(shape: str, motion: str, colour: str | None = None) -> str:
    """The plainest caption of a shape (of a colour) and its motion, for asking: `a ring approaches something`."""
    subject = f"{colour} {shape}" if colour else shape
    return f"{with_article(subject)} {VERBS[motion][0].format('something')}"


def agrees(said: Meaning, scene: Meaning, *, without: tuple[str, ...] = ()) -> bool:
    """Whether all that a caption says is true of a scene, some parts left aside."""
    return all(scene.get(name) == value for name, value in said.items() if name not in without)


def with_article(noun: str) -> str:
    """`a red ring`, `an orange bar`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def list_vocabulary() -> list[str]:
    """Texts that between them hold every word of a caption."""
    nouns = (*SHAPES, *COLOURS, *LANDMARKS, *LANDMARK_COLOURS, *sum(_SIZE_WORDS.values(), ()))
    verbs = [f"that {verb.format('something')}" for motion in MOTIONS for verb in VERBS[motion]]
    grounds = [f"on {words}" for words in _TEXTURE_WORDS.values()]
    return [*map(with_article, nouns), *verbs, *grounds, *(frame.format("") for frame in _FRAMES), *_BESIDE]


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]
