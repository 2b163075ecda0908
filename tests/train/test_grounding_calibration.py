import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4v.train.tasks.grounding_calibration import find_answer_threshold

scores = st.lists(st.integers(0, 12).map(lambda whole: whole / 12), min_size=1, max_size=30).map(np.array)


def test_a_threshold_that_was_counted_by_hand():
    others = np.arange(100) / 100  # 0.95 to 0.99 are the highest five
    found = find_answer_threshold(np.array([0.94, 0.945, 0.96, 1.0]), others, 0.05)
    assert (found.score, found.false_alarms, found.kept) == (0.94, 0.05, 0.75)
    assert (found.own_pairs, found.other_pairs) == (4, 100)
    assert find_answer_threshold(np.ones(1), others, 0.29).false_alarms == 0.29, "0.29 * 100 is below 29 in floats"


def test_ties_are_no_false_alarms():
    found = find_answer_threshold(np.array([0.5, 0.6]), np.array([0.5] * 19 + [0.1]), 0.05)
    assert (found.score, found.false_alarms, found.kept) == (0.5, 0.0, 0.5)


def test_any_rate_lets_everything_through_and_none_nothing_of_others():
    own, others = np.array([0.1, 0.9]), np.array([0.2, 0.8])
    every = find_answer_threshold(own, others, 1.0)
    assert (every.score, every.false_alarms, every.kept) == (-np.inf, 1.0, 1.0)
    none = find_answer_threshold(own, others, 0.0)
    assert (none.score, none.false_alarms, none.kept) == (0.8, 0.0, 0.5)


@given(own=scores, others=scores, rate=st.floats(0, 1))
def test_the_rate_is_held_and_no_lower_threshold_holds_it(own, others, rate):
    found = find_answer_threshold(own, others, rate)
    assert found.false_alarms == (others > found.score).mean() <= rate
    assert found.kept == (own > found.score).mean()
    for lower in {-np.inf, *others.tolist()}:
        assert lower >= found.score or (others > lower).mean() > rate


@given(own=scores, others=scores, low=st.floats(0, 1), high=st.floats(0, 1))
def test_more_false_alarms_keep_no_fewer_true_ones(own, others, low, high):
    strict, loose = (find_answer_threshold(own, others, rate) for rate in sorted((low, high)))
    assert strict.score >= loose.score
    assert strict.kept <= loose.kept and strict.false_alarms <= loose.false_alarms


@pytest.mark.parametrize(
    ("own", "others", "rate", "message"),
    [
        ([], [0.1], 0.05, "found 0 and 1 with 0 NaN"),
        ([0.1], [], 0.05, "found 1 and 0 with 0 NaN"),
        ([0.1, np.nan], [0.1], 0.05, "found 2 and 1 with 1 NaN"),
        ([0.1], [0.1], 1.5, "between 0 and 1, found 1.5"),
    ],
)
def test_pairs_that_say_nothing_are_refused(own, others, rate, message):
    with pytest.raises(ValueError, match=message):
        find_answer_threshold(np.array(own), np.array(others), rate)
