"""Folders of numbered JPEGs as videos."""

import numpy as np
import pytest
from PIL import Image

from s4v.extract.datasets import read_dataset
from s4v.extract.decode.frame_folder import is_frame_name, list_frames
from s4v.extract.decode.pool import DecodeRequest, DecoderPool
from s4v.extract.decode.video_file import DecodeFailure
from s4v.extract.decode.worker import decode


def run(path, **changes):
    request = dict(
        path=str(path),
        num_frames=3,
        sampling="uniform",
        resize="224",
        image_size=(64, 64),
        start_s=None,
        end_s=None,
        decoder="auto",
        frame_fps=None,
    )
    return decode({**request, **changes}, lambda duration_s: None)


def fail(path, **changes):
    with pytest.raises(DecodeFailure) as caught:
        run(path, **changes)
    return caught.value.code, str(caught.value)


@pytest.mark.parametrize("name", ["img_{:05d}.jpg", "{:05d}.jpg", "frame{}.JPEG", "v1-2_{:03d}.jpg"])
@pytest.mark.parametrize("first", [0, 1, 7])
def test_frames_come_in_the_order_of_their_numbers(tmp_path, make_frames, name, first):
    folder = make_frames(tmp_path / "v", num_frames=12, name=name, first=first)
    (folder / "notes.txt").touch()
    (folder / "._00001.jpg").touch()
    assert [f.name for f in list_frames(folder)] == [name.format(first + i) for i in range(12)]
    facts, pixels = run(folder)
    assert facts["frame_indices"] == [2, 6, 10]
    assert np.abs(pixels[0, :, 0, 32, 32, 0].astype(int) - [50, 130, 210]).max() <= 2
    assert pixels.shape == (1, 3, 1, 64, 64, 3)
    assert (facts["decoder"], facts["num_frames"], facts["width"], facts["height"]) == ("pillow", 12, 80, 64)


def test_what_is_a_frames_name():
    assert all(is_frame_name(name) for name in ("00001.jpg", "img_1.JPG", "a b 7.jpeg", "1.png", "v_2.WebP", "3.tif"))
    assert not any(is_frame_name(name) for name in ("cover.jpg", ".1.jpg", "1.pdf", "1.jpg.txt"))


def test_rate_gives_times_and_segments(tmp_path, make_frames):
    folder = make_frames(tmp_path / "v", num_frames=12)
    facts, _ = run(folder, frame_fps=6.0)
    assert (facts["fps"], facts["duration_s"]) == (6.0, 2.0)
    assert facts["timestamps_s"] == pytest.approx([2 / 6, 1.0, 10 / 6])
    assert run(folder, frame_fps=6.0, start_s=1.0, end_s=2.0)[0]["frame_indices"] == [7, 9, 11]


def test_without_a_rate_there_are_no_times_and_no_segments(tmp_path, make_frames):
    folder = make_frames(tmp_path / "v")
    facts, _ = run(folder)
    assert facts["fps"] is None
    assert facts["duration_s"] is None
    assert np.isnan(facts["timestamps_s"]).all()
    assert fail(folder, start_s=1.0) == (
        "no-frames",
        "a segment was asked for, and the rate of the frames is not known",
    )


def test_optical_flow_beside_the_frames_is_left_out_and_other_series_are_refused(tmp_path, make_frames):
    folder = make_frames(tmp_path / "v", num_frames=3, name="img_{:05d}.jpg")
    for name in ("flow_x_00001.jpg", "flow_y_00001.jpg"):
        (folder / name).touch()
    assert len(list_frames(folder)) == 3
    (folder / "depth_00001.jpg").touch()
    assert fail(folder) == ("unreadable", "expected one series of frames, found depth_, img_")


def test_one_number_twice_is_refused(tmp_path, make_frames):
    folder = make_frames(tmp_path / "v", num_frames=1, name="{:05d}.jpg")
    (folder / "1.jpg").touch()
    assert fail(folder) == ("unreadable", "frames 00001.jpg and 1.jpg have one number")


def test_broken_folders_fail_with_a_code(tmp_path, make_frames):
    (tmp_path / "empty").mkdir()
    assert fail(tmp_path / "empty") == ("no-frames", "the folder holds no numbered picture")
    assert fail(tmp_path / "none")[0] == "missing-file"
    folder = make_frames(tmp_path / "v", num_frames=3)
    (folder / "00002.jpg").write_bytes(b"no picture")
    code, detail = fail(folder)
    assert code == "decode-error"
    assert detail.startswith("00002.jpg: cannot identify image file")
    Image.new("RGB", (30, 20)).save(folder / "00002.jpg")
    assert fail(folder) == ("decode-error", "expected frames of one size, found 30x20, 80x64")


def test_grey_frames_become_rgb(tmp_path):
    (tmp_path / "v").mkdir()
    Image.new("L", (80, 64), 90).save(tmp_path / "v/1.jpg")
    assert run(tmp_path / "v")[1].shape == (1, 3, 1, 64, 64, 3)


def test_decoder_processes_read_frames(tmp_path, make_frames):
    request = DecodeRequest(
        path=str(make_frames(tmp_path / "v")), num_frames=2, sampling="uniform", resize="224", image_size=(64, 64)
    )
    with DecoderPool(1) as pool:
        video = pool.submit(request).result()
    assert video.pixels.shape == (1, 2, 1, 64, 64, 3)
    assert video.facts["decoder"] == "pillow"


def test_folders_of_frames_are_videos_of_a_folder_data_set(place, make_frames):
    root = place({}, "train/run/a.mp4", "train/run/thumbs.txt", "val/run/c.mp4")
    make_frames(root / "train/run/b")
    assert [r.path for r in read_dataset("folder", root)] == ["train/run/a.mp4", "train/run/b", "val/run/c.mp4"]


def test_pictures_beside_videos_are_no_video(place, make_frames):
    root = place({}, "run/a.mp4", "run/00001.jpg", "jump/b.mp4")
    assert [r.path for r in read_dataset("folder", root)] == ["jump/b.mp4", "run/a.mp4"]
