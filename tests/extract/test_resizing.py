import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from s4v.extract.decode.views import NUM_VIEWS, RESIZES, VIEWS, centre_view, render_view

SIDES = st.integers(16, 500)
CROPPED = sorted({*RESIZES} - {"whole"})


@given(width=SIDES, height=SIDES, resize=st.sampled_from(CROPPED), crop=st.sampled_from([64, 224]))
def test_view_lies_inside_the_resized_frame(width, height, resize, crop):
    view = centre_view(width, height, resize, (crop, crop))
    assert 0 <= view.x <= view.resized_width - crop
    assert 0 <= view.y <= view.resized_height - crop
    assert min(view.resized_width, view.resized_height) == (crop if resize == "224" else round(crop * 256 / 224))


@given(width=SIDES, height=SIDES, resize=st.sampled_from(CROPPED), name=st.sampled_from(sorted(VIEWS)))
def test_all_views_lie_inside_the_resized_frame(width, height, resize, name):
    views = VIEWS[name](width, height, resize, (224, 224))
    assert len(views) == NUM_VIEWS[name]
    for view in views:
        assert 0 <= view.x <= view.resized_width - 224
        assert 0 <= view.y <= view.resized_height - 224


@given(width=SIDES, height=SIDES, resize=st.sampled_from(["256", "224"]), crop=st.tuples(SIDES, SIDES))
def test_a_crop_of_any_shape_lies_inside_the_smallest_frame_that_covers_it(width, height, resize, crop):
    box = crop if resize == "224" else tuple(round(side * 256 / 224) for side in crop)
    for name in VIEWS:
        for view in VIEWS[name](width, height, resize, crop):
            assert (view.width, view.height) == crop
            assert 0 <= view.x <= view.resized_width - crop[0] and 0 <= view.y <= view.resized_height - crop[1]
            sizes = (view.resized_width, view.resized_height)
            assert all(size >= side for size, side in zip(sizes, box, strict=True))
            assert any(size == side for size, side in zip(sizes, box, strict=True)), "no larger than it must be"
            ratio = view.resized_width * height / (view.resized_height * width)
            assert ratio == pytest.approx(1, abs=1 / min(sizes) + 1 / min(sizes) ** 2), "of the frame's own shape"


def test_a_wide_crop_of_a_tall_frame_is_its_middle():
    view = centre_view(240, 320, "224", (288, 96))
    assert (view.resized_width, view.resized_height) == (288, 384)
    assert (view.x, view.y, view.width, view.height) == (0, 144, 288, 96)


def test_three_crops_are_left_right_and_centre():
    boxes = [(view.x, view.y) for view in VIEWS["three"](340, 256, "256", (224, 224))]
    assert boxes == [(0, 16), (116, 16), (58, 16)]
    sizes = {(view.resized_width, view.resized_height) for view in VIEWS["three"](340, 256, "256x320", (224, 224))}
    assert sizes == {(320, 256)}
    tall = [(view.x, view.y) for view in VIEWS["three"](256, 340, "256", (224, 224))]
    assert tall == [(0, 58), (32, 58), (16, 58)], "of a tall video too the crops stand side by side, as the reference's"


def test_a_mirrored_view_is_the_mirror_image():
    frame = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    plain, mirrored = (render_view(frame, view) for view in VIEWS["flip"](320, 240, "256", (224, 224)))
    assert np.array_equal(plain[:, ::-1], mirrored)


@pytest.mark.parametrize("size", [(340, 256), (256, 340), (426, 240), (568, 320), (641, 333), (224, 224), (50, 50)])
@pytest.mark.parametrize(("resize", "short"), [("256", 256), ("224", 224)])
def test_pixels_equal_torchvision_on_pil_images(size, resize, short):
    """The reference resizes PIL images with torchvision, bicubic, and crops the centre."""
    width, height = size
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = CenterCrop(224)(Resize(short, InterpolationMode.BICUBIC)(Image.fromarray(frame)))
    ours = render_view(frame, centre_view(width, height, resize, (224, 224)))
    assert np.array_equal(ours, np.asarray(expected))
