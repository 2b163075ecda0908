"""Done-markers: whole or refused, read once, and what they say of a shard's files."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from s4v.errors import StoreDamagedError
from s4v.extract.extraction import extract_dataset
from s4v.store import checksums, markers, writer
from s4v.store.fingerprint import fingerprint_shard
from s4v.store.markers import find_markers, make_marker, marker_path, read_joined, read_marker, write_joined
from s4v.store.reader import open_store
from s4v.store.records import VideoResult
from s4v.store.verify import verify_store

RESULTS = [
    VideoResult(video_id="a", status="ok", num_frames=9, num_cached_frames=2, num_views=1, frame_indices=[1, 7]),
    VideoResult(video_id="b", status="failed", reason="truncated: 1 of 9 frames decode"),
    VideoResult(video_id="ü", status="pending", reason="io-error", source_bytes=5, source_hash="sha256:0"),
]
FILES = {"patches/c.3.0.0.0.0.0": "0" * 32}


@pytest.fixture(params=[1, 2])
def root(tmp_path, request):
    """A folder with the marker of shard 3, in the kind of either format."""
    (tmp_path / "_parts").mkdir()
    make_marker(tmp_path / "_parts", 3, RESULTS, "c0dec", FILES, request.param)
    return tmp_path


def test_a_marker_says_what_was_written(root):
    marker = read_marker(root, 3, "c0dec")
    assert marker.as_results() == RESULTS and marker.files == FILES
    assert marker.statuses == ["ok", "failed", "pending"]
    assert list(find_markers(root)) == [3]
    assert read_marker(root, 4, "c0dec") is None


def test_a_marker_of_another_codec_or_of_other_files_is_refused(root):
    with pytest.raises(StoreDamagedError, match="another codec"):
        read_marker(root, 3, "other")
    make_marker(root / "_parts", 5, RESULTS, "c0dec", {"../secret": "0"}, 2)
    with pytest.raises(StoreDamagedError, match="other files than a shard has"):
        read_marker(root, 5, "c0dec")


def test_every_flipped_or_missing_byte_of_a_marker_is_found(tmp_path):
    (tmp_path / "_parts").mkdir()
    path = make_marker(tmp_path / "_parts", 3, RESULTS, "c0dec", FILES, 2)
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(StoreDamagedError, match="does not match its checksum"):
            read_marker(tmp_path, 3, "c0dec")
        path.write_bytes(data[:place])
        with pytest.raises(StoreDamagedError, match="does not match its checksum"):
            read_marker(tmp_path, 3, "c0dec")


def test_what_is_joined_is_known_of_one_manifest(tmp_path):
    (tmp_path / "_parts").mkdir()
    write_joined(tmp_path, {3: (17, 99), 8: (18, 100)}, "abc")
    assert read_joined(tmp_path, "abc") == {3: (17, 99), 8: (18, 100)}
    assert read_joined(tmp_path, "other") == read_joined(tmp_path, None) == {}
    (tmp_path / "_parts/joined.arrows").write_bytes(b"rubbish")
    assert read_joined(tmp_path, "abc") == {}


def test_fingerprints_tell_files_apart_by_their_checksums(float_store, tmp_path):
    layout = open_store(float_store).layout
    for spec in layout.array_specs():
        files = [float_store / spec.name / spec.shard_keys(shard)[0] for shard in (0, 1)]
        one, other = (fingerprint_shard(file, spec) for file in files)
        assert one != other and one == fingerprint_shard(files[0], spec)
        cut = tmp_path / "cut"
        cut.write_bytes(files[0].read_bytes()[:20])
        if spec.chunk_shape is not None:
            with pytest.raises(ValueError, match="shorter than its index|points outside of it"):
                fingerprint_shard(cut, spec)


def test_a_file_of_another_writer_is_found(float_store, tmp_path):
    """Whole, with right checksums, and not the one that the marker was written for: what two writers at once leave."""
    out = shutil.copytree(float_store, tmp_path / "mixed.zarr")
    shutil.copy(out / "patches/c.0.0.0.0.0.0", out / "patches/c.1.0.0.0.0.0")
    (damage,) = verify_store(open_store(out))
    assert (damage.where, damage.shard) == ("patches/c.1.0.0.0.0.0", 1)
    assert "is not the file that the shard's done-marker was written for" in damage.what


@pytest.fixture
def counted(monkeypatch):
    """How many markers are read, and how often the list of hashes is written."""
    counts = {"read": 0, "hashes": 0}
    read, write = markers.read_marker, checksums.write_json

    def count_read(*args, **kwargs):
        counts["read"] += 1
        return read(*args, **kwargs)

    def count_write(path, value):
        counts["hashes"] += path.name == "checksums.json"
        write(path, value)

    monkeypatch.setattr(writer, "read_marker", count_read)
    monkeypatch.setattr(checksums, "write_json", count_write)
    return counts


def test_a_consolidation_reads_the_markers_that_changed_and_no_others(
    video_folder, make_config, tmp_path, counted, make_video
):
    # D: all of them were read, each time.
    root = shutil.copytree(video_folder, tmp_path / "videos")
    config = make_config(root, tmp_path / "s.zarr", num_decoders=1)
    extract_dataset(config)
    counted.update(read=0)
    extract_dataset(config)
    assert counted["read"] == 0, "a finished store is not looked into"
    make_video(root / "train/walk/broken.mp4", seed=99)
    extract_dataset(replace(config, retry_failed=True))
    assert 1 <= counted["read"] <= 3, "of eleven"


@pytest.mark.parametrize("num_broken", [2, 7])
def test_retried_shards_do_not_rewrite_the_list_of_hashes(make_video, make_config, tmp_path, counted, num_broken):
    # D: it was written once for each shard.
    root = tmp_path / "videos/train/a"
    root.mkdir(parents=True)
    for number in range(num_broken):
        (root / f"{number}.mp4").write_bytes(b"no video" * 50)
    make_video(root / "good.mp4")
    config = make_config(tmp_path / "videos", tmp_path / "s.zarr", num_decoders=1, frames={"": 2})
    extract_dataset(config)
    for number in range(num_broken):
        make_video(root / f"{number}.mp4", seed=number)
    counted.update(hashes=0)
    assert extract_dataset(replace(config, retry_failed=True)).videos["ok"] == num_broken + 1
    assert counted["hashes"] <= 3, "at the end, whatever the number of shards"


def test_a_copied_store_reads_its_markers_again_and_is_the_same(
    float_store, video_folder, make_config, tmp_path, contents
):
    out = shutil.copytree(float_store, tmp_path / "copy.zarr")
    extract_dataset(make_config(video_folder, out))
    assert contents(out) == contents(float_store)
    rows = open_store(out).read_manifest(["status"])["status"].to_pylist()
    assert np.array_equal(rows, open_store(float_store).read_manifest(["status"])["status"].to_pylist())
    assert marker_path(out, 0).suffix == ".arrows"
