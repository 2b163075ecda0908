import numpy as np
import pytest

from s4v.demo.motions import FRAME_PX, MOTIONS, NUM_FRAMES, draw_scene, render_motion, write_motion_videos
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


def test_single_frames_of_all_classes_come_from_one_distribution():
    """The mean brightness of a frame, over many videos, is the same for every class within its error."""
    means = {m: [render_motion(m, seed)[seed % NUM_FRAMES].mean() for seed in range(60)] for m in MOTIONS}
    overall = np.concatenate(list(means.values()))
    for motion, values in means.items():
        error = np.std(overall) / np.sqrt(len(values))
        assert abs(np.mean(values) - overall.mean()) < 4 * error, motion


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
    with pytest.raises(RunExistsError, match="not an earlier demo"):
        run_demo(tmp_path / "mine")
    assert (tmp_path / "mine/thesis.tex").read_text() == "x"
