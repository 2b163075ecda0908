"""What a writer does when the file system refuses, and with what killed writers left behind."""

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from s4v import files as _files
from s4v.errors import EnvironmentFailedError
from s4v.extract.extraction import extract_dataset
from s4v.store.reader import open_store
from s4v.store.verify import verify_store


@pytest.fixture
def refuse(monkeypatch):
    """Have the file system refuse to rename a file of that name into place."""

    def of(name, code):
        replace_file = Path.replace

        def refuse_it(path, target):
            if Path(target).name == name:
                raise OSError(code, os.strerror(code), str(target))
            return replace_file(path, target)

        monkeypatch.setattr(Path, "replace", refuse_it)

    return of


@pytest.mark.parametrize(
    ("code", "said"), [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "the disk quota is used up")]
)
def test_a_done_marker_that_has_no_room_names_shard_and_space(code, said, video_folder, make_config, tmp_path, refuse):
    refuse("000002.arrows", code)
    config = make_config(video_folder, tmp_path / "full.zarr")
    with pytest.raises(
        EnvironmentFailedError, match=rf"shard 2 could not be written: {said}; it needs \d+\.\d MB.*the same command"
    ):
        extract_dataset(config)
    assert [path.name for path in sorted((config.out / "_parts").iterdir())] == ["000000.arrows", "000001.arrows"]


@pytest.mark.parametrize("name", ["checksums.json", "videos.parquet"])
def test_a_skeleton_or_manifest_that_has_no_room_is_told_in_one_line(
    name, float_store, video_folder, make_config, tmp_path, refuse
):
    unfinished = make_config(video_folder, tmp_path / "unfinished.zarr", limit=10)
    extract_dataset(unfinished)
    refuse(name, errno.ENOSPC)
    for config in (make_config(video_folder, tmp_path / "new.zarr"), replace(unfinished, limit=None)):
        with pytest.raises(EnvironmentFailedError, match=r"could not be written: no space left\. Finished shards"):
            extract_dataset(config)
    assert not (tmp_path / "new.zarr").exists()


@pytest.mark.parametrize(
    "point",
    ["swap begun", "swap moved", *(pytest.param(f"swap {at}", marks=pytest.mark.slow) for at in ("prepared", "done"))],
)
def test_a_shard_is_replaced_from_any_point_on(
    point, float_store, video_folder, make_video, make_config, tmp_path, monkeypatch
):
    """Killed in between, the store has the old shard or is completed by the next writer; nothing of it is damage."""
    root, out = (shutil.copytree(path, tmp_path / path.name) for path in (video_folder, float_store))
    make_video(root / "train/walk/broken.mp4", seed=99)
    config = make_config(root, out, retry_failed=True)

    class Killed(BaseException):
        pass

    def kill(passed):
        if passed == point:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("s4v.store.swap.kill_point", kill)
        with pytest.raises(Killed):
            extract_dataset(config)
    assert verify_store(open_store(out)) == []
    assert extract_dataset(config).videos == {"ok": 11, "failed": 0, "pending": 0}
    assert verify_store(open_store(out)) == []
    assert not [path.name for path in out.iterdir() if path.name.startswith("_scratch")]
    assert not list((out / "_swaps").iterdir())


def test_a_marker_that_got_lost_is_made_anew_without_damage(float_store, video_folder, make_config, tmp_path):
    out = shutil.copytree(float_store, tmp_path / "lost.zarr")
    (out / "_parts/000003.arrows").unlink()
    assert {one.where for one in verify_store(open_store(out))} == {"_parts/000003.arrows"}
    before = (out / "patches/c.3.0.0.0.0.0").read_bytes()
    extract_dataset(make_config(video_folder, out))
    assert verify_store(open_store(out)) == []
    assert (out / "patches/c.3.0.0.0.0.0").read_bytes() == before


def test_what_killed_writers_were_filling_is_removed(float_store, video_folder, make_config, tmp_path, contents):
    out = shutil.copytree(float_store, tmp_path / "leftovers.zarr")
    for name in ("patches/c.0.0.0.0.0.0_0a1b.__lock", "cls/c.12.0.0.0.0_99.__lock"):
        (out / name).write_bytes(b"half a shard")
    extract_dataset(make_config(video_folder, out))
    assert contents(out, "zarr.json") == contents(float_store, "zarr.json")


def test_writing_a_shard_lists_no_folder(video_folder, make_config, tmp_path, monkeypatch):
    """Listing one for each shard would take a time that grows with the square of their number."""
    listed = []
    iterate = Path.iterdir
    monkeypatch.setattr(Path, "glob", lambda path, pattern: pytest.fail(f"{path} is searched for {pattern}"))
    monkeypatch.setattr(Path, "iterdir", lambda path: listed.append(path.name) or iterate(path))
    counts = []
    for limit in (1, 10):
        listed.clear()
        extract_dataset(make_config(video_folder, tmp_path / f"{limit}.zarr", limit=limit))
        counts.append(listed.count("patches"))
    assert counts[0] == counts[1]


def test_kill_points_name_the_file_that_is_renamed(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(_files, "kill_point", told.append)
    _files.write_text(tmp_path / "a.json", "x")
    assert told == ["before rename of a.json", "after rename of a.json"]
