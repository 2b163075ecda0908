"""Paired intervals, against what is known of them."""

import numpy as np
import pytest

from s4v.errors import StoreMismatchError
from s4v.train.paired import Answers, average_answers, find_difference


def answers(is_right, videos=None, figure="top1"):
    videos = videos or [f"v{place}" for place in range(len(is_right))]
    return Answers(figure, tuple(videos), np.asarray(is_right, dtype=float))


def test_a_run_is_not_apart_from_itself():
    one = answers([1, 0, 1, 1])
    found = find_difference(one, one, "itself")
    assert (found.difference, found.interval, found.videos) == (0.0, (0.0, 0.0), 4)


def test_pairing_makes_the_interval_as_narrow_as_the_runs_are_alike():
    """Of 1,000 videos two runs differ in 30: the standard error of the difference is about sqrt(30) / 1000."""
    generator = np.random.default_rng(0)
    ours = (generator.random(1000) < 0.6).astype(float)
    theirs = ours.copy()
    theirs[np.flatnonzero(ours)[:30]] = 0
    found = find_difference(answers(ours), answers(theirs), "b")
    error = np.sqrt(0.03 * 0.97 / 1000)
    assert found.difference == pytest.approx(0.03)
    assert found.interval == pytest.approx((0.03 - 1.96 * error, 0.03 + 1.96 * error), abs=1.5e-3)


def test_the_interval_is_that_of_drawing_videos_one_by_one():
    generator = np.random.default_rng(1)
    ours, theirs = (generator.random(60) < share for share in (0.7, 0.5))
    found = find_difference(answers(ours), answers(theirs), "b")
    drawn = generator.integers(60, size=(20_000, 60))
    plain = np.percentile((ours.astype(float) - theirs)[drawn].mean(axis=1), [2.5, 97.5])
    assert found.interval == pytest.approx(plain, abs=0.02)


def test_captions_of_a_video_are_drawn_together():
    """20 videos of 50 captions that are right together: the interval is that of 20, and not of 1,000."""
    generator = np.random.default_rng(2)
    right = (generator.random(20) < 0.5).astype(float)
    videos = [f"v{place}" for place in range(20) for _ in range(50)]
    many = find_difference(answers(np.repeat(right, 50), videos, "r1"), answers(np.zeros(1000), videos, "r1"), "b")
    few = find_difference(answers(right, None, "r1"), answers(np.zeros(20), None, "r1"), "b")
    assert many.interval == few.interval and many.videos == 20


def test_the_order_of_videos_does_not_matter():
    ours, theirs = answers([1, 0, 0], ["a", "b", "c"]), answers([0, 1, 0], ["c", "a", "b"])
    assert find_difference(ours, theirs, "b").difference == 0.0


def test_other_questions_are_refused():
    with pytest.raises(StoreMismatchError, match="on the same questions alone: top1 of 2 videos here, top1 of 3 in b"):
        find_difference(answers([1, 0]), answers([1, 0, 1]), "b")
    with pytest.raises(StoreMismatchError, match="on the same questions alone"):
        find_difference(answers([1, 0]), answers([1, 0], figure="r1"), "b")
    with pytest.raises(StoreMismatchError, match="on different videos"):
        average_answers([answers([1, 0]), answers([1, 0], ["x", "y"])])


def test_trainings_of_one_thing_are_averaged():
    assert average_answers([answers([1, 0]), answers([1, 1])]).is_right.tolist() == [1.0, 0.5]
