"""Annotated moments on cached frames: the cases of R2-Tuning's own data sets, and those that it does not know."""

import json

import numpy as np
import pytest

from s4v.errors import StoreMismatchError
from s4v.extract.datasets._queries import read_moment
from s4v.store.records import Moment
from s4v.train.tasks.grounding_targets import fix_windows, make_target


@pytest.fixture(scope="module")
def golden(data_path):
    return json.loads((data_path / "r2_tuning/targets.json").read_text())


def test_targets_are_those_of_the_reference(golden):
    assert len(golden) == 10
    for case in golden:
        moment = read_moment(case["annotation"], "")
        target = make_target(moment, fps=case["fps"], num_frames=case["frames"])
        np.testing.assert_array_equal(target.windows, np.float32(case["windows"]), case["name"])
        np.testing.assert_allclose(
            target.saliency, np.float32(case["saliency"]), rtol=0, atol=1e-7, err_msg=case["name"]
        )
        assert target.positives.tolist() == case["positives"], case["name"]
        assert target.windows.dtype == target.saliency.dtype == np.float32


def test_windows_that_do_not_fit_a_video_are_fixed():
    windows = [(-3, 2), (8, 5), (9.9, 30), (4.2, 4.4), (4, 5)]
    fixed = fix_windows(windows, fps=1, num_frames=10)
    np.testing.assert_allclose(fixed, [(0, 2), (5, 8), (9, 10), (3.8, 4.8), (4, 5)], atol=1e-6)
    assert fix_windows((), fps=1, num_frames=10).shape == (0, 2)


def importance(rows, **changes):
    return Moment(query_id="v", clip_s=2.0, clip_ids=tuple(range(len(rows))), scores=tuple(map(tuple, rows)), **changes)


def test_importances_are_above_their_lower_median():
    rows = [[1] * 20, [5] * 20, [3] * 20, [2] * 20]
    target = make_target(importance(rows), fps=0.5, num_frames=4)
    np.testing.assert_allclose(target.saliency, [0, 1, 0.5, 0.25])
    assert target.positives.tolist() == [1, 2], "the lower median of four is the second lowest"
    cut = make_target(importance(rows), fps=0.5, num_frames=3)
    np.testing.assert_allclose(cut.saliency, [0, 1, 0.5])
    assert len(cut.windows) == 0


def test_matches_are_halves_and_highlights_positives():
    moment = Moment(query_id="v", clip_s=1.7, clip_ids=(0, 1, 2), scores=((-1,), (0,), (1,)))
    target = make_target(moment, fps=1 / 1.7, num_frames=3)
    np.testing.assert_array_equal(target.saliency, [0, 0.5, 1])
    assert target.positives.tolist() == [2]


def test_every_frame_of_many_has_its_own_label():
    for count in (3, 50, 777):
        clip_s = 41.37 / count
        scores = tuple((number % 3 - 1,) for number in range(count))
        moment = Moment(query_id="v", clip_s=clip_s, clip_ids=tuple(range(count)), scores=scores)
        target = make_target(moment, fps=1 / clip_s, num_frames=count)
        np.testing.assert_array_equal(target.saliency, [(number % 3) / 2 for number in range(count)])


def test_scores_of_clips_go_to_the_frames_in_them_at_another_rate():
    windows, scores = ((2.0, 4.0),), ((4, 4, 4),)
    moment = Moment(query_id="q", duration_s=8.0, windows=windows, clip_s=2.0, clip_ids=(1,), scores=scores)
    assert make_target(moment, fps=1, num_frames=8).saliency.tolist() == [0, 0, 1, 1, 0, 0, 0, 0]


def test_nowhere_is_a_target_without_positives():
    target = make_target(Moment(query_id="q", windows=()), fps=1, num_frames=6)
    assert target.windows.shape == (0, 2) and not target.saliency.any() and not len(target.positives)


def test_what_is_not_annotated_is_refused():
    with pytest.raises(StoreMismatchError, match="query a video's has neither windows nor scored clips"):
        make_target(Moment(query_id="q"), fps=1, num_frames=6, name="a video's")


@pytest.mark.parametrize("frames", [5, 15])
def test_labels_of_another_video_are_refused(frames):
    rows = [[1] * 20] * 10
    with pytest.raises(StoreMismatchError, match=rf"labels for 10 clips of 2 s, and its video has {frames} frames"):
        make_target(importance(rows), fps=0.5, num_frames=frames)
    assert len(make_target(importance(rows), fps=0.5, num_frames=6).saliency) == 6
    assert make_target(importance(rows), fps=0.5, num_frames=14).saliency.shape == (10,), "the video is cut"
