"""Scratch folders and files: nothing of anyone else's is touched, and what dead processes left goes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from s4v import files as _files
from s4v import process_identity
from s4v.extract.extraction import extract_dataset
from s4v.retrieve.index_reader import open_index
from s4v.store.lease import Scope, hold_lease
from s4v.store.merge import merge_stores
from s4v.store.reader import open_store
from s4v.store.scratch import (
    TAG_NAME,
    is_scratch_name,
    make_scratch,
    remove_dead_files,
    remove_dead_scratch,
    take_over_scratch,
)
from s4v.store.verify import verify_store

DIE = """
import os, signal, sys
from pathlib import Path
from s4v import process_identity
from s4v.store.scratch import make_scratch
if len(sys.argv) > 2:
    process_identity.identify_machine = lambda: process_identity.Machine(sys.argv[2], sys.argv[2], "pid:[1]")
scratch = make_scratch(Path(sys.argv[1]), "k.zarr", "extract", lease=sys.argv[3] if len(sys.argv) > 3 else None)
(scratch.path / "k.zarr").mkdir()
(scratch.path / "k.zarr/zarr.json").write_text("{}")
os.kill(os.getpid(), signal.SIGKILL)
"""


def die(folder, *arguments, **environment):
    """Have a process killed that has a scratch folder."""
    command = [sys.executable, "-c", DIE, str(folder), *arguments]
    assert subprocess.run(command, env={**os.environ, **environment}).returncode == -signal.SIGKILL
    [path] = folder.glob(".k.zarr.*.partial")
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill(folder):
    """Somebody's store."""
    (folder / "patches").mkdir(parents=True)
    (folder / "zarr.json").write_text("precious")
    (folder / "patches/c.0").write_bytes(b"precious")
    return folder


def test_what_a_killed_process_left_goes(tmp_path):
    die(tmp_path)
    remove_dead_scratch(tmp_path, "other.zarr")
    assert len(names(tmp_path)) == 1, "another thing's"
    remove_dead_scratch(tmp_path, "k.zarr")
    assert names(tmp_path) == []


def test_what_a_process_killed_before_the_tag_left_goes_and_nothing_in_it(tmp_path):
    path = die(tmp_path, S4V_KILL_AT="scratch made 1")
    assert names(path) == []
    (path / "notes.txt").write_text("mine")
    remove_dead_scratch(tmp_path, "k.zarr")
    assert names(path) == ["notes.txt"]
    (path / "notes.txt").unlink()
    remove_dead_scratch(tmp_path, "k.zarr")
    assert names(tmp_path) == []


def test_scratch_in_use_stays_and_goes_with_its_user(tmp_path):
    with make_scratch(tmp_path, "k.zarr", "extract") as mine, make_scratch(tmp_path, "k.zarr", "extract") as other:
        assert mine != other
        remove_dead_scratch(tmp_path, "k.zarr")
        assert mine.is_dir() and other.is_dir()
        assert is_scratch_name(mine.name) and not is_scratch_name("k.zarr")
    assert names(tmp_path) == []


def take_tag(path):
    (path / TAG_NAME).unlink()


def garble_tag(path):
    (path / TAG_NAME).write_bytes(b"\xff")


def tag_of_another_tool(path):
    told = json.loads((path / TAG_NAME).read_text())
    (path / TAG_NAME).write_text(json.dumps({**told, "made_by": "rsync"}))


def rename(path):
    path.rename(path.with_name(".k.zarr.00000000-1-1-00000000.partial"))


def rename_to_keep(path):
    path.rename(path.with_name("k.zarr.partial"))


def link(path):
    path.rename(path.with_name("target"))
    path.symlink_to(path.with_name("target"))


def link_tag(path):
    (path / TAG_NAME).rename(path.with_name("tag"))
    (path / TAG_NAME).symlink_to(path.with_name("tag"))


@pytest.mark.parametrize("change", [take_tag, garble_tag, tag_of_another_tool, rename, rename_to_keep, link, link_tag])
def test_only_what_bears_its_own_tag_is_removed(change, tmp_path):  # C1
    change(die(tmp_path))
    remove_dead_scratch(tmp_path, "k.zarr")
    kept = list(tmp_path.rglob("zarr.json"))
    assert len(kept) >= 1 and kept[0].read_text() == "{}"


def test_what_another_machine_left_goes_after_a_day(tmp_path):
    path = die(tmp_path, "node7")
    remove_dead_scratch(tmp_path, "k.zarr")
    assert path.is_dir(), "that process may run"
    day_ago = (path / TAG_NAME).stat().st_mtime - 25 * 3600
    os.utime(path / TAG_NAME, (day_ago, day_ago))
    remove_dead_scratch(tmp_path, "k.zarr")
    assert names(tmp_path) == []


def test_what_another_machine_left_in_a_store_goes_with_its_lease(tmp_path):
    with hold_lease(tmp_path, Scope.all(), purpose="extract") as lease:
        die(tmp_path, "node7", lease.nonce)
        remove_dead_scratch(tmp_path, "k.zarr")
        assert len(names(tmp_path)) == 2
    remove_dead_scratch(tmp_path, "k.zarr")
    assert names(tmp_path) == []


def test_a_dead_scratch_is_taken_over(tmp_path):
    with hold_lease(tmp_path, Scope.all(), purpose="extract") as lease:
        assert take_over_scratch(tmp_path, "k.zarr", "extract", lease=lease.nonce) is None
        path = die(tmp_path)
        scratch = take_over_scratch(tmp_path, "k.zarr", "extract", lease=lease.nonce)
        assert scratch is not None and scratch.path == path and (path / "k.zarr/zarr.json").exists()
        assert take_over_scratch(tmp_path, "k.zarr", "extract", lease=lease.nonce) is None, "it has an owner again"
        scratch.leave()
        again = take_over_scratch(tmp_path, "k.zarr", "extract", lease=lease.nonce)
        assert again is not None and again.path == path
        again.remove()
    assert names(tmp_path) == []


def test_temporary_files_of_dead_processes_go_and_others_stay(tmp_path, monkeypatch):
    script = "import sys; from pathlib import Path; from s4v.files import write_text\n"
    script += "write_text(Path(sys.argv[1]) / 'a.json', 'x')"
    environment = {**os.environ, "S4V_KILL_AT": "before rename of a.json 1"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    mine = tmp_path / f".b.json.{process_identity.make_token()}.partial"
    mine.write_text("in use")
    (tmp_path / ".a.json.partial").write_text("without a token")
    with monkeypatch.context() as patch:
        patch.setattr(process_identity, "identify_machine", lambda: process_identity.Machine("node7", "x", "pid:[1]"))
        elsewhere = tmp_path / f".c.json.{process_identity.make_token()}.partial"
        elsewhere.write_text("of another machine")
    assert len(names(tmp_path)) == 4
    remove_dead_files(tmp_path)
    assert names(tmp_path) == sorted([".a.json.partial", mine.name, elsewhere.name])


def test_two_writers_of_one_file_never_share_a_temporary_one(tmp_path):  # C4
    def write_both(temporary):
        temporary.write_text("first")
        _files.write_text(tmp_path / "a.json", "second")  # another process, in the middle
        assert temporary.read_text() == "first"

    _files.write_atomic(tmp_path / "a.json", write_both)
    assert (tmp_path / "a.json").read_text() == "first" and names(tmp_path) == ["a.json"]


def test_names_as_long_as_names_may_be_are_written(tmp_path):
    path = tmp_path / ("ä" * 122 + ".json")
    _files.write_text(path, "x")
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize("name", ["k.zarr.old", "k.zarr.partial", ".k.zarr.partial"])
@pytest.mark.parametrize("is_there", [pytest.param(False, marks=pytest.mark.slow), True])
def test_extracting_leaves_neighbours_alone(is_there, name, video_folder, make_config, tmp_path):  # C1
    """A store that was moved to `k.zarr.old` is not the one that `--out k.zarr` replaces."""
    config = make_config(video_folder, tmp_path / "k.zarr", limit=1, splits=("val",))
    if is_there:
        extract_dataset(config)
    kept = fill(tmp_path / name)
    extract_dataset(replace(config, overwrite=is_there))
    assert (kept / "patches/c.0").read_bytes() == b"precious" and (kept / "zarr.json").read_text() == "precious"
    assert names(tmp_path) == sorted(["k.zarr", name])


@pytest.mark.parametrize("name", ["out.zarr.partial", "out.zarr.old"])
def test_merging_leaves_neighbours_alone(name, float_store, tmp_path):  # C1
    kept = fill(tmp_path / name)
    merge_stores([float_store], tmp_path / "out.zarr")
    assert (kept / "patches/c.0").read_bytes() == b"precious"
    assert names(tmp_path) == ["out.zarr", name]


@pytest.mark.parametrize("name", ["s.index.partial", "s.index.old"])
def test_indexing_leaves_neighbours_alone(name, float_store, tmp_path):  # C1
    store = shutil.copytree(float_store, tmp_path / "s.zarr")
    kept = fill(tmp_path / name)
    open_index(open_store(store))
    np.testing.assert_equal((kept / "patches/c.0").read_bytes(), b"precious")
    assert names(tmp_path) == sorted(["s.index", "s.zarr", name])


def test_repairing_leaves_neighbours_alone(float_store, video_folder, make_config, flip_byte, tmp_path):  # C1
    store = shutil.copytree(float_store, tmp_path / "k.zarr")
    kept = fill(tmp_path / "k.zarr.partial")
    flip_byte(store / "videos.parquet", 300)
    extract_dataset(make_config(video_folder, store, repair=True))
    assert (kept / "patches/c.0").read_bytes() == b"precious" and names(tmp_path) == ["k.zarr", "k.zarr.partial"]


def test_what_the_version_before_left_in_a_store_goes(float_store, video_folder, make_config, tmp_path, contents):
    store = shutil.copytree(float_store, tmp_path / "k.zarr")
    for name in ("_append.partial", "text.partial.old"):
        fill(store / name)
    (store / ".videos.parquet.partial").write_bytes(b"half")
    extract_dataset(make_config(video_folder, store))
    assert contents(store) == contents(float_store)


def test_an_unfinished_scratch_in_a_store_is_not_of_the_store(
    float_store, video_folder, make_config, tmp_path, contents
):
    store = shutil.copytree(float_store, tmp_path / "k.zarr")
    fill(die(store) / "s.zarr")
    (store / "_leases").mkdir()
    (store / "_leases" / f"{'0' * 32}.json").write_text("{}")
    assert verify_store(open_store(store)) == []
    merge_stores([store], tmp_path / "merged.zarr")
    assert [name for name in names(tmp_path / "merged.zarr") if is_scratch_name(name)] == []
    merged = contents(tmp_path / "merged.zarr", "zarr.json")
    assert merged.keys() == contents(float_store, "zarr.json").keys()
