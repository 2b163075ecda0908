"""What a video of the small world shows: things, where they are at each moment, and how that moves.

Every video has one coloured *subject*, one *landmark* in black or white, grey *pebbles* that drift about and mean
nothing, and a textured ground. Motions come in pairs that are each other's time reversal: the second of a pair is the
first one played backwards, pose by pose, so that no bag of frames tells the two apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

FRAME_PX = 64

SHAPES = ("bar", "cross", "ring", "square", "triangle")
COLOURS: dict[str, tuple[int, int, int]] = {
    "blue": (45, 75, 225),
    "cyan": (60, 215, 225),
    "green": (40, 155, 55),
    "orange": (245, 135, 20),
    "pink": (250, 135, 190),
    "purple": (125, 45, 175),
    "red": (215, 35, 40),
    "yellow": (240, 225, 50),
}
TEXTURES = ("checks", "clouds", "dots", "grid", "stripes", "waves")
LANDMARKS = ("ball", "block")
LANDMARK_COLOURS: dict[str, tuple[int, int, int]] = {"black": (20, 20, 20), "white": (245, 245, 245)}
SIZES: dict[str, tuple[float, float]] = {"small": (7.0, 8.0), "medium": (8.5, 9.5), "big": (11.0, 12.0)}
"""Radii in pixels."""

PAIRS = (
    ("left", "right"),
    ("up", "down"),
    ("growing", "shrinking"),
    ("turning-left", "turning-right"),
    ("approaching", "parting"),
    ("hiding", "emerging"),
)
"""Motions with their time reversals. The last two pairs are relations of subject and landmark."""
MOTIONS = tuple(sorted(motion for pair in PAIRS for motion in pair))
RELATIONS = tuple(sorted(motion for pair in PAIRS[4:] for motion in pair))
REVERSED = {**dict(PAIRS), **{second: first for first, second in PAIRS}}
"""The motion that a clip shows when it is played backwards."""

_GROWTH = 1.7
_REACH_PX = (30.0, 36.0)
"""How far a thing moves."""
_GAP_PX = (22.0, 30.0)
"""How much nearer subject and landmark come to each other when they approach."""
_TILT = 0.2
"""Radians. A small ViT learns shapes that stand upright from far fewer stills than shapes at any angle."""
_MARGIN_PX = 1.0
_HIDDEN_AT = 1.0
"""How far from the landmark's centre, in its radii, the subject's centre still is when it hides deepest: about
half of it is still to be seen."""


def is_novel(colour: str, texture: str) -> bool:
    """Whether a colour and a texture are kept apart in training: a quarter of all combinations, each word in some."""
    return (list(COLOURS).index(colour) + TEXTURES.index(texture)) % 4 == 0


@dataclass(frozen=True, slots=True)
class Pose:
    """Where a thing is."""

    x: float
    y: float
    radius: float
    angle: float = 0.0
    """Radians, clockwise."""


@dataclass(frozen=True, slots=True)
class Ground:
    """A textured background: a pattern between two muted colours."""

    texture: str
    colours: np.ndarray
    """(2, 3) from 0 to 255."""
    period_px: float
    angle: float
    phase: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Pebble:
    """A grey distractor that drifts in a straight line."""

    first: tuple[float, float]
    last: tuple[float, float]
    radius: float
    grey: int


@dataclass(frozen=True, slots=True)
class Scene:
    """One video before it is painted."""

    motion: str
    shape: str
    colour: str
    rgb: tuple[float, float, float]
    """The colour as it looks here."""
    size: str | None
    """A key of `SIZES`; None where the size is what changes."""
    first: Pose
    """The subject at the start of the motion's forward half of the pair ..."""
    last: Pose
    """... and at its end."""
    landmark: str | None
    """None where there is none: only in stills."""
    landmark_colour: str
    landmark_first: Pose
    """Like the subject's; most landmarks stand still ..."""
    landmark_last: Pose
    """... but what approaches is met half way."""
    pebbles: tuple[Pebble, ...]
    ground: Ground

    @property
    def is_backwards(self) -> bool:
        """Whether the motion is the second of its pair."""
        return any(self.motion == second for _, second in PAIRS)

    def subject_at(self, now: float) -> Pose:
        """The subject's pose at a moment from 0 to 1 of the video."""
        return self._between(self.first, self.last, now)

    def landmark_at(self, now: float) -> Pose:
        """The landmark's pose at a moment from 0 to 1 of the video."""
        return self._between(self.landmark_first, self.landmark_last, now)

    def _between(self, first: Pose, last: Pose, now: float) -> Pose:
        share = 1 - now if self.is_backwards else now
        names = ("x", "y", "radius", "angle")
        return Pose(*((1 - share) * getattr(first, name) + share * getattr(last, name) for name in names))


def draw_scene(
    rng: np.random.Generator,
    *,
    motion: str,
    shape: str,
    kind: Literal["known", "novel"] = "known",
    num_pebbles: int = 2,
    contrast: float = 1.0,
    with_landmark: bool = True,
    colours: Sequence[str] = tuple(COLOURS),
) -> Scene:
    """Draw all that motion and shape leave open.

    Args:
        rng: The source of chance.
        motion: One of `MOTIONS`.
        shape: One of `SHAPES`.
        kind: Combinations of colour and texture that training shows, or those that it never does.
        num_pebbles: Distractors.
        contrast: Of the ground's texture; 1 is usual.
        with_landmark: Whether there is one; relations need it.
        colours: To choose from.
    """
    assert motion in MOTIONS and shape in SHAPES
    assert with_landmark or motion not in RELATIONS
    pairs = [(c, t) for c in colours for t in TEXTURES if is_novel(c, t) == (kind == "novel")]
    colour, texture = pairs[rng.integers(len(pairs))]
    size = None if motion in ("growing", "shrinking") else list(SIZES)[rng.integers(len(SIZES))]
    landmark_radius = rng.uniform(8.5, 10.5)
    while (placed := _place(rng, motion, size, landmark_radius)) is None:
        pass
    (first, last), (landmark_first, landmark_last) = placed
    return Scene(
        motion=motion,
        shape=shape,
        colour=colour,
        rgb=tuple(np.clip(np.asarray(COLOURS[colour]) + rng.uniform(-10, 10, 3), 0, 255).tolist()),
        size=size,
        first=first,
        last=last,
        landmark=LANDMARKS[rng.integers(len(LANDMARKS))] if with_landmark else None,
        landmark_colour=list(LANDMARK_COLOURS)[rng.integers(len(LANDMARK_COLOURS))],
        landmark_first=landmark_first,
        landmark_last=landmark_last,
        pebbles=tuple(_draw_pebble(rng) for _ in range(num_pebbles)),
        ground=_draw_ground(rng, texture, contrast),
    )


_Way = tuple[Pose, Pose]
"""First and last pose of a thing."""


def _place(rng: np.random.Generator, motion: str, size: str | None, landmark_radius: float) -> tuple[_Way, _Way] | None:
    """The ways of subject and landmark; None where they do not fit into the frame."""
    low, high = SIZES[size] if size else SIZES["small"]
    radius = rng.uniform(low, high)
    angle = rng.uniform(-_TILT, _TILT)
    first = last = Pose(*_draw_inside(rng, radius), radius, angle)
    landmark_first = landmark_last = Pose(*_draw_inside(rng, landmark_radius), landmark_radius)
    reach = rng.uniform(*_REACH_PX)
    heading = rng.uniform(0, 2 * math.pi)
    touching = radius + landmark_radius + _MARGIN_PX

    def beside(place: Pose, distance: float) -> tuple[float, float]:
        return place.x + distance * math.cos(heading), place.y + distance * math.sin(heading)

    if motion in ("left", "right"):
        last = Pose(first.x - reach, first.y, radius, angle)
    elif motion in ("up", "down"):
        last = Pose(first.x, first.y - reach, radius, angle)
    elif motion in ("growing", "shrinking"):
        last = Pose(first.x, first.y, _GROWTH * radius, angle)
    elif motion in ("turning-left", "turning-right"):
        turn = rng.uniform(0.75, 1.0)
        first, last = Pose(first.x, first.y, radius, turn), Pose(first.x, first.y, radius, -turn)
    elif motion in ("approaching", "parting"):
        # Both move: else it would be a plain move that happens to lead that way.
        gap = rng.uniform(*_GAP_PX)
        landmark_last = Pose(*beside(landmark_first, gap / 2), landmark_radius)
        first = Pose(*beside(landmark_first, touching + gap), radius, angle)
        last = Pose(*beside(landmark_last, touching), radius, angle)
    else:
        first = Pose(*beside(landmark_first, touching + rng.uniform(3, 7)), radius, angle)
        last = Pose(*beside(landmark_first, _HIDDEN_AT * landmark_radius), radius, angle)
    if not all(map(_is_inside, (first, last, landmark_first, landmark_last))):
        return None
    if motion not in RELATIONS and not _is_clear(first, last, landmark_first):
        return None
    return (first, last), (landmark_first, landmark_last)


def _draw_inside(rng: np.random.Generator, radius: float) -> tuple[float, float]:
    room = radius + _MARGIN_PX
    return rng.uniform(room, FRAME_PX - room), rng.uniform(room, FRAME_PX - room)


def _is_inside(pose: Pose) -> bool:
    room = pose.radius + _MARGIN_PX
    return room <= pose.x <= FRAME_PX - room and room <= pose.y <= FRAME_PX - room


def _is_clear(first: Pose, last: Pose, landmark: Pose) -> bool:
    """Whether the circles around subject and landmark stay apart all the way."""
    for share in np.linspace(0, 1, 9):
        x, y = first.x + share * (last.x - first.x), first.y + share * (last.y - first.y)
        if math.hypot(x - landmark.x, y - landmark.y) < max(first.radius, last.radius) + landmark.radius + _MARGIN_PX:
            return False
    return True


def _draw_pebble(rng: np.random.Generator) -> Pebble:
    middle, drift = rng.uniform(0, FRAME_PX, 2), rng.uniform(-6, 6, 2)
    # About the middle of the way: if all began inside the frame and some ended outside, a pebble that is gone would
    # tell late frames from early ones.
    return Pebble(tuple(middle - drift), tuple(middle + drift), rng.uniform(2.0, 3.5), int(rng.choice([60, 190])))


def _draw_ground(rng: np.random.Generator, texture: str, contrast: float) -> Ground:
    middle = rng.uniform(85, 165) + rng.uniform(-14, 14, 3)
    swing = contrast * rng.uniform(14, 30) * rng.choice([-1, 1]) + rng.uniform(-8, 8, 3)
    return Ground(
        texture=texture,
        colours=np.clip(np.stack([middle - swing, middle + swing]), 0, 255),
        period_px=rng.uniform(8, 16),
        angle=rng.uniform(0, math.pi),
        phase=(rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi)),
    )
