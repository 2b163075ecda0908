"""One rule says which answer is right: every figure of an evaluation follows from it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4v.train.tasks.ranks import find_answers, rank_own
from s4v.train.tasks.recognition_metrics import Evaluation, accuracy_figures, describe_classes, find_calibration

NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "own", "rank", "answer"),
    [
        ([0.1, 0.7, 0.2], 1, 1, 1),
        ([0.1, 0.7, 0.2], 0, 3, 1),
        ([0.4, 0.4, 0.2], 0, 2, 1),
        ([0.4, 0.4, 0.2], 1, 2, 0),
        ([0.4, 0.4, 0.2], 2, 3, 0),
        ([0.3, 0.3, 0.3], 0, 3, 1),
        ([0.3, 0.3, 0.3], 1, 3, 0),
        ([0.5, NAN, 0.2], 0, 2, 1),
        ([NAN, 0.5, 0.2], 0, 4, 1),
        ([NAN, NAN, NAN], 0, 4, 1),
        ([np.inf, np.inf, 0.0], 1, 2, 0),
        ([-np.inf, -np.inf, -np.inf], 0, 3, 1),
        ([0.0, -np.inf, -np.inf], 0, 1, 0),
    ],
)
def test_ties_and_nan_by_hand(scores, own, rank, answer):
    table, place = np.asarray([scores], dtype=np.float32), np.asarray([own])
    assert rank_own(table, place).tolist() == [rank]
    assert find_answers(table, place).tolist() == [answer]


@given(
    seed=st.integers(0, 10**6),
    videos=st.integers(1, 40),
    classes=st.integers(2, 12),
    levels=st.sampled_from([1, 2, 5, 1000]),
    has_nan=st.booleans(),
)
def test_all_figures_of_one_evaluation_agree(seed, videos, classes, levels, has_nan):
    rng = np.random.default_rng(seed)
    probabilities = (rng.integers(0, levels, (videos, classes)) / levels).astype(np.float32)
    if has_nan:
        probabilities[rng.random((videos, classes)) < 0.1] = NAN
    labels = rng.integers(0, classes, videos)
    result = Evaluation(np.arange(videos), labels, probabilities, loss=0.0)
    names = [f"class {place}" for place in range(classes)]
    right = result.predictions == labels
    # By hand, one by one: right is who stands alone at the top.
    for place, label in enumerate(labels):
        others = np.delete(probabilities[place], label)
        assert right[place] == bool((others < probabilities[place, label]).all())
    figures = accuracy_figures(result)
    assert figures["top1"] == right.mean()
    assert result.confusion().trace() == right.sum() and result.confusion().sum() == videos
    described = describe_classes(result, names)
    assert sum(one["videos"] for one in described) == videos
    assert sum(one["accuracy"] * one["videos"] for one in described) == pytest.approx(right.sum())
    tops = [result.top(k) for k in range(1, classes + 1)]
    assert tops == sorted(tops) and tops[0] == figures["top1"]
    assert tops[-1] == pytest.approx(1 - np.isnan(probabilities[np.arange(videos), labels]).mean())
    if not has_nan:
        bins = find_calibration(result)
        assert sum(one.count * one.accuracy for one in bins) == pytest.approx(right.sum())
