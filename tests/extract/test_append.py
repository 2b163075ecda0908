"""`--append`: new videos at the end of a store, the old ones where they are."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from s4v.errors import ConfigError, StoreBusyError, StoreMismatchError
from s4v.extract.extraction import extract_dataset
from s4v.store import append as appending
from s4v.store.reader import open_store
from s4v.store.verify import verify_store

NEW = {"train/aaa/new1.mp4": "aaa", "train/run/new2.mp4": "run", "val/walk/a.mp4": "walk"}


@pytest.fixture
def grown(video_folder, float_store, make_video, make_config, tmp_path):
    """A copy of a finished store, and a configuration of its videos with three more, one of a new class."""
    root = shutil.copytree(video_folder, tmp_path / "videos")
    for seed, name in enumerate(NEW, start=70):
        make_video(root / name, seed=seed)
    return make_config(root, shutil.copytree(float_store, tmp_path / "grown.zarr"))


def read_rows(path, ids):
    store = open_store(path)
    table = store.read_manifest()
    row_of = {video_id: row for row, video_id in enumerate(table["video_id"].to_pylist())}
    clips = store.read_clips([row_of[i] for i in ids], [[0, 1, 2, 3]] * len(ids))
    facts = [{k: v for k, v in table.slice(row_of[i], 1).to_pylist()[0].items() if k != "label"} for i in ids]
    return clips, facts


def test_new_videos_come_last_and_the_old_ones_stay(grown, float_store, tmp_path):
    with pytest.raises(StoreMismatchError, match=r"3 \(.*\) videos are new \(--append adds them\)"):
        extract_dataset(grown)
    old = open_store(float_store).read_manifest()
    before = {p.name: p.stat().st_mtime_ns for p in (grown.out / "patches").glob("c.*")}
    summary = extract_dataset(replace(grown, append=True))
    assert summary.videos == {"ok": 13, "failed": 1, "pending": 0}
    store = open_store(grown.out)
    table = store.read_manifest()
    assert table["video_id"].to_pylist()[:11] == old["video_id"].to_pylist()
    new = dict(zip(table["video_id"].to_pylist()[11:], table["class_name"].to_pylist()[11:], strict=True))
    assert new == NEW
    assert store.classes.names == ("aaa", *open_store(float_store).classes.names)
    labels = [None if name is None else store.classes.names.index(name) for name in table["class_name"].to_pylist()]
    assert table["label"].to_pylist() == labels
    after = {p.name: p.stat().st_mtime_ns for p in (grown.out / "patches").glob("c.*")}
    assert before.items() <= after.items(), "full shards are not touched"
    assert verify_store(store) == []
    fresh = replace(grown, out=tmp_path / "fresh.zarr")
    extract_dataset(fresh)
    ids = open_store(fresh.out).read_manifest(["video_id", "status"]).to_pylist()
    ids = [row["video_id"] for row in ids if row["status"] == "ok"]
    (ours, our_facts), (theirs, their_facts) = (read_rows(path, ids) for path in (grown.out, fresh.out))
    assert our_facts == their_facts
    for name in ("patches", "cls", "pixels"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-5)


def test_an_appended_store_goes_on_and_stays_as_it_is(grown, contents):
    extract_dataset(replace(grown, append=True, limit=1))
    assert extract_dataset(grown).videos["pending"] == 0, "the order of the rows is the store's, not the folder's"
    before = contents(grown.out)
    extract_dataset(replace(grown, append=True))
    extract_dataset(replace(grown, repair=True))
    assert contents(grown.out) == before


def test_a_last_shard_that_was_not_full_is_filled(grown, make_video, tmp_path):
    """17 videos fall into shards of two: the last one has room."""
    late = grown.root / "val/walk/a.mp4"
    late.rename(tmp_path / "a.mp4")
    for number in range(4):
        make_video(grown.root / f"val/run/more{number}.mp4", seed=number)
    config = replace(grown, out=tmp_path / "half.zarr")
    extract_dataset(config)
    assert open_store(config.out).layout.rows_per_shard == 2
    (tmp_path / "a.mp4").rename(late)
    make_video(grown.root / "val/run/more4.mp4", seed=4)
    assert extract_dataset(replace(config, append=True, prepare=True)).videos["pending"] == 2, "the old one is kept"
    assert extract_dataset(config).videos == {"ok": 18, "failed": 1, "pending": 0}
    assert open_store(config.out).layout.rows_per_shard == 2
    assert verify_store(open_store(config.out)) == []


def test_an_interrupted_append_is_completed(grown, contents, monkeypatch, tmp_path):
    done = shutil.copytree(grown.out, tmp_path / "done.zarr")
    extract_dataset(replace(grown, out=done, append=True))

    def stop(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(appending, "write_checksums", stop)
        with pytest.raises(KeyboardInterrupt):
            extract_dataset(replace(grown, append=True))
    with pytest.raises(StoreBusyError, match="rows are being added to .*s4v extract --append. completes it"):
        open_store(grown.out)
    extract_dataset(replace(grown, append=True))
    assert contents(grown.out, "zarr.json") == contents(done, "zarr.json")
    assert verify_store(open_store(grown.out)) == []


def test_rows_that_are_still_pending_are_no_damage(grown):
    extract_dataset(replace(grown, append=True, prepare=True))
    assert verify_store(open_store(grown.out)) == []


def test_an_append_that_cannot_be_done_changes_nothing(grown, contents, make_video, monkeypatch, tmp_path):
    before = contents(grown.out)
    with monkeypatch.context() as patch:
        patch.setattr("s4v.extract.disk_space.free_bytes", lambda _: 1000)
        with pytest.raises(ConfigError, match="needs .* more and its disk has 1.0 kB free"):
            extract_dataset(replace(grown, append=True))
    assert contents(grown.out) == before


def test_an_append_needs_no_video_of_the_rows_that_are_there(grown, make_video, tmp_path):
    for number in range(4):
        make_video(grown.root / f"val/run/more{number}.mp4", seed=number)
    config = replace(grown, out=tmp_path / "half.zarr", dataset="lists", splits=None)
    (grown.root / "list.csv").write_text(
        "\n".join(f"{path.relative_to(grown.root)} 0" for path in sorted(grown.root.rglob("*.mp4"))[:17]) + "\n"
    )
    config = replace(config, annotations=grown.root / "list.csv", frames={"": 4})
    extract_dataset(config)
    last = open_store(config.out).read_manifest(["path", "status"]).to_pylist()[-1]
    assert last["status"] == "ok"
    before = open_store(config.out).read_clips([16], [[0, 1, 2, 3]]).patches
    (grown.root / last["path"]).unlink()
    make_video(grown.root / "val/run/zzz.mp4", seed=9)
    with (grown.root / "list.csv").open("a") as file:
        file.write("val/run/zzz.mp4 0\n")
    assert extract_dataset(replace(config, append=True)).videos == {"ok": 17, "failed": 1, "pending": 0}
    assert np.array_equal(open_store(config.out).read_clips([16], [[0, 1, 2, 3]]).patches, before)
    assert verify_store(open_store(config.out)) == []


def test_a_damaged_store_with_new_videos_is_not_repaired_to_another_one(grown, flip_byte, contents):
    flip_byte(grown.out / "videos.parquet", 300)
    before = contents(grown.out)
    with pytest.raises(
        StoreMismatchError, match="was begun otherwise .*layout.num_rows 11 there, 14 here.*Nothing was"
    ):
        extract_dataset(replace(grown, repair=True))
    with pytest.raises(ConfigError, match="--repair mends the rows that are there: run it first, without --append"):
        replace(grown, repair=True, append=True)
    assert contents(grown.out) == before


def test_what_does_not_fit_is_refused(grown, contents):
    before = contents(grown.out)
    with pytest.raises(StoreMismatchError, match="rows cannot be added to .*layout.layers .*Nothing was changed"):
        extract_dataset(replace(grown, append=True, layers="1,5"))
    (grown.root / "train/walk/broken.mp4").rename(grown.root / "train/run/broken.mp4")
    with pytest.raises(StoreMismatchError, match="are gone, or have another path"):
        extract_dataset(replace(grown, append=True))
    with pytest.raises(ConfigError, match="--append keeps what is there, --overwrite replaces it"):
        replace(grown, append=True, overwrite=True)
    assert contents(grown.out) == before


def test_a_damaged_manifest_of_an_appended_store_is_repaired_in_its_order(grown, flip_byte, contents):
    extract_dataset(replace(grown, append=True))
    before = contents(grown.out)
    flip_byte(grown.out / "videos.parquet", 300)
    assert verify_store(open_store(grown.out))
    extract_dataset(replace(grown, repair=True))
    assert contents(grown.out) == before
    assert json.loads((grown.out / "zarr.json").read_text())["attributes"]["s4v"]["layout"]["num_rows"] == 14
