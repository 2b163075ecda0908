"""How a decoded frame becomes the square that the backbone sees: sizes and boxes, and the one resize itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ...store.records import View, count_augmented
from .augmented_views import augment_views, cut_augmented, render_augmented

Size = tuple[int, int]
"""(width, height) in pixels."""


def _short_side(width: int, height: int, side: int) -> Size:
    # The long side is truncated, as torchvision's Resize does: the reference's pixels depend on it.
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def _resize_recognition(width: int, height: int, crop_px: int) -> Size:
    """Short side 256 for crops of 224 pixels, in proportion for others, so that a crop sees the same share."""
    return _short_side(width, height, round(crop_px * 256 / 224))


def _resize_own(width: int, height: int, crop_px: int) -> Size:
    """Short side equal to the crop: the backbone's own preprocessing, used for retrieval and zero-shot."""
    return _short_side(width, height, crop_px)


def _resize_something(width: int, height: int, crop_px: int) -> Size:
    """320 x 256 for crops of 224 pixels, whatever the video's shape, in proportion for others."""
    return round(crop_px * 320 / 224), round(crop_px * 256 / 224)


RESIZES: dict[str, Callable[[int, int, int], Size]] = {
    "256": _resize_recognition,
    "256x320": _resize_something,
    "224": _resize_own,
}
"""By the name that `--resize` takes: (width, height, side of the crop) -> size of the whole frame before cropping."""


def centre_view(width: int, height: int, resize: str, crop_px: int) -> View:
    """The centre crop of a resized frame.

    Args:
        width: Of the upright frame, pixels.
        height: Of the upright frame, pixels.
        resize: A name in `RESIZES`.
        crop_px: Side of the square that the backbone sees.

    Source:
        torchvision's CenterCrop rounds half to even: x = round((width - side) / 2).
    """
    resized_width, resized_height = RESIZES[resize](width, height, crop_px)
    return View(
        resized_width=resized_width,
        resized_height=resized_height,
        x=round((resized_width - crop_px) / 2),
        y=round((resized_height - crop_px) / 2),
        width=crop_px,
        height=crop_px,
    )


def _centre_and_mirrored(width: int, height: int, resize: str, crop_px: int) -> list[View]:
    view = centre_view(width, height, resize, crop_px)
    return [view, replace(view, flip=True)]


def _three_crops(width: int, height: int, resize: str, crop_px: int) -> list[View]:
    """Left, right and centre, as the reference tests."""
    view = centre_view(width, height, resize, crop_px)
    step_x, step_y = (view.resized_width - crop_px) // 4, (view.resized_height - crop_px) // 4
    return [replace(view, x=place * step_x, y=2 * step_y) for place in (0, 4, 2)]


VIEWS: dict[str, Callable[[int, int, str, int], list[View]]] = {
    "centre": lambda *frame: [centre_view(*frame)],
    "flip": _centre_and_mirrored,
    "three": _three_crops,
}
"""By the name that `--views` takes: (width, height, resize, side of the crop) -> views.

Source:
    The three crops are those of https://github.com/HJYao00/Side4Video at 5d72352.
"""

NUM_VIEWS = {name: len(make(224, 224, "224", 224)) for name, make in VIEWS.items()}
"""How many there are of each."""


def count_views(name: str) -> int:
    """How many views a name makes, of `VIEWS` or `augment:N`."""
    return 1 + count_augmented(name) if count_augmented(name) else NUM_VIEWS[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """What the drawn views of a row depend on, beside the size of its frames."""

    steps: tuple[str, ...]
    """Of `augmented_views.STEPS`."""
    seed: int
    """Of the extraction."""
    video_id: str
    class_name: str | None


def make_views(name: str, width: int, height: int, resize: str, crop_px: int, drawing: Drawing) -> list[View]:
    """The views of a row.

    Args:
        name: Of `VIEWS`, or `augment:N`.
        width: Of the upright frame, pixels.
        height: Of the upright frame, pixels.
        resize: A name in `RESIZES`.
        crop_px: Side of the square that the backbone sees.
        drawing: Of drawn views.
    """
    if not count_augmented(name):
        return VIEWS[name](width, height, resize, crop_px)
    centre = centre_view(width, height, resize, crop_px)
    return augment_views(
        name,
        centre,
        drawing.steps,
        seed=drawing.seed,
        video_id=drawing.video_id,
        class_name=drawing.class_name,
    )


def render_view(frame: np.ndarray, view: View) -> np.ndarray:
    """Resize a frame (PIL, bicubic, antialiased), take the view's box, mirror it if the view says so.

    Args:
        frame: (H, W, 3) uint8, upright.
        view: Where to cut.

    Returns:
        (view.height, view.width, 3) uint8, which keeps nothing of the frame.
    """
    return render_views(frame, [view])[0]


def render_views(frame: np.ndarray, views: Sequence[View]) -> list[np.ndarray]:
    """The views of one frame, which is resized once for all that want it in one size.

    Args:
        frame: (H, W, 3) uint8, upright.
        views: Where to cut.

    Returns:
        (view.height, view.width, 3) uint8 of each view; they keep nothing of the frame.
    """
    resized: dict[Size, np.ndarray] = {(frame.shape[1], frame.shape[0]): frame}
    crops = []
    for view in views:
        if view.augmentation is not None and view.augmentation.operations:
            crops.append(render_augmented(frame, view))
            continue
        size = (view.resized_width, view.resized_height)
        if size not in resized:
            resized[size] = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))
        if view.augmentation is not None:
            crops.append(cut_augmented(resized[size], view))
            continue
        box = resized[size][view.y : view.y + view.height, view.x : view.x + view.width]
        crops.append(np.array(box[:, ::-1] if view.flip else box, order="C"))
    return crops
