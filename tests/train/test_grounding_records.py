import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4v.errors import DataNotFoundError, DatasetError
from s4v.train.tasks.grounding_records import (
    GroundingPrediction,
    match_queries,
    read_submission,
    read_truths,
    write_submission,
)

TRUTH = {
    "qid": 4711,
    "query": "A cat jumps on a table.",
    "duration": 150,
    "vid": "aB3-x_Yz012_60.0_210.0",
    "relevant_windows": [[10, 16], [40, 42]],
    "relevant_clip_ids": [5, 6, 7, 20],
    "saliency_scores": [[4, 4, 2], [3, 4, 2], [2, 2, 3], [0, 1, 3]],
    "of nobody's": 1,
}


def write_lines(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


numbers = st.floats(-1e4, 1e4, width=32)


@given(
    moments=st.lists(st.tuples(numbers, numbers, numbers), max_size=5),
    saliency=st.none() | st.lists(numbers, max_size=5),
    query_id=st.integers(0, 99) | st.text(max_size=5),
    query=st.text(max_size=9),
)
def test_a_submission_is_read_as_it_was_written(tmp_path_factory, moments, saliency, query_id, query):
    path = tmp_path_factory.mktemp("submission") / "own.jsonl"
    own = np.array(moments, np.float32).reshape(-1, 3)
    curve = None if saliency is None else np.array(saliency, np.float32)
    write_submission(path, [GroundingPrediction(query_id, own, curve, query, "video_1")] * 2)
    first, second = read_submission(path)
    assert (first.query_id, first.query, first.video_id) == (query_id, query, "video_1")
    np.testing.assert_array_equal(second.moments, own)
    assert second.moments.shape == own.shape
    assert (second.saliency is None) == (curve is None)
    assert curve is None or np.array_equal(second.saliency, curve)


def test_a_submission_has_the_keys_of_qvhighlights(tmp_path):
    path = tmp_path / "own.jsonl"
    one = GroundingPrediction(7, np.float32([[2, 8.5, 0.75]]), np.float32([0.5, -0.25]), "Ein\u2028Käfer.", "v1")
    write_submission(path, [one])
    assert path.read_text(encoding="utf-8") == (
        '{"qid": 7, "query": "Ein\u2028Käfer.", "vid": "v1", "pred_relevant_windows": [[2.0, 8.5, 0.75]], '
        '"pred_saliency_scores": [0.5, -0.25]}\n'
    )
    assert read_submission(path)[0].query == one.query, "not every line separator of Unicode ends a row"


def test_truths_are_read_with_and_without_labels(tmp_path):
    bare = {"qid": "s10-d20_0", "query": "q", "duration": 30.96, "vid": "s10-d20"}
    full, null, empty = read_truths(
        write_lines(tmp_path / "own.jsonl", TRUTH, bare, {**bare, "qid": 2, "relevant_windows": []})
    )
    assert full.windows.tolist() == [[10, 16], [40, 42]] and full.clip_ids.tolist() == [5, 6, 7, 20]
    assert full.scores.shape == (4, 3) and (full.query_id, full.duration_s) == (4711, 150.0)
    assert null.query_id == "s10-d20_0" and null.windows is None and null.scores is None
    assert empty.windows.shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qid": None}, "line 1: `qid` should be a number or a text, found None"),
        ({"duration": "150"}, "line 1: `duration` should be seconds above 0, found '150'"),
        ({"duration": 0}, "seconds above 0, found 0"),
        (
            {"relevant_windows": [[1, 2, 3]]},
            r"`relevant_windows` should be a list of rows, 2 numbers each, found \[",
        ),
        ({"relevant_windows": [[1, 2], [3]]}, "2 numbers each"),
        ({"relevant_windows": [["a", 2]]}, "2 numbers each"),
        ({"relevant_windows": 3}, "2 numbers each, found 3"),
        ({"relevant_clip_ids": [5, 6]}, r"2 clips, but scores of shape \(4, 3\)"),
    ],
)
def test_a_truth_that_is_none_is_named(tmp_path, change, message):
    with pytest.raises(DatasetError, match=message):
        read_truths(write_lines(tmp_path / "own.jsonl", {**TRUTH, **change}))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"qid": 1}, "3 numbers each, found None"),
        ({"qid": 1, "pred_relevant_windows": [[0, float("nan"), 1]]}, "3 numbers each"),
        ({"qid": 1, "pred_relevant_windows": [], "pred_saliency_scores": [[1]]}, "one number each"),
        ([1], "`qid` should be a number or a text, found None"),
    ],
)
def test_a_prediction_that_is_none_is_named(tmp_path, row, message):
    with pytest.raises(DatasetError, match=message):
        read_submission(write_lines(tmp_path / "own.jsonl", row))


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(DataNotFoundError, match="own.jsonl is not there"):
        read_submission(tmp_path / "own.jsonl")
    (tmp_path / "own.jsonl").write_text('\n{"qid": 1')
    with pytest.raises(DatasetError, match="line 2: no JSON"):
        read_submission(tmp_path / "own.jsonl")


def test_predictions_come_in_the_order_of_the_truths(tmp_path):
    truths = read_truths(write_lines(tmp_path / "own.jsonl", *({**TRUTH, "qid": query} for query in (3, "3", 1))))
    one, other = (GroundingPrediction(query, np.ones((1, 3))) for query in (1, 3))
    matched = match_queries([one, other], truths)
    assert [prediction.query_id for prediction in matched] == [3, "3", 1]
    assert [len(prediction.moments) for prediction in matched] == [1, 0, 1]
