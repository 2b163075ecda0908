"""`--segment`: rows that are pieces of long videos."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4v.errors import ConfigError, StoreMismatchError
from s4v.extract import segments
from s4v.extract.decode import video_file as _video
from s4v.extract.decode.video_file import DecodeFailure
from s4v.extract.decode.worker import LastVideo, decode
from s4v.extract.extraction import extract_dataset
from s4v.extract.plan import plan_command
from s4v.extract.segments import cut_span, name_segment
from s4v.store.reader import open_store
from s4v.store.verify import verify_store

needs_decord = pytest.mark.skipif(_video.decord is None, reason="decord has no wheel for this system")


@given(
    start=st.none() | st.floats(0, 100),
    end=st.none() | st.floats(100.5, 5000),
    length=st.floats(0.1, 10_000),
    segment=st.floats(1, 300),
)
def test_segments_follow_each_other_and_none_is_much_shorter_or_longer(start, end, length, segment):
    spans = cut_span((start, end), length, segment)
    assert spans[0][0] == start and spans[-1][1] == end
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    stop = min(length, end) if end is not None else length
    bounds = [start or 0.0, *(span[1] for span in spans[:-1]), stop]
    if len(spans) > 1:
        np.testing.assert_allclose(np.diff(bounds)[:-1], segment)
        assert 0.499 * segment <= bounds[-1] - bounds[-2] <= 1.501 * segment
    else:
        assert stop - (start or 0.0) <= 1.501 * segment


def test_what_has_no_known_length_stays_whole():
    assert cut_span((None, None), None, 5) == [(None, None)]
    assert cut_span((3.0, 90.0), None, 5) == [(3.0, 90.0)]


def test_names_sort_in_time():
    starts = [None, 0.5, 2.0, 10.0, 59.999, 60.0, 600.0, 3600.0, 36000.0]
    names = [name_segment("a talk.mp4", start) for start in starts]
    assert names == sorted(names, key=str.encode) and len(set(names)) == len(names)
    assert names[1] == "a talk.mp4@00:00:00.500" and names[-1] == "a talk.mp4@10:00:00"


def ask(path, start_s, end_s, **changes):
    values = dict(num_frames=3, sampling="uniform", resize="224", image_size=(64, 64), decoder="auto")
    return {"path": str(path), **values, "start_s": start_s, "end_s": end_s, **changes}


@pytest.mark.parametrize(
    ("codec", "ending", "decoder"),
    [
        pytest.param("libx264", "mp4", "decord", marks=needs_decord),
        pytest.param("libvpx-vp9", "webm", "decord", marks=needs_decord),
        ("libx264", "mp4", "pyav"),
        ("libx264", "ts", "auto"),
        ("mpeg4", "avi", "auto"),
    ],
)
def test_a_video_that_stays_open_gives_the_same_frames(tmp_path, make_video, codec, ending, decoder, monkeypatch):
    """In rising order, from the middle, backwards, twice the same: as a file that is opened anew each time."""
    path = make_video(tmp_path / f"v.{ending}", codec=codec, num_frames=90)
    spans = [(0.0, 2.0), (2.0, 4.0), (6.0, 8.0), (4.0, 6.0), (4.0, 6.0), (8.0, None), (None, None)]
    fresh = [decode(ask(path, *span, decoder=decoder), lambda _: None) for span in spans]
    read = []
    monkeypatch.setattr(_video, "_read_timeline", lambda *a, f=_video._read_timeline: read.append(a) or f(*a))
    last_video = LastVideo()
    for span, (facts, pixels) in zip(spans, fresh, strict=True):
        again, again_pixels = decode(ask(path, *span, decoder=decoder), lambda _: None, last_video)
        assert again == facts
        assert np.array_equal(again_pixels, pixels), span
    assert len(read) == 1


def test_going_on_decodes_nothing_twice(tmp_path, make_video, monkeypatch):
    path = make_video(tmp_path / "v.avi", codec="mpeg4", num_frames=60)
    opened = []
    monkeypatch.setattr(_video, "_read_in_order", lambda *a, f=_video._read_in_order: opened.append(a) or f(*a))
    last_video = LastVideo()
    for start in range(6):
        decode(ask(path, float(start), start + 1.0), lambda _: None, last_video)
    assert len(opened) == 1


def test_a_file_that_changed_is_opened_anew(tmp_path, make_video):
    path = make_video(tmp_path / "v.mp4", num_frames=40)
    last_video = LastVideo()
    _, before = decode(ask(path, 0.0, 2.0), lambda _: None, last_video)
    make_video(path, num_frames=50, seed=9)
    _, after = decode(ask(path, 0.0, 2.0), lambda _: None, last_video)
    assert not np.array_equal(before, after)


def test_segments_of_a_damaged_video_fail_by_the_same_rule(tmp_path, make_video):
    path = make_video(tmp_path / "v.mp4", num_frames=90, options={"x264-params": "scenecut=0"})
    data = path.read_bytes()
    place = len(data) * 2 // 3
    path.write_bytes(data[:place] + bytes(len(data) // 8) + data[place + len(data) // 8 :])

    def outcome(span, last_video):
        try:
            return decode(ask(path, *span, decoder="pyav"), lambda _: None, last_video)[0]
        except DecodeFailure as failure:
            return failure.code, str(failure)

    spans = [(float(start), start + 1.0) for start in range(9)]
    last_video = LastVideo()
    kept = [outcome(span, last_video) for span in spans]
    assert kept == [outcome(span, None) for span in spans]
    assert isinstance(kept[0], dict) and any(isinstance(one, tuple) for one in kept)


@pytest.fixture
def long_videos(tmp_path, make_video):
    root = tmp_path / "archive"
    make_video(root / "talk.mp4", num_frames=67)  # 6.7 s
    make_video(root / "short.mp4", num_frames=12, seed=3)
    make_video(root / "clip.mkv", num_frames=45, seed=5)
    (root / "broken.mp4").write_bytes(b"not a video at all" * 50)
    return root


def test_long_videos_become_rows(long_videos, make_config, tmp_path, contents):
    config = make_config(long_videos, tmp_path / "s.zarr", segment_s=2.0, frames={"": 4})
    summary = extract_dataset(config)
    store = open_store(config.out)
    rows = store.read_manifest(
        ["video_id", "source_id", "path", "start_s", "end_s", "split", "timestamps_s"]
    ).to_pylist()
    assert [(row["video_id"], row["start_s"], row["end_s"]) for row in rows] == [
        ("broken.mp4@00:00:00", None, None),
        ("clip.mkv@00:00:00", None, 2.0),
        ("clip.mkv@00:00:02", 2.0, None),
        ("short.mp4@00:00:00", None, None),
        ("talk.mp4@00:00:00", None, 2.0),
        ("talk.mp4@00:00:02", 2.0, 4.0),
        ("talk.mp4@00:00:04", 4.0, None),
    ]
    assert summary.videos == {"ok": 6, "failed": 1, "pending": 0}
    for row in rows[1:]:
        assert row["source_id"] == row["path"]
        assert all((row["start_s"] or 0) <= t < (row["end_s"] or 7) for t in row["timestamps_s"]), row
    assert len({(row["path"], row["split"]) for row in rows}) == 4, "a video's segments are in one split"
    assert verify_store(store) == []
    # Once more changes nothing.
    before = contents(config.out)
    extract_dataset(config)
    assert contents(config.out) == before


def test_cuts_are_read_from_the_store(long_videos, make_config, tmp_path, make_video, monkeypatch):
    config = make_config(long_videos, tmp_path / "s.zarr", segment_s=2.0, frames={"": 4}, limit=1)
    extract_dataset(config)
    asked = []
    monkeypatch.setattr(segments, "cut_span", lambda *a: asked.append(a) or cut_span(*a))
    extract_dataset(replace(config, limit=None))
    assert asked == []
    make_video(long_videos / "new.mp4", num_frames=40, seed=8)
    extract_dataset(replace(config, limit=None, append=True))
    assert len(asked) == 1
    ids = open_store(config.out).read_manifest(["video_id"])["video_id"].to_pylist()
    assert ids[-2:] == ["new.mp4@00:00:00", "new.mp4@00:00:02"] and len(ids) == 9


def test_parts_of_an_annotated_span_are_those_of_a_table(long_videos, make_config, tmp_path):
    (long_videos / "v.csv").write_text("path,split,start,end\ntalk.mp4,val,1.0,5.5\n")
    (long_videos / "w.csv").write_text("path,split,start,end,id\ntalk.mp4,val,1.0,3.0,a\ntalk.mp4,val,3.0,5.5,b\n")
    table = {"dataset": "table", "frames": {"": 4}}
    cut = make_config(long_videos, tmp_path / "a.zarr", **table, annotations=long_videos / "v.csv", segment_s=2.0)
    told = make_config(long_videos, tmp_path / "b.zarr", **table, annotations=long_videos / "w.csv")
    extract_dataset(cut)
    extract_dataset(told)
    ours, theirs = (open_store(config.out) for config in (cut, told))
    assert ours.read_manifest(["start_s", "end_s"]).to_pylist() == [
        {"start_s": 1.0, "end_s": 3.0},
        {"start_s": 3.0, "end_s": 5.5},
    ]
    clips = [store.read_clips([0, 1], [[0, 1, 2, 3]] * 2) for store in (ours, theirs)]
    assert np.array_equal(clips[0].pixels, clips[1].pixels)
    assert np.array_equal(clips[0].patches, clips[1].patches)


def test_another_cut_of_a_store_is_refused(long_videos, make_config, tmp_path):
    config = make_config(long_videos, tmp_path / "s.zarr", segment_s=2.0, frames={"": 4})
    extract_dataset(config)
    for other in (3.0, None):
        with pytest.raises(StoreMismatchError, match="segment_s"):
            extract_dataset(replace(config, segment_s=other))


def test_what_cannot_be_cut_is_told(captioned_folder, make_captioned_config, tmp_path):
    with pytest.raises(
        ConfigError, match=r"--segment would give each piece of a video all of its captions, and 00\.mp4"
    ):
        extract_dataset(make_captioned_config(captioned_folder, tmp_path / "s.zarr", segment_s=2.0))
    assert not (tmp_path / "s.zarr").exists()
    for wrong in (0.0, -1.0, float("nan"), float("inf"), 0.5):
        with pytest.raises(ConfigError, match="--segment takes seconds, at least 1; found"):
            make_captioned_config(captioned_folder, tmp_path / "s.zarr", segment_s=wrong)


def test_a_plan_counts_segments(long_videos, make_config, tmp_path):
    config = make_config(long_videos, tmp_path / "s.zarr", segment_s=2.0, frames={"": 4})
    assert plan_command(config).videos == 7
    with pytest.raises(ConfigError, match="--segment needs the videos' lengths"):
        plan_command(config, videos=100)
