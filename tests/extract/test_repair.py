import shutil
from dataclasses import replace

import numpy as np
import pytest

from s4v.errors import StoreDamagedError, StoreMismatchError
from s4v.extract.pipeline import extract_dataset
from s4v.store.reader import open_store
from s4v.store.verify import verify_store


@pytest.fixture
def damaged(int8_store, tmp_path):
    return shutil.copytree(int8_store, tmp_path / "copy.zarr")


def test_repair_redoes_what_is_damaged_and_nothing_else(
    damaged, int8_store, video_folder, make_config, contents, flip_byte
):
    for name in ("patches/c.1.0.0.0.0.0", "pixels/c.2.0.0.0.0.0.0", "embedding/c.4.0.0.0", "_parts/000005.parquet"):
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
    before = {p: p.stat().st_mtime_ns for p in damaged.rglob("*") if p.is_file()}
    extract_dataset(make_config(video_folder, damaged, dtype="int8", repair=True))
    assert {p: p.stat().st_mtime_ns for p in damaged.rglob("*") if p.is_file()} == before


def test_another_command_does_not_repair(damaged, video_folder, make_config, contents, flip_byte, monkeypatch):
    flip_byte(damaged / "head/norm_weight/c.0")
    flip_byte(damaged / "cls/zarr.json")
    before = contents(damaged)
    other = make_config(video_folder, damaged, dtype="int8", repair=True, layers="1,5")
    with pytest.raises(StoreMismatchError, match="was begun otherwise than this command says: layout.layers"):
        extract_dataset(other)
    # Were the settings not to tell, the files would.
    monkeypatch.setattr("s4v.store.writer.list_differences", lambda *_: [])
    with pytest.raises(StoreDamagedError, match=r"cls/zarr\.json is damaged and this command does not give the same"):
        extract_dataset(other)
    assert contents(damaged) == before
    assert np.any([one.where == "cls/zarr.json" for one in verify_store(open_store(damaged))])


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
