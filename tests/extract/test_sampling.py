import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4v.errors import ConfigError
from s4v.extract.decode.sampling import (
    PIXEL_EDGES,
    SAMPLINGS,
    STEPPED_SAMPLINGS,
    parse_clips,
    parse_frames,
    parse_views,
    pick_offset_frames,
    sample_clips,
    sample_uniform,
)
from s4v.store.offsets import parse_offsets


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


@pytest.mark.parametrize(
    ("name", "counts", "clips"),
    [
        ("uniform", (50, 5, 1), [[5, 15, 25, 35, 45]]),
        ("uniform", (16, 4, 2), [[1, 5, 9, 13], [3, 7, 11, 15]]),
        ("reference-k400", (50, 8, 1), [[0, 6, 12, 18, 25, 31, 37, 43]]),
        (
            "reference-k400",
            (50, 8, 4),  # starts 0, 1.75, 3.5 and 5.25, cut to integers
            [
                [0, 6, 12, 18, 25, 31, 37, 43],
                [1, 7, 13, 19, 26, 32, 38, 44],
                [3, 9, 15, 21, 28, 34, 40, 46],
                [5, 11, 17, 23, 30, 36, 42, 48],
            ],
        ),
        ("reference-k400", (3, 4, 1), [[0, 0, 1, 2]]),
        ("reference-sth", (50, 8, 1), [[3, 9, 15, 21, 27, 34, 40, 46]]),  # 24.5 is rounded to 24
        (
            "reference-sth",
            (50, 8, 2),
            [[2, 8, 14, 20, 26, 33, 39, 45], [4, 10, 16, 22, 28, 35, 41, 47]],
        ),
        ("reference-retrieval", (50, 12, 1), [[2, 6, 10, 14, 18, 22, 27, 31, 35, 39, 43, 47]]),
        ("reference-retrieval", (12, 12, 1), [[0] * 12]),
        ("dense", (300, 8, 1), [[86, 102, 118, 134, 150, 166, 182, 198]]),
        (
            "dense",
            (301, 4, 3),  # 173 free frames, starts 0, 86 and 172
            [[0, 32, 64, 96], [86, 118, 150, 182], [172, 204, 236, 268]],
        ),
        ("dense", (50, 4, 2), [[0, 32, 14, 46]] * 2),
        ("dense", (128, 5, 1), [[0, 25, 51, 76, 102]]),
    ],
)
def test_clips_are_those_of_the_formulas(name, counts, clips):
    """Worked out by hand from the reference's formulas."""
    assert SAMPLINGS[name](*counts) == clips


@given(
    name=st.sampled_from(sorted(SAMPLINGS)),
    num_frames=st.integers(1, 5000),
    num_steps=st.integers(1, 64),
    num_clips=st.integers(1, 10),
)
def test_every_clip_has_its_frames_and_all_are_there(name, num_frames, num_steps, num_clips):
    clips = SAMPLINGS[name](num_frames, num_steps, 1 if name == "reference-retrieval" else num_clips)
    assert len(clips) == (1 if name == "reference-retrieval" else num_clips)
    for clip in clips:
        assert len(clip) == num_steps
        assert all(0 <= index < num_frames for index in clip)


def test_retrieval_has_one_clip():
    with pytest.raises(ConfigError, match="reference-retrieval has one clip; found --clips 2"):
        SAMPLINGS["reference-retrieval"](50, 12, 2)


def test_clips_and_views_are_read_by_split():
    assert parse_clips("test=4,1") == {"test": 4, "": 1}
    assert parse_views("test=three, centre") == {"test": "three", "": "centre"}
    with pytest.raises(ConfigError, match=r"--clips takes a number \(1\) or one for each split"):
        parse_clips("test=two")
    with pytest.raises(ConfigError, match=r"--views takes a name \(centre\) or one for each split"):
        parse_views("test=")


@pytest.mark.parametrize("text", ["", "x", "train=", "0", "8,4", "train=8=9", "-3"])
def test_malformed_frames_option_is_refused(text):
    with pytest.raises(ConfigError, match="--frames takes a number"):
        parse_frames(text)


def sample_as_the_reference(name, num_frames, num_steps, num_clips):
    """Its validation (of one clip) and test indices, as its own NumPy expressions give them."""
    tick, step = num_frames / num_steps, float(num_frames - 1) / num_steps
    if name == "reference-k400":
        starts = np.linspace(0, tick - 1, num=num_clips, dtype=int).tolist() if num_clips > 1 else [0]
        return [[int(start + tick * x) % num_frames for x in range(num_steps)] for start in starts]
    if name == "reference-sth":
        return [
            [int(np.round(step * i)) + int(step / (num_clips + 1) * (clip + 1)) for i in range(num_steps)]
            for clip in range(num_clips)
        ]
    return [[int(tick / 2 + tick * x) for x in range(num_steps)] if num_frames > num_steps else [0] * num_steps]


@pytest.mark.parametrize("num_steps", [4, 8, 12, 16])
@pytest.mark.parametrize(
    ("name", "num_clips"),
    [
        *((name, clips) for name in ("reference-k400", "reference-sth") for clips in (1, 2, 3, 4, 10)),
        ("reference-retrieval", 1),
    ],
)
def test_every_clip_is_the_references(name, num_steps, num_clips):
    """Of videos shorter than a clip, too."""
    for num_frames in (*range(1, 4 * num_steps + 2), 99, 250, 300, 1001):
        expected = sample_as_the_reference(name, num_frames, num_steps, num_clips)
        assert SAMPLINGS[name](num_frames, num_steps, num_clips) == expected, num_frames


def test_frames_of_dist_are_its_own(data_path):
    """Of its own function; the backbone sees every second one of them."""
    cases = json.loads((data_path / "dist_frames.json").read_text())["cases"]
    assert len(cases) == 20
    for case in cases:
        expected = [clip[::2] for clip in case["dense"]]
        assert SAMPLINGS["reference-dist"](case["n"], case["T"], case["clips"]) == expected, case


def test_dense_training_rows_are_dense(make_config, tmp_path):
    config = make_config(tmp_path, tmp_path / "s.zarr", sampling="dense")
    assert (config.sampling_of("train"), config.sampling_of("val")) == ("dense", "dense")
    config = make_config(tmp_path, tmp_path / "s.zarr", sampling="reference-dist")
    assert (config.sampling_of("train"), config.sampling_of("val")) == ("uniform", "reference-dist")


def test_starts_of_short_videos_are_rounded_down():
    """Three frames for a clip of four: NumPy makes -1 of a start of -0.08, and what is added is cut towards zero."""
    assert SAMPLINGS["reference-k400"](3, 4, 4) == [[0, 0, 1, 2], *([[2, 0, 0, 1]] * 3)]


def test_one_clip_more_is_what_the_rule_makes_one_clip_of():
    for name in ("uniform", "reference-k400", "reference-sth"):
        clips = sample_clips(name, 45, 8, 2, holds_validation_clip=True)
        assert clips == [*SAMPLINGS[name](45, 8, 2), *SAMPLINGS[name](45, 8, 1)]
        assert sample_clips(name, 45, 8, 2) == clips[:2]
    assert SAMPLINGS["reference-k400"](45, 8, 4)[0] == SAMPLINGS["reference-k400"](45, 8, 1)[0]


def test_neighbours_of_tds_clip_are_its_own(data_path):
    """Of its own loaders: Something-Something's shows the ends again, Kinetics' wraps below the first frame."""
    golden = json.loads((data_path / "tds_clip_frames.json").read_text())
    rules = {"something": ("reference-sth", "clamp"), "kinetics": ("reference-k400", "wrap")}
    assert {case["n"] for case in golden["cases"]} == {8, 11, 33, 64, 250} and len(golden["cases"]) == 20
    for case in golden["cases"]:
        name, edge = rules[case["data"]]
        counts = (case["n"], golden["T"], case["clips"])
        picked = pick_offset_frames(name, *counts, parse_offsets("-2..2"), edge=edge)
        assert picked == case["neighbours"] and [frame[2] for frame in picked] == case["centres"], case


def test_half_steps_of_dist_are_its_own(data_path):
    for case in json.loads((data_path / "dist_frames.json").read_text())["cases"]:
        picked = pick_offset_frames("reference-dist", case["n"], case["T"], case["clips"], parse_offsets("0,0.5step"))
        assert [frame for pair in picked for frame in pair] == [frame for clip in case["dense"] for frame in clip], case


def test_one_store_serves_both(data_path):
    """Neighbours in frames and half steps side by side, each as it is alone."""
    counts = ("reference-dist", 250, 8, 3)
    both = pick_offset_frames(*counts, parse_offsets("-2..2,0.5step"))
    assert [frame[:5] for frame in both] == pick_offset_frames(*counts, parse_offsets("-2..2"))
    assert [[frame[2], frame[5]] for frame in both] == pick_offset_frames(*counts, parse_offsets("0,0.5step"))


@given(
    name=st.sampled_from(sorted(SAMPLINGS)),
    num_frames=st.integers(1, 2000),
    num_steps=st.integers(1, 40),
    num_clips=st.integers(1, 5),
    edge=st.sampled_from(PIXEL_EDGES),
)
def test_pixel_frames_lie_in_the_video_and_the_cached_one_is_among_them(name, num_frames, num_steps, num_clips, edge):
    num_clips = 1 if name == "reference-retrieval" else num_clips
    offsets = parse_offsets("-1024,-3,0,1,1024,-2step,0.5step,1024step")
    picked = pick_offset_frames(name, num_frames, num_steps, num_clips, offsets, edge=edge)
    assert [frame[2] for frame in picked] == [
        index for clip in SAMPLINGS[name](num_frames, num_steps, num_clips) for index in clip
    ]
    assert all(0 <= index < num_frames for frame in picked for index in frame)
    for frame in picked:
        below = frame[2] - 3
        assert frame[1] == (below if below >= 0 else below % num_frames if edge == "wrap" else 0)
        assert frame[3] == min(frame[2] + 1, num_frames - 1)


@given(
    name=st.sampled_from(sorted(STEPPED_SAMPLINGS)),
    num_frames=st.integers(1, 2000),
    num_steps=st.integers(2, 40),
    num_clips=st.integers(1, 5),
)
def test_a_whole_step_is_the_next_frame_of_the_clip(name, num_frames, num_steps, num_clips):
    num_clips = 1 if name == "reference-retrieval" else num_clips
    picked = pick_offset_frames(name, num_frames, num_steps, num_clips, parse_offsets("0,-1step,0.5step,1step"))
    is_turned = name == "reference-k400" and num_frames < num_steps  # such clips begin before the video, and turn
    for clip in range(num_clips):
        own = picked[clip * num_steps : (clip + 1) * num_steps]
        for (index, before, half, after), (later, *_) in itertools.pairwise(own):
            assert after == later or is_turned
            assert index <= half <= later or is_turned or (name == "dense" and num_frames < 128)
            assert before <= index or is_turned or (name == "dense" and num_frames < 128)


def test_a_clip_for_validation_has_steps_of_its_own():
    offsets = parse_offsets("0,0.5step")
    picked = pick_offset_frames("uniform", 80, 4, 2, offsets, holds_validation_clip=True)
    assert picked == [
        *pick_offset_frames("uniform", 80, 4, 2, offsets),
        *pick_offset_frames("uniform", 80, 4, 1, offsets),
    ]
    assert picked[8:] == [[10, 20], [30, 40], [50, 60], [70, 79]]
    assert pick_offset_frames("uniform", 80, 4, 2, offsets)[:4] == [[5, 15], [25, 35], [45, 55], [65, 75]]
