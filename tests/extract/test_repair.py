import shutil
from dataclasses import replace

import numpy as np
import pytest

from s4v.errors import StoreDamagedError, StoreMismatchError
from s4v.extract.extraction import extract_dataset
from s4v.store.reader import open_store
from s4v.store.verify import verify_store


@pytest.fixture
def damaged(int8_store, tmp_path):
    return shutil.copytree(int8_store, tmp_path / "copy.zarr")


def test_repair_redoes_what_is_damaged_and_nothing_else(
    damaged, int8_store, video_folder, make_config, contents, flip_byte
):
    for name in ("patches/c.1.0.0.0.0.0", "pixels/c.2.0.0.0.0.0.0", "embedding/c.4.0.0.0", "_parts/000005.arrows"):
        flip_byte(damaged / name)
    for name in ("videos.parquet", "captions.parquet", "cls/zarr.json", "head/norm_weight/c.0", "codec/scale/c.0.0"):
        flip_byte(damaged / name)
    (damaged / "cls/c.7.0.0.0.0").unlink()
    before = {p.name: p.stat().st_mtime_ns for p in (damaged / "patches").glob("c.*")}
    summary = extract_dataset(make_config(video_folder, damaged, dtype="int8", repair=True))
    assert summary.videos == {"ok": 10, "failed": 1, "pending": 0}
    assert verify_store(open_store(damaged)) == []
    assert contents(damaged) == contents(int8_store)
    redone = {p.name.split(".")[1] for p in (damaged / "patches").glob("c.*") if p.stat().st_mtime_ns != before[p.name]}
    assert redone == {"1", "2", "4", "5", "7"}


def test_repairing_a_whole_store_changes_nothing(damaged, video_folder, make_config):
    def times():
        # What is known of done-markers is known of their inodes: a copy finds it out again.
        files = [p for p in damaged.rglob("*") if p.is_file() and p.name != "joined.arrows"]
        return {p: p.stat().st_mtime_ns for p in files}

    before = times()
    extract_dataset(make_config(video_folder, damaged, dtype="int8", repair=True))
    assert times() == before


def test_another_command_does_not_repair(damaged, video_folder, make_config, contents, flip_byte, monkeypatch):
    flip_byte(damaged / "head/norm_weight/c.0")
    flip_byte(damaged / "cls/zarr.json")
    before = contents(damaged)
    other = make_config(video_folder, damaged, dtype="int8", repair=True, layers="1,5")
    with pytest.raises(StoreMismatchError, match="was begun otherwise than this command says: layout.layers"):
        extract_dataset(other)
    # Were the settings not to tell, the files would.
    monkeypatch.setattr("s4v.store.repair.list_differences", lambda *_: [])
    with pytest.raises(StoreDamagedError, match=r"cls/zarr\.json is damaged and this command does not give the same"):
        extract_dataset(other)
    assert contents(damaged) == before
    assert np.any([one.where == "cls/zarr.json" for one in verify_store(open_store(damaged))])


@pytest.fixture
def paired(make_video, make_config, tmp_path):
    """18 listed videos in shards of two, two of them broken; a function that gives the status of a row."""
    names = [f"{number:02d}.mp4" for number in range(18)]
    for number, name in enumerate(names):
        make_video(tmp_path / "videos" / name, seed=number)
    for broken in (names[2], names[7]):
        (tmp_path / "videos" / broken).write_bytes(b"no video" * 50)
    (tmp_path / "list.csv").write_text("".join(f"{name} 0\n" for name in names))
    lists = {"dataset": "lists", "annotations": tmp_path / "list.csv", "frames": {"": 4}}
    config = make_config(tmp_path / "videos", tmp_path / "paired.zarr", **lists)
    extract_dataset(config)
    assert open_store(config.out).layout.rows_per_shard == 2
    return config


def read(config, row):
    return open_store(config.out).read_clips([row], [[0, 1, 2, 3]]).patches


def statuses(config):
    return open_store(config.out).read_manifest(["status"])["status"].to_pylist()


def test_trying_failed_rows_again_keeps_good_ones_whose_video_is_gone(paired, make_video):
    before = statuses(paired)
    kept = read(paired, 3)
    (paired.root / "03.mp4").unlink()  # beside 02
    for name in ("02.mp4", "07.mp4"):
        make_video(paired.root / name, seed=50)
    summary = extract_dataset(replace(paired, retry_failed=True))
    assert summary.videos == {"ok": 18, "failed": 0, "pending": 0}
    assert [now for now, then in zip(statuses(paired), before, strict=True) if then == "ok"] == ["ok"] * 16
    assert np.array_equal(read(paired, 3), kept)
    assert verify_store(open_store(paired.out)) == []


def test_a_good_row_is_not_replaced_by_a_failed_or_another_one(paired, make_video, caplog):
    kept = {row: read(paired, row) for row in (3, 6)}
    (paired.root / "03.mp4").write_bytes(b"no video any more")
    make_video(paired.root / "06.mp4", seed=70)  # another video in its place
    for name in ("02.mp4", "07.mp4"):
        make_video(paired.root / name, seed=50)
    summary = extract_dataset(replace(paired, retry_failed=True))
    assert summary.videos == {"ok": 18, "failed": 0, "pending": 0}
    assert summary.changed == ["03.mp4", "06.mp4"]
    assert "2 rows were made of other videos than lie there now (03.mp4, 06.mp4)" in caplog.text
    assert all(np.array_equal(read(paired, row), tokens) for row, tokens in kept.items())
    # A done-marker that is gone takes nothing with it.
    (paired.out / "_parts/000005.arrows").unlink()
    (paired.root / "10.mp4").unlink()
    assert extract_dataset(paired).videos == {"ok": 18, "failed": 0, "pending": 0}
    assert verify_store(open_store(paired.out)) == []


def test_repair_keeps_every_row_that_is_whole(paired, flip_byte):
    kept = read(paired, 8)
    (paired.root / "08.mp4").unlink()
    flip_last_chunk(paired.out / "patches/c.4.0.0.0.0.0")  # of row 9
    flip_byte(paired.out / "patches/c.6.0.0.0.0.0")
    flip_byte(paired.out / "_parts/000004.arrows", 300)
    summary = extract_dataset(replace(paired, repair=True))
    assert summary.videos == {"ok": 16, "failed": 2, "pending": 0}
    assert verify_store(open_store(paired.out)) == []
    assert np.array_equal(read(paired, 8), kept)


def test_a_damaged_row_is_not_mended_with_another_video(paired, make_video, flip_byte, caplog):
    flip_last_chunk(paired.out / "patches/c.4.0.0.0.0.0")  # of row 9
    flip_byte(paired.out / "patches/c.6.0.0.0.0.0")
    make_video(paired.root / "09.mp4", seed=80)
    with pytest.raises(StoreDamagedError, match=r"damage stays in shards 4; all else is mended.*--redo-changed"):
        extract_dataset(replace(paired, repair=True))
    assert "shard 4 is damaged and stays so: 09.mp4 was made of another video" in caplog.text
    assert [(one.shard, one.video_id) for one in verify_store(open_store(paired.out))] == [(4, "09.mp4")]
    extract_dataset(replace(paired, repair=True, redo_changed=True))
    assert verify_store(open_store(paired.out)) == []


def test_repair_loses_only_damaged_rows_whose_video_is_gone(paired, flip_byte):
    for name in ("08.mp4", "14.mp4"):
        (paired.root / name).unlink()
    flip_byte(paired.out / "patches/c.4.0.0.0.0.0")  # its first chunk is row 8's
    (paired.out / "pixels/c.7.0.0.0.0.0.0").unlink()  # of both rows
    flip_byte(paired.out / "patches/c.6.0.0.0.0.0")
    summary = extract_dataset(replace(paired, repair=True))
    assert summary.videos == {"ok": 14, "failed": 4, "pending": 0}
    assert verify_store(open_store(paired.out)) == []


def test_a_damaged_done_marker_alone_is_written_anew_where_a_video_is_gone(paired, contents):
    before = contents(paired.out)
    (paired.root / "08.mp4").unlink()
    (paired.out / "_parts/000004.arrows").unlink()
    extract_dataset(replace(paired, repair=True))
    assert contents(paired.out) == before
    assert verify_store(open_store(paired.out)) == []


def flip_last_chunk(path):
    """A byte of the last chunk, which stands before the index: one pair of offset and length for each chunk."""
    data = bytearray(path.read_bytes())
    pairs = np.frombuffer(data[-4 - 16 * 8 : -4], dtype="<u8").reshape(-1, 2)
    data[int(pairs[-1, 0]) + 5] ^= 1
    path.write_bytes(data)


def test_failed_rows_are_tried_again_when_asked_for(video_folder, make_video, make_config, tmp_path, contents):
    root = shutil.copytree(video_folder, tmp_path / "videos")
    config = make_config(root, tmp_path / "retried.zarr")
    extract_dataset(config)
    before = {p.name: p.stat().st_mtime_ns for p in (config.out / "patches").glob("c.*")}
    make_video(root / "train/walk/broken.mp4", seed=99)
    assert extract_dataset(config).videos["failed"] == 1, "not without being asked"
    summary = extract_dataset(replace(config, retry_failed=True))
    assert summary.videos == {"ok": 11, "failed": 0, "pending": 0}
    assert verify_store(open_store(config.out)) == []
    after = {p.name: p.stat().st_mtime_ns for p in (config.out / "patches").glob("c.*")}
    assert {name for name in after if after[name] != before.get(name)} == set(after) - set(before)
    fresh = make_config(root, tmp_path / "fresh.zarr")
    extract_dataset(fresh)
    assert contents(config.out).keys() == contents(fresh.out).keys()
    assert all(contents(config.out)[name] == data for name, data in contents(fresh.out).items() if name != "zarr.json")
