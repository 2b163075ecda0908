"""Rows that are as long as their videos: `--sampling fps:X` and `all`."""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import replace
from fractions import Fraction

import av
import av.filter
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s4v.backbone.vision_tower import build_backbone
from s4v.errors import ConfigError, StoreMismatchError
from s4v.extract.batching import batch_slots
from s4v.extract.decode.pool import DecodeRequest, DecoderPool
from s4v.extract.decode.sampling import check_sampling, sample_open_ended
from s4v.extract.extraction import extract_dataset
from s4v.extract.plan import plan_command
from s4v.store.merge import merge_stores
from s4v.store.offsets import parse_offsets
from s4v.store.reader import open_store
from s4v.store.verify import verify_store


def write_times(path, times, base=Fraction(1, 1000), size=64):
    """A video of frames at any times, in units of `base`; frame i has its own brightness."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = size, 32, "yuv420p", base
        stream.codec_context.time_base = base
        for index, time in enumerate(times):
            picture = np.full((32, size, 3), 4 * (index % 60) + 8, np.uint8)
            picture[:, : index // 60 * 4] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = time, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def filter_fps(path, rate):
    """Which frames of a video ffmpeg's filter `fps` gives, by comparison of their pixels."""
    graph = av.filter.Graph()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        source, chosen, sink = (
            graph.add_buffer(template=stream),
            graph.add("fps", f"fps={rate}"),
            graph.add("buffersink"),
        )
        source.link_to(chosen)
        chosen.link_to(sink)
        graph.configure()
        known, taken = {}, []

        def pull():
            while True:
                try:
                    taken.append(known[graph.pull().to_ndarray().tobytes()])
                except (av.BlockingIOError, av.EOFError, BlockingIOError, EOFError):
                    return

        for index, frame in enumerate(container.decode(stream)):
            known[frame.to_ndarray().tobytes()] = index
            graph.push(frame)
            pull()
        graph.push(None)
        pull()
    return taken


EVEN = {
    f"{fps} frames a second": (range(0, count * step, step), base)
    for fps, count, step, base in (
        ("25", 60, 40, Fraction(1, 1000)),
        ("30", 90, 1, Fraction(1, 30)),
        ("29.97", 77, 1001, Fraction(1, 30000)),
        ("12", 30, 1, Fraction(1, 12)),
        ("2", 9, 500, Fraction(1, 1000)),
    )
}
UNEVEN = {
    "a pause in the middle": ([0, 40, 80, 2080, 2120, 2160], Fraction(1, 1000)),
    "slower and slower": ([0, 33, 90, 200, 410, 800, 1500, 2600], Fraction(1, 1000)),
    "a burst": ([0, 500, 510, 520, 530, 1000, 1990], Fraction(1, 1000)),
    "halves": ([0, 500, 1000, 1500, 2500, 3500], Fraction(1, 1000)),
    "one frame": ([0], Fraction(1, 1000)),
    "two frames": ([0, 40], Fraction(1, 1000)),
}


@pytest.mark.parametrize("rate", ["1/2", "1", "3", "7.5", "60"])
@pytest.mark.parametrize("kind", [*EVEN, *UNEVEN])
def test_frames_are_those_of_ffmpegs_filter(tmp_path, pool, kind, rate):
    path = write_times(tmp_path / "v.mkv", *{**EVEN, **UNEVEN}[kind])
    expected = filter_fps(path, rate)
    request = DecodeRequest(path=str(path), num_frames=1, sampling=f"fps:{rate}", resize="224", image_size=(32, 32))
    video = pool.submit(request).result()
    counted = pool.submit(replace(request, num_frames=0)).result().facts
    if expected:
        assert video.facts["frame_indices"] == expected
        assert counted["count"] == len(expected) == video.pixels.shape[1]
    else:
        assert video.facts["reason"].startswith("too-short: ") and video.pixels is None
        assert counted["reason"] == video.facts["reason"]


@pytest.fixture(scope="module")
def pool():
    with DecoderPool(1) as one:
        yield one


@given(count=st.integers(1, 500), fps=st.fractions(1, 60), rate=st.fractions(Fraction(1, 8), 70, max_denominator=30))
def test_of_an_even_video_the_formula_gives_them(count, fps, rate):
    """The closed form of R2-Tuning's specification, in exact fractions."""
    times = np.array([float(Fraction(index) / fps) for index in range(count)])
    steps = math.floor(count * rate / fps + Fraction(1, 2))
    expected = [math.ceil((step + Fraction(1, 2)) * fps / rate) - 1 for step in range(steps)]
    assert sample_open_ended(f"fps:{rate}", times, float(count / fps)) == expected


@pytest.mark.parametrize("name", ["fps:", "fps:0", "fps:-1", "fps:x", "fps:1/0", "fps:2000", "every", "ALL"])
def test_a_rate_that_is_none_is_told(name):
    with pytest.raises(ConfigError, match="--sampling"):
        check_sampling(name)


@pytest.fixture(scope="module")
def clips(tmp_path_factory, make_video):
    """Videos of 3, 12, 20 and 45 frames at 10 a second."""
    root = tmp_path_factory.mktemp("clips")
    for place, count in enumerate((3, 12, 20, 45)):
        make_video(root / f"train/{'ab'[place % 2]}/{count}.mp4", num_frames=count, seed=place)
    make_video(root / "val/a/v.mp4", num_frames=17, seed=9)
    return root


def counts_of(store):
    table = store.read_manifest(["video_id", "status", "num_cached_frames", "reason"])
    return {row["video_id"]: row["num_cached_frames"] or row["reason"] for row in table.to_pylist()}


def test_rows_hold_what_they_are_long(make_config, clips, tmp_path):
    config = make_config(clips, tmp_path / "s.zarr", sampling="fps:2", frames=None, dtype="float32")
    summary = extract_dataset(config)
    assert summary.videos == {"ok": 5, "failed": 0, "pending": 0}
    store = open_store(config.out)
    found = counts_of(store)
    lengths = {name.rsplit("/", 1)[1].removesuffix(".mp4"): count for name, count in found.items()}
    assert lengths == {"3": 1, "12": 2, "20": 4, "45": 9, "v": 3}
    assert store.layout.num_frames == 9 and store.facts.is_open_ended
    assert verify_store(store) == []
    _require_live_tokens(config, store)
    before = {file: file.read_bytes() for file in config.out.rglob("c.*")}
    extract_dataset(config)
    assert {file: file.read_bytes() for file in config.out.rglob("c.*")} == before


def _require_live_tokens(config, store):
    """Every token is the tower's on the same pixels, in the batches that the store is made of."""
    backbone = build_backbone(config.model, weights=config.weights, device=torch.device("cpu"), seed=config.seed)
    backbone.load_weights()
    table = store.read_manifest(["num_cached_frames", "num_views"])
    for shard in range(store.layout.num_shards):
        rows = store.layout.shard_rows(shard)
        frames, views = (table[name].to_pylist()[rows.start : rows.stop] for name in ("num_cached_frames", "num_views"))
        held = [store.read_row(row, views[place], frames[place]) for place, row in enumerate(rows)]
        for slots in batch_slots(frames, views, config.batch_size):
            pixels = np.stack([held[row]["pixels"][view, frame, 0] for row, view, frame in slots])
            tokens = backbone.encode_frames(torch.from_numpy(pixels), store.layout.layers)
            for place, (row, view, frame) in enumerate(slots):
                for layer, values in enumerate(tokens.patches):
                    assert np.array_equal(held[row]["patches"][view, frame, layer], values[place].numpy())
                assert np.array_equal(held[row]["cls"][view, frame], tokens.cls[place].numpy())
                assert np.array_equal(held[row]["embedding"][view, frame], tokens.embedding[place].numpy())


def test_every_frame(make_config, clips, tmp_path):
    config = make_config(clips, tmp_path / "s.zarr", sampling="all", frames=None)
    extract_dataset(config)
    store = open_store(config.out)
    assert sorted(counts_of(store).values()) == [3, 12, 17, 20, 45]
    assert store.layout.frames_per_block == 9  # of 8 to 16 it pads these rows least
    assert verify_store(store) == []
    indices = store.read_manifest(["frame_indices"])["frame_indices"].to_pylist()
    assert all(own == list(range(len(own))) for own in indices)


def test_neighbours_of_every_second_frame_are_frames_of_the_source(make_config, clips, tmp_path):
    plain, more = (
        make_config(clips, tmp_path / f"{name}.zarr", sampling=sampling, frames=None, splits=("val",), **offsets)
        for name, sampling, offsets in (
            ("all", "all", {}),
            ("five", "fps:5", {"pixel_offsets": parse_offsets("-2..2")}),
        )
    )
    extract_dataset(plain)
    extract_dataset(more)
    every = open_store(plain.out).read_row(0, 1, 17)["pixels"][0, :, 0]
    store = open_store(more.out)
    (indices,) = store.read_manifest(["frame_indices"])["frame_indices"].to_pylist()
    held = store.read_row(0, 1, len(indices))["pixels"][0]
    for place, index in enumerate(indices):
        assert np.array_equal(held[place], every[np.clip(np.arange(index - 2, index + 3), 0, 16)])
    with pytest.raises(ConfigError, match="which --sampling fps:5 does not keep"):
        replace(more, pixel_offsets=parse_offsets("0,0.5step"))


def test_what_is_too_short_fails_with_its_length(make_config, clips, tmp_path):
    config = make_config(clips, tmp_path / "s.zarr", sampling="fps:1/2", frames=None)
    assert extract_dataset(config).videos == {"ok": 4, "failed": 1, "pending": 0}
    (reason,) = [count for count in counts_of(open_store(config.out)).values() if isinstance(count, str)]
    assert reason == "too-short: 0.3 s, in which --sampling fps:1/2 takes no frame"


def test_frames_that_repeat_are_told(make_config, clips, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        extract_dataset(make_config(clips, tmp_path / "s.zarr", sampling="fps:20", frames=None, splits=("val",)))
    assert "1 of 1 good rows show frames more than once: fps:20 is above their videos' own rate" in caplog.text


def test_segments_are_rows_of_their_own_length(make_config, clips, tmp_path):
    config = make_config(clips, tmp_path / "s.zarr", sampling="fps:2", frames=None, segment_s=2.0, splits=("train",))
    extract_dataset(config)
    found = counts_of(open_store(config.out))
    assert [count for name, count in sorted(found.items()) if "45" in name] == [4, 5]


def test_a_longer_video_gets_room(make_config, clips, tmp_path, make_video, contents):
    root = tmp_path / "videos"
    make_video(root / "train/a/short.mp4", num_frames=10)
    config = make_config(root, tmp_path / "s.zarr", sampling="all", frames=None, dataset="folder")
    extract_dataset(config)
    first = contents(config.out)
    assert open_store(config.out).layout.num_frames == 10
    make_video(root / "train/b/long.mp4", num_frames=33)
    with pytest.raises(StoreMismatchError, match="videos are new"):
        extract_dataset(config)
    extract_dataset(replace(config, append=True))
    store = open_store(config.out)
    assert counts_of(store) == {"train/a/short": 10, "train/b/long": 33} or sorted(counts_of(store).values()) == [
        10,
        33,
    ]
    assert store.layout.num_frames == 33 and verify_store(store) == []
    after = contents(config.out)
    assert all(after[name] == data for name, data in first.items() if name.split("/")[-1].startswith("c.0."))


@pytest.mark.slow  # two extractions; an append is as long
def test_a_failed_video_that_is_mended_may_be_the_longest(make_config, tmp_path, make_video):
    root = tmp_path / "videos"
    make_video(root / "train/a/one.mp4", num_frames=5)
    (root / "train/a/two.mp4").write_bytes(b"no video")
    config = make_config(root, tmp_path / "s.zarr", sampling="all", frames=None, dataset="folder")
    assert extract_dataset(config).videos == {"ok": 1, "failed": 1, "pending": 0}
    make_video(root / "train/a/two.mp4", num_frames=21)
    assert extract_dataset(replace(config, retry_failed=True)).videos == {"ok": 2, "failed": 0, "pending": 0}
    store = open_store(config.out)
    assert sorted(counts_of(store).values()) == [5, 21] and verify_store(store) == []


@pytest.mark.slow  # three extractions
def test_a_part_may_hold_the_longest_row(make_config, tmp_path, make_video):
    root = tmp_path / "videos"
    make_video(root / "train/a/one.mp4", num_frames=5)
    (root / "train/a/two.mp4").write_bytes(b"no video")
    config = make_config(root, tmp_path / "s.zarr", sampling="all", frames=None, dataset="folder", prepare=True)
    extract_dataset(config)
    make_video(root / "train/a/two.mp4", num_frames=21)
    parts = [shutil.copytree(config.out, tmp_path / f"{number}" / "s.zarr") for number in (1, 2)]
    for number, path in enumerate(parts, start=1):
        extract_dataset(replace(config, out=path, prepare=False, part=(number, 2)))
    assert [open_store(path).layout.num_frames for path in parts] == [5, 21]
    merge_stores(parts[:1], tmp_path / "short.zarr")
    with pytest.raises(StoreMismatchError, match="rows of at most 5 frames, and .* has room for 21.*another --out"):
        merge_stores(parts, tmp_path / "short.zarr")
    assert merge_stores(parts, tmp_path / "merged.zarr") == {"ok": 2, "failed": 0, "pending": 0}
    store = open_store(tmp_path / "merged.zarr")
    assert sorted(counts_of(store).values()) == [5, 21] and verify_store(store) == []


@pytest.mark.slow  # a cluster
def test_workers_make_the_same_store(make_config, clips, tmp_path, contents):
    config = make_config(clips, tmp_path / "one.zarr", sampling="fps:2", frames=None)
    extract_dataset(config)
    extract_dataset(replace(config, out=tmp_path / "two.zarr", num_workers=2))
    assert contents(tmp_path / "two.zarr", "zarr.json") == contents(config.out, "zarr.json")


@pytest.mark.parametrize(
    "changes", [{"frames": {"": 8}}, {"clips": {"": 2}}, {"validation_clip": ("val",)}], ids=["frames", "clips", "held"]
)
def test_what_is_shared_out_is_refused(make_config, clips, tmp_path, changes):
    with pytest.raises(ConfigError, match="--sampling fps:2 takes as many frames as a video is long, in one clip"):
        make_config(clips, tmp_path / "s.zarr", **{"frames": None, "sampling": "fps:2", **changes})


def test_a_plan_counts_the_frames(make_config, clips, tmp_path):
    config = make_config(clips, tmp_path / "s.zarr", sampling="fps:2", frames=None)
    plan = plan_command(config)
    assert (plan.videos, plan.frames) == (5, 19)
    assert plan.splits["train"].frames_per_video == 4
    with pytest.raises(ConfigError, match="needs the videos' lengths"):
        plan_command(config, videos=10)
