import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4v.errors import DatasetError
from s4v.train.tasks.grounding_metrics import (
    LENGTHS,
    MAP_THRESHOLDS,
    PROTOCOLS,
    THRESHOLDS,
    compare_protocols,
    find_overlaps,
    measure_grounding,
)
from s4v.train.tasks.grounding_records import GroundingPrediction, GroundingTruth, parse_prediction, parse_truth

GOLDEN = json.loads((Path(__file__).parents[1] / "data/r2_tuning/metrics.json").read_text())


def read_case(case):
    predictions = [parse_prediction(row, "golden") for row in case["predictions"]]
    return predictions, [parse_truth(row, "golden") for row in case["truth"]]


def rename(result):
    """Figures of a golden result under our names; `brief` repeats what the others say."""
    figures = {}
    for part, own in result.items():
        if part.startswith("HL-min-"):
            level = part.removeprefix("HL-min-")
            figures |= {f"HL mAP {level}": own["HL-mAP"], f"HL HIT@1 {level}": own["HL-Hit1"]}
        elif part != "brief":
            prefix = "" if part == "full" else f"{part} "
            for kind, values in own.items():
                kind = kind.removeprefix("MR-")
                for at, value in values.items() if isinstance(values, dict) else [("average", values)]:
                    figures[prefix + (kind if at == "average" else f"{kind}@{at}")] = value
    return figures


def test_the_golden_cases_hold_as_many_figures_as_the_documents_say():
    assert sum(len(rename(case["result"]["r2"])) for case in GOLDEN["cases"]) == 3562
    assert sum(case["result"]["moment_detr"] is not None for case in GOLDEN["cases"]) == 5


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_figures_are_the_evaluators_digits_and_all(case):
    predictions, truths = read_case(case)
    figures = measure_grounding(predictions, truths, "reference").list_figures()
    assert figures == rename(case["result"]["r2"])
    own = measure_grounding(predictions, truths, "moment_detr")
    stops = None in own.moments.values()
    assert stops == (case["result"]["moment_detr"] is None)
    if not stops:
        assert own.list_figures() == rename(case["result"]["moment_detr"])


def test_a_query_without_predictions_counts_0_and_is_told():
    predictions, truths = read_case(GOLDEN["empty"][0])
    expected = rename({"full": {"MR-mAP": GOLDEN["empty"][0]["result"]["mAP"]}})
    reference = measure_grounding(predictions, truths, "reference").moments["full"]
    assert {name: value for name, value in reference.figures.items() if name.startswith("mAP")} == expected
    assert reference.figures["R1@0.5"] is None and reference.figures["mIoU"] is None, "the reference stops"
    own = measure_grounding(predictions, truths).moments["full"]
    assert (own.queries, own.without_predictions) == (2, 1)
    assert own.figures == dict.fromkeys(reference.figures, 50.0)
    # A query that was left out of the file altogether is one without predictions.
    assert measure_grounding(predictions[:1], truths).moments["full"] == own
    differences = compare_protocols(predictions, truths)
    assert differences.without_predictions == 1 and differences.empty_lengths == ("short", "long")
    assert differences.figures["mAP"] == (50.0, 100.0) and differences.figures["R1@0.7"] == (50.0, None)


def test_predictions_of_nobody_have_no_map_in_the_reference():
    truths = [GroundingTruth(1, 10.0, np.array([[0.0, 4.0]]))]
    assert set(measure_grounding([], truths, "reference").list_figures().values()) == {None}
    assert set(measure_grounding([], truths).moments["full"].figures.values()) == {0.0}


def test_a_range_without_a_window_has_no_figure():
    case = next(case for case in GOLDEN["cases"] if case["name"].startswith("no window is long"))
    predictions, truths = read_case(case)
    own = measure_grounding(predictions, truths)
    assert own.moments["long"] is None and own.moments["short"] is None
    assert own.moments["middle"] == own.moments["full"]
    assert not any(name.startswith(("long", "short")) for name in own.list_figures())
    differences = compare_protocols(predictions, truths)
    assert differences.empty_lengths == ("short", "long")
    assert differences.figures["long mAP"] == (None, 10.0)
    assert all(name.startswith(("long", "short")) for name in differences.figures)


def test_two_windows_of_no_length_do_not_overlap():
    predictions = [GroundingPrediction(1, np.array([[5.0, 5.0, 0.9], [0.0, 4.0, 0.8]]))]
    truths = [GroundingTruth(1, 10.0, np.array([[5.0, 5.0], [0.0, 4.0]]))]
    for protocol in PROTOCOLS:
        figures = measure_grounding(predictions, truths, protocol).moments["full"].figures
        # One of two windows is found, in second place.
        assert (figures["R1@0.5"], figures["mAP"]) == (0.0, 25.0)
    assert compare_protocols(predictions, truths).undefined_overlaps == 1
    assert find_overlaps(np.array([5.0, 5.0]), np.array([5.0, 5.0])) == 0


def test_queries_without_windows_are_not_judged():
    truths = [GroundingTruth(1, 10.0, None), GroundingTruth(2, 10.0, np.zeros((0, 2)))]
    assert measure_grounding([], truths).list_figures() == {}
    truths.append(GroundingTruth(3, 10.0, np.array([[0.0, 4.0]])))
    assert measure_grounding([], truths).moments["full"].queries == 1


def test_what_cannot_be_matched_is_refused():
    truth = GroundingTruth(7, 10.0, np.array([[0.0, 4.0]]))
    one = GroundingPrediction(7, np.array([[0.0, 4.0, 1.0]]))
    with pytest.raises(DatasetError, match="1 queries that are not among the 1 truths, the first is '7'"):
        measure_grounding([GroundingPrediction("7", one.moments)], [truth])
    with pytest.raises(DatasetError, match="Query 7 stands twice among the predictions"):
        measure_grounding([one, one], [truth])
    with pytest.raises(DatasetError, match="Query 7 stands twice among the truths"):
        measure_grounding([one], [truth, truth])


def draw_window(rng, on_grid):
    ends = np.sort(rng.integers(0, 40, 2)).astype(float) if on_grid else np.sort(rng.uniform(0, 60, 2))
    return ends.tolist()


def draw_queries(seed, count, on_grid=False):
    rng = np.random.default_rng(seed)
    predictions, truths = [], []
    for query in range(count):
        windows = [draw_window(rng, on_grid) for _ in range(rng.integers(1, 6))]
        moments = [[*draw_window(rng, on_grid), rng.integers(1, 6) / 5] for _ in range(rng.integers(0, 14))]
        moments += [[*window, 0.5] for window in windows[:2]]
        moments = [moments[place] for place in rng.permutation(len(moments))][: rng.integers(0, len(moments) + 1)]
        predictions.append(GroundingPrediction(query, np.array(moments).reshape(-1, 3)))
        truths.append(GroundingTruth(query, 60.0, np.array(windows)))
    return predictions, truths


def overlap_plainly(one, other):
    common = max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
    union = (one[1] - one[0]) + (other[1] - other[0]) - common
    return common / union if union > 0 else 0.0


def find_precision_plainly(moments, windows, threshold):
    """VOC's average precision, one moment and one window after the other."""
    rows = sorted(moments[:10], key=lambda row: -row[2])
    free, hits, curve = list(range(len(windows))), 0, []
    for place, row in enumerate(rows, start=1):
        candidates = [one for one in free if overlap_plainly(row, windows[one]) >= threshold]
        if candidates:
            free.remove(max(candidates, key=lambda one: (overlap_plainly(row, windows[one]), one)))
            hits += 1
        curve.append((hits / len(windows), hits / place))
    area, before = 0.0, 0.0
    for place, (recall, _) in enumerate(curve):
        area += (recall - before) * max(precision for _, precision in curve[place:])
        before = recall
    return area


def measure_plainly(predictions, truths, low, high):
    shares = {"R1@0.5": [], "R5@0.7": [], "mIoU": [], "mAP@0.75": [], "mAP": []}
    for prediction, truth in zip(predictions, truths, strict=True):
        windows = [window for window in truth.windows.tolist() if low < window[1] - window[0] <= high]
        if windows:
            moments = prediction.moments.tolist()
            best = [max(overlap_plainly(row, window) for window in windows) for row in moments[:5]] or [0.0]
            precisions = {one: find_precision_plainly(moments, windows, one) for one in MAP_THRESHOLDS}
            shares["R1@0.5"].append(best[0] >= 0.5)
            shares["R5@0.7"].append(max(best) >= 0.7)
            shares["mIoU"].append(best[0])
            shares["mAP@0.75"].append(precisions[0.75])
            shares["mAP"].append(sum(precisions.values()) / len(precisions))
    return {name: 100 * sum(own) / len(own) for name, own in shares.items() if own}


@given(seed=st.integers(0, 10**6), count=st.integers(1, 12), on_grid=st.booleans())
def test_figures_are_what_one_query_after_the_other_gives(seed, count, on_grid):
    predictions, truths = draw_queries(seed, count, on_grid)
    figures = measure_grounding(predictions, truths).list_figures()
    # `full` has windows of no length, which no range has.
    for name, (low, high) in {"": (-1.0, np.inf), **{f"{one} ": ends for one, ends in LENGTHS.items()}}.items():
        plain = measure_plainly(predictions, truths, low, high)
        assert bool(plain) == (f"{name}mAP" in figures)
        for figure, value in plain.items():
            assert figures[name + figure] == pytest.approx(value, abs=0.0051), name + figure


@given(seed=st.integers(0, 10**6), count=st.integers(1, 8))
def test_the_order_of_queries_and_windows_changes_no_figure(seed, count):
    predictions, truths = draw_queries(seed, count)
    rng = np.random.default_rng(seed)
    moved = [
        GroundingTruth(one.query_id, one.duration_s, one.windows[rng.permutation(len(one.windows))])
        for one in (truths[place] for place in rng.permutation(count))
    ]
    figures = measure_grounding(predictions, truths).list_figures()
    assert measure_grounding(predictions[::-1], moved).list_figures() == pytest.approx(figures, abs=0.011)


@given(seed=st.integers(0, 10**6), count=st.integers(1, 8))
def test_figures_fall_with_the_threshold_and_r5_is_no_less_than_r1(seed, count):
    predictions, truths = draw_queries(seed, count)
    for one in filter(None, measure_grounding(predictions, truths).moments.values()):
        for kind, thresholds in (("R1", THRESHOLDS), ("R5", THRESHOLDS), ("mAP", MAP_THRESHOLDS)):
            figures = [one.figures[f"{kind}@{threshold}"] for threshold in thresholds]
            assert kind == "mAP" or figures == sorted(figures, reverse=True)
            assert all(0 <= figure <= 100 for figure in figures)
        assert all(one.figures[f"R5@{at}"] >= one.figures[f"R1@{at}"] for at in THRESHOLDS)


windows = st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda ends: np.array(sorted(ends), float))


@given(one=windows, other=windows)
def test_iou_is_a_share_alike_from_both_sides(one, other):
    overlap = find_overlaps(one, other)
    assert overlap == find_overlaps(other, one) == pytest.approx(overlap_plainly(one, other))
    assert 0 <= overlap <= 1
    assert (overlap == 1) == ((one == other).all() and one[1] > one[0])


def test_the_last_of_windows_that_overlap_as_much_is_taken():
    # [0, 8] overlaps both windows by half; the next moment is the second window itself.
    moments, both = np.array([[0.0, 8.0, 0.9], [4.0, 8.0, 0.8]]), np.array([[0.0, 4.0], [4.0, 8.0]])
    figures = measure_grounding([GroundingPrediction(1, moments)], [GroundingTruth(1, 9.0, both)]).list_figures()
    assert figures["mAP@0.5"] == 50.0, "the first took what was the second's"
    figures = measure_grounding([GroundingPrediction(1, moments)], [GroundingTruth(1, 9.0, both[::-1])]).list_figures()
    assert figures["mAP@0.5"] == 100.0
