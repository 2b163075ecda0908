"""Generated videos in which the class is a motion, and a frame by itself says nothing about it.

Every video has a way across, a way down, a growth and a turn of its own. The class decides which of the four runs, and
in which direction; the other three stand still at a random moment. So a frame from an unknown moment comes from one
distribution for all classes: place, size and angle of a shape tell nothing, only how they change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

MOTIONS = ("down", "growing", "left", "right", "shrinking", "turning-left", "turning-right", "up")
"""Class names; each is another one backwards in time."""

FRAME_PX = 64
NUM_FRAMES = 16
FPS = 8

_OVERSAMPLE = 4
_GROWTH = 1.8

# Corners, in radii. All show which way they point: a turning square looks the same four times, a disc always.
_SHAPES: dict[str, list[tuple[float, float]]] = {
    "triangle": [(0.0, -1.1), (0.65, 0.8), (-0.65, 0.8)],
    "arrow": [(0.0, -1.1), (0.8, -0.1), (0.3, -0.1), (0.3, 1.0), (-0.3, 1.0), (-0.3, -0.1), (-0.8, -0.1)],
    "corner": [(-0.8, -0.9), (-0.2, -0.9), (-0.2, 0.3), (0.8, 0.3), (0.8, 0.9), (-0.8, 0.9)],
    "half-disc": [(math.cos(step * math.pi / 8), math.sin(step * math.pi / 8) - 0.4) for step in range(9)],
    "kite": [(0.0, -1.2), (0.6, 0.3), (0.0, 0.8), (-0.6, 0.3)],
}
_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 50, 40),
    "green": (50, 170, 70),
    "blue": (50, 90, 220),
    "yellow": (235, 205, 50),
    "purple": (150, 60, 180),
    "orange": (240, 140, 30),
}
_MARK = (250, 250, 250)


@dataclass(frozen=True, slots=True)
class Scene:
    """What one video shows, drawn from its seed."""

    shape: str
    colour: str
    background: tuple[np.ndarray, np.ndarray]
    """Colours at the top left and the bottom right, (3,) each."""
    centre: tuple[float, float]
    """Of the ways across and down, pixels."""
    reach: float
    """Half the length of either way, pixels."""
    sizes: tuple[float, float]
    """Smallest and largest radius, pixels."""
    angles: tuple[float, float]
    """First and last angle of a turn to the right, radians."""
    still: tuple[float, float, float, float]
    """Moments in [0, 1] at which the ways across and down, growth and turn stand still when they do not run."""


def draw_scene(seed: int) -> Scene:
    """Draw everything but the class."""
    rng = np.random.default_rng(seed)
    reach = rng.uniform(9, 12)
    smallest = rng.uniform(8, 10)
    first = rng.uniform(0, 2 * math.pi)
    # The shape stays inside the frame wherever it is on its ways and however large it is.
    margin = reach + _GROWTH * smallest
    return Scene(
        shape=str(rng.choice(list(_SHAPES))),
        colour=str(rng.choice(list(_COLOURS))),
        background=(rng.uniform(0, 110, 3), rng.uniform(0, 110, 3)),
        centre=(rng.uniform(margin, FRAME_PX - margin), rng.uniform(margin, FRAME_PX - margin)),
        reach=reach,
        sizes=(smallest, _GROWTH * smallest),
        angles=(first, first + rng.uniform(2.6, 3.4)),
        still=(rng.uniform(), rng.uniform(), rng.uniform(), rng.uniform()),
    )


def render_motion(motion: str, seed: int) -> np.ndarray:
    """The frames of one video.

    Args:
        motion: One of `MOTIONS`.
        seed: Decides everything else.

    Returns:
        (NUM_FRAMES, FRAME_PX, FRAME_PX, 3) uint8.
    """
    scene = draw_scene(seed)
    is_backwards = motion in ("left", "up", "shrinking", "turning-left")
    frames = []
    for step in range(NUM_FRAMES):
        now = step / (NUM_FRAMES - 1)
        frames.append(_paint(scene, *place_shape(scene, motion, 1 - now if is_backwards else now)))
    noise = np.random.default_rng(seed + 1).normal(0, 2, (NUM_FRAMES, FRAME_PX, FRAME_PX, 1))
    return np.clip(np.stack(frames) + noise, 0, 255).astype(np.uint8)


def write_motion_videos(folder: Path, *, train_per_class: int, val_per_class: int, seed: int = 0) -> int:
    """Write H.264 files as SPLIT/MOTION/NUMBER.mp4, as the `folder` reader expects them; returns their number."""
    count = 0
    for split, per_class in (("train", train_per_class), ("val", val_per_class)):
        for motion in MOTIONS:
            target = folder / split / motion
            target.mkdir(parents=True, exist_ok=True)
            for number in range(per_class):
                count += 1
                encode_video(target / f"{number:04d}.mp4", render_motion(motion, seed * 1_000_003 + 2 * count))
    return count


def encode_video(path: Path, frames: np.ndarray, *, fps: int = FPS) -> None:
    """Write (n, H, W, 3) uint8 frames as one H.264 file."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "16", "preset": "veryfast"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for packet in _encode(stream, frames):
            container.mux(packet)


def _encode(stream: av.VideoStream, frames: np.ndarray) -> Iterator[av.Packet]:
    for frame in frames:
        yield from stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24"))
    yield from stream.encode()


def place_shape(scene: Scene, motion: str, now: float) -> tuple[float, float, float, float]:
    """Where a shape is at a moment of its motion.

    Args:
        scene: The video.
        motion: One of `MOTIONS`: what runs; all else stands still.
        now: From 0 (leftmost, topmost, smallest, before the turn to the right) to 1.

    Returns:
        x, y and radius in pixels, angle in radians.
    """
    across, down, growth, turn = scene.still
    if motion in ("left", "right"):
        across = now
    elif motion in ("up", "down"):
        down = now
    elif motion in ("growing", "shrinking"):
        growth = now
    else:
        turn = now
    return (
        scene.centre[0] + (2 * across - 1) * scene.reach,
        scene.centre[1] + (2 * down - 1) * scene.reach,
        scene.sizes[0] + growth * (scene.sizes[1] - scene.sizes[0]),
        scene.angles[0] + turn * (scene.angles[1] - scene.angles[0]),
    )


def _paint(scene: Scene, x: float, y: float, radius: float, angle: float) -> np.ndarray:
    ramp = np.linspace(0, 0.5, FRAME_PX)
    share = (ramp[:, None] + ramp[None])[..., None]
    background = scene.background[0] * (1 - share) + scene.background[1] * share
    cos, sin = math.cos(angle) * radius, math.sin(angle) * radius

    def place(u: float, v: float) -> tuple[float, float]:
        return (x + cos * u - sin * v) * _OVERSAMPLE, (y + sin * u + cos * v) * _OVERSAMPLE

    body = _cover(lambda draw: draw.polygon([place(u, v) for u, v in _SHAPES[scene.shape]], fill=255))
    # A mark off the centre: it shows which way a shape points even where 8-pixel patches blur its outline.
    mark = _cover(lambda draw: draw.circle(place(0.0, -0.45), 0.4 * radius * _OVERSAMPLE, fill=255))
    painted = background * (1 - body) + np.asarray(_COLOURS[scene.colour]) * body
    return painted * (1 - mark) + np.asarray(_MARK) * mark


def _cover(draw: Callable[[ImageDraw.ImageDraw], None]) -> np.ndarray:
    """Share of each pixel that a drawing covers, (H, W, 1) in [0, 1]."""
    mask = Image.new("L", (FRAME_PX * _OVERSAMPLE,) * 2)
    draw(ImageDraw.Draw(mask))
    return np.asarray(mask.resize((FRAME_PX, FRAME_PX), Image.Resampling.BOX), dtype=np.float64)[..., None] / 255
