import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s4v.train.tasks.grounding_baselines import find_constant_window, find_runs, find_similarity_threshold
from s4v.train.tasks.grounding_metrics import measure_grounding
from s4v.train.tasks.grounding_records import GroundingPrediction, GroundingTruth


def draw_queries(seed, count, fps=2.0):
    """Windows, durations and similarities of frames, higher inside the first window."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(4, 40, count)
    windows = [np.sort(rng.uniform(0, num / fps, (rng.integers(1, 4), 2)), axis=1) for num in frames]
    similarities = []
    for num, own in zip(frames, windows, strict=True):
        middles = (np.arange(num) + 0.5) / fps
        inside = (own[0, 0] <= middles) & (middles <= own[0, 1])
        similarities.append(rng.normal(0.2, 0.05, num) + 0.1 * inside)
    return windows, frames / fps, similarities


def measure_recall(moments, windows, durations):
    truths = [GroundingTruth(q, d, own) for q, (d, own) in enumerate(zip(durations, windows, strict=True))]
    predictions = [GroundingPrediction(q, own) for q, own in enumerate(moments)]
    return measure_grounding(predictions, truths).list_figures()["R1@0.7"]


def test_the_constant_window_is_the_one_that_most_queries_share():
    windows = [np.array([[2.0, 6.0]]), np.array([[0.0, 1.0], [1.0, 3.0]]), np.array([[10.0, 100.0]])]
    found = find_constant_window(windows, [10.0, 5.0, 100.0], steps=10)
    assert (found.start, found.end) == (0.2, 0.6), "2 of 10 s to 6 s, and 1 of 5 s to 3 s"
    assert found.recall == pytest.approx(2 / 3)
    np.testing.assert_allclose(found.predict(50.0), [[10, 30, 1]])


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 12))
def test_no_window_of_the_grid_is_right_more_often(seed, count):
    windows, durations, _ = draw_queries(seed, count)
    found = find_constant_window(windows, durations, steps=6)
    assert round(100 * found.recall, 2) == measure_recall([found.predict(d) for d in durations], windows, durations)
    for start in range(6):
        for end in range(start + 1, 7):
            moments = [np.array([[start / 6 * d, end / 6 * d, 1.0]]) for d in durations]
            assert measure_recall(moments, windows, durations) <= round(100 * found.recall, 2)


def test_runs_of_frames_that_were_counted_by_hand():
    similarities = np.array([0.5, 0.1, 0.6, 0.9, 0.1, 0.1, 0.5])
    found = find_runs(similarities, 0.5, 0.5)
    assert found.tolist() == [[4, 8, 0.9], [0, 2, 0.5], [12, 14, 0.5]]
    assert find_runs(similarities, 0.95, 0.5).shape == (0, 3)
    assert find_runs(similarities, 0.0, 0.5).tolist() == [[0, 14, 0.9]]


@given(seed=st.integers(0, 10**6), threshold=st.floats(0, 1))
def test_frames_of_runs_are_those_above_the_threshold(seed, threshold):
    similarities = np.random.default_rng(seed).uniform(0, 1, 30)
    found = find_runs(similarities, threshold, 1.0)
    covered = [frame for start, end, _ in found for frame in range(int(start), int(end))]
    assert sorted(covered) == np.flatnonzero(similarities >= threshold).tolist()
    assert not set(found[:, 0]) & set(found[:, 1]), "runs do not touch"


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 10))
def test_the_threshold_has_the_recall_that_it_says_and_no_relative_one_has_more(seed, count):
    windows, durations, similarities = draw_queries(seed, count)
    found = find_similarity_threshold(similarities, windows, [2.0] * count, steps=8)
    moments = [found.predict(own, 2.0) for own in similarities]
    assert measure_recall(moments, windows, durations) == round(100 * found.recall, 2)
    for place in range(1, 9):
        levels = [own.min() + place / 8 * np.ptp(own) for own in similarities]
        moments = [find_runs(own, min(level, own.max()), 2.0) for own, level in zip(similarities, levels, strict=True)]
        assert measure_recall(moments, windows, durations) <= round(100 * found.recall, 2)


def test_each_kind_of_threshold_is_found_where_it_is_right():
    # Query 0's frames are all less similar than query 1's: only a relative threshold is right for both.
    low, high = np.array([0.0, 0.1, 0.1, 0.0]), np.array([0.5, 0.5, 0.9, 0.5])
    windows = [np.array([[1.0, 3.0]]), np.array([[2.0, 3.0]])]
    found = find_similarity_threshold([low, high], windows, [1.0, 1.0])
    assert found.is_relative and found.recall == 1.0
    # Whole videos beside half ones: only one similarity is right for both.
    whole, half = np.array([0.8, 0.9, 0.8, 0.9]), np.array([0.8, 0.9, 0.1, 0.1])
    windows = [np.array([[0.0, 4.0]]), np.array([[0.0, 2.0]])]
    found = find_similarity_threshold([whole, half], windows, [1.0, 1.0])
    assert not found.is_relative and found.recall == 1.0 and 0.1 < found.value <= 0.8


def test_the_best_frame_alone_is_above_the_highest_relative_threshold():
    similarities = np.array([0.1, 0.7, 0.3])
    found = find_similarity_threshold([similarities], [np.array([[1.0, 2.0]])], [1.0])
    assert found.is_relative and found.recall == 1.0
    assert find_similarity_threshold([np.full(3, 0.3)], [np.array([[0.0, 3.0]])], [1.0]).recall == 1.0


def test_nothing_to_choose_on_is_refused():
    with pytest.raises(ValueError, match="found none"):
        find_constant_window([], [])
    with pytest.raises(ValueError, match="found none"):
        find_similarity_threshold([], [], [])
