"""Rows of any length: every array is cut along its frames, and a row has files for its own frames alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s4v.errors import StoreDamagedError, StoreMismatchError
from s4v.store.codecs.affine import AffineCodec
from s4v.store.layout import StoreLayout, choose_block
from s4v.store.reader import NO_FRAME, open_store, pad_places
from s4v.store.records import VideoRecord, VideoResult
from s4v.store.spec import StoreSpec
from s4v.store.verify import verify_store
from s4v.store.writer import RowTokens, create_store

pytestmark = pytest.mark.usefixtures("each_reader")

LAYOUT = StoreLayout(
    num_rows=5,
    num_views=2,
    num_frames=11,
    layers=(1, 3),
    num_patches=4,
    width=8,
    channels=8,
    embed_dim=6,
    image_size=(12, 12),
    patch_dtype="float16",
    rows_per_shard=3,
    frames_per_block=4,
)
ATTRIBUTES = {
    "created": "now",
    "dataset": {"name": "toy", "root": "videos"},
    "classes": {"names": ["a"]},
    "backbone": {"name": "toy", "width": 8},
    "frames": {},
    "sampling": "fps:1",
    "resize": "256",
    "libraries": {},
}
ARRAYS = ("patches", "cls", "pixels")


def make_tokens(row, num_frames, num_views, layout=LAYOUT):
    rng = np.random.default_rng(row)
    place, layers = (num_views, num_frames), len(layout.layers)
    return RowTokens(
        patches=rng.normal(size=(*place, layers, layout.num_patches, layout.channels)).astype(layout.patch_dtype),
        cls=rng.normal(size=(*place, layers, layout.width)).astype(layout.cls_dtype),
        embedding=rng.normal(size=(*place, layout.embed_dim)).astype(np.float32),
        pixels=rng.integers(0, 256, (*place, 1, *layout.image_size, 3), dtype=np.uint8) if layout.with_pixels else None,
    )


def write_store(path, rows, layout=LAYOUT):
    """A store of rows (frames, views); a row without frames failed."""
    records = [
        VideoRecord(video_id=f"{i:05d}", path=f"{i:05d}", split="train", class_name="a") for i in range(len(rows))
    ]
    layout = replace(layout, num_rows=len(rows))
    spec = StoreSpec(
        layout=layout,
        attributes=ATTRIBUTES,
        records=records,
        codec=AffineCodec(dtype="float16"),
        head={"eps": np.array(1.0)},
    )
    results = [
        VideoResult(
            video_id=record.video_id,
            status="ok",
            num_cached_frames=frames,
            num_views=views,
            frame_indices=list(range(frames)),
            timestamps_s=[float(i) for i in range(frames)],
            eval_clips=[list(range(frames))],
        )
        if frames
        else VideoResult(video_id=record.video_id, status="failed", reason="too-short")
        for record, (frames, views) in zip(records, rows, strict=True)
    ]
    with create_store(path, spec) as writer:
        for shard in range(layout.num_shards):
            own = layout.shard_rows(shard)
            tokens = {row: make_tokens(row, *rows[row], layout) for row in own if rows[row][0]}
            writer.write_shard(shard, tokens, results[own.start : own.stop])
        writer.consolidate()
    return open_store(path)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.integers(0, 11), st.integers(1, 2)), min_size=1, max_size=5),
    block=st.integers(1, 11),
    data=st.data(),
)
def test_rows_of_any_length_come_back(tmp_path_factory, rows, block, data):
    store = write_store(tmp_path_factory.mktemp("any") / "s.zarr", rows, replace(LAYOUT, frames_per_block=block))
    assert store.facts.format_version == 3
    assert verify_store(open_store(store.path)) == []
    good = [row for row, (frames, _) in enumerate(rows) if frames]
    for row in good:
        expected, found = make_tokens(row, *rows[row]), store.read_row(row, rows[row][1], rows[row][0])
        assert all(np.array_equal(found[name], getattr(expected, name)) for name in (*ARRAYS, "embedding"))
    embeddings = store.read_embeddings()
    assert embeddings.shape == (len(rows), 2, max(frames for frames, _ in rows), 6)
    for row, (frames, views) in enumerate(rows):
        if frames:
            assert np.array_equal(embeddings[row, :views, :frames], make_tokens(row, frames, views).embedding)
            assert np.isnan(embeddings[row, views:]).all() and np.isnan(embeddings[row, :, frames:]).all()
        else:
            assert np.isnan(embeddings[row]).all()
    if not good:
        return
    asked = data.draw(st.lists(st.sampled_from(good), min_size=1, max_size=4))
    clips = [data.draw(st.lists(st.integers(0, rows[row][0] - 1), min_size=1, max_size=6)) for row in asked]
    places = pad_places(clips)
    layers = data.draw(st.sampled_from([None, [3], [3, 1]]))
    read = store.read_clips(asked, places, layers=layers)
    picked = slice(None) if layers is None else [LAYOUT.layers.index(layer) for layer in layers]
    for number, (row, clip) in enumerate(zip(asked, clips, strict=True)):
        expected = make_tokens(row, *rows[row])
        assert np.array_equal(read.patches[number, : len(clip)], expected.patches[0, clip][:, picked])
        assert np.array_equal(read.cls[number, : len(clip)], expected.cls[0, clip][:, picked])
        assert np.array_equal(read.pixels[number, : len(clip)], expected.pixels[0, clip])
        assert not any(getattr(read, name)[number, len(clip) :].any() for name in ARRAYS), "padding is zeros"


def test_compressed_patches_are_padded_too(tmp_path):
    layout = replace(LAYOUT, keep_bits=9)
    store = write_store(tmp_path / "s.zarr", [(11, 1), (3, 1)], layout)
    read = store.read_clips([0, 1], pad_places([range(11), [2]]), arrays=("patches",)).patches
    assert np.array_equal(read[0], make_tokens(0, 11, 1).patches[0])
    assert np.array_equal(read[1, 0], make_tokens(1, 3, 1).patches[0, 2])
    assert not read[1, 1:].any()


def test_plain_zarr_reads_it(tmp_path):
    store = write_store(tmp_path / "s.zarr", [(11, 1), (3, 2)])
    group = zarr.open_group(store.path, mode="r")
    for name in (*ARRAYS, "embedding"):
        assert np.array_equal(group[name][0, :1], getattr(make_tokens(0, 11, 1), name)), name
        assert np.array_equal(group[name][1, :, :3], getattr(make_tokens(1, 3, 2), name)), name


def test_a_row_has_files_of_its_own_frames_alone(tmp_path):
    store = write_store(tmp_path / "s.zarr", [(11, 1), (3, 1), (4, 1), (4, 1), (1, 1)])
    names = sorted(file.name for file in (store.path / "cls").glob("c.*"))
    assert names == ["c.0.0.0.0.0", "c.0.0.1.0.0", "c.0.0.2.0.0", "c.1.0.0.0.0"]


@pytest.mark.parametrize("name", [*ARRAYS, "embedding"])
def test_damage_in_a_later_block_is_found(tmp_path, flip_byte, name):
    store = write_store(tmp_path / "s.zarr", [(11, 1), (3, 1)])
    file = next((store.path / name).glob("c.0.0.2.*"))
    flip_byte(file)
    assert [one.where for one in verify_store(open_store(store.path))] == [f"{name}/{file.name}"]
    with pytest.raises(StoreDamagedError, match="does not match its checksum"):
        open_store(store.path).read_row(0, 1, 11)
    file.unlink()
    assert {one.what for one in verify_store(open_store(store.path))} == {f"the file {file.name} is missing"}
    assert open_store(store.path).read_row(1, 1, 3)["cls"].shape == (1, 3, 2, 8), "the other row has no frame there"


def test_a_file_that_no_row_reaches_is_damage(tmp_path):
    store = write_store(tmp_path / "s.zarr", [(3, 1), (4, 1)])
    (store.path / "cls/c.0.0.2.0.0").write_bytes((store.path / "cls/c.0.0.0.0.0").read_bytes())
    (damage,) = verify_store(open_store(store.path))
    assert damage.where == "cls/c.0.0.2.0.0"


def test_frames_that_a_row_lacks_are_told(tmp_path):
    store = write_store(tmp_path / "s.zarr", [(11, 1), (3, 1)])
    with pytest.raises(StoreMismatchError, match="row 1 of .* holds 3 frames and 1 views; wanted frames 0,3"):
        store.read_clips([0, 1], [[0, 1], [0, 3]])
    with pytest.raises(StoreMismatchError, match="wanted frames -2,1"):
        store.read_clips([1], [[-2, 1]])
    assert store.read_clips([1], [[NO_FRAME, 1]], arrays=("cls",)).cls[0, 0].any() == np.False_


@pytest.mark.slow  # thirteen hundred files
def test_one_long_row_costs_its_own_bytes_alone(tmp_path):
    """Two hours among 10,000 rows of ten seconds, a frame a second; small tokens, without pixels."""
    layout = replace(
        LAYOUT,
        num_views=1,
        num_frames=7200,
        num_patches=49,
        width=96,
        channels=64,
        embed_dim=64,
        with_pixels=False,
        rows_per_shard=64,
        frames_per_block=16,
    )

    def measure(name, rows):
        store = write_store(tmp_path / name, rows, layout)
        return sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())

    short = measure("short", [(10, 1)] * 128)
    own = 7200 * sum(layout.bytes_per_frame.values())
    more = measure("long", [*[(10, 1)] * 100, (7200, 1), *[(10, 1)] * 28]) - short - own
    assert more < 0.01 * short * 10_000 / 128


@pytest.mark.parametrize(
    ("num_frames", "bytes_per_frame", "block"),
    [
        *[(8, 10**6, 8), (16, 10**6, 16), (24, 10**6, 12), (33, 10**6, 11), (7200, 10**6, 16)],
        *[(16, 238 * 10**6, 4), (16, 2 * 10**9, 1), (1, 10, 1)],
    ],
)
def test_a_block_is_up_to_sixteen_frames_or_what_a_gigabyte_holds(num_frames, bytes_per_frame, block):
    assert choose_block(num_frames, bytes_per_frame) == block


@pytest.mark.parametrize(
    ("lengths", "block"),
    [
        ({10: 10_000, 7200: 1}, 10),
        ({16: 240_000, 32: 20_000}, 16),
        ({8: 100, 16: 3}, 8),
        ({0: 5, 7200: 1}, 16),
        ({0: 5}, 16),
        ({20: 1000, 7201: 1}, 10),
    ],
)
def test_a_block_pads_the_rows_that_there_are_as_little_as_it_can(lengths, block):
    assert choose_block(max(16, *lengths), 10**4, lengths) == block


@given(
    lengths=st.dictionaries(st.integers(0, 400), st.integers(1, 50), min_size=1),
    frame_bytes=st.sampled_from([10, 10**8, 4 * 10**8]),
)
def test_no_block_pads_more_than_the_longest_would(lengths, frame_bytes):
    longest = max(1, *lengths)
    block, most = choose_block(longest, frame_bytes, lengths), min(16, longest, max(1, 10**9 // frame_bytes))
    padded = {size: sum(n * -(-length // size) * size for length, n in lengths.items()) for size in (block, most)}
    assert max(1, most // 2) <= block <= most and padded[block] <= padded[most]


def test_shards_of_short_rows_hold_more_of_them():
    layout = replace(LAYOUT, num_rows=10_000, num_frames=7200, num_patches=4000)
    frame = layout.num_views * sum(layout.bytes_per_frame.values())
    assert layout.choose_rows(10_000 * 10 * layout.num_views) == min(64, 2**29 // (10 * frame))
    assert layout.choose_rows(10_000 * 7200 * layout.num_views) == 1


def test_an_array_of_a_codec_that_is_not_known_is_refused_alone(tmp_path):
    store = write_store(tmp_path / "s.zarr", [(3, 1), (4, 1)])
    assert store.attributes["codecs"] == {
        "patches": "affine", "cls": "identity", "embedding": "identity", "pixels": "identity",
    }  # fmt: skip
    store.attributes["codecs"]["pixels"] = "delta"
    assert store.read_clips([0], [[0]], arrays=("patches", "cls")).patches.shape[0] == 1
    with pytest.raises(StoreMismatchError, match=r"`pixels` of .* has a codec 'delta', expected identity: use the s4v"):
        store.read_clips([0], [[0]], arrays=("pixels",))
