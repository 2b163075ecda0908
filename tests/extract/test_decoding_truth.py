"""A row says what is in its file: each line of the faults A1 to A8, F4 and F5, and other inputs of its kind.

Most videos here are made by `write_counting_video`: four quarters of known colours, of which the grey one counts the
frames. How a picture lies, and which frame it is, is read back from the pixels.
"""

import gzip
import hashlib
import io
import os
import re
import struct
import tarfile
import zipfile
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from s4v.extract.decode import video_file as _video
from s4v.extract.decode import worker as _decoder
from s4v.extract.decode.pool import DecodeRequest, DecoderPool
from s4v.extract.decode.video_file import DecodeFailure
from s4v.extract.decode.worker import LastVideo, decode
from s4v.extract.extraction import extract_dataset
from s4v.extract.scan import scan_dataset
from s4v.store.reader import open_store

RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)
WIDTH, HEIGHT = 64, 48
needs_decord = pytest.mark.skipif(_video.decord is None, reason="decord has no wheel for this system")


def paint(number, *, ground=0):
    """Red and green above, blue and a grey that counts below."""
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[: HEIGHT // 2, : WIDTH // 2], picture[: HEIGHT // 2, WIDTH // 2 :] = RED, GREEN
    picture[HEIGHT // 2 :, : WIDTH // 2] = BLUE
    picture[HEIGHT // 2 :, WIDTH // 2 :] = 20 + ground + 2 * (number % 100)
    return picture


def write_counting_video(
    path, num_frames=40, *, codec="libx264", gop=20, rate=25, container=None, options=None, ticks=None, matrix=None,
    sound_s=0.0, title=None, first=0, ground=0,
):  # fmt: skip
    """`ticks` are the frames' times in units of 1/rate."""
    with av.open(str(path), "w", options=container or {}) as file:
        if title:
            file.metadata["title"] = title
        stream = file.add_stream(codec, rate=rate, options={"qscale": "1", "crf": "4", **(options or {})})
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = Fraction(1, rate)
        stream.codec_context.bit_rate = 4_000_000
        if matrix is not None:
            stream.set_display_matrix(matrix)
        sound = file.add_stream("aac", rate=16000) if sound_s else None
        for number in range(int(sound_s * 16000 / 1024)):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            samples.sample_rate, samples.pts = 16000, 1024 * number
            file.mux(sound.encode(samples))
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(paint(first + number, ground=ground), format="rgb24")
            frame.pts, frame.time_base = (number if ticks is None else ticks[number]), Fraction(1, rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if sound is not None:
            file.mux(sound.encode(None))
    return path


def run(path, **changes):
    """Facts and pixels: frames as they are, their middle 48 x 48."""
    request = dict(
        path=str(path), num_frames=8, sampling="uniform", resize="224", image_size=(48, 48), start_s=None, end_s=None,
        decoder="auto",
    )  # fmt: skip
    return decode({**request, **changes}, lambda _: None)


def outcome(path, **changes):
    """The reason of a row that failed, or None and the facts of a good one."""
    try:
        return None, run(path, **changes)[0]
    except DecodeFailure as failure:
        return f"{failure.code}: {failure}", None


def read_counts(pixels, *, corner=(36, 36)):
    """Which frames they are, by the grey quarter."""
    grey = pixels[0, :, 0, corner[0] - 4 : corner[0] + 4, corner[1] - 4 : corner[1] + 4].mean(axis=(1, 2, 3))
    return [round((value - 20) / 2) for value in grey]


def assert_is_counted(path, num_in_file, **changes):
    """All frames are there, and those that were asked for are the ones that came."""
    facts, pixels = run(path, **changes)
    assert (facts["num_frames"], facts["reason"]) == (num_in_file, None)
    counts = read_counts(pixels)
    assert np.abs(np.subtract(counts, [index % 100 for index in facts["frame_indices"]])).max() <= 1
    return facts


def cut_after_packets(path, num_packets):
    """Cut a file before a packet of its film, in the order in which they lie there."""
    with av.open(str(path)) as file:
        places = sorted(packet.pos for packet in file.demux(video=0) if packet.size)
    path.write_bytes(path.read_bytes()[: places[num_packets]])
    return path


# --- A1: announced against present ---

FAST = {"movflags": "faststart"}
ANNOUNCING = {
    "v.mp4": dict(container=FAST),
    "v.mov": dict(container=FAST),
    "v.avi": dict(codec="mpeg4"),
    "v.mkv": dict(),
    "v.webm": dict(codec="libvpx"),
    "v.mxf": dict(codec="mpeg2video"),
}


@pytest.mark.parametrize("name", ANNOUNCING)
def test_a_file_that_was_cut_is_truncated(tmp_path, name):  # A1
    path = write_counting_video(tmp_path / name, 200, **ANNOUNCING[name])
    assert_is_counted(path, 200)
    path.write_bytes(path.read_bytes()[: int(0.7 * path.stat().st_size)])
    reason, facts = outcome(path)
    assert facts is None, "a good row of a file that lacks a third"
    num_left, num_announced = map(int, re.fullmatch(r"truncated: (\d+) of (?:about )?(\d+) frames.*", reason).groups())
    assert num_left < 160 and 190 <= num_announced <= 200


@pytest.mark.parametrize("name", ["v.mp4", "v.avi"])
@pytest.mark.parametrize(("num_left", "code"), [(198, "clamped"), (196, "clamped"), (195, "truncated")])
def test_two_frames_or_two_percent_may_be_missing(tmp_path, name, num_left, code):  # A1
    options = {**ANNOUNCING[name], "options": {"bf": "0"}}
    path = cut_after_packets(write_counting_video(tmp_path / name, 200, **options), num_left)
    reason, facts = outcome(path)
    reason = reason or facts["reason"]
    assert reason is not None and reason.startswith(f"{code}: {num_left} of 200 frames")
    if facts is not None:
        assert facts["num_frames"] == num_left


@pytest.mark.parametrize("name", ["v.mp4", "v.avi", "v.mkv"])
def test_allow_loss_keeps_more_and_says_so(tmp_path, name):  # A1
    options = {**ANNOUNCING[name], "options": {"bf": "0"}}
    path = cut_after_packets(write_counting_video(tmp_path / name, 200, **options), 130)
    assert outcome(path, allow_loss=0.3)[0].startswith("truncated: 130 of ")
    reason, facts = outcome(path, allow_loss=0.4)
    assert reason is None and facts["num_frames"] == 130
    assert facts["reason"].startswith("clamped: 130 of ")
    assert read_counts(run(path, allow_loss=0.4)[1])[-1] == pytest.approx(facts["frame_indices"][-1] % 100, abs=1)


@pytest.mark.parametrize("decoder", ["auto", "pyav", pytest.param("decord", marks=needs_decord)])
def test_all_decoders_judge_a_cut_file_alike(tmp_path, decoder):  # A1
    path = cut_after_packets(write_counting_video(tmp_path / "v.mp4", 100, container=FAST, options={"bf": "0"}), 70)
    assert outcome(path, decoder=decoder)[0] == "truncated: 70 of 100 frames are there"
    assert outcome(path, decoder=decoder, end_s=1.0)[0] == "truncated: 70 of 100 frames are there"


def test_damage_in_the_middle_and_at_the_end_are_judged_alike(tmp_path):  # A1
    path = write_counting_video(tmp_path / "v.mp4", 100, container=FAST, gop=1)
    with av.open(str(path)) as file:
        packets = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for place, size in packets[41:46]:
        data[place : place + size] = b"\xff" * size
    path.write_bytes(data)
    assert outcome(path)[0] == "truncated: 95 of 100 frames decode"


@pytest.mark.parametrize("name", ["v.mkv", "v.webm"])
def test_a_hole_in_a_matroska_file_is_no_still_stretch(tmp_path, name):  # A1
    path = write_counting_video(tmp_path / name, 100, container={"cluster_time_limit": "400"}, **ANNOUNCING[name])
    with av.open(str(path)) as file:
        places = sorted(packet.pos for packet in file.demux(video=0) if packet.size)
    data = bytearray(path.read_bytes())
    assert outcome(path)[0] is None
    data[places[40] - 12 : places[60]] = bytes(places[60] - places[40] + 12)
    path.write_bytes(data)
    assert re.match(r"truncated: \d\d of about (9\d|10[01]) frames", outcome(path)[0])


def set_edit(path, start, length):
    """Have an edit list show frames from `start` on, for so many units of the film's time base."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        per_frame = round(1 / 25 / file.streams.video[0].time_base)
    place = data.index(b"elst") + 4
    assert struct.unpack_from(">II", data, place) == (0, 1)
    struct.pack_into(">Ii", data, place + 8, length * 40, start * per_frame)
    path.write_bytes(data)
    return path


def pack_b_frames(path, num_frames):
    """An AVI as DivX and old Xvid wrote them: a P-frame and the B-frame before it in one packet, then an empty one."""
    source = write_counting_video(path.with_name("plain.avi"), num_frames, codec="mpeg4", options={"bf": "1"}, gop=400)
    with av.open(str(source)) as file, av.open(str(path), "w") as packed:
        film = file.streams.video[0]
        stream = packed.add_stream_from_template(film)
        stream.codec_context.extradata = bytes(film.codec_context.extradata or b"")
        units = [bytes(packet) for packet in file.demux(film) if packet.size]
        mark = b"\0\0\1\xb2DivX503b1393p"
        chunks, waiting = [], None
        for unit in units:
            start = unit.index(b"\0\0\1\xb6")
            is_b = unit[start + 4] >> 6 == 2
            if is_b and chunks and waiting is None:
                chunks[-1] += unit
                chunks.append(b"\0\0\1\xb6\x40\x00\x00")
                waiting = len(chunks)
            else:
                chunks.append(unit)
                waiting = None
        first = chunks[0].index(b"\0\0\1\xb6")
        chunks[0] = chunks[0][:first] + mark + chunks[0][first:]
        for number, chunk in enumerate(chunks):
            packet = av.Packet(chunk)
            packet.pts = packet.dts = number
            packet.time_base, packet.stream = film.time_base, stream
            packet.is_keyframe = number == 0
            packed.mux(packet)
    return path


def hide_frames(path, num_frames):
    """A VP8 film of which every tenth picture is predicted from and never shown: two packets for the frame after it."""
    source = write_counting_video(path.with_name("shown.webm"), num_frames, codec="libvpx", gop=400)
    with av.open(str(source)) as file, av.open(str(path), "w") as hidden:
        stream = hidden.add_stream_from_template(file.streams.video[0])
        for number, packet in enumerate(file.demux(video=0)):
            if packet.size:
                data = bytearray(bytes(packet))
                data[0] &= 0xEF if number % 10 == 5 else 0xFF
                copy = av.Packet(bytes(data))
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                hidden.mux(copy)
    return path


LOOK_SHORT = {
    "edit_list.mp4": lambda p: (set_edit(write_counting_video(p, 60, options={"bf": "0"}), 20, 30), 30, 20),
    "packed.avi": lambda p: (pack_b_frames(p, 41), 41, 0),
    "hidden.webm": lambda p: (hide_frames(p, 60), 54, 0),
    "fragmented.mp4": lambda p: (
        write_counting_video(p, container={"movflags": "frag_keyframe+empty_moov"}), 40, 0,
    ),
    "dash.mp4": lambda p: (
        write_counting_video(p, container={"movflags": "frag_keyframe+empty_moov+dash+global_sidx"}), 40, 0,
    ),
    "live.webm": lambda p: (write_counting_video(p, codec="libvpx", container={"live": "1"}), 40, 0),
    "variable_rate.mp4": lambda p: (write_counting_video(p, ticks=[n * n // 4 + n for n in range(40)]), 40, 0),
    "variable_rate.mkv": lambda p: (write_counting_video(p, ticks=[n * n // 4 + n for n in range(40)]), 40, 0),
    "one_frame.mp4": lambda p: (write_counting_video(p, 1), 1, 0),
    "one_frame.mkv": lambda p: (write_counting_video(p, 1), 1, 0),
    "long_sound.mkv": lambda p: (write_counting_video(p, sound_s=6.0), 40, 0),
    "long_sound.mp4": lambda p: (write_counting_video(p, sound_s=6.0), 40, 0),
    "transport.ts": lambda p: (write_counting_video(p), 40, 0),
    "dropped_chunks.avi": lambda p: (
        write_counting_video(p, codec="mpeg4", ticks=[n + 9 * (n > 20) for n in range(40)]), 40, 0,
    ),
    "late_start.mkv": lambda p: (write_counting_video(p, ticks=range(250, 290)), 40, 0),
    "program.mpg": lambda p: (write_counting_video(p, codec="mpeg1video"), 40, 0),
    "animation.gif": lambda p: (write_counting_video(p, codec="gif"), 40, 0),
    "flash.flv": lambda p: (write_counting_video(p), 40, 0),
    "windows.wmv": lambda p: (write_counting_video(p, codec="wmv2"), 40, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOK_SHORT)
def test_what_only_looks_short_stays_good_with_the_same_frames(tmp_path, name):  # A1
    path, num_frames, first = LOOK_SHORT[name](tmp_path / name)
    facts, pixels = run(path)
    assert (facts["num_frames"], facts["reason"]) == (num_frames, None)
    shown = [number for number in range(100) if number % 10 != 5 or name != "hidden.webm"]
    expected = [shown[first + index] for index in facts["frame_indices"]]
    assert np.abs(np.subtract(read_counts(pixels), expected)).max() <= (4 if name.endswith("gif") else 1)


def test_pictures_of_vp9_that_are_never_shown_are_known():  # A1
    """Bits: marker 10, profile 00, show_existing_frame, frame_type, show_frame."""
    from s4v.extract.decode.timeline import _is_hidden_vp9

    assert _is_hidden_vp9(bytes([0b10000100, 0, 0]))
    assert not _is_hidden_vp9(bytes([0b10000110, 0, 0]))
    assert not _is_hidden_vp9(bytes([0b10001000])), "an earlier picture is shown"
    assert not _is_hidden_vp9(bytes([0b10000100, 0, 0xC1])), "a superframe ends with a frame that is shown"


def test_frames_that_share_a_time_are_all_there(tmp_path):  # A1
    path = tmp_path / "v.mkv"
    source = write_counting_video(tmp_path / "source.mkv", 40, gop=1)
    with av.open(str(source)) as file, av.open(str(path), "w") as shared:
        stream = shared.add_stream_from_template(file.streams.video[0])
        for packet in file.demux(video=0):
            if packet.size:
                packet.stream = stream
                packet.pts = packet.dts = packet.pts - packet.pts % 80
                shared.mux(packet)
    assert_is_counted(path, 40, num_frames=40)


# --- A2: a row knows its source ---


def test_good_and_failed_answers_carry_their_source(tmp_path, make_frames):  # A2
    good = write_counting_video(tmp_path / "v.mp4")
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video" * 40)
    folder = make_frames(tmp_path / "frames")
    requests = [
        DecodeRequest(path=str(path), num_frames=2, sampling="uniform", resize="224", image_size=(32, 32))
        for path in (good, bad, folder, tmp_path / "none.mp4")
    ]
    with DecoderPool(1) as pool:
        answers = list(pool.decode_ahead(requests))
    assert [answer.pixels is not None for answer in answers] == [True, False, True, False]
    for path, answer in zip((good, bad), answers[:2], strict=True):
        assert answer.facts.get("source_bytes") == path.stat().st_size
        assert answer.facts["source_mtime_ns"] == path.stat().st_mtime_ns
        assert answer.facts["source_hash"] == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    assert answers[2].facts["source_bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert answers[2].facts["source_hash"].startswith("sha256-frames:")
    assert answers[3].facts == {"reason": "missing-file"}


@pytest.mark.parametrize("change", ["append", "replace", "touch", "folder"])
def test_a_source_that_changes_meanwhile_is_a_failed_row(tmp_path, make_video, make_frames, change, monkeypatch):  # A2
    path = make_frames(tmp_path / "frames") if change == "folder" else make_video(tmp_path / "v.mp4", num_frames=20)

    def disturb(video, *args, decode=_decoder.VideoFile.decode, **kwargs):
        decoded = decode(video, *args, **kwargs)
        if change == "append":
            with path.open("ab") as file:
                file.write(b"more")
        elif change == "replace":
            data = path.read_bytes()
            other = tmp_path / "other"
            other.write_bytes(data)
            stat = path.stat()
            os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            other.rename(path)
        elif change == "touch":
            os.utime(path, ns=(1, 1))
        else:
            make_frames(tmp_path / "more", num_frames=1, first=9)
            (tmp_path / "more/00009.jpg").rename(path / "00009.jpg")
        return decoded

    monkeypatch.setattr(_decoder.VideoFile, "decode", disturb)
    try:
        run(path)
        code = None
    except DecodeFailure as failure:
        code = failure.code
    assert code == "source-changing"


# --- A3: mirrors ---

ONE = 1 << 16
MATRICES = {
    "as_it_is": ((ONE, 0, 0, ONE), lambda picture: picture),
    "mirrored": ((-ONE, 0, 0, ONE), lambda picture: picture[:, ::-1]),
    "upside_down_mirrored": ((ONE, 0, 0, -ONE), lambda picture: picture[::-1]),
    "turned_180": ((-ONE, 0, 0, -ONE), lambda picture: picture[::-1, ::-1]),
    "turned_right": ((0, ONE, -ONE, 0), lambda picture: np.rot90(picture, -1)),
    "turned_left": ((0, -ONE, ONE, 0), lambda picture: np.rot90(picture, 1)),
    "transposed": ((0, ONE, ONE, 0), lambda picture: picture.swapaxes(0, 1)),
    "anti_transposed": ((0, -ONE, -ONE, 0), lambda picture: picture[::-1, ::-1].swapaxes(0, 1)),
}


def find_quarters(picture):
    """The colours' names, row by row."""
    height, width = picture.shape[:2]
    names = []
    for y in (height // 4, 3 * height // 4):
        for x in (width // 4, 3 * width // 4):
            colour = picture[y - 2 : y + 2, x - 2 : x + 2].astype(float).mean(axis=(0, 1))
            names.append("grey" if np.ptp(colour) < 20 else "RGB"[int(colour.argmax())])
    return names


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("ending", ["mp4", "mov"])
def test_pictures_lie_as_the_display_matrix_says(tmp_path, name, decoder, ending):  # A3
    (a, b, c, d), lay = MATRICES[name]
    matrix = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path = write_counting_video(tmp_path / f"v.{ending}", 8, matrix=None if name == "as_it_is" else matrix)
    facts, pixels = run(path, num_frames=2, decoder=decoder)
    expected = lay(paint(4))
    assert (facts["height"], facts["width"]) == expected.shape[:2]
    assert find_quarters(pixels[0, 0, 0]) == find_quarters(expected)


@needs_decord
def test_decord_gets_no_mirrored_file(tmp_path):  # A3
    path = write_counting_video(tmp_path / "v.mp4", 8, matrix=(-ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30))
    assert outcome(path, decoder="decord")[0].startswith("decode-error: decord seeks to wrong frames")
    turned = write_counting_video(tmp_path / "w.mp4", 8, matrix=(-ONE, 0, 0, 0, -ONE, 0, 0, 0, 1 << 30))
    by_decord, by_pyav = (run(turned, decoder=name)[1] for name in ("decord", "pyav"))
    assert np.array_equal(by_decord, by_pyav)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_frames_of_a_folder_lie_as_their_exif_says(tmp_path, orientation):  # A3
    lays = ["as_it_is", "mirrored", "turned_180", "upside_down_mirrored"]
    lays += ["transposed", "turned_right", "anti_transposed", "turned_left"]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for number in (1, 2):
        Image.fromarray(paint(number)).save(tmp_path / f"{number}.jpg", quality=95, exif=exif)
    facts, pixels = run(tmp_path, num_frames=2)
    expected = MATRICES[lays[orientation - 1]][1](paint(1))
    assert (facts["height"], facts["width"]) == expected.shape[:2]
    assert find_quarters(pixels[0, 0, 0]) == find_quarters(expected)


# --- A4: the film among the tracks ---


def write_tracks(path, *tracks):
    """Tracks of (codec, frames, grey ground, disposition), one after the other in the header."""
    with av.open(str(path), "w") as file:
        streams = []
        for codec, _, _, disposition in tracks:
            stream = file.add_stream(codec, rate=25, options={"crf": "4", "qscale": "1"})
            stream.width, stream.height = WIDTH, HEIGHT
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.disposition = disposition
            streams.append(stream)
        for stream, (_, num_frames, ground, _) in zip(streams, tracks, strict=True):
            for number in range(num_frames):
                picture = av.VideoFrame.from_ndarray(paint(number, ground=ground), format="rgb24")
                picture.pts, picture.time_base = number, Fraction(1, 25)
                file.mux(stream.encode(picture))
            file.mux(stream.encode(None))
    return path


NONE, DEFAULT, ATTACHED = (av.stream.Disposition(value) for value in (0, 1, 1024))


@pytest.mark.parametrize(
    ("ending", "tracks"),
    [
        ("mkv", [("mjpeg", 1, 30, DEFAULT), ("libx264", 20, 0, NONE)]),
        ("mkv", [("mjpeg", 1, 30, NONE), ("libx264", 20, 0, NONE)]),
        ("mp4", [("mjpeg", 1, 30, ATTACHED), ("libx264", 20, 0, DEFAULT)]),
        ("mkv", [("libx264", 20, 30, NONE), ("libx264", 20, 0, DEFAULT)]),
        ("mkv", [("libx264", 10, 30, DEFAULT), ("libx264", 20, 0, DEFAULT)]),
        ("mkv", [("libx264", 20, 0, DEFAULT), ("mjpeg", 1, 30, NONE)]),
    ],
)
@pytest.mark.parametrize("decoder", ["auto", "pyav"])
def test_the_film_is_the_track_that_players_choose(tmp_path, ending, tracks, decoder):  # A4
    path = write_tracks(tmp_path / f"v.{ending}", *tracks)
    facts, pixels = run(path, decoder=decoder)
    assert facts["num_frames"] == 20
    assert np.abs(np.subtract(read_counts(pixels), facts["frame_indices"])).max() <= 1


# --- A5: what is on the screen ---


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.avi", "v.ts"])
def test_a_still_stretch_shows_its_last_frame(tmp_path, name):  # A5
    ticks = [number if number < 50 else number + 1500 for number in range(100)]  # 0 to 2 s, 62 to 64 s
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    path = write_counting_video(tmp_path / name, 100, codec=codec, ticks=ticks)
    facts, pixels = run(path, start_s=30.0, end_s=32.0)
    assert set(facts["frame_indices"]) == {49} and read_counts(pixels) == [pytest.approx(49, abs=1)] * 8
    assert facts["timestamps_s"][0] == pytest.approx(1.96)
    reasons = [outcome(path, start_s=float(start), end_s=start + 2.0)[0] for start in range(0, 64, 8)]
    assert reasons == [None] * 8
    assert set(run(path, start_s=62.0, end_s=64.0)[0]["frame_indices"]) == {53, 59, 65, 71, 78, 84, 90, 96}
    assert outcome(path, start_s=64.5, end_s=66.0)[0] == "no-frames: no frame from 64.5 s to 66.0 s among 100"


def test_every_segment_of_a_video_with_a_still_stretch_is_a_row(tmp_path, make_config):  # A5
    ticks = [number if number < 20 else number + 300 for number in range(40)]
    (tmp_path / "videos/a").mkdir(parents=True)
    write_counting_video(tmp_path / "videos/a/v.mp4", 40, ticks=ticks)
    config = make_config(tmp_path / "videos", tmp_path / "s.zarr", segment_s=2.0, frames={"": 2}, num_decoders=1)
    assert extract_dataset(config).videos == {"ok": 7, "failed": 0, "pending": 0}


# --- A6: streams that were put one after the other ---


@pytest.mark.parametrize(("ending", "codec"), [("ts", "libx264"), ("mpg", "mpeg1video"), ("mkv", "libx264")])
def test_joined_streams_are_counted_on(tmp_path, ending, codec):  # A6
    one = write_counting_video(tmp_path / f"a.{ending}", 30, codec=codec)
    other = write_counting_video(tmp_path / f"b.{ending}", 20, codec=codec, first=30)
    path = tmp_path / f"ab.{ending}"
    path.write_bytes(one.read_bytes() + other.read_bytes())
    facts = assert_is_counted(path, 50, num_frames=10)
    assert facts["timestamps_s"] == sorted(facts["timestamps_s"])
    assert facts["duration_s"] == pytest.approx(2.0, abs=0.1)
    assert read_counts(run(path, start_s=1.4, end_s=1.8, num_frames=2)[1]) == pytest.approx([38, 43], abs=2)
    path.write_bytes(one.read_bytes() * 3)
    reason, facts = outcome(path)
    assert facts["num_frames"] == 90 if reason is None else "a second file begins" in reason


@pytest.mark.parametrize(("ending", "codec"), [("mp4", "libx264"), ("flv", "libx264"), ("wmv", "wmv2")])
def test_what_cannot_be_counted_on_is_told(tmp_path, ending, codec):  # A6
    one = write_counting_video(tmp_path / f"a.{ending}", 30, codec=codec)
    assert outcome(one)[0] is None
    path = tmp_path / f"aa.{ending}"
    path.write_bytes(one.read_bytes() * 2)
    reason, facts = outcome(path)
    assert facts is None or facts["num_frames"] == 60
    assert reason is None or "players show the first" in reason


# --- A7: nothing opens other files ---


@pytest.fixture
def secret(tmp_path):
    """A film outside the root."""
    (tmp_path / "elsewhere").mkdir()
    return write_counting_video(tmp_path / "elsewhere/secret.ts", 30)


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.2,\n{}\n#EXT-X-ENDLIST\n",
    "master": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1000\nfile://{}\n",
    "concat": "ffconcat version 1.0\nfile '{}'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "dash": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{}</BaseURL><Period/></MPD>',
}


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
@pytest.mark.parametrize("ending", ["m3u8", "mp4", "ts", "ffconcat"])
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_file_that_names_others_opens_none(tmp_path, secret, kind, ending, decoder):  # A7
    path = tmp_path / f"x.{ending}"
    path.write_text(PLAYLISTS[kind].format(secret))
    reason, facts = outcome(path, decoder=decoder)
    assert facts is None and reason.startswith("unreadable: it is a")


@needs_decord
def test_decord_alone_would_open_a_playlist_under_any_name(tmp_path, secret):  # A7
    path = tmp_path / "x.mp4"
    path.write_text(PLAYLISTS["hls"].format(secret))
    assert len(_video.decord.VideoReader(str(path))) == 30, "then the check before it is needed no more"
    assert outcome(path, decoder="decord")[1] is None


def refer_to(path, other):
    """Have an MP4 say that its data lie in another file: an alias in its `dref` box, as QuickTime wrote them."""
    data = bytearray(path.read_bytes())
    assert data.index(b"mdat") < data.index(b"moov"), "its data must not move"
    volume, name, target = b"disk", other.name.encode(), str(other).encode()
    alias = bytearray(150)
    alias[10], alias[11 : 11 + len(volume)] = len(volume), volume
    alias[50], alias[51 : 51 + len(name)] = len(name), name
    record = bytes(alias) + struct.pack(">HH", 2, len(target)) + target + bytes(len(target) % 2)
    record += struct.pack(">HH", 0xFFFF, 0)
    entry = struct.pack(">I4sI", 12 + len(record), b"alis", 0) + record
    dref = data.index(b"dref") - 4
    size = struct.unpack_from(">I", data, dref)[0]
    grown = len(entry) - (size - 16)
    data[dref + 16 : dref + size] = entry
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        place = data.index(kind) - 4
        struct.pack_into(">I", data, place, struct.unpack_from(">I", data, place)[0] + grown)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("decoder", ["auto", "pyav", pytest.param("decord", marks=needs_decord)])
def test_data_in_another_file_are_not_read(tmp_path, decoder):  # A7
    other = write_counting_video(tmp_path / "other.mp4", 20, ground=40)
    own = write_counting_video(tmp_path / "own.mp4", 20)
    assert outcome(refer_to(own, other), decoder=decoder)[0] == (
        "unreadable: its frames lie in another file, and none but itself is opened"
    )
    with av.open(str(own), container_options={"enable_drefs": "1", "use_absolute_path": "1"}) as file:
        num_read = sum(packet.size > 0 for packet in file.demux(video=0))
    assert num_read == 20, "with references enabled the other file would be read"


# --- A8: what is no video is named ---


def encode_picture(kind):
    buffer = io.BytesIO()
    Image.fromarray(paint(3)).save(buffer, format=kind)
    return buffer.getvalue()


def pack(kind, data):
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("v.ts", data)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            entry = tarfile.TarInfo("v.ts")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


NO_VIDEOS = {
    "a JPEG picture": lambda film: encode_picture("JPEG"),
    "a PNG picture": lambda film: encode_picture("PNG"),
    "a GIF picture": lambda film: encode_picture("GIF"),
    "a WebP picture": lambda film: encode_picture("WEBP"),
    "a BMP picture": lambda film: encode_picture("BMP"),
    "a TIFF picture": lambda film: encode_picture("TIFF"),
    "a Git LFS pointer: run git lfs pull": lambda film: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
    "a git-annex pointer: run git annex get": lambda film: b"/annex/objects/SHA256E-s5--abc.mp4\n",
    "an HTML page": lambda film: b"\n  <!DOCTYPE html>\n<html><body>Not found</body></html>",
    "an HTML page:": lambda film: b'<?xml version="1.0"?>\n<html xmlns="http://www.w3.org/1999/xhtml"></html>',
    "a zip archive": lambda film: pack("zip", film),
    "a tar archive": lambda film: pack("tar", film),
    "gzip-compressed": lambda film: gzip.compress(film),
    "a PDF document": lambda film: b"%PDF-1.7\n" + bytes(200),
    "a text": lambda film: "keine Videos, nur Wörter\n".encode() * 90,
    "zeros alone": lambda film: bytes(9000),
    "a JSON text": lambda film: b'{"error": "quota exceeded"}',
}


@pytest.mark.parametrize("name", NO_VIDEOS)
@pytest.mark.parametrize("ending", ["mp4", "avi"])
def test_what_is_no_video_is_named_by_its_first_bytes(tmp_path, name, ending):  # A8
    film = write_counting_video(tmp_path / "film.ts", 10).read_bytes()
    path = tmp_path / f"v.{ending}"
    path.write_bytes(NO_VIDEOS[name](film))
    reason, facts = outcome(path)
    assert facts is None, "a good row of what is no video"
    assert reason.startswith(f"unreadable: it is {name}")


@pytest.mark.parametrize(("codec", "ending"), [("gif", "gif"), ("apng", "apng"), ("mjpeg", "mjpeg"), ("mjpeg", "avi")])
def test_animations_and_motion_pictures_stay_videos(tmp_path, codec, ending):  # A8
    path = tmp_path / f"v.{ending}"
    if codec == "apng":
        pictures = [Image.fromarray(paint(number)) for number in range(10)]
        pictures[0].save(path, format="PNG", save_all=True, append_images=pictures[1:], duration=40)
    else:
        write_counting_video(path, 10, codec=codec)
    assert run(path)[0]["num_frames"] == 10


# --- F4: frames by their times ---


def write_out_of_order(path, num_frames):
    """A film whose packets stand, and decode, in another order than that of their times; each shows its own time."""
    order = [4 * (number // 4) + (0, 3, 1, 2)[number % 4] for number in range(num_frames)]
    source = path.with_name("source.mp4")
    with av.open(str(source), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={"crf": "4", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = 20
        for number in order:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(paint(number), format="rgb24")))
        file.mux(stream.encode(None))
    with av.open(str(source)) as file, av.open(str(path), "w") as shuffled:
        stream = shuffled.add_stream_from_template(file.streams.video[0])
        packets = [packet for packet in file.demux(video=0) if packet.size]
        for place, (packet, number) in enumerate(zip(packets, order, strict=True)):
            packet.pts, packet.dts, packet.time_base = number, place - 3, Fraction(1, 25)
            packet.stream = stream
            shuffled.mux(packet)
    return path


@pytest.mark.parametrize("num_frames", [8, 40])
@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv"])
def test_frames_that_come_out_of_order_are_taken_by_their_times(tmp_path, num_frames, ending):  # F4
    path = write_out_of_order(tmp_path / f"v.{ending}", 40)
    with av.open(str(path)) as file:
        times = [frame.pts for frame in file.decode(video=0)]
    assert times != sorted(times) and len(set(times)) == 40, "this decoder gives them in order"
    for decoder in ("pyav", "auto"):
        assert_is_counted(path, 40, num_frames=num_frames, decoder=decoder)
    last_video = LastVideo()
    for start in (0.0, 0.4, 0.8, 1.2, 0.0):
        request = dict(
            path=str(path), num_frames=3, sampling="uniform", resize="224", image_size=(48, 48), decoder="pyav"
        )
        request |= dict(start_s=start, end_s=start + 0.4)
        facts, pixels = decode(request, lambda _: None, last_video)
        assert np.abs(np.subtract(read_counts(pixels), facts["frame_indices"])).max() <= 1


def test_packets_out_of_order_are_all_taken(real_videos):  # F4
    facts, _ = run(real_videos / "real" / "unordered.mov", num_frames=4)
    assert facts["frame_indices"] == [0, 1, 2, 3]


# --- F5: metadata do not matter ---


@pytest.mark.parametrize(
    ("ending", "codec"), [("avi", "mpeg4"), ("mp4", "libx264"), ("mkv", "libx264"), ("flv", "flv1")]
)
def test_a_title_that_is_not_utf8_does_not_matter(tmp_path, ending, codec):  # F5
    path = write_counting_video(tmp_path / f"v.{ending}", 20, codec=codec, title="TITLETITLE")
    data = path.read_bytes()
    assert b"TITLETITLE" in data
    path.write_bytes(data.replace(b"TITLETITLE", b"caf\xe9 \xff\xfe\x80 x"))
    assert_is_counted(path, 20)


# --- scan and extract say the same ---


def test_scan_says_what_extract_says_word_for_word(tmp_path, make_config):  # A1
    root = tmp_path / "videos"
    (root / "train/a").mkdir(parents=True)
    (root / "val/a").mkdir(parents=True)
    film = write_counting_video(root / "train/a/good.mp4", 60, container=FAST, options={"bf": "0"})
    (root / "train/a/short.mp4").write_bytes(film.read_bytes())
    cut_after_packets(root / "train/a/short.mp4", 58)
    (root / "val/a/cut.mp4").write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    (root / "val/a/page.mp4").write_text("<html></html>")
    (root / "val/a/empty.mp4").touch()
    (root / "val/a/picture.avi").write_bytes(encode_picture("JPEG"))
    write_counting_video(root / "val/a/still.mkv", 40, ticks=[n + 150 * (n >= 20) for n in range(40)])
    for number, changes in enumerate(({}, {"segment_s": 2.0, "allow_loss": 0.9})):
        config = make_config(root, tmp_path / f"{number}.zarr", frames={"": 4}, num_decoders=2, **changes)
        extract_dataset(config)
        names = ["video_id", "status", "reason", "num_frames", "decoder", "width", "height"]
        rows = open_store(config.out).read_manifest(names).to_pylist()
        scan_dataset(config, tmp_path / "scan.parquet")
        import pyarrow.parquet

        assert pyarrow.parquet.read_table(tmp_path / "scan.parquet", columns=names).to_pylist() == rows
        cut = next(row for row in rows if row["video_id"].startswith("val/a/cut.mp4"))
        assert cut["status"] == ("ok" if changes.get("allow_loss") else "failed")
        assert {row["reason"] for row in rows if "short" in row["video_id"]} == {"clamped: 58 of 60 frames are there"}
