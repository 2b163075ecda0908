import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4v.errors import ConfigError
from s4v.extract.sampling import parse_frames, sample_uniform


@given(num_frames=st.integers(1, 10_000), num_steps=st.integers(1, 200))
def test_uniform_indices_are_in_range_in_order_and_right_in_number(num_frames, num_steps):
    indices = sample_uniform(num_frames, num_steps)
    assert len(indices) == num_steps
    assert indices == sorted(indices)
    assert indices[0] >= 0
    assert indices[-1] < num_frames
    if num_frames >= num_steps:
        assert len(set(indices)) == num_steps, "no frame twice when there are enough"


@given(num_frames=st.integers(1, 1000), num_steps=st.integers(1, 50))
def test_uniform_takes_the_middle_of_equal_parts(num_frames, num_steps):
    for step, index in enumerate(sample_uniform(num_frames, num_steps)):
        middle = (step + 0.5) * num_frames / num_steps
        assert index <= middle < index + 1


def test_one_frame_is_repeated():
    assert sample_uniform(1, 4) == [0, 0, 0, 0]


def test_counts_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1; found 0 frames"):
        sample_uniform(0, 4)


@pytest.mark.parametrize(
    ("text", "frames"),
    [("8", {"": 8}), ("train=16,val=8", {"train": 16, "val": 8}), ("train=16, 8", {"train": 16, "": 8})],
)
def test_frames_option_is_read(text, frames):
    assert parse_frames(text) == frames


@pytest.mark.parametrize("text", ["", "x", "train=", "0", "8,4", "train=8=9", "-3"])
def test_malformed_frames_option_is_refused(text):
    with pytest.raises(ConfigError, match="--frames takes a number"):
        parse_frames(text)
