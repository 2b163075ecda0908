"""More than 200 damaged videos among good ones: each is a row with its reason, and the good ones do not notice."""

import random
import shutil
import struct
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import psutil
import pytest

from s4v.extract.decode import pool as decoding
from s4v.extract.extraction import extract_dataset
from s4v.store.reader import open_store
from s4v.store.verify import verify_store

REASONS = {
    "decode-error",
    "empty-file",
    "no-frames",
    "no-video-stream",
    "too-large",
    "truncated",
    "unreadable",
}
CPU_LIMIT_S = 5.0
REAL = Path(__file__).parents[3] / "shared/videos/real"


def encode(path, *, codec="libx264", pix_fmt="yuv420p", size=(64, 48), num_frames=16, ticks=None, gop=4, options=None):
    """A video with a moving column; `ticks` are the times of its frames in tenths of a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    ground = np.random.default_rng(len(path.name)).integers(0, 90, (height, width, 3)).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = Fraction(1, 10)
        for number in range(num_frames):
            image = ground.copy()
            image[:, 3 * number % width :][:, :6] = 255
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = (ticks or range(num_frames))[number], Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def encode_sound(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        for one in (frame, None):
            container.mux(stream.encode(one))


GOOD = {
    "h264.mp4": {},
    "h264.mkv": {"gop": 16},
    "b_frames.mp4": {"gop": 12, "options": {"bf": "2"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "mpeg4.avi": {"codec": "mpeg4"},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "open-gop=0:log-level=none"}},
    "hevc_ten_bits.mp4": {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": {"x265-params": "log-level=none"}},
    "ten_bits.mp4": {"pix_fmt": "yuv420p10le"},
    "odd_size.mp4": {"pix_fmt": "yuv444p", "size": (63, 47)},
    "one_frame.mp4": {"num_frames": 1},
    "variable_rate.mp4": {"ticks": [n * n // 4 + n for n in range(16)]},
}


def turn(path):
    """Have an mp4 say that it is to be shown turned by 90 degrees: the matrix of its track header."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    assert struct.unpack_from(">9i", data, matrix) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, matrix, 0, 65536, 0, -65536, 0, 0, 48 * 65536, 0, 1 << 30)
    path.write_bytes(data)


def damage(name, data):
    """Damaged versions of a file, by a new name."""
    draw = random.Random(name)
    size = len(data)
    for number in range(7):
        yield f"cut{number}_{name}", data[: int(size * (number + 0.5) / 7)]
    for number in range(9):
        flipped = bytearray(data)
        for _ in range(4 ** (number // 2)):
            flipped[draw.randrange(size)] ^= 1 << draw.randrange(8)
        yield f"flip{number}_{name}", bytes(flipped)
    for number in range(4):
        start = draw.randrange(size)
        end = min(size, start + size // 2 ** (number + 1))
        yield f"zero{number}_{name}", data[:start] + bytes(end - start) + data[end:]
    for number in (16, 400):
        yield f"headless{number}_{name}", data[number:]
    yield f"halves_swapped_{name}", data[size // 2 :] + data[: size // 2]
    yield f"more_{name}", data + draw.randbytes(500)
    stem, _, ending = name.rpartition(".")
    yield f"renamed_{stem}.{'avi' if ending == 'mp4' else 'mp4'}", data


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for name, options in GOOD.items():
        codec = options.get("codec", "libx264")
        if codec not in av.codecs_available:
            pytest.skip(f"this build of PyAV has no encoder {codec}")
        encode(root / "train/good" / name, **options)
    turned = root / "train/good/turned.mp4"
    encode(turned)
    turn(turned)
    bad = root / "train/bad"
    bad.mkdir()
    # Rotated by their container, packets out of order: not made with an encoder, so only where they lie beside us.
    for name in ("rotated_0.mov", "rotated_90.mov", "unordered.mov"):
        if (REAL / name).is_file():
            shutil.copy(REAL / name, root / "train/good" / name)
    for name in sorted(path.name for path in (root / "train/good").iterdir()):
        for damaged, data in damage(name, (root / "train/good" / name).read_bytes()):
            (bad / damaged).write_bytes(data)
    encode_sound(bad / "only_sound.mp4")
    (bad / "empty.mp4").touch()
    (bad / "text.mp4").write_text("a video\n" * 300)
    (bad / "noise.webm").write_bytes(random.Random(1).randbytes(20_000))
    return root


@pytest.fixture
def cpu_seconds(monkeypatch):
    """What decoding each file took of its process's CPU, by path; where the process died of it, wall seconds."""
    taken = {}
    decode = decoding._Child.decode

    def used(child):
        times = psutil.Process(child._process.pid).cpu_times()
        return times.user + times.system

    def measure(child, request):
        before, start = used(child), time.monotonic()
        try:
            video = decode(child, request)
        except decoding._ChildDied:
            taken[request.path] = time.monotonic() - start
            raise
        taken[request.path] = used(child) - before
        return video

    monkeypatch.setattr(decoding._Child, "decode", measure)
    return taken


def test_damaged_videos_are_rows_with_reasons_and_good_ones_do_not_notice(corpus, make_config, tmp_path, cpu_seconds):
    config = make_config(corpus, tmp_path / "all.zarr", decode_timeout_s=CPU_LIMIT_S, frames={"": 4})
    summary = extract_dataset(config)
    slow = {path: seconds for path, seconds in cpu_seconds.items() if seconds > CPU_LIMIT_S}
    total = len(cpu_seconds)
    assert not slow and total == sum(summary.videos.values())
    assert sum(summary.videos.values()) == len(list(corpus.rglob("*.*"))) > 220
    assert summary.videos["pending"] == 0 and summary.videos["failed"] > 60
    codes = Counter(row["reason"].partition(":")[0] for row in summary.failed)
    assert set(codes) <= REASONS, codes
    assert not [row for row in summary.failed if "does not expect" in row["reason"]]
    store = open_store(config.out)
    assert verify_store(store) == []
    # A1: each row against a decode of its whole file.
    rows = store.read_manifest(["video_id", "status", "reason", "num_frames"]).to_pylist()
    wrong = [(row, found) for row in rows if (found := find_disagreement(corpus, row)) is not None]
    assert wrong == []
    turned = store.read_manifest(["video_id", "width", "height", "status"]).to_pylist()
    (turned,) = [row for row in turned if row["video_id"] == "train/good/turned.mp4"]
    assert (turned["width"], turned["height"]) == (48, 64)
    # The same rows, shards and batches; what is damaged is empty instead.
    alone = make_config(shutil.copytree(corpus, tmp_path / "alone"), tmp_path / "alone.zarr", frames={"": 4})
    for file in (alone.root / "train/bad").iterdir():
        file.write_bytes(b"")
    good = len(list((alone.root / "train/good").iterdir()))
    assert extract_dataset(alone).videos == {"ok": good, "failed": total - good, "pending": 0}
    ours, theirs = (read_good(path) for path in (config.out, alone.out))
    for name in ("patches", "cls", "pixels"):
        one, other = (getattr(clips, name) for clips in (ours, theirs))
        assert np.array_equal(one, other), name


class Film(NamedTuple):
    """A whole file as PyAV decodes it."""

    num_announced: int
    """By its table of frames; 0 where there is none."""
    num_good: int
    """Frames without an error."""
    num_broken: int
    """Errors and frames that are marked as damaged."""


def decode_whole(path):
    """All of a file's first film; None where there is none to decode."""
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            num_indexed = len(stream.index_entries)
            num_discarded = num_good = num_broken = 0
            for packet in container.demux(stream):
                num_discarded += packet.is_discard
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    num_broken += 1
                    continue
                num_broken += sum(frame.is_corrupt for frame in frames)
                num_good += sum(not frame.is_corrupt for frame in frames)
            # An edit list that ends early leaves packets out of the index; those before its start are discarded.
            num_listed = min(stream.frames, num_indexed) if "mov" in container.format.name else stream.frames
            return Film(max(0, num_listed - num_discarded), num_good, num_broken)
    except (av.FFmpegError, IndexError, AttributeError):
        return None


def find_disagreement(root, row):
    """Why a row does not say what is in its file; None where it does. All films of the corpus had 16 frames, or 1."""
    film = decode_whole(root / row["video_id"])
    num_original = 1 if "one_frame" in row["video_id"] else 3 if "rotated" in row["video_id"] else 16
    num_original = 4 if "unordered" in row["video_id"] else num_original
    if row["status"] == "ok":
        if film is None or film.num_good < row["num_frames"]:
            return f"good with {row['num_frames']} frames, and PyAV decodes {film}"
        lost = film.num_announced - row["num_frames"]
        if lost > max(2, 0.02 * film.num_announced) or (lost > 0 and not row["reason"]):
            return f"good with {row['num_frames']} frames, and the file announces {film}"
        return None
    is_short = film is None or film.num_good < max(num_original, film.num_announced)
    return None if is_short or film.num_broken else f"failed ({row['reason']}), and PyAV decodes {film}"


def read_good(path):
    store = open_store(path)
    table = store.read_manifest(["video_id", "status", "num_cached_frames"]).to_pylist()
    rows = {row["video_id"]: place for place, row in enumerate(table) if row["video_id"].startswith("train/good/")}
    assert {table[place]["status"] for place in rows.values()} == {"ok"}
    chosen = [rows[name] for name in sorted(rows) if table[rows[name]]["num_cached_frames"] == 4]
    return store.read_clips(chosen, [[0, 1, 2, 3]] * len(chosen))


def mutate(data, draw):
    """One damaged version of a file: bits, bytes and stretches changed, cut, moved, doubled."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        size = len(data)
        start = draw.randrange(size)
        length = min(size - start, draw.choice((1, 4, 16, 100, size // 10 + 1, size // 3 + 1)))
        kind = draw.randrange(8)
        if kind == 0:
            for _ in range(draw.choice((1, 3, 20))):
                data[draw.randrange(size)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[start : start + length] = draw.randbytes(length)
        elif kind == 2:
            data[start : start + length] = bytes(length)
        elif kind == 3:
            data[start : start + length] = b"\xff" * length
        elif kind == 4 and size - length > 64:
            del data[start : start + length]
        elif kind == 5 and size > 128:
            del data[max(64, start) :]
        elif kind == 6:
            data[start:start] = data[start : start + length]
        else:  # a number of a header, most often in the first or last kilobyte
            place = draw.choice((draw.randrange(min(size, 1000)), size - 1 - draw.randrange(min(size, 1000))))
            data[place : place + 4] = draw.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4), b"\0\1\0\0"))
    return bytes(data)


def check_mutated(corpus, folder, count, seed):
    """Decode so many mutated files; returns what is wrong, the reasons' codes, and the most memory that one took."""
    sources = sorted((corpus / "train/good").iterdir())
    draw = random.Random(seed)
    folder.mkdir()
    for number in range(count):
        source = sources[number % len(sources)]
        (folder / f"{number:04d}_{source.name}").write_bytes(mutate(source.read_bytes(), draw))
    paths = sorted(folder.iterdir())
    requests = [
        decoding.DecodeRequest(
            path=str(path), num_frames=4, sampling="uniform", resize="256", image_size=(64, 64), timeout_s=CPU_LIMIT_S
        )
        for path in paths
    ]
    wrong, codes, peaks = [], Counter(), Counter()
    with decoding.DecoderPool(2) as pool:
        for path, video in zip(paths, pool.decode_ahead(requests), strict=True):
            for child in list(pool._children):
                status = Path(f"/proc/{child._process.pid}/status")
                lines = status.read_text().splitlines() if status.is_file() else []
                peaks[child] = max([peaks[child], *(int(line.split()[1]) for line in lines if "VmHWM" in line)])
            reason = video.facts.get("reason")
            codes["ok" if video.pixels is not None else reason.partition(":")[0]] += 1
            row = {"video_id": path.name, "status": "ok" if video.pixels is not None else "failed", "reason": reason}
            row["num_frames"] = video.facts.get("num_frames")
            if video.is_pending or (reason or "").startswith(("crashed", "timeout")) or "not expect" in (reason or ""):
                wrong.append(row)
            elif video.pixels is not None and (found := find_disagreement(folder, row)) is not None:
                wrong.append((row, found))
    return wrong, codes, max(peaks.values(), default=0) / 1e6


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_videos_hang_nothing_crash_nothing_and_are_no_good_rows(corpus, tmp_path, count):  # A1, B4
    wrong, codes, peak_gb = check_mutated(corpus, tmp_path / "mutated", count, seed=21)
    print(codes, f"{peak_gb:.2f} GB")
    assert wrong == [], "\n".join(map(str, wrong))
    assert codes["ok"] > 0 and sum(codes.values()) - codes["ok"] > count // 3
    assert peak_gb < 2.0
