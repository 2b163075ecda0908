import math

import pytest

from s4v.demo.scores import Share, judge_answers, judge_reversal, reverse_label, split_label

LABELS = ["ring left", "ring left", "bar growing", "cross up", "square hiding"]
ANSWERS = ["ring left", "ring right", "cross growing", "cross left", "square emerging"]


def test_answers_are_taken_apart_by_hand():
    shares = judge_answers(LABELS, ANSWERS)
    counted = {name: (share.hits, share.total) for name, share in shares.items()}
    assert counted == {"both": (1, 5), "shape": (4, 5), "motion": (2, 5), "pair": (4, 5), "direction": (2, 4)}


def test_reversal_counts_among_the_right_answers_only():
    forwards = ["ring left", "ring left", "bar growing", "cross left", "square hiding"]
    backwards = ["ring right", "ring left", "bar shrinking", "cross down", "cross emerging"]
    share = judge_reversal(LABELS, forwards, backwards)
    assert (share.hits, share.total) == (2, 4)


def test_labels_turn_round():
    assert split_label("ring turning-left") == ("ring", "turning-left")
    assert reverse_label("ring turning-left") == "ring turning-right"
    assert reverse_label(reverse_label("bar hiding")) == "bar hiding"


def test_intervals_are_wilsons():
    assert Share(8, 10).interval == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Share(0, 10).interval[0] == 0 and Share(10, 10).interval[1] == 1
    assert Share(0, 0).interval == (0, 1) and math.isnan(Share(0, 0).value)
