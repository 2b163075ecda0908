import errno
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s4v.errors import (
    EnvironmentFailedError,
    StoreBusyError,
    StoreDamagedError,
    StoreExistsError,
    StoreMismatchError,
    StoreNotFoundError,
)
from s4v.store import _chunk_reads, _shard_file, manifest
from s4v.store.codecs.affine import AffineCodec, round_mantissas
from s4v.store.info import describe_store
from s4v.store.layout import StoreLayout
from s4v.store.markers import marker_path
from s4v.store.reader import open_store
from s4v.store.records import VideoRecord, VideoResult
from s4v.store.spec import StoreSpec
from s4v.store.writer import RowTokens, create_store, resume_store

pytestmark = pytest.mark.usefixtures("each_reader")

LAYOUT = StoreLayout(
    num_rows=20,
    num_views=2,
    num_frames=4,
    layers=(1, 3),
    num_patches=9,
    width=8,
    channels=8,
    embed_dim=6,
    image_size=(12, 12),
    patch_dtype="float16",
)
RECORDS = [
    VideoRecord(
        video_id=f"{i:03d}.mp4", path=f"{i:03d}.mp4", split="train", class_name="ab"[i % 2], captions=("x",) * (i % 3)
    )
    for i in range(20)
]
ATTRIBUTES = {
    "created": "now",
    "dataset": {"name": "toy", "root": "videos"},
    "classes": {"names": ["a", "b"]},
    "backbone": {"name": "toy", "width": 8},
    "frames": {"": 4},
    "sampling": "uniform",
    "resize": "256",
    "libraries": {},
}
SPEC = StoreSpec(layout=LAYOUT, attributes=ATTRIBUTES, records=RECORDS)


def make_tokens(row, num_frames=4, num_views=2):
    rng = np.random.default_rng(row)
    place = (num_views, num_frames)
    return RowTokens(
        patches=rng.normal(size=(*place, 2, 9, 8)).astype(np.float16),
        cls=rng.normal(size=(*place, 2, 8)).astype(np.float16),
        embedding=rng.normal(size=(*place, 6)).astype(np.float32),
        pixels=rng.integers(0, 256, (*place, 1, 12, 12, 3), dtype=np.uint8),
    )


def result_of(row, num_frames=4):
    if row % 7 == 3:
        return VideoResult(video_id=RECORDS[row].video_id, status="failed", reason="truncated: 1 of 9 frames decode")
    return VideoResult(
        video_id=RECORDS[row].video_id,
        status="ok",
        num_cached_frames=num_frames,
        num_views=2,
        frame_indices=list(range(num_frames)),
        timestamps_s=[0.1 * i for i in range(num_frames)],
        eval_clips=[list(range(num_frames))],
    )


def create(path, **changes):
    values = dict(
        layout=LAYOUT,
        attributes=ATTRIBUTES,
        records=RECORDS,
        codec=AffineCodec(dtype="float16"),
        head={"eps": np.array(1.0)},
    )
    overwrite = changes.pop("overwrite", False)
    return create_store(path, StoreSpec(**{**values, **changes}), overwrite=overwrite)


@pytest.fixture(autouse=True)
def writers(monkeypatch):
    """Close every writer at the end of a test: each holds its store's lock."""
    opened = []
    for name in ("create_store", "resume_store"):
        function = globals()[name]

        def remember(*args, function=function, **kwargs):
            opened.append(function(*args, **kwargs))
            return opened[-1]

        monkeypatch.setitem(globals(), name, remember)
    yield opened
    for writer in opened:
        writer.close()


def write_shard(writer, shard, num_frames=4):
    rows = LAYOUT.shard_rows(shard)
    results = [result_of(row, num_frames) for row in rows]
    ok = [row for row, result in zip(rows, results, strict=True) if result.status == "ok"]
    writer.write_shard(shard, {row: make_tokens(row, num_frames) for row in ok}, results)


@pytest.fixture
def store_path(tmp_path):
    path = tmp_path / "toy.zarr"
    with create(path) as writer:
        for shard in writer.pending_shards():
            write_shard(writer, shard, num_frames=4 if shard % 2 else 3)
        writer.consolidate()
    return path


def test_what_is_written_is_read(store_path):
    store = open_store(store_path)
    row = 2  # in shard 1: all four frames
    clips = store.read_clips([row, row], [[0, 3], [2, 1]], view=[0, 1])
    tokens = make_tokens(row)
    assert np.array_equal(clips.patches[0], tokens.patches[0, [0, 3]])
    assert np.array_equal(clips.patches[1], tokens.patches[1, [2, 1]])
    assert np.array_equal(clips.cls[1], tokens.cls[1, [2, 1]])
    assert np.array_equal(clips.pixels[1], tokens.pixels[1, [2, 1]])
    assert np.array_equal(store.read_embeddings()[row], tokens.embedding)
    decoded = store.decode_patches(clips.patches)
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded, clips.patches.astype(np.float32))


rows_and_places = st.lists(
    st.tuples(st.sampled_from([0, 1, 2, 5, 6, 19]), st.integers(0, 1), st.tuples(*[st.integers(0, 2)] * 3)),
    min_size=1,
    max_size=9,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(clips=rows_and_places, layers=st.sampled_from([None, (1,), (3,), (3, 1)]))
def test_our_reader_reads_what_tensorstore_reads(store_path, clips, layers):
    """Any rows, views, places and layers, twice the same ones too."""
    rows, views, places = zip(*clips, strict=True)
    ours, theirs = open_store(store_path), open_store(store_path)
    for name in ("patches", "cls", "pixels"):
        theirs._sharded_arrays[name] = None
    found, expected = (store.read_clips(rows, places, view=views, layers=layers) for store in (ours, theirs))
    assert all(ours._sharded_arrays.values())
    for name in ("patches", "cls", "pixels"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


def test_many_shards_do_not_keep_many_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr("s4v.store._shards._OPEN_SHARDS", 3)
    path = tmp_path / "many.zarr"
    writer = create(path)
    for shard in writer.pending_shards():
        write_shard(writer, shard)
    writer.consolidate()
    store = open_store(path)
    folder = Path("/dev/fd")
    before = len(list(folder.iterdir()))
    good = [row for row in range(20) if row % 7 != 3]
    for _ in range(2):
        for row in good:
            assert np.array_equal(store.read_clips([row], [[1]], arrays=["cls"]).cls[0, 0], make_tokens(row).cls[0, 1])
    assert len(list(folder.iterdir())) <= before + 4


def test_threads_share_a_reader_whose_files_come_and_go(tmp_path, monkeypatch):
    monkeypatch.setattr("s4v.store._shards._OPEN_SHARDS", 2)
    path = tmp_path / "many.zarr"
    with create(path) as writer:
        for shard in writer.pending_shards():
            write_shard(writer, shard)
    store = open_store(path)
    good = np.array([row for row in range(20) if row % 7 != 3])

    def read(seed):
        rows = np.random.default_rng(seed).permutation(good)
        found = store.read_clips(rows, [[2, 1]] * len(rows), view=1).patches
        return all(
            np.array_equal(clip, make_tokens(row).patches[1, [2, 1]]) for row, clip in zip(rows, found, strict=True)
        )

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(12)))


def test_the_index_of_a_shard_is_read_once_unless_the_shard_is_replaced(store_path, monkeypatch):
    monkeypatch.setattr("s4v.store._shards._OPEN_SHARDS", 1)
    read = []
    original = _shard_file.ShardFile._read_index
    monkeypatch.setattr(
        _shard_file.ShardFile, "_read_index", lambda shard, *rest: read.append(shard._name) or original(shard, *rest)
    )
    store = open_store(store_path)
    for row in (2, 0, 2, 0):
        store.read_clips([row], [[1]], arrays=["patches"])
    assert len(read) == len(set(read)) == 2
    file = next((store_path / "patches").glob("c.1.*"))
    file.unlink()
    resumed = resume_store(open_store(store_path), SPEC)
    write_shard(resumed, 1)
    found = store.read_clips([2], [[1]], arrays=["patches"]).patches
    assert np.array_equal(found[0, 0], make_tokens(2).patches[0, 1])
    assert read.count(file.name) == 2


def test_a_folder_in_place_of_a_shard_is_damage(store_path):
    file = next((store_path / "cls").glob("c.1.*"))
    file.unlink()
    file.mkdir()
    with pytest.raises(StoreDamagedError, match=r"cls, shard 1: .*Read for video 002\.mp4"):
        open_store(store_path).read_clips([2], [[1]])


def test_damage_of_a_compressed_shard_names_its_own_video(tmp_path):
    path = tmp_path / "rounded.zarr"
    layout = replace(LAYOUT, keep_bits=3)
    with create(path, layout=layout) as writer:
        for shard in writer.pending_shards():
            write_shard(writer, shard)
    file = next((path / "patches").glob("c.3.*"))
    data = bytearray(file.read_bytes())
    data[11] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreDamagedError, match=r"patches, shard 3: .*Read for video 006\.mp4\. .*--repair"):
        open_store(path).read_clips([0, 2, 6, 8], [[0]] * 4)


def test_what_an_unfinished_store_has_is_read_whatever_columns_are_asked_for(tmp_path):
    path = tmp_path / "half.zarr"
    with create(path) as writer:
        write_shard(writer, 1)
    found = open_store(path).read_manifest(["video_id", "num_cached_frames"])
    assert found.column_names == ["video_id", "num_cached_frames"]
    assert found["num_cached_frames"].to_pylist()[:4] == [None, None, 4, None]


def test_a_view_for_each_video_and_no_other_number(store_path):
    with pytest.raises(StoreMismatchError, match=r"one for each of 2 videos; found shape \(3,\)"):
        open_store(store_path).read_clips([0, 2], [[0], [0]], view=[0, 1, 0])


def test_a_codec_with_parts_of_a_later_version_is_refused(store_path):
    metadata = store_path / "zarr.json"
    told = json.loads(metadata.read_text())
    told["attributes"]["s4v"]["codec"]["parts"] = ["rotation"]
    metadata.write_text(json.dumps(told))
    (store_path / "checksums.json").write_text("{}")
    with pytest.raises(StoreMismatchError, match="has rotation; this s4v knows mean, basis, scale"):
        _ = open_store(store_path).codec


def test_a_store_from_before_the_codec_was_fitted_still_opens(data_path):
    store = open_store(data_path / "format1.zarr")
    rng = np.random.default_rng(2)
    patches = rng.integers(-127, 128, (1, 2, 2, 4, 8), dtype=np.int8)
    cls = rng.normal(size=(1, 2, 2, 8)).astype(np.float16)
    clips = store.read_clips([2], [[0, 1]])
    assert np.array_equal(clips.patches, patches) and np.array_equal(clips.cls, cls)
    scale = np.linspace(0.1, 0.9, 16, dtype=np.float32).reshape(2, 1, 8)
    assert np.array_equal(store.decode_patches(clips.patches), patches * scale)
    facts = describe_store(store)
    assert (facts["fidelity"], facts["codec"]["keep_bits"]) == (None, None)


def test_kept_bits_compress_and_read_back(tmp_path):
    path = tmp_path / "rounded.zarr"
    layout = replace(LAYOUT, keep_bits=3, num_patches=400)
    with create(path, layout=layout) as writer:
        tokens = make_tokens(0)
        patches = np.random.default_rng(0).normal(size=(2, 4, 2, 400, 8)).astype(np.float16)
        tokens = replace(tokens, patches=round_mantissas(patches, 3))
        writer.write_shard(
            0, {0: tokens, 1: replace(make_tokens(1), patches=tokens.patches)}, [result_of(0), result_of(1)]
        )
    store = open_store(path)
    assert np.array_equal(store.read_clips([0], [[3, 0]]).patches[0], tokens.patches[0, [3, 0]])
    assert np.array_equal(zarr.open_group(path, mode="r")["patches"][1], tokens.patches)
    assert (path / "patches/c.0.0.0.0.0.0").stat().st_size < 0.75 * 2 * patches.nbytes


def test_layers_are_chosen_by_block_number(store_path):
    store = open_store(store_path)
    both = store.read_clips([2], [[0, 1]])
    last = store.read_clips([2], [[0, 1]], layers=[3])
    assert np.array_equal(last.patches, both.patches[:, :, 1:])
    assert np.array_equal(last.cls, both.cls[:, :, 1:])


def test_plain_zarr_opens_the_store(store_path):
    group = zarr.open_group(store_path, mode="r")
    tokens = make_tokens(2)
    assert np.array_equal(group["patches"][2, :, :4], tokens.patches)
    assert np.array_equal(group["pixels"][2], tokens.pixels)
    assert np.array_equal(group["embedding"][2], tokens.embedding)
    assert group["head/eps"][()] == 1.0
    assert group.attrs["s4v"]["format_version"] == 2


def test_only_codecs_of_the_zarr_specification_are_used(store_path):
    for metadata in store_path.rglob("zarr.json"):
        codecs = json.loads(metadata.read_text()).get("codecs", [])
        inner = [c for codec in codecs for c in codec.get("configuration", {}).get("codecs", [])]
        assert {codec["name"] for codec in [*codecs, *inner]} <= {"bytes", "crc32c", "sharding_indexed"}


def test_every_array_carries_a_checksum(store_path):
    for metadata in store_path.rglob("zarr.json"):
        if "codecs" in json.loads(metadata.read_text()):
            assert "crc32c" in metadata.read_text()


def test_black_frame_is_stored_and_unused_places_are_not(tmp_path):
    path = tmp_path / "black.zarr"
    writer = create(path)
    tokens = make_tokens(0, num_frames=2)
    tokens.pixels[:] = 0
    writer.write_shard(0, {0: tokens, 1: make_tokens(1, num_frames=4)}, [result_of(0, 2), result_of(1, 4)])
    size = (path / "pixels" / "c.0.0.0.0.0.0.0").stat().st_size
    chunk = 12 * 12 * 3 + 4
    index = 2 * 2 * 4 * 16 + 4
    assert size == 2 * (2 + 4) * chunk + index


def test_manifest_ties_rows_to_videos(store_path):
    table = open_store(store_path).videos.to_table()
    assert table["video_id"].to_pylist() == [r.video_id for r in RECORDS]
    rows = table.to_pylist()
    assert rows[3]["status"] == "failed"
    assert rows[3]["frame_indices"] is None
    assert rows[3]["reason"] == "truncated: 1 of 9 frames decode"
    assert rows[2]["label"] == 0
    assert rows[2]["class_name"] == "a"
    assert rows[2]["eval_clips"] == [[0, 1, 2, 3]]


def test_captions_are_tied_to_videos_many_to_one(store_path):
    captions = open_store(store_path).read_captions().to_pylist()
    assert [c["video_id"] for c in captions[:3]] == ["001.mp4", "002.mp4", "002.mp4"]
    assert len({c["caption_id"] for c in captions}) == len(captions)


def test_shard_of_failed_rows_has_a_marker_and_no_file(tmp_path):
    path = tmp_path / "failed.zarr"
    writer = create(path, layout=LAYOUT)
    results = [
        VideoResult(video_id=RECORDS[row].video_id, status="failed", reason="empty-file")
        for row in LAYOUT.shard_rows(0)
    ]
    writer.write_shard(0, {}, results)
    assert 0 not in writer.pending_shards()
    assert not list((path / "patches").glob("c.*"))


def test_reader_refuses_rows_that_are_not_ok_and_frames_that_are_not_there(store_path):
    store = open_store(store_path)
    with pytest.raises(StoreMismatchError, match="rows 3 of .* are not ok"):
        store.read_clips([3], [[0]])
    with pytest.raises(StoreMismatchError, match="row 0 of .* holds 3 frames and 2 views; wanted frames 3 of view 0"):
        store.read_clips([0], [[3]])
    with pytest.raises(StoreMismatchError, match=r"holds layers 1,3, wanted 2,3: missing 2"):
        store.read_clips([0], [[0]], layers=[2, 3])
    with pytest.raises(StoreMismatchError, match="has rows 0 to 19"):
        store.read_clips([20], [[0]])


@pytest.mark.parametrize("name", ["patches", "cls", "pixels"])
def test_flipped_byte_is_refused_with_shard_and_video_named(store_path, name):
    file = next((store_path / name).glob("c.1.*"))
    data = bytearray(file.read_bytes())
    data[11] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreDamagedError, match=rf"{name}, shard 1: .*002\.mp4"):
        open_store(store_path).read_clips([2], [[0, 1, 2, 3]])


@pytest.mark.parametrize("name", ["patches", "cls", "pixels"])
def test_missing_shard_is_refused(store_path, name):
    next((store_path / name).glob("c.1.*")).unlink()
    with pytest.raises(StoreDamagedError, match=rf"{name}, shard 1: the file .* is missing"):
        open_store(store_path).read_clips([2], [[0, 1]])


@pytest.mark.parametrize(("cut", "why"), [(3, "index at the end .* cut short or damaged"), (10**6, "cut short")])
def test_truncated_shard_is_refused(store_path, cut, why):
    file = next((store_path / "patches").glob("c.1.*"))
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(StoreDamagedError, match=rf"patches, shard 1: .*{why}.*002\.mp4"):
        open_store(store_path).read_clips([2], [[0]])


def test_missing_array_is_refused(store_path):
    shutil.rmtree(store_path / "patches")
    with pytest.raises(StoreDamagedError, match=r"patches/zarr\.json is missing"):
        open_store(store_path).read_clips([2], [[0]])


@pytest.mark.parametrize("has_hashes", [True, False])
def test_truncated_manifest_is_refused(store_path, has_hashes):
    file = store_path / "videos.parquet"
    file.write_bytes(file.read_bytes()[:-40])
    if not has_hashes:
        (store_path / "checksums.json").unlink()
    with pytest.raises(StoreDamagedError, match=r"videos\.parquet (does not match|is missing or damaged)"):
        open_store(store_path).read_clips([2], [[0]])


def test_files_without_checksums_of_their_own_are_held_to_their_hashes(store_path):
    for name in ("patches/zarr.json", "captions.parquet"):
        file = store_path / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    store = open_store(store_path)
    with pytest.raises(StoreDamagedError, match=r"patches/zarr\.json does not match its recorded hash"):
        store.read_clips([2], [[0]])
    with pytest.raises(StoreDamagedError, match=r"captions\.parquet does not match its recorded hash"):
        store.read_captions()


def test_lost_small_chunks_are_refused(store_path):
    (store_path / "head/eps/c").unlink()
    next((store_path / "embedding").glob("c.1.*")).unlink()
    store = open_store(store_path)
    with pytest.raises(StoreDamagedError, match="head/eps has lost its chunk"):
        _ = store.head
    with pytest.raises(StoreDamagedError, match="embedding, shard 1: the chunk is missing"):
        store.read_embeddings()


@pytest.mark.parametrize("name", ["zarr.json", "checksums.json"])
def test_garbled_json_is_damage(store_path, name):
    (store_path / name).write_bytes(b"\xff{")
    with pytest.raises(StoreDamagedError, match=f"{name} is not readable as JSON"):
        open_store(store_path)


def test_views_and_arrays_that_are_not_there_are_refused(store_path):
    store = open_store(store_path)
    with pytest.raises(StoreMismatchError, match="of view -1"):
        store.read_clips([2], [[0]], view=-1)
    with pytest.raises(StoreMismatchError, match="read_clips reads patches, cls, pixels; found embedding"):
        store.read_clips([2], [[0]], arrays=("embedding",))


def test_second_writer_is_refused(tmp_path):
    writer = create(tmp_path / "busy.zarr")
    with pytest.raises(StoreBusyError, match=r"another process is writing to .*busy\.zarr"):
        resume_store(open_store(tmp_path / "busy.zarr"), SPEC)
    with pytest.raises(StoreBusyError, match="stop it before replacing its store"):
        create(tmp_path / "busy.zarr", overwrite=True)
    writer.close()
    resume_store(open_store(tmp_path / "busy.zarr"), SPEC)


def test_overwrite_replaces_what_a_link_points_to(store_path, tmp_path):
    (tmp_path / "link.zarr").symlink_to(store_path)
    create(tmp_path / "link.zarr", overwrite=True)
    assert (tmp_path / "link.zarr").is_symlink()
    assert open_store(store_path).read_manifest(["status"])["status"].unique().to_pylist() == ["pending"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.zarr", "toy.zarr"]


def test_kill_between_manifest_and_hashes_is_mended_by_the_next_run(store_path, monkeypatch):
    recorded = (store_path / "checksums.json").read_bytes()
    marker_path(store_path, 3).unlink()
    writer = resume_store(open_store(store_path), SPEC)
    write_shard(writer, 3, num_frames=2)
    write = manifest.write_table

    def write_and_die(*args):
        write(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest, "write_table", write_and_die)
    with pytest.raises(KeyboardInterrupt):
        writer.consolidate()
    writer.close()
    monkeypatch.undo()
    assert open_store(store_path).read_manifest(["status"]) is not None, "no hash is not a wrong one"
    with resume_store_outside(store_path) as writer:
        writer.consolidate()
    assert (store_path / "checksums.json").read_bytes() != recorded
    assert "videos.parquet" in json.loads((store_path / "checksums.json").read_text())


def resume_store_outside(path):
    from s4v.store import writer

    return writer.resume_store(open_store(path), SPEC)


def test_changed_captions_are_a_difference(store_path):
    records = [replace(RECORDS[1], captions=("y",)) if i == 1 else record for i, record in enumerate(RECORDS)]
    with pytest.raises(StoreMismatchError, match="captions differ"):
        resume_store(open_store(store_path), replace(SPEC, records=records))


def test_numbers_as_class_names_keep_their_order():
    records = [VideoRecord(video_id=str(i), path=str(i), split="train", class_name=str(i)) for i in range(12)]
    assert manifest.ClassList.of(records).names == tuple(str(i) for i in range(12))


def test_changed_metadata_is_refused(store_path):
    file = store_path / "zarr.json"
    file.write_text(file.read_text().replace('"toy"', '"other"'))
    with pytest.raises(StoreDamagedError, match="does not match its recorded hash"):
        open_store(store_path)


def test_refused_write_names_the_shard_and_leaves_it_pending(tmp_path, monkeypatch):
    writer = create(tmp_path / "full.zarr")
    write_shard(writer, 0)

    def refuse(_tokens):
        raise ValueError("RESOURCE_EXHAUSTED: ...: No space left on device [os_error_code='28']")

    monkeypatch.setattr(writer, "_write_arrays", refuse)
    with pytest.raises(EnvironmentFailedError, match=r"full\.zarr/shard 2 could not be written: no space left"):
        write_shard(writer, 2)
    monkeypatch.undo()
    assert 2 in writer.pending_shards()
    write_shard(writer, 2)
    assert 2 not in writer.pending_shards()


def test_finished_store_is_not_written_again(store_path):
    before = {p: p.stat().st_mtime_ns for p in store_path.rglob("*")}
    with resume_store(open_store(store_path), SPEC) as writer:
        writer.consolidate()
    assert {p: p.stat().st_mtime_ns for p in store_path.rglob("*")} == before


def test_later_format_is_refused(store_path):
    file = store_path / "zarr.json"
    file.write_text(file.read_text().replace('"format_version": 2', '"format_version": 99'))
    with pytest.raises(StoreMismatchError, match="has format 99, this s4v reads up to 5. Update s4v"):
        open_store(store_path)


def test_what_is_not_a_store_is_refused(tmp_path):
    with pytest.raises(StoreNotFoundError, match=r"nothing\.zarr is not a store: nothing there"):
        open_store(tmp_path / "nothing.zarr")
    with pytest.raises(StoreNotFoundError, match=r"is not a store: no zarr\.json in it"):
        open_store(tmp_path)
    zarr.create_group(tmp_path / "foreign.zarr")
    with pytest.raises(StoreNotFoundError, match="not a store that s4v wrote"):
        open_store(tmp_path / "foreign.zarr")


def test_existing_store_and_foreign_folders_are_never_replaced_unasked(store_path, tmp_path):
    with pytest.raises(StoreExistsError, match="is a store already.*--overwrite"):
        create(store_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(StoreExistsError, match="exists and is not a store. Nothing was written"):
        create(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_resume_gives_the_store_that_an_undisturbed_run_gives(store_path, tmp_path):
    path = tmp_path / "resumed.zarr"
    with create(path) as writer:
        for shard in (0, 5, 2):
            write_shard(writer, shard, num_frames=4 if shard % 2 else 3)
    writer = resume_store(open_store(path), replace(SPEC, attributes={**ATTRIBUTES, "created": "later"}))
    assert writer.pending_shards() == [s for s in range(LAYOUT.num_shards) if s not in (0, 5, 2)]
    for shard in writer.pending_shards():
        write_shard(writer, shard, num_frames=4 if shard % 2 else 3)
    writer.consolidate()
    writer.close()
    names = {p.relative_to(path) for p in path.rglob("*") if p.is_file() and p.name != "joined.arrows"}
    assert names == {p.relative_to(store_path) for p in store_path.rglob("*") if p.is_file()} - {
        Path("_parts/joined.arrows")
    }
    for name in names:
        assert (path / name).read_bytes() == (store_path / name).read_bytes(), name


def test_unfinished_store_is_read_with_what_is_done(tmp_path):
    writer = create(tmp_path / "half.zarr")
    write_shard(writer, 1)
    store = open_store(tmp_path / "half.zarr")
    statuses = store.read_manifest(["status"])["status"].to_pylist()
    assert statuses[2:4] == ["ok", "failed"]
    assert set(statuses[:2] + statuses[4:]) == {"pending"}
    assert store.read_clips([2], [[0, 1]]).patches.shape == (1, 2, 2, 9, 8)
    assert describe_store(store)["videos"] == {"ok": 1, "failed": 1, "pending": 18}


def test_resume_with_other_settings_lists_all_differences(store_path):
    other = {**ATTRIBUTES, "backbone": {"name": "other", "width": 16}}
    records = [*RECORDS[:-1], VideoRecord(video_id="new.mp4", path="new.mp4", split="train", class_name="a")]
    with pytest.raises(StoreMismatchError) as caught:
        resume_store(open_store(store_path), replace(SPEC, attributes=other, records=records))
    message = str(caught.value)
    assert "backbone.name toy there, other here" in message
    assert "backbone.width 8 there, 16 here" in message
    assert "1 (new.mp4) videos are new" in message
    assert "1 (019.mp4) videos are gone" in message


def test_hashes_of_files_without_zarr_checksums_are_recorded(store_path):
    recorded = json.loads((store_path / "checksums.json").read_text())
    expected = {
        p.relative_to(store_path).as_posix()
        for pattern in ("zarr.json", "*.parquet")
        for p in store_path.rglob(pattern)
    }
    assert set(recorded) == expected


def test_labels_follow_the_names_whatever_the_order_of_rows():
    forward = manifest.ClassList.of(RECORDS)
    assert forward == manifest.ClassList.of(reversed(RECORDS)) == manifest.ClassList(("a", "b"))


def test_parquet_pages_carry_checksums(store_path):
    column = pyarrow.parquet.ParquetFile(store_path / "videos.parquet", page_checksum_verification=True)
    assert column.read().num_rows == 20


def test_store_imports_neither_torch_nor_a_model():
    code = "import sys, s4v.store.reader, s4v.store.writer, s4v.store.info\n"
    code += "print([m for m in ('torch', 'open_clip') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert out.stdout.strip() == "[]"


def test_store_below_the_package_folder_is_found_from_the_root(tmp_path, store_path, monkeypatch):
    (tmp_path / "store").mkdir()
    shutil.copytree(store_path, tmp_path / "store" / "k400.zarr")
    monkeypatch.chdir(tmp_path)
    assert open_store("store/k400.zarr").layout == LAYOUT


def test_a_file_that_stays_stale_is_opened_anew_once(store_path, monkeypatch):
    """As a disk on a network leaves it that was away: the open file is lost, the same name is not."""
    store, waits, read, stale = open_store(store_path), [], _chunk_reads._try_to_read, []
    before = store.read_clips([0], [[0, 1]])

    def try_to_read(reads, num_threads):
        if not stale:
            stale.extend(shard for one in reads for shard in one.shards)
        lost = [place for place, one in enumerate(reads) if set(map(id, one.shards)) & set(map(id, stale))]
        return [_chunk_reads._Problem(place, 0, os.strerror(errno.ESTALE)) for place in lost] or read(
            reads, num_threads
        )

    monkeypatch.setattr(_chunk_reads, "_try_to_read", try_to_read)
    monkeypatch.setattr("time.sleep", waits.append)
    again = store.read_clips([0], [[0, 1]])
    assert all(np.array_equal(getattr(before, name), getattr(again, name)) for name in ("patches", "cls", "pixels"))
    assert waits[:3] == [0.1, 1.0, 5.0]
    stale.clear()
    monkeypatch.setattr(
        _chunk_reads, "_try_to_read", lambda reads, _: [_chunk_reads._Problem(0, 0, os.strerror(errno.EIO))]
    )
    with pytest.raises(StoreDamagedError, match="Input/output error"):
        store.read_clips([0], [[0, 1]])
