import math

import numpy as np
import pytest

from s4v.demo.motions import FRAME_PX, MOTIONS, NUM_FRAMES, draw_scene, place_shape, render_motion, write_motion_videos
from s4v.errors import RunExistsError
from s4v.extract._decoder import decode


def test_videos_depend_on_their_seed_alone():
    assert np.array_equal(render_motion("left", 3), render_motion("left", 3))
    assert not np.array_equal(render_motion("left", 3), render_motion("left", 4))


@pytest.mark.parametrize(
    ("motion", "reverse"),
    [("left", "right"), ("up", "down"), ("growing", "shrinking"), ("turning-left", "turning-right")],
)
def test_motions_come_in_pairs_that_are_each_other_backwards(motion, reverse):
    """Up to the noise, which is drawn frame by frame."""
    forward, backward = render_motion(motion, 5).astype(int), render_motion(reverse, 5)[::-1].astype(int)
    assert np.abs(forward - backward).mean() < 4
    assert np.abs(forward - backward[::-1]).mean() > np.abs(forward - backward).mean() + 1


def test_the_shape_stays_inside_the_frame():
    for seed in range(300):
        scene = draw_scene(seed)
        for place in scene.centre:
            assert scene.reach + scene.sizes[1] <= min(place, FRAME_PX - place) + 1e-9


def test_a_frame_from_an_unknown_moment_looks_alike_in_all_classes():
    """Place, size and angle of the shape, and what sets one axis apart from the other, have one distribution."""
    rng = np.random.default_rng(0)

    def features(motion):
        rows = []
        for _ in range(1500):
            scene = draw_scene(int(rng.integers(2**40)))
            x, y, radius, angle = place_shape(scene, motion, rng.integers(NUM_FRAMES) / (NUM_FRAMES - 1))
            dx, dy = x - FRAME_PX / 2, y - FRAME_PX / 2
            rows.append([dx, dy, abs(dx), abs(dy), abs(dx) - abs(dy), radius, math.cos(angle), math.sin(angle)])
        return np.array(rows)

    of_class = {motion: features(motion) for motion in MOTIONS}
    everything = np.concatenate(list(of_class.values()))
    for motion, rows in of_class.items():
        for moment in (1, 2):
            error = (everything**moment).std(axis=0) / np.sqrt(len(rows))
            distance = np.abs((rows**moment).mean(axis=0) - (everything**moment).mean(axis=0)) / error
            # A grid of 16 moments is a little wider than the interval it stands for: 0.14 of its variance.
            assert distance.max() < (4 if moment == 1 else 6), (motion, moment, distance.round(1))


def test_files_are_real_h264_in_the_layout_of_the_folder_reader(tmp_path):
    assert write_motion_videos(tmp_path, train_per_class=1, val_per_class=1) == 2 * len(MOTIONS)
    path = tmp_path / "val" / "left" / "0000.mp4"
    request = dict(path=str(path), num_frames=NUM_FRAMES, sampling="uniform", resize="224", crop_px=FRAME_PX)
    facts, pixels = decode({**request, "start_s": None, "end_s": None, "decoder": "auto"}, lambda _: None)
    assert facts["num_frames"] == NUM_FRAMES
    assert pixels.shape == (1, NUM_FRAMES, 1, FRAME_PX, FRAME_PX, 3)


def test_small_demo_writes_a_report_and_never_clears_a_foreign_folder(tmp_path):
    from s4v.demo.pipeline import run_demo

    out = tmp_path / "demo"
    result = run_demo(out, train_per_class=2, val_per_class=1, epochs=1)
    report = (out / "report.html").read_text()
    assert "://" not in report, "self-contained"
    for text in ("side network", "linear probe", "data:image/png;base64", ", predicted ", " MB"):
        assert text in report
    assert set(result["seconds_by_stage"]) >= {"generate", "extract", "train side4video", "retrieve"}
    assert run_demo(out, train_per_class=2, val_per_class=1, epochs=1)["report"] == result["report"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    (tmp_path / "mine/demo.json").write_text('{"my": 1}')
    with pytest.raises(RunExistsError, match="not an earlier demo"):
        run_demo(tmp_path / "mine")
    assert (tmp_path / "mine/thesis.tex").read_text() == "x"
