import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4v.errors import DatasetError
from s4v.train.tasks.grounding_records import GroundingPrediction, GroundingTruth
from s4v.train.tasks.highlight_metrics import (
    LEVELS,
    find_clip_precisions,
    find_trapezoid_precision,
    measure_highlights,
    measure_tvsum,
    measure_youtube,
)

# The figures of QVHighlights' golden cases are held in test_grounding_metrics.py.
GOLDEN = json.loads((Path(__file__).parents[1] / "data/r2_tuning/summaries.json").read_text())


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["kind"])
def test_summaries_are_the_references_digits_and_all(case):
    scores = [np.array(video["scores"]) for video in case["videos"]]
    if case["kind"] == "tvsum":
        figure = measure_tvsum(scores, [np.array(video["label"]["anno"]) for video in case["videos"]])
    else:
        figure = measure_youtube(scores, [np.array(video["label"]["match"]) for video in case["videos"]])
    assert figure == round(100 * case["result"]["mAP"], 3)


def find_precision_plainly(scores, labels):
    """Score by score, from the highest: the greatest precision there or lower, once for each that finds a highlight."""
    if all(labels) or not any(labels):
        return float(all(labels))
    curve = []
    for score in sorted(set(scores), reverse=True):
        hits = [label for one, label in zip(scores, labels, strict=True) if one >= score]
        curve.append((sum(hits), sum(hits) / len(hits)))
    before, steps = 0, []
    for place, (hits, _) in enumerate(curve):
        if hits > before:
            steps.append(max(precision for _, precision in curve[place:]))
        before = hits
    return sum(steps) / len(steps)


@given(seed=st.integers(0, 10**6), levels=st.sampled_from([1, 3, 1000]))
def test_precision_of_clips_is_what_one_score_after_the_other_gives(seed, levels):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 12, 4)
    is_clip = np.arange(counts.max()) < counts[:, None]
    scores = rng.integers(-levels, levels, is_clip.shape) / levels
    labels = rng.random((*is_clip.shape, 3)) < rng.random()
    found = find_clip_precisions(scores, labels, is_clip)
    for query, count in enumerate(counts):
        for annotator in range(3):
            plain = find_precision_plainly(scores[query, :count].tolist(), labels[query, :count, annotator].tolist())
            assert found[query, annotator] == pytest.approx(plain)


def make_truth(query_id=1, duration=10.0, clip_ids=(1, 3), scores=((4, 2, 0), (0, 3, 4))):
    return GroundingTruth(query_id, duration, None, np.array(clip_ids), np.array(scores))


def predict(saliency, query_id=1):
    return GroundingPrediction(query_id, np.zeros((0, 3)), saliency)


def test_figures_that_were_counted_by_hand():
    found = measure_highlights([predict(np.array([0.1, 0.5, 0.2, 0.9, 0.0]))], [make_truth()])
    # VeryGood: clip 1 for the first annotator (in place 2), none for the second, clip 3 for the third (in place 1).
    assert found["VeryGood"].mean_ap == 50.0 and found["VeryGood"].hit_1 == 100.0
    # Good: the same, but clip 3 for the second. Fair: clips 1 and 3 for the second, in places 1 and 2.
    assert found["Good"].mean_ap == 83.33 and found["Fair"].mean_ap == 83.33
    assert measure_highlights([predict(np.array([0.1, 0.5, 0.9, 0.2, 0.0]))], [make_truth()])["Fair"].hit_1 == 0.0


def test_a_query_without_saliency_counts_0_and_is_told():
    perfect = predict(np.array([0, 1.0, 0, 1.0, 0]))
    for missing in (predict(None, 2), predict(np.zeros(0), 2)):
        found = measure_highlights([perfect, missing], [make_truth(), make_truth(2)])["Good"]
        alone = measure_highlights([perfect], [make_truth()])["Good"]
        assert (found.queries, found.without_saliency) == (2, 1)
        assert (found.hit_1, found.mean_ap) == (50.0, round(alone.mean_ap / 2, 2))


def test_only_queries_with_scores_are_judged():
    unscored = GroundingTruth(2, 10.0, np.array([[0.0, 2.0]]))
    assert measure_highlights([predict(None, 2)], [unscored]) == {}
    found = measure_highlights([predict(np.ones(5)), predict(None, 2)], [make_truth(), unscored])
    assert {one.queries for one in found.values()} == {1} and found.keys() == LEVELS.keys()


def test_labels_that_fit_no_video_are_refused():
    with pytest.raises(DatasetError, match="Query 1 has scores of clips 1 to 5, but its 10 s are 5 clips of 2 s"):
        measure_highlights([predict(None)], [make_truth(clip_ids=(1, 5))])
    other = make_truth(2, scores=((4, 2), (0, 3)))
    with pytest.raises(DatasetError, match=r"same number of scores in every query, found \[2, 3\]"):
        measure_highlights([predict(None), predict(None, 2)], [make_truth(), other])
    with pytest.raises(DatasetError, match="Video 1 has 2 scores, but 3 labelled clips"):
        measure_youtube([np.ones(1), np.ones(2)], [np.ones(1), np.ones(3)])


def test_tvsum_cuts_scores_and_annotations_to_the_shorter():
    rng = np.random.default_rng(0)
    scores, marks = rng.random(9), rng.integers(1, 6, (9, 20))
    expected = measure_tvsum([scores[:8]], [marks[:8]])
    assert expected == measure_tvsum([scores], [marks[:8]]) == measure_tvsum([scores[:8]], [marks])


def test_trapezoids_that_were_counted_by_hand():
    assert find_trapezoid_precision(np.array([True, True])) == 1.0
    assert find_trapezoid_precision(np.array([False, False])) == 0.0
    # Precision 0, 1/2, 2/3 at recall 0, 1/2, 1: 1/2 (0 + 1/2) / 2 + 1/2 (1/2 + 2/3) / 2.
    assert find_trapezoid_precision(np.array([False, True, True])) == pytest.approx(1 / 8 + 7 / 24)
