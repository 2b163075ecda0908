"""Offsets of pixel frames: as options say them, as stores record them, and as they are read."""

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from s4v.errors import ConfigError, StoreDamagedError, StoreMismatchError
from s4v.store import _shards
from s4v.store.attributes import parse_layout
from s4v.store.codecs.affine import AffineCodec
from s4v.store.layout import StoreLayout
from s4v.store.offsets import MOST_OFFSETS, SEEN_FRAME, PixelOffset, describe_offsets, order_offsets, parse_offsets
from s4v.store.reader import open_store
from s4v.store.records import VideoRecord, VideoResult
from s4v.store.spec import StoreSpec
from s4v.store.verify import verify_store
from s4v.store.writer import RowTokens, create_store

pytestmark = pytest.mark.usefixtures("each_reader")

LAYOUT = StoreLayout(
    num_rows=3,
    num_views=2,
    num_frames=4,
    layers=(1, 3),
    num_patches=9,
    width=8,
    channels=8,
    embed_dim=6,
    image_size=(12, 12),
    patch_dtype="float16",
    pixel_offsets=parse_offsets("-1..1,0.5step"),
)
RECORDS = [VideoRecord(video_id=f"{i}.mp4", path=f"{i}.mp4", split="train", class_name="a") for i in range(3)]
ATTRIBUTES = {
    "created": "now",
    "dataset": {"name": "toy", "root": "videos"},
    "classes": {"names": ["a"]},
    "backbone": {"name": "toy", "width": 8},
    "frames": {"": 4},
    "sampling": "uniform",
    "resize": "256",
    "libraries": {},
}
NUM_FRAMES = (4, 2, 3)


def make_tokens(row, num_offsets=4):
    rng, place = np.random.default_rng(row), (2, NUM_FRAMES[row])
    return RowTokens(
        patches=rng.normal(size=(*place, 2, 9, 8)).astype(np.float16),
        cls=rng.normal(size=(*place, 2, 8)).astype(np.float16),
        embedding=rng.normal(size=(*place, 6)).astype(np.float32),
        pixels=rng.integers(0, 256, (*place, num_offsets, 12, 12, 3), dtype=np.uint8),
    )


def result_of(row):
    places = list(range(NUM_FRAMES[row]))
    return VideoResult(
        video_id=RECORDS[row].video_id,
        status="ok",
        num_cached_frames=len(places),
        num_views=2,
        frame_indices=places,
        timestamps_s=[0.1 * place for place in places],
        eval_clips=[places],
    )


@pytest.fixture
def path(tmp_path):
    spec = StoreSpec(layout=LAYOUT, attributes=ATTRIBUTES, records=RECORDS, codec=AffineCodec(dtype="float16"), head={})
    with create_store(tmp_path / "s.zarr", spec) as writer:
        for shard in range(LAYOUT.num_shards):
            rows = LAYOUT.shard_rows(shard)
            writer.write_shard(shard, {row: make_tokens(row) for row in rows}, [result_of(row) for row in rows])
        writer.consolidate()
    return tmp_path / "s.zarr"


@pytest.mark.parametrize(
    ("text", "recorded", "shown"),
    [
        ("0", [0], "0"),
        ("-2..2", [-2, -1, 0, 1, 2], "-2..2"),
        (" 1, 0,-1", [-1, 0, 1], "-1..1"),
        ("0,0.5step", [0, "0.5step"], "0,0.5step"),
        ("0.50step,-2..2,-1/3step", [-2, -1, 0, 1, 2, "-1/3step", "0.5step"], "-2..2,-1/3step,0.5step"),
        ("0step,5", [0, 5], "0,5"),
    ],
)
def test_offsets_are_read_and_told_in_one_order(text, recorded, shown):
    offsets = parse_offsets(text)
    assert [offset.recorded for offset in offsets] == recorded
    assert describe_offsets(offsets) == shown and parse_offsets(shown) == offsets


def test_each_offset_has_its_unit():
    assert parse_offsets("0,1,1step") == (SEEN_FRAME, PixelOffset(Fraction(1)), PixelOffset(Fraction(1), "step"))
    with pytest.raises(ValueError, match="expected whole frames, found 1/2"):
        PixelOffset(Fraction(1, 2))


@given(
    frames=st.sets(st.integers(-MOST_OFFSETS, MOST_OFFSETS), max_size=40),
    steps=st.sets(st.fractions(-9, 9, max_denominator=1000), max_size=5),
)
def test_what_is_recorded_is_read_again(frames, steps):
    offsets = order_offsets({SEEN_FRAME, *map(PixelOffset, frames), *(PixelOffset(step, "step") for step in steps)})
    assert tuple(map(PixelOffset.of, json.loads(json.dumps([one.recorded for one in offsets])))) == offsets
    assert parse_offsets(describe_offsets(offsets)) == offsets


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"takes frames of the source \(-2..2, or -1,0,1\) and .* \(0.5step\), none beyond 1024; found ''"),
        ("0,x", "found 'x'"),
        ("0,0.5", r"found '0\.5'"),
        ("0,1/0step", "found '1/0step'"),
        ("0,1e3step", "found '1e3step'"),
        ("0,1025", "none beyond 1024; found '1025'"),
        ("0,2000step", "none beyond 1024; found '2000step'"),
        ("1,2", "must name 0, the frame that the backbone sees; found 1,2: add 0"),
        ("0.5step", "must name 0, .* found 0.5step"),
        ("0,1,1", "names 1 more than once; found 0,1,1"),
        ("0,0step", "names 0 more than once"),
        ("2..-2", r"a range from its lowest to its highest offset, such as -2\.\.2, .*; found 2\.\.-2"),
        ("-5000..2", r"none beyond 1024; found -5000\.\.2"),
        ("-1024..1", "takes at most 1024 offsets; found 1026"),
    ],
)
def test_what_is_no_list_of_offsets_is_told_in_one_line(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_offsets(text)
    assert "\n" not in str(caught.value)


def test_the_layout_of_a_plain_store_is_recorded_as_ever():
    spec = StoreSpec(
        layout=replace(LAYOUT, pixel_offsets=(0,)),
        attributes=ATTRIBUTES,
        records=RECORDS,
        codec=AffineCodec(dtype="float16"),
    )
    recorded = spec.full_attributes()["layout"]
    assert (recorded["pixel_offsets"], recorded["pixel_offsets_unit"]) == ([0], "frame")
    assert list(recorded)[-3:] == ["pixel_offsets", "rows_per_shard", "pixel_offsets_unit"]


def test_a_layout_says_offsets_as_it_was_given_them(tmp_path, path):
    recorded = json.loads((path / "zarr.json").read_text())["attributes"]["s4v"]["layout"]
    assert recorded["pixel_offsets"] == [-1, 0, 1, "0.5step"]
    assert parse_layout(tmp_path, recorded) == LAYOUT and LAYOUT.seen_offset == 1
    for wrong in ([1], [0, "x"], [0, 2000], [0, None], [0, True], [0, 0.5], "0", [0] * 2000, [0, "9" * 99 + "step"]):
        with pytest.raises(StoreDamagedError, match="pixel_offsets must be frames or steps, 0 among them, found"):
            parse_layout(tmp_path, {**recorded, "pixel_offsets": wrong})


@pytest.mark.parametrize("reader", ["our own", "tensorstore"])
def test_offsets_are_read_in_the_order_wanted(path, reader, monkeypatch):
    if reader == "tensorstore":
        monkeypatch.setattr(_shards, "_find_geometry", lambda spec: None)
    store, expected = open_store(path), make_tokens(0).pixels
    read = lambda offsets: store.read_clips([0], [[3, 1]], view=1, arrays=("pixels",), offsets=offsets).pixels[0]  # noqa: E731
    assert np.array_equal(read(None), expected[1, [3, 1]])
    assert np.array_equal(read(("0.5step", -1)), expected[1, [3, 1]][:, [3, 0]])
    assert np.array_equal(read([SEEN_FRAME]), expected[1, [3, 1]][:, [1]])
    for row in range(3):
        values = store.read_row(row, 2, NUM_FRAMES[row])
        assert all(np.array_equal(values[name], getattr(make_tokens(row), name)) for name in values)


def test_an_offset_that_is_not_read_may_be_damaged(path, flip_byte):
    """Each offset is a chunk of its own: who does not read it does not meet its damage, and `verify` does."""
    assert verify_store(open_store(path)) == []
    flip_byte(path / "pixels/c.0.0.0.0.0.0.0", 12 * 12 * 3 + 4 + 5)  # in the second chunk: the seen frame of frame 0
    store = open_store(path)
    read = lambda offsets: store.read_clips([0], [[0]], arrays=("pixels",), offsets=offsets).pixels  # noqa: E731
    assert np.array_equal(read((-1, 1))[0], make_tokens(0).pixels[0, :1][:, [0, 2]])
    with pytest.raises(StoreDamagedError, match="does not match its checksum"):
        read((0,))
    damage = verify_store(store)
    assert {(one.where, one.rows) for one in damage} == {("pixels/c.0.0.0.0.0.0.0", (0,))}


def test_a_missing_offset_is_found(path):
    """Row 1 has two frames of four: chunks of offsets that it has not are nobody's damage, one that is gone is."""
    file = path / "pixels/c.1.0.0.0.0.0.0"
    data = bytearray(file.read_bytes())
    index_bytes = 16 * 2 * 4 * 4  # views, frames, offsets
    start = len(data) - 4 - index_bytes
    data[start + 16 * 5 : start + 16 * 6] = b"\xff" * 16
    data[-4:] = crc32c(bytes(data[start : start + index_bytes])).to_bytes(4, "little")
    file.write_bytes(data)
    damage = verify_store(open_store(path))
    assert next((one.what, one.rows) for one in damage) == ("has no chunk 5", (1,))


def test_offsets_that_a_store_lacks_are_told_with_the_option_that_makes_them(path):
    store = open_store(path)
    with pytest.raises(StoreMismatchError) as caught:
        store.offset_places((-2, 0, 1, "0.25step"))
    assert str(caught.value) == (
        f"{path} holds pixels at offsets -1..1,0.5step from its frames, wanted -2,0,1,0.25step: missing -2,0.25step. "
        "Extract a new store with --pixel-offsets=-2..1,0.25step,0.5step, which serves both."
    )
    assert store.offset_places((-1, 0, 1, "0.5step")) is None and store.offset_places((0,)) == [1]
