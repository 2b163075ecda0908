"""How a decoded frame becomes the picture that the backbone sees: sizes and boxes, and the one resize itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ...store.records import WHOLE, View, count_augmented
from .augmented_views import augment_views, cut_augmented, render_augmented

Size = tuple[int, int]
"""(width, height) in pixels."""

Colour = tuple[int, int, int]
BLACK: Colour = (0, 0, 0)


def _cover(width: int, height: int, box: Size) -> Size:
    """The smallest size of a frame's own shape that covers a box: of a square, its short side is the square's."""
    box_width, box_height = box
    # The other side is truncated, as torchvision's Resize does: the reference's pixels depend on it.
    if box_width * height >= box_height * width:
        return box_width, int(box_width * height / width)
    return int(box_height * width / height), box_height


def _resize_recognition(width: int, height: int, crop: Size) -> Size:
    """Short side 256 for crops of 224 pixels, in proportion for others, so that a crop sees the same share."""
    return _cover(width, height, (round(crop[0] * 256 / 224), round(crop[1] * 256 / 224)))


def _resize_something(width: int, height: int, crop: Size) -> Size:
    """320 x 256 for square crops of 224 pixels, whatever the video's shape, in proportion for other squares."""
    return round(crop[0] * 320 / 224), round(crop[1] * 256 / 224)


def _fit(width: int, height: int, box: Size) -> Size:
    """The largest size of a frame's own shape that fits into a box: nothing is cut off, and the rest is padded."""
    box_width, box_height = box
    if box_width * height <= box_height * width:
        return box_width, max(1, round(box_width * height / width))
    return max(1, round(box_height * width / height)), box_height


RESIZES: dict[str, Callable[[int, int, Size], Size]] = {
    "256": _resize_recognition,
    "256x320": _resize_something,
    "224": _cover,
    WHOLE: _fit,
}
"""By the name that `--resize` takes: (width, height, size of the crop) -> size of the whole frame before cropping.

`224` is the backbone's own preprocessing, used for retrieval and zero-shot: the frame covers the crop and no more.
"""

SQUARE_RESIZES = frozenset({"256x320"})
"""Those that bend a frame to a fixed shape, of which crops are squares."""

WHOLE_VIEWS = frozenset({"centre", "flip"})
"""Views that whole frames have: there is nothing to their left and right."""


def centre_view(width: int, height: int, resize: str, crop: Size) -> View:
    """The centre crop of a resized frame; of a whole one, its box reaches beyond the frame, which stands in the middle.

    Args:
        width: Of the upright frame, pixels.
        height: Of the upright frame, pixels.
        resize: A name in `RESIZES`.
        crop: Size of the picture that the backbone sees.

    Source:
        torchvision's CenterCrop rounds half to even: x = round((width - side) / 2).
    """
    resized_width, resized_height = RESIZES[resize](width, height, crop)
    return View(
        resized_width=resized_width,
        resized_height=resized_height,
        x=round((resized_width - crop[0]) / 2),
        y=round((resized_height - crop[1]) / 2),
        width=crop[0],
        height=crop[1],
    )


def _centre_and_mirrored(width: int, height: int, resize: str, crop: Size) -> list[View]:
    view = centre_view(width, height, resize, crop)
    return [view, replace(view, flip=True)]


def _three_crops(width: int, height: int, resize: str, crop: Size) -> list[View]:
    """Left, right and centre, as the reference tests."""
    view = centre_view(width, height, resize, crop)
    step_x, step_y = (view.resized_width - crop[0]) // 4, (view.resized_height - crop[1]) // 4
    return [replace(view, x=place * step_x, y=2 * step_y) for place in (0, 4, 2)]


VIEWS: dict[str, Callable[[int, int, str, Size], list[View]]] = {
    "centre": lambda *frame: [centre_view(*frame)],
    "flip": _centre_and_mirrored,
    "three": _three_crops,
}
"""By the name that `--views` takes: (width, height, resize, size of the crop) -> views.

Source:
    The three crops are those of https://github.com/HJYao00/Side4Video at 5d72352.
"""

NUM_VIEWS = {name: len(make(224, 224, "224", (224, 224))) for name, make in VIEWS.items()}
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


def make_views(name: str, width: int, height: int, resize: str, crop: Size, drawing: Drawing) -> list[View]:
    """The views of a row.

    Args:
        name: Of `VIEWS`, or `augment:N`.
        width: Of the upright frame, pixels.
        height: Of the upright frame, pixels.
        resize: A name in `RESIZES`.
        crop: Width and height of the picture that the backbone sees.
        drawing: Of drawn views.
    """
    if not count_augmented(name):
        return VIEWS[name](width, height, resize, crop)
    centre = centre_view(width, height, resize, crop)
    return augment_views(
        name,
        centre,
        drawing.steps,
        seed=drawing.seed,
        video_id=drawing.video_id,
        class_name=drawing.class_name,
    )


def render_view(frame: np.ndarray, view: View, padding: Colour = BLACK) -> np.ndarray:
    """Resize a frame (PIL, bicubic, antialiased), take the view's box, mirror it if the view says so.

    Args:
        frame: (H, W, 3) uint8, upright.
        view: Where to cut.
        padding: What stands where the box reaches beyond the frame.

    Returns:
        (view.height, view.width, 3) uint8, which keeps nothing of the frame.
    """
    return render_views(frame, [view], padding)[0]


def render_views(frame: np.ndarray, views: Sequence[View], padding: Colour = BLACK) -> list[np.ndarray]:
    """The views of one frame, which is resized once for all that want it in one size.

    Args:
        frame: (H, W, 3) uint8, upright.
        views: Where to cut.
        padding: What stands where a box reaches beyond the frame.

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
        box = _cut(resized[size], view, padding)
        crops.append(np.array(box[:, ::-1] if view.flip else box, order="C"))
    return crops


def _cut(picture: np.ndarray, view: View, padding: Colour) -> np.ndarray:
    """A view's box of a resized picture, (view.height, view.width, 3), not mirrored yet."""
    top, left = max(0, view.y), max(0, view.x)
    inside = picture[top : max(top, view.y + view.height), left : max(left, view.x + view.width)]
    if inside.shape[:2] == (view.height, view.width):
        return inside
    canvas = np.empty((view.height, view.width, 3), np.uint8)
    canvas[:] = padding
    canvas[top - view.y :, left - view.x :][: inside.shape[0], : inside.shape[1]] = inside
    return canvas
