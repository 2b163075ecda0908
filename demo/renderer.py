"""Scenes to pixels: antialiased shapes on a textured ground, with camera shake and sensor noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from .scenes import FRAME_PX, LANDMARK_COLOURS, Ground, Pose, Scene

_OVERSAMPLE = 4

_Points = list[tuple[float, float]]


# Corners in radii; what has none is round.
_CORNERS: dict[str, _Points] = {
    "bar": [(-0.36, -1.1), (0.36, -1.1), (0.36, 1.1), (-0.36, 1.1)],
    "cross": [
        (-0.26, -1.1), (0.26, -1.1), (0.26, -0.26), (1.1, -0.26), (1.1, 0.26), (0.26, 0.26),
        (0.26, 1.1), (-0.26, 1.1), (-0.26, 0.26), (-1.1, 0.26), (-1.1, -0.26), (-0.26, -0.26),
    ],
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0.0, -1.1), (1.0, 0.72), (-1.0, 0.72)],
    "block": [(-0.8, -0.95), (0.8, -0.95), (0.8, 0.95), (-0.8, 0.95)],
}  # fmt: skip
_RING_HOLE = 0.55

# A dot on the edge, dark on light colours and light on dark ones, shows which way a shape points: without it a ring
# would look the same at every angle.
_MARK_RADIUS = 0.3
_MARKS_RGB = (20, 20, 20), (245, 245, 245)
_LIGHT_OF_RGB, _DARK_BELOW = (0.299, 0.587, 0.114), 128


def paint_scene(
    scene: Scene,
    moments: np.ndarray,
    rng: np.random.Generator,
    *,
    shake_px: float = 0.7,
    noise: float = 6.0,
    with_subject: bool = True,
) -> np.ndarray:
    """Paint a scene at some moments.

    Args:
        scene: What is seen.
        moments: (n,) from 0 to 1.
        rng: For shake and noise.
        shake_px: Standard deviation of the camera's place, drawn anew for each frame, pixels.
        noise: Standard deviation of each value of the picture, of 255.
        with_subject: Whether the subject is painted.

    Returns:
        (n, FRAME_PX, FRAME_PX, 3) uint8.
    """
    shakes = rng.normal(0, shake_px, (len(moments), 2))
    whens = zip(moments.tolist(), *shakes.T.tolist(), strict=True)
    frames = np.stack([_paint(scene, *when, with_subject=with_subject) for when in whens])
    frames += noise * rng.standard_normal(frames.shape, dtype=np.float32)
    return np.clip(frames, 0, 255, out=frames).astype(np.uint8)


def halve_chroma(frame: np.ndarray) -> np.ndarray:
    """A picture, (H, W, 3) uint8, as video files hold it: each 2 x 2 pixels share one colour and keep their light."""
    light, *colours = Image.fromarray(frame).convert("YCbCr").split()
    half = (light.width // 2, light.height // 2)
    coarse = [c.resize(half, Image.Resampling.BOX).resize(light.size, Image.Resampling.NEAREST) for c in colours]
    return np.asarray(Image.merge("YCbCr", [light, *coarse]).convert("RGB"))


def _paint(scene: Scene, now: float, dx: float, dy: float, *, with_subject: bool) -> np.ndarray:
    """One frame, (FRAME_PX, FRAME_PX, 3) float32; the camera's place (dx, dy) moves all that is seen."""
    frame = _paint_ground(scene.ground, dx, dy)
    for pebble in scene.pebbles:
        x, y = ((1 - now) * a + now * b for a, b in zip(pebble.first, pebble.last, strict=True))
        _cover(frame, Pose(x + dx, y + dy, pebble.radius), (pebble.grey,) * 3, _round)
    if with_subject:
        _paint_subject(frame, scene, now, dx, dy)
    if scene.landmark is None:
        return frame
    # The landmark last: what slips behind it is hidden.
    landmark = scene.landmark_at(now)
    corners = _CORNERS.get(scene.landmark)
    place = Pose(landmark.x + dx, landmark.y + dy, landmark.radius)
    _cover(frame, place, LANDMARK_COLOURS[scene.landmark_colour], _polygon(corners) if corners else _round)
    return frame


def _paint_subject(frame: np.ndarray, scene: Scene, now: float, dx: float, dy: float) -> None:
    subject = scene.subject_at(now)
    subject = Pose(subject.x + dx, subject.y + dy, subject.radius, subject.angle)
    corners = _CORNERS.get(scene.shape)
    _cover(frame, subject, scene.rgb, _polygon(corners) if corners else _ring)
    is_dark = bool(np.dot(scene.rgb, _LIGHT_OF_RGB) < _DARK_BELOW)
    _cover(frame, _mark(subject), _MARKS_RGB[is_dark], _round)


def _mark(pose: Pose) -> Pose:
    x, y = pose.x + pose.radius * math.sin(pose.angle), pose.y - pose.radius * math.cos(pose.angle)
    return Pose(x, y, _MARK_RADIUS * pose.radius)


_Drawing = Callable[[ImageDraw.ImageDraw, float, float, Pose], None]


def _polygon(corners: _Points) -> _Drawing:
    def draw(canvas: ImageDraw.ImageDraw, x: float, y: float, pose: Pose) -> None:
        cos, sin = (_OVERSAMPLE * pose.radius * f(pose.angle) for f in (math.cos, math.sin))
        canvas.polygon([(x + cos * u - sin * v, y + sin * u + cos * v) for u, v in corners], fill=255)

    return draw


def _round(canvas: ImageDraw.ImageDraw, x: float, y: float, pose: Pose) -> None:
    canvas.circle((x, y), _OVERSAMPLE * pose.radius, fill=255)


def _ring(canvas: ImageDraw.ImageDraw, x: float, y: float, pose: Pose) -> None:
    canvas.circle((x, y), _OVERSAMPLE * pose.radius, fill=255)
    canvas.circle((x, y), _OVERSAMPLE * _RING_HOLE * pose.radius, fill=0)


def _cover(frame: np.ndarray, pose: Pose, rgb: tuple[float, ...], draw: _Drawing) -> None:
    """Paint one thing onto a frame, in the small box around it."""
    reach = math.ceil(1.2 * pose.radius) + 1
    left, top = math.floor(pose.x) - reach, math.floor(pose.y) - reach
    side = 2 * reach + 1
    mask = Image.new("L", (side * _OVERSAMPLE,) * 2)
    draw(ImageDraw.Draw(mask), (pose.x - left) * _OVERSAMPLE, (pose.y - top) * _OVERSAMPLE, pose)
    share = np.asarray(mask.resize((side, side), Image.Resampling.BOX), dtype=np.float32)[..., None] / 255
    rows, columns = (slice(max(start, 0), max(start + side, 0)) for start in (top, left))
    target = frame[rows, columns]
    share = share[max(-top, 0) :, max(-left, 0) :][: target.shape[0], : target.shape[1]]
    target += share * (np.asarray(rgb, dtype=np.float32) - target)


@cache
def _grid() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:FRAME_PX, :FRAME_PX].astype(np.float32)
    return x, y


def _paint_ground(ground: Ground, dx: float, dy: float) -> np.ndarray:
    x, y = _grid()
    x, y = x - dx, y - dy
    cos, sin = math.cos(ground.angle), math.sin(ground.angle)
    turn = 2 * math.pi / ground.period_px
    u = turn * (cos * x + sin * y) + ground.phase[0]
    v = turn * (cos * y - sin * x) + ground.phase[1]
    if ground.texture == "stripes":
        share = np.sin(u)
    elif ground.texture == "checks":
        share = np.clip(4 * np.sin(u) * np.sin(v), -1, 1)
    elif ground.texture == "dots":
        share = np.clip(4 * (np.cos(u) + np.cos(v) - 1), -1, 1)
    elif ground.texture == "grid":
        share = np.clip(5 * (np.maximum(np.cos(u), np.cos(v)) - 0.8), -1, 1)
    elif ground.texture == "waves":
        share = np.sin(u + 1.5 * np.sin(0.7 * v))
    else:
        assert ground.texture == "clouds"
        share = np.sin(0.5 * u + np.sin(0.37 * v)) * np.cos(0.31 * v + np.sin(0.43 * u))
    first, second = ground.colours.astype(np.float32)
    return first + (0.5 + 0.5 * share[..., None]) * (second - first)
