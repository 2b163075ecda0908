"""What a decoder may take, and whose fault it is when it gets no further: the video's or the machine's (B3, B4, B5)."""

import errno
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import av
import numpy as np
import pytest
from PIL import Image

from s4v.errors import EnvironmentFailedError
from s4v.extract.decode import pool as decoding
from s4v.extract.decode.pool import DecodeRequest, DecoderPool
from s4v.extract.decode.video_file import DecodeFailure
from s4v.extract.decode.worker import decode
from s4v.store.records import REASONS

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc and sets other processes' limits")


def ask(path, **changes):
    values = dict(num_frames=4, sampling="uniform", resize="224", image_size=(48, 48), timeout_s=20.0)
    return DecodeRequest(**{"path": str(path), **values, **changes})


def fail(path, **changes):
    request = dict(path=str(path), num_frames=4, sampling="uniform", resize="224", image_size=(48, 48), decoder="auto")
    try:
        decode({**request, "start_s": None, "end_s": None, **changes}, lambda _: None)
    except DecodeFailure as failure:
        return failure.code, str(failure)
    return None


# --- B3: crashes, timeouts, kills ---


class FakeChild:
    """In place of a decoder process: dies as often as it is told to, and counts who works beside it."""

    versions: ClassVar[dict] = {}
    deaths: ClassVar[list] = []
    alone: ClassVar[list] = []
    inside = 0
    lock = threading.Lock()

    def decode(self, request):
        with self.lock:
            FakeChild.inside += 1
        try:
            time.sleep(0.02)
            if request.path == "bad":
                with self.lock:
                    death = FakeChild.deaths.pop(0) if FakeChild.deaths else None
                    FakeChild.alone.append(FakeChild.inside)
                if death is not None:
                    raise decoding._ChildDied(*death)
            return decoding.DecodedVideo(np.zeros(1), {"decoder": request.decoder})
        finally:
            with self.lock:
                FakeChild.inside -= 1

    def kill(self):
        pass

    def close(self):
        pass


@pytest.fixture
def fake_child(monkeypatch):
    FakeChild.deaths, FakeChild.alone = [], []
    monkeypatch.setattr(decoding, "_Child", FakeChild)
    return FakeChild


@pytest.mark.parametrize("death", [("crashed", "SIGSEGV"), ("timeout", "no answer"), ("killed", "SIGKILL")])
def test_a_decoder_that_died_gets_one_more_try_while_no_other_runs(fake_child, death):  # B3
    fake_child.deaths = [death]
    with DecoderPool(4) as pool:
        requests = [ask("bad" if number == 5 else f"{number}") for number in range(24)]
        videos = list(pool.decode_ahead(requests))
    assert all(video.pixels is not None for video in videos)
    assert len(fake_child.alone) == 2 and fake_child.alone[1] == 1


@pytest.mark.parametrize(
    ("deaths", "reason", "is_pending"),
    [
        ([("crashed", "SIGSEGV"), ("crashed", "SIGSEGV")], "crashed: SIGSEGV", False),
        ([("timeout", "x"), ("timeout", "the CPU budget is used up")], "timeout: the CPU budget is used up", False),
        ([("killed", "SIGKILL"), ("crashed", "SIGABRT")], "crashed: SIGABRT", False),
        ([("killed", "SIGKILL"), ("killed", "SIGKILL")], "no-memory: ", True),
        ([("crashed", "SIGSEGV"), ("killed", "SIGKILL")], "no-memory: ", True),
    ],
)
def test_what_happens_alone_decides(fake_child, deaths, reason, is_pending):  # B3
    fake_child.deaths = list(deaths)
    with DecoderPool(2) as pool:
        video = pool.submit(ask("bad")).result()
        assert pool.submit(ask("good")).result().pixels is not None
    assert video.pixels is None and video.facts["reason"].startswith(reason)
    assert video.is_pending == is_pending
    assert video.facts["reason"].partition(":")[0] in REASONS


def test_after_a_crash_of_decord_pyav_has_its_turn(fake_child):  # B3
    fake_child.deaths = [("crashed", "SIGABRT")]
    with DecoderPool(1) as pool:
        assert pool.submit(ask("bad")).result().facts == {"decoder": "pyav"}
        fake_child.deaths = [("crashed", "SIGABRT")]
        assert pool.submit(ask("bad", decoder="decord")).result().facts == {"decoder": "decord"}


def test_a_killed_decoder_loses_no_video(tmp_path, make_video):  # B3
    path = make_video(tmp_path / "v.mp4")
    with DecoderPool(1) as pool:
        expected = pool.submit(ask(path)).result()
        os.kill(pool._children[0]._process.pid, signal.SIGKILL)
        video = pool.submit(ask(path)).result()
        assert video.pixels is not None and np.array_equal(video.pixels, expected.pixels)
        assert video.facts == expected.facts


def test_a_decoder_that_is_always_killed_leaves_its_row_pending(tmp_path, make_video, monkeypatch):  # B3
    path = make_video(tmp_path / "v.mp4")
    read_message = decoding._Child._read_message

    def kill_after_source(child, timeout_s):
        message = read_message(child, timeout_s)
        if message["event"] == "opened":
            child._process.kill()
            child._process.wait()
            child._buffer.clear()
            raise child._death()
        return message

    monkeypatch.setattr(decoding._Child, "_read_message", kill_after_source)
    with DecoderPool(1) as pool:
        video = pool.submit(ask(path)).result()
    assert video.pixels is None and video.is_pending
    assert video.facts["reason"].startswith("no-memory: ")
    assert video.facts["source_bytes"] == path.stat().st_size, "what it said of the file before it died"


@pytest.mark.parametrize(("kills", "starts"), [(1, True), (3, True), (9, False)])
def test_a_kill_during_the_start_is_no_reason_to_stop(tmp_path, make_video, monkeypatch, kills, starts):  # B3
    path = make_video(tmp_path / "v.mp4")
    started = []

    def start(*args, popen=subprocess.Popen, **kwargs):
        process = popen(*args, **kwargs)
        started.append(process)
        if len(started) <= kills:
            process.kill()
        return process

    monkeypatch.setattr(decoding.subprocess, "Popen", start)
    with DecoderPool(1) as pool:
        try:
            is_good = pool.submit(ask(path)).result().pixels is not None
        except EnvironmentFailedError:
            is_good = False
    assert is_good == starts


def test_a_pool_that_is_left_does_not_wait_for_second_tries(tmp_path, make_video):  # B3
    path = make_video(tmp_path / "v.mp4")
    start = time.monotonic()
    with pytest.raises(KeyError), DecoderPool(2) as pool:
        pool.submit(ask(path)).result()
        for child in pool._children:
            os.kill(child._process.pid, signal.SIGSTOP)
        for _ in range(6):
            pool.submit(ask(path))
        raise KeyError
    assert time.monotonic() - start < 15


# --- B3: the machine's trouble ---


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.EACCES])
@pytest.mark.parametrize("where", ["open", "read", "stat"])
def test_errors_of_the_machine_are_no_fault_of_the_video(tmp_path, make_video, monkeypatch, number, where):  # B3
    path = make_video(tmp_path / "v.mp4")

    def break_down(*_, **__):
        raise OSError(number, os.strerror(number))

    if where == "open":
        if number == errno.EIO:
            pytest.skip("FFmpeg calls it so too where a file ends too early: reading the file decides")
        monkeypatch.setattr(av, "open", lambda *_, **__: av.error.err_check(-number))
    elif where == "read":
        monkeypatch.setattr(os, "pread", break_down)
    else:
        stat = Path.stat
        monkeypatch.setattr(Path, "stat", lambda p, **k: break_down() if p == path else stat(p, **k))
    assert fail(path)[0] == "io-error"


def test_a_disk_that_fails_behind_a_librarys_back_is_found(tmp_path, make_video, monkeypatch):  # B3
    """FFmpeg takes a failing read for the file's end: before a row fails, each byte of its file must be readable."""
    path = make_video(tmp_path / "v.mp4", num_frames=60)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert fail(path)[0] in ("unreadable", "truncated")
    open_path = Path.open

    class Broken:
        def __init__(self, file):
            self._file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def __getattr__(self, name):
            return getattr(self._file, name)

        def read(self, count=-1):
            if self._file.tell() > 0 or count >= 1 << 20:
                raise OSError(errno.EIO, "Input/output error")
            return self._file.read(count)

    monkeypatch.setattr(Path, "open", lambda p, *a, **k: Broken(open_path(p, *a, **k)))
    assert fail(path)[0] == "io-error"


@needs_proc
def test_too_many_open_files_leave_the_row_pending(tmp_path, make_video):  # B3
    path = make_video(tmp_path / "v.mp4")
    with DecoderPool(1) as pool:
        pool.library_versions()
        pid = pool._children[0]._process.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(list(Path(f"/proc/{pid}/fd").iterdir())), hard))
        video = pool.submit(ask(path)).result()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert pool.submit(ask(path)).result().pixels is not None
    assert video.facts["reason"] == "io-error: too many files are open on this machine"
    assert video.is_pending


@needs_proc
def test_a_machine_without_memory_leaves_the_row_pending(tmp_path):  # B3
    path = write_black(tmp_path / "v.mp4", 1600, 1600, 3)
    with DecoderPool(1) as pool:
        pool.library_versions()
        pid = pool._children[0]._process.pid
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (6 << 20)
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
        video = pool.submit(ask(path)).result()
    assert video.pixels is None and video.facts["reason"].startswith("no-memory")
    assert video.is_pending


@pytest.mark.parametrize(
    "error", [KeyError(426), IndexError("list index out of range"), AttributeError("x"), TypeError()]
)
def test_an_exception_of_python_is_never_a_reason(tmp_path, make_video, error, monkeypatch):  # F4
    path = make_video(tmp_path / "v.mp4")
    code = (
        "import sys\nfrom s4v.extract.decode import worker\n"
        f"def fail(*_, **__): raise {error!r}\nworker.VideoFile.decode = fail\nworker.main()"
    )
    answer = ask_process(code, path)
    assert answer["code"] == "decode-error" and type(error).__name__ not in answer["detail"]
    assert answer["detail"].startswith("the file holds what s4v does not expect (at worker.py:")


# --- B5: links and names ---


def test_a_circle_of_links_is_a_row_with_a_reason(tmp_path):  # B5
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "a.mp4").symlink_to("b.mp4")
    (tmp_path / "b.mp4").symlink_to("a.mp4")
    with DecoderPool(1) as pool:
        for name in ("loop.mp4", "a.mp4"):
            video = pool.submit(ask(tmp_path / name)).result()
            assert video.facts["reason"] == "missing-file: its links lead round in a circle"


@pytest.mark.parametrize("name", [b"caf\xe9.mp4", b"\xff\xfe.mkv", "ü\n\x1b[31m.mp4".encode()])
@pytest.mark.parametrize("decoder", ["auto", "pyav"])
def test_names_of_any_bytes_are_decoded(tmp_path, make_video, name, decoder):  # B5
    source = make_video(tmp_path / f"plain.{'mkv' if name.endswith(b'mkv') else 'mp4'}")
    path = tmp_path / os.fsdecode(name)
    try:
        source.rename(path)
    except OSError:
        pytest.skip("this file system takes no such names")
    with DecoderPool(1) as pool:
        assert pool.submit(ask(path, decoder=decoder)).result().pixels is not None


# --- B4: limits ---


def write_black(path, width, height, num_frames):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        frame = av.VideoFrame(width, height, "yuv420p")
        for place, plane in enumerate(frame.planes):
            plane.update(bytes([16 if place == 0 else 128]) * plane.buffer_size)
        for number in range(num_frames):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def ask_process(code, path, **changes):
    """The last answer of a decoder process that is started with some code."""
    request = dict(path=str(path), num_frames=4, sampling="uniform", resize="224", image_size=(48, 48), decoder="auto")
    request |= dict(start_s=None, end_s=None, timeout_s=60.0, **changes)
    out = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(request).encode() + b"\n", capture_output=True, check=True
    )
    lines = [line for line in out.stdout.split(b"\n") if line.startswith(b'{"event": "done"')]
    return json.loads(lines[-1])


def peak_mb(path, **changes):
    """What a decoder takes at most for a file beyond what it has when it starts; and its answer."""
    with DecoderPool(1) as pool:
        pool.library_versions()
        pid = pool._children[0]._process.pid

        def status(name):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(name))

        before = status("VmRSS")
        video = pool.submit(ask(path, **changes)).result()
        return status("VmHWM") - before, video


@pytest.fixture(scope="module")
def black_film(tmp_path_factory):
    """24 frames that are 300 MB as RGB."""
    return write_black(tmp_path_factory.mktemp("black") / "v.mp4", 2048, 2048, 24)


@needs_proc
@pytest.mark.parametrize("decoder", ["auto", "pyav"])
def test_a_decoders_memory_does_not_grow_with_frames_times_pixels(black_film, decoder):  # B4
    few, video = peak_mb(black_film, num_frames=2, decoder=decoder)
    many, again = peak_mb(black_film, num_frames=24, decoder=decoder)
    assert video.pixels is not None and again.pixels.shape[1] == 24
    assert many < 200 and many < few + 40


@needs_proc
def test_a_folder_of_large_pictures_takes_the_memory_of_one(tmp_path):  # B4
    picture = Image.new("RGB", (2000, 1500), (90, 0, 0))
    for number in range(24):
        picture.save(tmp_path / f"{number}.jpg")
    many, video = peak_mb(tmp_path, num_frames=24)
    assert video.pixels is not None and many < 80, "24 frames as RGB are 216 MB"


@needs_proc
@pytest.mark.slow
def test_black_frames_of_4096_pixels_stay_small(tmp_path):  # B4
    path = write_black(tmp_path / "v.mp4", 4096, 4096, 16)
    taken, video = peak_mb(path, num_frames=16)
    assert video.pixels is not None and taken < 400


def announce_samples(path, num_frames, sample_bytes=1):
    """Have the tables of an MP4 announce so many samples of one size."""
    data = bytearray(path.read_bytes())
    stts = data.index(b"stts")
    struct.pack_into(">I", data, stts + 12, num_frames)
    stsz = data.index(b"stsz")
    struct.pack_into(">II", data, stsz + 8, sample_bytes, num_frames)
    stsc = data.index(b"stsc")
    struct.pack_into(">I", data, stsc + 16, num_frames)
    path.write_bytes(data)
    return path


@needs_proc
@pytest.mark.parametrize(
    ("num_frames", "reason"),
    [
        (20_000_000, "too-large: 20000000 frames are announced, at most 8000000 are read"),
        (4_000_000_000, "too-large: 4000000000 frames are announced, at most 8000000 are read"),
        (5_000_000, "truncated: 5000000 samples are announced in a file of"),
    ],
)
def test_an_announcement_costs_no_memory(tmp_path, make_video, num_frames, reason):  # B4
    path = announce_samples(make_video(tmp_path / "v.mp4", num_frames=1, size=(16, 16)), num_frames)
    assert path.stat().st_size < 2000
    taken, video = peak_mb(path)
    assert taken < 60
    assert video.facts["reason"].startswith(reason)


@needs_proc
def test_a_fragment_that_announces_millions_costs_no_memory(tmp_path, make_video):  # B4
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w", options={"movflags": "frag_keyframe+empty_moov+default_base_moof"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    trun = data.index(b"trun")
    data[trun + 4 : trun + 8] = bytes(4)
    struct.pack_into(">I", data, trun + 8, 30_000_000)
    path.write_bytes(data)
    taken, video = peak_mb(path)
    assert taken < 60 and video.facts["reason"].startswith("too-large: 30000000 frames")


def test_frames_beyond_the_limits_are_told(tmp_path, monkeypatch):  # B4
    path = write_black(tmp_path / "v.mp4", 512, 512, 2)
    from s4v.extract.decode import timeline as _timeline

    assert fail(path) is None
    monkeypatch.setattr(_timeline, "MAX_FRAME_PIXELS", 500 * 500, raising=False)
    assert fail(path) == ("too-large", "frames of 512x512: at most 250000 pixels are decoded")
    monkeypatch.undo()
    monkeypatch.setattr(_timeline, "MAX_PACKETS", 1, raising=False)
    assert fail(path) == ("too-large", "more than 1 packets")
    monkeypatch.undo()
    assert fail(write_black(tmp_path / "w.mp4", 2048, 16, 2)) == (
        "too-large",
        "frames of 2048x16: more than 100 times as long as wide",
    )
    Image.new("RGB", (4000, 20)).save(tmp_path / "1.jpg")
    assert fail(tmp_path)[0] == "too-large"


def test_a_decoder_over_its_own_limit_is_the_videos_fault(tmp_path):  # B4
    path = write_black(tmp_path / "v.mp4", 2048, 2048, 4)
    code = (
        "from s4v.extract.decode import worker\nworker._MEMORY_BYTES, worker._BYTES_PER_PIXEL = {} << 20, 0\n"
        "worker.main()"
    )
    answer = ask_process(code.format(16), path)
    assert answer["ok"] is False and answer["code"] == "too-large"
    assert answer["detail"] == "it takes a decoder more than 0.0 GB of memory"
    assert ask_process(code.format(1000), path)["ok"] is True


@pytest.mark.slow
def test_an_honest_8k_film_passes(tmp_path):  # B4
    path = write_black(tmp_path / "v.mp4", 7680, 4320, 3)
    taken, video = peak_mb(path, num_frames=3)
    assert video.pixels is not None and (video.facts["width"], video.facts["height"]) == (7680, 4320)
    assert taken < 1500
