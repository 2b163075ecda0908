"""Views that are drawn: random resized crops, mirrored, made grey, through RandAugment, beside a row's centre.

What is drawn is a pure function of seed, video and number of the view, and holds for all frames of the view. A frame
is rendered from what was drawn alone, so the manifest is enough to have the pixels again.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ...errors import ConfigError
from ...store.records import AUGMENTED, Augmentation, View, count_augmented
from .image_operations import apply_operations, draw_operations

Box = tuple[int, int, int, int]
"""x, y, width, height in pixels."""

STEPS = ("randaugment", "crop", "flip", "grey")
"""What `--augmentation` takes, in the order in which it is done."""

_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)
_TRIES = 10
_FLIP_PROBABILITY = 0.5
_GREY_PROBABILITY = 0.2
_SEED_BYTES = 6
MOST_AUGMENTED = 255
"""Views of a row that may be drawn."""


def check_augmented_name(name: str) -> None:
    """Refuse a name of views that begins as one that is drawn, and is none.

    Raises:
        ConfigError: With what was expected.
    """
    if name.partition(":")[0] != AUGMENTED.rstrip(":"):
        return
    count = name.removeprefix(AUGMENTED)
    if not (count.isascii() and count.isdecimal() and 1 <= int(count) <= MOST_AUGMENTED and count[0] != "0"):
        raise ConfigError(
            f"--views {AUGMENTED}N takes a number of views from 1 to {MOST_AUGMENTED}, as in train=augment:4,centre; "
            f"found {name!r}"
        )


def check_steps(steps: Sequence[str]) -> None:
    """Refuse steps that are not known, or stand twice.

    Raises:
        ConfigError: With those that are known.
    """
    if not steps or len(set(steps)) != len(steps) or not set(steps) <= set(STEPS):
        raise ConfigError(f"--augmentation takes some of {','.join(STEPS)}; found {','.join(steps)!r}")


def seed_view(seed: int, video_id: str, view: int) -> int:
    """What a view of a video is drawn from: a number below 2^48, which the manifest records."""
    return int.from_bytes(hashlib.sha256(f"{seed}:view {view}:{video_id}".encode()).digest()[:_SEED_BYTES], "big")


def augment_views(
    name: str, centre: View, steps: Sequence[str], *, seed: int, video_id: str, class_name: str | None
) -> list[View]:
    """The centre view and the drawn ones behind it, as many as a name says.

    Args:
        name: Such as `augment:4`.
        centre: Of the row; the drawn ones are cut from frames of its size, and scaled to that of its box.
        steps: Of `STEPS`, which are done.
        seed: Of the extraction.
        video_id: Of the row.
        class_name: Of the row, where it has one.
    """
    numbers = range(1, count_augmented(name) + 1)
    seeds = [seed_view(seed, video_id, number) for number in numbers]
    return [centre, *(draw_view(centre, steps, seed=one, class_name=class_name) for one in seeds)]


def draw_view(centre: View, steps: Sequence[str], *, seed: int, class_name: str | None) -> View:
    """Draw one view; every step has numbers of its own, so leaving one out does not change another.

    Args:
        centre: Of the row: what is cut from, and how large the result is.
        steps: Of `STEPS`, which are done.
        seed: As `seed_view` gives it.
        class_name: Of the row.
    """
    size = (centre.resized_width, centre.resized_height)
    box = (centre.x, centre.y, centre.width, centre.height)
    if "crop" in steps:
        box = draw_box(*size, _stream(seed, "crop"), shape=centre.width / centre.height)
    flip = "flip" in steps and _stream(seed, "flip").random() < _FLIP_PROBABILITY
    grey = "grey" in steps and _stream(seed, "grey").random() < _GREY_PROBABILITY
    mirrored = mirror_name(class_name) if flip and class_name is not None else class_name
    return View(
        resized_width=size[0],
        resized_height=size[1],
        x=box[0],
        y=box[1],
        width=box[2],
        height=box[3],
        flip=flip,
        seed=seed,
        augmentation=Augmentation(
            scaled_width=centre.width,
            scaled_height=centre.height,
            grey=grey,
            operations=draw_operations(_stream(seed, "randaugment")) if "randaugment" in steps else (),
            class_name=None if mirrored == class_name else mirrored,
        ),
    )


def draw_box(width: int, height: int, chance: random.Random, *, shape: float = 1.0) -> Box:
    """A random box of a picture: 8 to 100 % of its area, 3/4 to 4/3 as wide as high; of ten tries the first that fits.

    Where none fits it is the largest in the middle that is neither too wide nor too high.

    Args:
        width: Of the picture.
        height: Of the picture.
        chance: Where it is drawn from.
        shape: What the box is scaled to: as wide as high by so much, which the shares above count from.

    Source:
        torchvision's RandomResizedCrop: the logarithm of the aspect is uniform.
    """
    low, high = (shape * bound for bound in _ASPECT)
    for _ in range(_TRIES):
        area = width * height * (_AREA[0] + (_AREA[1] - _AREA[0]) * chance.random())
        aspect = math.exp(math.log(low) + (math.log(high) - math.log(low)) * chance.random())
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        at_y, at_x = chance.random(), chance.random()
        if 0 < box_width <= width and 0 < box_height <= height:
            y, x = int(at_y * (height - box_height + 1)), int(at_x * (width - box_width + 1))
            return x, y, box_width, box_height
    box_width, box_height = width, height
    if width / height < low:
        box_height = max(1, round(width / low))
    elif width / height > high:
        box_width = max(1, round(height * high))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


def mirror_name(class_name: str) -> str:
    """The class that a mirror image shows: `left` and `right` change places, wherever they are words of its name.

    Source:
        Of Something-Something these are the six classes that the reference changes, by their numbers:
        https://github.com/HJYao00/Side4Video at 5d72352.
    """
    return _SIDES.sub(lambda match: _OTHER_SIDE[match.group().lower()][match.group()[0].isupper()], class_name)


_SIDES = re.compile(r"(?<![^\W_])(?:left|right)(?![^\W_])", re.IGNORECASE)
_OTHER_SIDE = {"left": ("right", "Right"), "right": ("left", "Left")}


def render_augmented(frame: np.ndarray, view: View) -> np.ndarray:
    """The pixels of a view that was drawn, from what was drawn alone.

    Args:
        frame: (H, W, 3) uint8, upright.
        view: With an augmentation.

    Returns:
        (scaled_height, scaled_width, 3) uint8.
    """
    assert view.augmentation is not None
    picture = apply_operations(Image.fromarray(frame), view.augmentation.operations)
    size = (view.resized_width, view.resized_height)
    return cut_augmented(np.asarray(picture.resize(size, Image.Resampling.BICUBIC)), view)


def cut_augmented(resized: np.ndarray, view: View) -> np.ndarray:
    """What `render_augmented` gives, of a frame that its operations were done on and that has its size.

    Args:
        resized: (resized_height, resized_width, 3) uint8.
        view: With an augmentation.
    """
    drawn = view.augmentation
    assert drawn is not None
    picture = Image.fromarray(resized).crop((view.x, view.y, view.x + view.width, view.y + view.height))
    picture = picture.resize((drawn.scaled_width, drawn.scaled_height), Image.Resampling.BILINEAR)
    if drawn.grey:
        picture = picture.convert("L").convert("RGB")
    pixels = np.asarray(picture)
    return np.array(pixels[:, ::-1] if view.flip else pixels, order="C")


def _stream(seed: int, step: str) -> random.Random:
    """Random numbers of one step: `random()` gives the same ones in every version of Python."""
    return random.Random(int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest(), "big"))
