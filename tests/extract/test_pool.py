import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from s4v.extract.decode import video_file as _video
from s4v.extract.decode.pool import DecodeRequest, DecoderPool
from s4v.extract.decode.video_file import DecodeFailure
from s4v.extract.decode.worker import decode

needs_decord = pytest.mark.skipif(_video.decord is None, reason="decord has no wheel for this system")


def request(path, **changes):
    values = dict(
        path=str(path),
        num_frames=4,
        sampling="uniform",
        resize="224",
        image_size=(64, 64),
        start_s=None,
        end_s=None,
        decoder="auto",
    )
    return {**values, **changes}


def run(path, **changes):
    return decode(request(path, **changes), lambda duration_s: None)


def fail(path, **changes):
    with pytest.raises(DecodeFailure) as caught:
        run(path, **changes)
    return caught.value.code, str(caught.value)


@needs_decord
@pytest.mark.parametrize(("codec", "ending"), [("libx264", "mp4"), ("libx264", "mkv"), ("libvpx-vp9", "webm")])
def test_decord_and_pyav_agree_to_the_bit(tmp_path, make_video, codec, ending):
    path = make_video(tmp_path / f"v.{ending}", codec=codec, num_frames=23)
    by_decord, pixels_decord = run(path, decoder="decord")
    by_pyav, pixels_pyav = run(path, decoder="pyav")
    assert by_decord["decoder"] == "decord"
    assert by_pyav["decoder"] == "pyav"
    assert by_decord["frame_indices"] == by_pyav["frame_indices"] == [2, 8, 14, 20]
    assert np.array_equal(pixels_decord, pixels_pyav)
    np.testing.assert_allclose(by_decord["timestamps_s"], by_pyav["timestamps_s"], atol=1e-5)


def test_frames_are_the_ones_that_were_asked_for(tmp_path, make_video):
    facts, pixels = run(make_video(tmp_path / "v.mp4", num_frames=12, size=(64, 64)))
    assert facts["frame_indices"] == [1, 4, 7, 10]
    brightest = pixels[0, :, 0, 32, :, 1].astype(int)
    for frame, index in zip(brightest, facts["frame_indices"], strict=True):
        left = index * 5 % 56
        assert frame[left + 1 : left + 7].min() > 150, "the bright column stands where this frame has it"


def test_avi_without_frame_times_decodes_in_display_order(tmp_path, make_video):
    path = make_video(tmp_path / "v.avi", codec="mpeg4", num_frames=20, size=(64, 64))
    facts, pixels = run(path)
    assert facts["num_frames"] == 20
    assert all(0 <= t < 3 for t in facts["timestamps_s"])
    for frame, index in zip(pixels[0, :, 0, 32, :, 1].astype(int), facts["frame_indices"], strict=True):
        left = index * 5 % 56
        assert frame[left + 2 : left + 6].min() > 150


@pytest.mark.parametrize(
    ("codec", "ending", "options"),
    [
        ("libx264", "ts", {}),
        ("wmv2", "wmv", {}),
        ("mpeg4", "mov", {"bf": "2"}),
        ("mpeg2video", "mkv", {"bf": "2"}),
        ("libx264", "mkv", {"x264-params": "open-gop=1:keyint=24:min-keyint=24:bframes=3:scenecut=0"}),
        ("libx264", "mp4", {"x264-params": "intra-refresh=1:keyint=24:scenecut=0"}),
        ("libx265", "mp4", {"x265-params": "open-gop=1:keyint=24:min-keyint=24:bframes=3:log-level=none"}),
    ],
)
def test_streams_in_which_decord_seeks_wrongly_are_decoded_in_order(tmp_path, make_video, codec, ending, options):
    path = make_video(tmp_path / f"v.{ending}", codec=codec, num_frames=120, gop=24, options=options)
    facts, pixels = run(path, num_frames=8)
    assert facts["decoder"] == "pyav"
    assert facts["timestamps_s"][0] < 1
    assert np.array_equal(pixels, run(path, num_frames=8, decoder="pyav")[1])
    assert fail(path, decoder="decord")[0] == "decode-error"
    for frame, index in zip(pixels[0, :, 0, 32, :, 1].astype(int), facts["frame_indices"], strict=True):
        left = (index * 5) % 72 - 8  # the crop takes 64 of 80 columns
        if 2 <= left <= 54:
            assert frame[left + 2 : left + 6].min() > 130, index


def test_times_start_at_the_first_frame_for_both_decoders(tmp_path, make_video):
    path = make_video(tmp_path / "v.ts", num_frames=40)
    facts, _ = run(path, start_s=1.0, end_s=2.0)
    assert facts["frame_indices"] == [11, 13, 16, 18]
    assert facts["duration_s"] == pytest.approx(4.0, abs=0.2)


def test_segment_takes_frames_between_its_times(tmp_path, make_video):
    facts, _ = run(make_video(tmp_path / "v.mp4", num_frames=40, fps=10), start_s=1.0, end_s=3.0)
    assert facts["frame_indices"] == [12, 17, 22, 27]
    assert all(1.0 <= t < 3.0 for t in facts["timestamps_s"])
    assert facts["num_frames"] == 40


def test_segment_outside_the_video_fails_its_row(tmp_path, make_video):
    code, detail = fail(make_video(tmp_path / "v.mp4"), start_s=50.0, end_s=60.0)
    assert code == "no-frames"
    assert detail == "no frame from 50.0 s to 60.0 s among 12"


def test_one_frame_is_a_good_video(tmp_path, make_video):
    facts, pixels = run(make_video(tmp_path / "v.mp4", num_frames=1))
    assert facts["frame_indices"] == [0, 0, 0, 0]
    assert pixels.shape == (1, 4, 1, 64, 64, 3)


def test_broken_files_fail_with_a_code(tmp_path, make_video):
    whole = make_video(tmp_path / "whole.mp4", num_frames=60).read_bytes()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    assert fail(tmp_path / "none.mp4")[0] == "missing-file"
    assert fail(tmp_path / "empty.mp4")[0] == "empty-file"
    assert fail(tmp_path / "text.mp4")[0] == "unreadable"
    assert fail(tmp_path / "cut.mp4")[0] in ("unreadable", "truncated")


def test_audio_only_file_has_no_video_stream(tmp_path):
    import av

    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert fail(tmp_path / "sound.mp4")[0] == "no-video-stream"


def damage(path: Path, num_frames: int, first_bad: int) -> None:
    """Overwrite the packets from one frame on; the container still announces all of them."""
    import av

    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    for pos, size in packets[first_bad:]:
        data[pos : pos + size] = b"\xff" * size
    path.write_bytes(data)
    assert len(packets) == num_frames


def test_video_that_is_a_frame_short_is_clamped_and_says_so(tmp_path, make_video):
    path = make_video(tmp_path / "v.mp4", num_frames=40, gop=1)
    damage(path, 40, first_bad=39)
    facts, _ = run(path, num_frames=40)
    assert facts["num_frames"] == 39
    assert facts["reason"] == "clamped: 39 of 40 frames decode"
    assert facts["frame_indices"][-1] == 38


def test_video_that_lacks_more_is_failed_not_padded(tmp_path, make_video):
    path = make_video(tmp_path / "v.mp4", num_frames=40, gop=1)
    damage(path, 40, first_bad=30)
    assert fail(path, num_frames=40) == ("truncated", "30 of 40 frames decode")


def test_damage_after_the_wanted_frames_does_not_matter(tmp_path, make_video):
    path = make_video(tmp_path / "v.mp4", num_frames=40, gop=1)
    damage(path, 40, first_bad=30)
    facts, _ = run(path, num_frames=4, end_s=2.0, decoder="pyav")
    assert facts["frame_indices"] == [2, 7, 12, 17]


def test_real_files_decode_and_rotated_ones_come_out_upright(real_videos):
    upright, _ = run(real_videos / "real" / "rotated_0.mov", num_frames=3)
    rotated, pixels_rotated = run(real_videos / "real" / "rotated_90.mov", num_frames=3)
    assert (upright["width"], upright["height"]) == (568, 320)
    assert (rotated["width"], rotated["height"]) == (320, 568)
    _, by_pyav = run(real_videos / "real" / "rotated_90.mov", num_frames=3, decoder="pyav")
    assert np.array_equal(pixels_rotated, by_pyav)


def test_corrupted_real_file_fails_by_the_rule(real_videos):
    assert fail(real_videos / "real" / "corrupted.mp4", num_frames=8) == ("truncated", "28 of 50 frames decode")


def test_reasons_hold_no_path_clock_or_address(tmp_path):
    folder = tmp_path / "a folder" / "deep"
    folder.mkdir(parents=True)
    (folder / "text.mp4").write_text("no video")
    details = {fail(folder / "text.mp4", decoder=name)[1] for name in ("auto", "pyav")}
    for detail in details:
        assert "folder" not in detail
        assert "0x" not in detail
        assert "[" not in detail


def pool_request(path, **changes):
    return DecodeRequest(**{**request(path), "timeout_s": 30.0, **changes})


def test_pool_decodes_and_survives_a_killed_process(tmp_path, make_video):
    path = make_video(tmp_path / "v.mp4")
    with DecoderPool(1) as pool:
        assert pool.submit(pool_request(path)).result().pixels.shape == (1, 4, 1, 64, 64, 3)
        (child,) = pool._children
        os.kill(child._process.pid, signal.SIGKILL)
        assert pool.submit(pool_request(path)).result().pixels is not None, "tried again, by a new process"
        assert pool._children != [child]


def test_signals_to_the_whole_group_are_the_parents_business(tmp_path, make_video):
    path = make_video(tmp_path / "v.mp4")
    with DecoderPool(1) as pool:
        pool.submit(pool_request(path)).result()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pool._children[0]._process.pid, number)
            assert pool.submit(pool_request(path)).result().pixels is not None, number


def test_a_video_whose_decoder_hangs_is_tried_again(tmp_path, make_video):
    path = make_video(tmp_path / "v.mp4")
    with DecoderPool(1) as pool:
        pool.submit(pool_request(path)).result()
        os.kill(pool._children[0]._process.pid, signal.SIGSTOP)
        assert pool.submit(pool_request(path, timeout_s=0.5)).result().pixels is not None, "tried again"


def test_cpu_budget_ends_a_decoder_that_spins():
    code = "from s4v.extract.decode.worker import _limit_cpu\n_limit_cpu(0.1)\nwhile True: pass"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGXCPU


def test_a_lying_header_buys_no_cpu_time(tmp_path, make_video):
    """One bit of the table of frame times (stts): half an hour for 20 frames. They get what their packets are worth."""
    path = make_video(tmp_path / "v.mp4", num_frames=20)
    announced = []
    decode(request(path), announced.append)
    assert announced == [2.0], "the length of a video that tells the truth"
    data = bytearray(path.read_bytes())
    delta = data.index(b"stts") + 4 + 4 + 4 + 4
    data[delta] ^= 1
    path.write_bytes(data)
    try:
        facts, _ = decode(request(path), announced.append)
    except DecodeFailure:
        pass
    else:
        assert facts["duration_s"] > 1000
    assert announced[1:] == [0.1], "one frame is left of them"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_decoder_dies_with_its_parent():
    code = (
        "from s4v.extract.decode.pool import DecoderPool\nimport time\n"
        "with DecoderPool(1) as pool:\n"
        "    pool.library_versions(); print(pool._children[0]._process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_decoder_process_imports_neither_torch_nor_pyarrow():
    code = "import sys, s4v.extract.decode.worker; print([m for m in ('torch', 'pyarrow', 'zarr') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
