import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4v.train.tasks.grounding_postprocess import (
    MOST_MOMENTS,
    Suppression,
    clean_moments,
    find_moments,
    merge_moments,
    merge_saliency,
    plan_parts,
    spread_levels,
    suppress,
    to_probabilities,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "data/r2_tuning/postprocess.json").read_text())
NAMES = {"type": "kind", "thres": "threshold", "sigma": "sigma"}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_moments_are_the_references_bit_by_bit(case):
    how = case["nms"] and Suppression(**{NAMES[key]: value for key, value in case["nms"].items()})
    cleaned = clean_moments(np.array(case["moments"]), case["duration"], unit_s=case["unit"], suppression=how)
    assert cleaned.dtype == np.float32
    found = cleaned[cleaned[:, 2] > 0]
    np.testing.assert_array_equal(found, np.array(case["result"], np.float32).reshape(-1, 3))
    assert sorted(cleaned[cleaned[:, 2] == 0].tolist()) == np.array(case["zeros"], np.float32).tolist()


def draw_moments(rng, count, duration=20.0, levels=None):
    """Moments (count, 3), some of them beyond the video; with `levels`, on a grid with equal scores and no length."""
    ends = np.sort(rng.uniform(-3, duration + 3, (count, 2)), axis=1)
    scores = rng.uniform(0.01, 1, count)
    if levels is not None:
        ends, scores = np.rint(ends), rng.integers(1, levels + 1, count) / levels
    return np.column_stack([ends, scores]).astype(np.float32)


def suppress_plainly(moments, how):
    """One pair after the other, in the order of the best of the rest."""
    rest, done = [list(map(np.float32, row)) for row in moments], []
    while rest:
        best = max(range(len(rest)), key=lambda place: (rest[place][2], -place))
        first = rest.pop(best)
        done.append(first)
        for other in rest:
            common = max(min(first[1], other[1]) - max(first[0], other[0]), np.float32(0))
            union = (first[1] - first[0]) + (other[1] - other[0]) - common
            overlap = common / union if union > 0 else np.float32(0)
            if how.kind == "normal":
                other[2] = np.float32(0) if overlap >= np.float32(how.threshold) else other[2]
            elif how.kind == "linear":
                other[2] *= np.float32(1) - overlap
            else:
                other[2] *= np.float32(np.exp(float(-(overlap * overlap) / np.float32(how.sigma))))
    return np.array(done, np.float32).reshape(-1, 3)


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(0, 12),
    levels=st.sampled_from([None, 2, 10]),
    how=st.sampled_from([Suppression(kind="normal"), Suppression(kind="linear"), Suppression(kind="gaussian")]),
)
def test_suppression_is_what_one_pair_after_the_other_gives(seed, count, levels, how):
    moments = draw_moments(np.random.default_rng(seed), count, levels=levels)
    np.testing.assert_array_equal(suppress(moments, how), suppress_plainly(moments, how))


def test_two_moments_of_no_length_leave_each_other_alone():
    moments = np.array([[4, 4, 0.9], [4, 4, 0.8], [0, 8, 0.7]])
    for kind in ("normal", "linear", "gaussian"):
        cleaned = clean_moments(moments, 10.0, suppression=Suppression(kind=kind))
        np.testing.assert_array_equal(cleaned, moments.astype(np.float32))


@given(seed=st.integers(0, 10**6), count=st.integers(0, 80), unit=st.sampled_from([None, 0.1, 2]))
def test_clean_moments_lie_in_the_video_best_first_and_are_fifty_at_most(seed, count, unit):
    moments = draw_moments(np.random.default_rng(seed), count)
    cleaned = clean_moments(moments, 17.3, unit_s=unit, suppression=Suppression(kind="linear"))
    assert len(cleaned) == min(count, MOST_MOMENTS)
    assert (cleaned[:, 0] >= 0).all() and (cleaned[:, 0] <= cleaned[:, 1]).all()
    assert (cleaned[:, 1] <= np.float32(17.3) + (unit or 0)).all(), "half a unit beyond, where rounding goes up"
    assert (np.diff(cleaned[:, 2]) <= 0).all()
    again = clean_moments(cleaned, 17.3)
    np.testing.assert_array_equal(again[:, 2], cleaned[:, 2])


def test_points_become_moments():
    found = find_moments(
        points=np.array([4, 8]),
        strides=np.array([1, 4]),
        offsets=np.array([[1.0, 2.0], [0.5, 1.5]]),
        logits=np.array([0.0, np.log(3.0)]),
        fps=0.5,
    )
    # (8 - 0.5 * 4) / 0.5 = 12 and (8 + 1.5 * 4) / 0.5 = 28, sigmoid(ln 3) = 3/4; (4 - 1) / 0.5 = 6, (4 + 2) / 0.5 = 12.
    np.testing.assert_allclose(found, [[12, 28, 0.75], [6, 12, 0.5]], rtol=1e-6)
    many = find_moments(np.arange(70), np.ones(70), np.ones((70, 2)), np.arange(70) / 10, 1.0)
    assert many.shape == (50, 3) and many.dtype == np.float32
    assert many[:, 0].tolist() == [point - 1 for point in range(69, 19, -1)]


def test_extreme_logits_are_probabilities():
    with np.errstate(all="raise", under="ignore"):
        assert to_probabilities(np.array([-1000.0, 0.0, 1000.0])).tolist() == [0.0, 0.5, 1.0]


def test_levels_are_spread_over_frames():
    # 11 frames: 5 cells twice each and the last once more; 2 cells five times each and the last once more; 1 cell.
    two, four = np.array([1, 5, 2, 0, 3]), np.array([2, 4])
    expected = [2, 2, 5, 5, 2, 4, 4, 4, 4, 4, 4]
    assert spread_levels([two, four], 11).tolist() == expected
    assert spread_levels([two, four, np.array([3])], 11).tolist() == np.maximum(expected, 3).tolist()
    cosines = np.linspace(-1, 1, 11)
    np.testing.assert_allclose(spread_levels([two, four], 11, cosines), expected * cosines.astype(np.float32))


@given(num_frames=st.integers(1, 5000), most=st.integers(2, 1100))
def test_parts_cover_a_video_and_overlap_by_half(num_frames, most):
    parts = plan_parts(num_frames, most)
    assert parts[0][0] == 0 and parts[-1][1] == num_frames
    assert {end - start for start, end in parts} == {min(num_frames, most)}
    steps = np.diff([start for start, _ in parts])
    assert (steps <= most // 2).all() and (steps > 0).all()


def test_a_moment_of_two_parts_is_one():
    # Seconds 30 to 40 of a video, seen by a part from 0 on and by one from 25 on, which also sees 50 to 60.
    parts = [np.array([[30, 40, 0.8]]), np.array([[5, 15, 0.9], [25, 35, 0.5]])]
    merged = merge_moments(parts, [0, 25], 58.0, suppression=Suppression(kind="normal"))
    np.testing.assert_allclose(merged, [[30, 40, 0.9], [50, 58, 0.5], [30, 40, 0]], rtol=1e-6)


@given(seed=st.integers(0, 10**6))
def test_one_part_is_the_video(seed):
    moments = draw_moments(np.random.default_rng(seed), 20)
    how = Suppression(kind="linear")
    merged = merge_moments([moments], [0.0], 20.0, unit_s=2, suppression=how)
    np.testing.assert_array_equal(merged, clean_moments(moments, 20.0, unit_s=2, suppression=how))


def test_saliency_of_parts_is_their_mean():
    merged = merge_saliency([np.array([1.0, 2.0, 3.0]), np.array([5.0, 1.0, 0.0])], [0, 2], 5)
    assert merged.tolist() == [1, 2, 4, 1, 0]
    with pytest.raises(AssertionError, match="no part"):
        merge_saliency([np.ones(2)], [1], 3)


def test_parts_need_frames():
    with pytest.raises(ValueError, match="at least 1 frame and parts of at least 2, found 0 and 1"):
        plan_parts(0, 1)
