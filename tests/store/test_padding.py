"""Which patches are padding: compared with a picture that is drawn and looked at."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from s4v.extract.decode.views import VIEWS, centre_view, render_view
from s4v.store.padding import find_padding
from s4v.store.records import View

SIDES = st.integers(1, 400)


def brute_force_padding(view, patch_size):
    """The same by drawing: a white picture on a black canvas, patch by patch."""
    frame = np.full((view.resized_height, view.resized_width, 3), 255, np.uint8)
    drawn = render_view(frame, view)[:, :, 0]
    rows, columns = (side // patch for side, patch in zip(drawn.shape, patch_size, strict=True))
    cut = drawn[: rows * patch_size[0], : columns * patch_size[1]]
    return ~cut.reshape(rows, patch_size[0], columns, patch_size[1]).any(axis=(1, 3)).reshape(-1)


@given(width=SIDES, height=SIDES, name=st.sampled_from(["centre", "flip"]), patch=st.sampled_from([(8, 8), (14, 7)]))
def test_padding_is_where_no_pixel_of_the_picture_is(width, height, name, patch):
    crop = (18 * patch[1], 10 * patch[0])
    for view in VIEWS[name](width, height, "whole", crop):
        assert np.array_equal(find_padding(view, patch), brute_force_padding(view, patch))
        assert view.resized_width <= crop[0] and view.resized_height <= crop[1], "all of the frame is there"
        assert view.resized_width == crop[0] or view.resized_height == crop[1], "as large as it can be"
        spare = (view.width - view.resized_width, view.height - view.resized_height)
        assert abs(-2 * view.x - spare[0]) <= 2 and abs(-2 * view.y - spare[1]) <= 2, "in the middle"


@given(
    box=st.tuples(st.integers(-40, 40), st.integers(-40, 40), st.integers(8, 60), st.integers(8, 60)),
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    flip=st.booleans(),
)
def test_a_box_that_reaches_beyond_its_frame_is_padded_there(box, size, flip):
    x, y, width, height = box
    view = View(resized_width=size[0], resized_height=size[1], x=x, y=y, width=width, height=height, flip=flip)
    frame = np.random.default_rng(0).integers(1, 256, (size[1], size[0], 3), dtype=np.uint8)
    seen = render_view(frame, view, (7, 8, 9))
    expected = np.empty((height, width, 3), np.uint8)
    for row in range(height):
        for column in range(width):
            there = 0 <= row + y < size[1] and 0 <= column + x < size[0]
            expected[row, column] = frame[row + y, column + x] if there else (7, 8, 9)
    assert np.array_equal(seen, expected[:, ::-1] if flip else expected)
    whole_patches = view.width % 8 == 0 and view.height % 8 == 0
    if whole_patches:
        assert np.array_equal(find_padding(view, (8, 8)), brute_force_padding(view, (8, 8)))


def test_the_view_says_where_the_picture_is():
    tall = centre_view(64, 96, "whole", (144, 80))
    assert (tall.resized_width, tall.resized_height, tall.x, tall.y) == (53, 80, -46, 0)
    assert (tall.width, tall.height) == (144, 80)
    padding = find_padding(tall, (8, 8)).reshape(10, 18)
    # The picture covers columns 46 to 98 of 144: patches 5 to 12.
    assert (~padding).all(axis=0).tolist() == [5 <= column <= 12 for column in range(18)]
