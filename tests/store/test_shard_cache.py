"""Copies of shards on a fast disk: what is read through them is what the store holds, whatever happens to them."""

import errno
import multiprocessing
import os
import random
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from s4v.errors import ConfigError, EnvironmentFailedError, StoreDamagedError
from s4v.files import describe_bytes
from s4v.store import _chunk_reads, _shard_file, reader, shard_cache
from s4v.store.fingerprint import fingerprint_shard
from s4v.store.markers import make_marker
from s4v.store.reader import StoreReader, open_store
from s4v.store.shard_cache import TAG_NAME, ShardCache, clear_cache, describe_cache, render_cache

ARRAYS = ("patches", "cls", "pixels")
ENOUGH = 10**9


@pytest.fixture(scope="module")
def written(int8_store):
    """A store, which tests copy before they change it, and its clips."""
    return int8_store, read_all(open_store(int8_store))


def good_rows(store):
    table = store.read_manifest(["status", "num_cached_frames"]).to_pylist()
    return {row: one["num_cached_frames"] for row, one in enumerate(table) if one["status"] == "ok"}


def read_all(store):
    """Each good row's frames."""
    found = {}
    for row, frames in good_rows(store).items():
        clips = store.read_clips([row], [range(frames)])
        found |= {(row, name): getattr(clips, name) for name in ARRAYS}
    return found


def shard_files(path):
    """Of the arrays that clips are read of, those that have a good row."""
    shards = {row // open_store(path).layout.rows_per_shard for row in good_rows(open_store(path))}
    return [file for name in ARRAYS for shard in sorted(shards) for file in (path / name).glob(f"c.{shard}.*")]


def assert_same(found, expected):
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def open_through(path, cache, most_bytes=ENOUGH, *, waits=True):
    store = open_store(path)
    store.read_through(ShardCache(cache, most_bytes), waits=waits)
    return store


def copies(cache):
    return sorted(path for path in cache.glob("*/*.c.*") if not path.name.startswith("."))


@pytest.fixture
def store_path(written, tmp_path):
    return shutil.copytree(written[0], tmp_path / "copied.zarr")


def test_what_was_read_once_is_read_of_the_cache(written, store_path, tmp_path):
    cache = tmp_path / "cache"
    assert_same(read_all(open_through(store_path, cache)), written[1])
    assert len(copies(cache)) == len(shard_files(store_path))
    for file in shard_files(store_path):  # a disk that has gone
        file.unlink()
    assert_same(read_all(open_through(store_path, cache)), written[1])
    with pytest.raises(StoreDamagedError, match="is missing"):
        read_all(open_store(store_path))


def test_without_waiting_the_store_is_read_until_a_copy_is_there(written, store_path, tmp_path):
    cache = tmp_path / "cache"
    store = open_through(store_path, cache, waits=False)
    assert_same(read_all(store), written[1])
    assert not copies(cache)
    rows, places = np.array([3]), np.arange(4)[None]
    files = store.list_files(rows, np.array([0]), places, ARRAYS)
    assert [name for name, *_ in files] == list(ARRAYS)
    assert all(store.bring(*file) == (store_path / file[0] / file[2]).stat().st_size for file in files)
    assert len(copies(cache)) == 3
    for name, _, file in files:
        (store_path / name / file).unlink()
    again = open_through(store_path, cache, waits=False)
    assert np.array_equal(again.read_clips(rows, places).patches, written[1][3, "patches"][:, :4])


def test_a_cache_is_never_larger_than_it_may_be_and_keeps_what_was_used_last(written, store_path, tmp_path):
    cache, most = tmp_path / "cache", sum(file.stat().st_size for file in shard_files(store_path)) // 3
    store = open_through(store_path, cache, most)
    for row in [*good_rows(store)] * 2:
        store = open_through(store_path, cache, most)
        assert np.array_equal(store.read_clips([row], [range(4)]).pixels, written[1][row, "pixels"][:, :4])
        assert sum(path.stat().st_size for path in cache.glob("*/*c.*")) <= most
        assert any(path.name.startswith(f"pixels.c.{row}.") for path in copies(cache)), "the last one"
        time.sleep(0.002)
    assert_same(read_all(open_through(store_path, cache, 1)), written[1])
    assert_same(read_all(open_through(store_path, cache, most)), written[1])


def test_processes_that_share_a_cache_keep_to_its_size_together(written, tmp_path):
    cache, most = tmp_path / "cache", sum(file.stat().st_size for file in shard_files(written[0])) // 3
    stores = [open_through(written[0], cache, most) for _ in range(3)]
    rows = [*good_rows(stores[0])]
    for place in range(len(rows)):
        for behind, store in enumerate(stores):
            row = rows[place - 3 * behind]
            assert np.array_equal(store.read_clips([row], [range(4)]).cls, written[1][row, "cls"][:, :4])
            assert sum(path.stat().st_size for path in cache.glob("*/*c.*")) <= most


def test_what_is_evicted_frees_its_bytes_and_is_read_of_the_store(written, tmp_path, caplog):
    cache = tmp_path / "cache"
    store = open_through(written[0], cache)
    assert_same(read_all(store), written[1])
    opened = [shard for name in ARRAYS for shard in store._sharded(name)._shards.values()]
    assert len(opened) == len(copies(cache))
    assert clear_cache(cache) > 0
    assert all(os.fstat(shard.descriptor).st_size == 0 for shard in opened), "though they are open"
    assert_same(read_all(store), written[1])
    assert "damaged" not in caplog.text


def test_copies_that_are_evicted_while_they_are_read_are_passed_by(written, tmp_path, monkeypatch):
    store, read = open_through(written[0], tmp_path / "cache"), _chunk_reads._try_to_read
    evicted = []

    def evict_and_read(*arguments):
        evicted.append(clear_cache(tmp_path / "cache"))
        return read(*arguments)

    monkeypatch.setattr(_chunk_reads, "_try_to_read", evict_and_read)
    assert_same(read_all(store), written[1])
    assert sum(map(bool, evicted)) >= 2


def test_a_copy_that_stays_open_is_noted_as_used(written, tmp_path, monkeypatch):
    store = open_through(written[0], tmp_path / "cache")
    row = next(iter(good_rows(store)))
    store.read_clips([row], [range(4)])
    for path in copies(tmp_path / "cache"):
        os.utime(path, (0, 0))
    store.read_clips([row], [range(4)])
    assert {path.stat().st_mtime for path in copies(tmp_path / "cache")} == {0}, "not with every read"
    monkeypatch.setattr(_shard_file, "_NOTE_EVERY_S", -1.0)
    store.read_clips([row], [range(4)])
    assert all(path.stat().st_mtime > 0 for path in copies(tmp_path / "cache"))


def test_a_source_that_becomes_shorter_gets_no_copy(written, tmp_path, monkeypatch):
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, size, place: pread(handle, size, place)[: max(0, 1000 - place)])
    monkeypatch.setattr(shard_cache, "_require_fingerprint", lambda *_: None)
    cache = ShardCache(tmp_path / "cache", ENOUGH)
    source, spec = shard_files(written[0])[0], open_store(written[0])._spec("patches")
    copy = cache.place_of(written[0]) / f"patches.{source.name}.{'0' * 32}"
    assert cache.make(copy, source, spec) is None and not copy.exists()


def test_a_file_that_is_larger_than_the_cache_is_read_of_the_store(written, store_path, tmp_path):
    assert_same(read_all(open_through(store_path, tmp_path / "cache", 100)), written[1])
    assert not copies(tmp_path / "cache")


def make_anew(path, shard, like):
    """Another shard's bytes in the place of a shard, with a marker that says so, as --redo-changed leaves them."""
    store = open_store(path)
    files = {}
    for spec in store.layout.array_specs():
        name = f"{spec.name}/{spec.shard_keys(shard)[0]}"
        (path / name).unlink()
        shutil.copyfile(path / f"{spec.name}/{spec.shard_keys(like)[0]}", path / name)
        files[name] = fingerprint_shard(path / name, spec)
    marker = store.read_marker(shard)
    made = make_marker(path, shard, marker.as_results(), store.facts.codecs_sha256, files, store.facts.format_version)
    made.replace(path / "_parts" / made.name)


def test_a_shard_that_was_made_anew_is_never_served_stale(written, store_path, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_MARKER_LIFE_S", -1.0)
    cache = tmp_path / "cache"
    before = open_through(store_path, cache)
    assert_same(read_all(before), written[1])
    make_anew(store_path, 0, like=1)
    again = open_through(store_path, cache)
    for name in ARRAYS:
        assert np.array_equal(getattr(again.read_clips([0], [range(4)]), name), written[1][1, name][:, :4])
    before._sharded("patches")._shards.clear()  # as when other shards were read meanwhile
    assert np.array_equal(before.read_clips([0], [range(4)]).patches, written[1][1, "patches"][:, :4])


def flip(path, place, bit):
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.unlink()  # open files keep what they have
    path.write_bytes(data)


def test_a_damaged_copy_is_told_of_and_removed(written, tmp_path, caplog):
    cache = tmp_path / "cache"
    read_all(open_through(written[0], cache))
    path = next(path for path in copies(cache) if path.name.startswith("pixels.c.1.0.0"))
    flip(path, 40, 3)
    store = open_through(written[0], cache)
    assert_same(read_all(store), written[1])
    assert f"a copy in {cache} is damaged (chunk 0 of {path.name} does not match its checksum)" in caplog.text
    assert not path.exists()
    assert_same(read_all(store), written[1])
    assert not path.exists(), "this process reads the store's own"
    assert_same(read_all(open_through(written[0], cache)), written[1])
    assert path.exists(), "the next one keeps it again"


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_flipped_bits_of_copies_are_never_read(written, tmp_path, count):
    cache, draw = tmp_path / "cache", random.Random(count)
    read_all(open_through(written[0], cache))
    for _ in range(count):
        path = draw.choice(copies(cache))
        flip(path, draw.randrange(path.stat().st_size), draw.randrange(8))
        assert_same(read_all(open_through(written[0], cache)), written[1])


def test_a_damaged_store_is_no_better_through_a_cache(store_path, tmp_path):
    file = store_path / "pixels/c.1.0.0.0.0.0.0"
    flip(file, 40, 3)
    store = open_through(store_path, tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(
            StoreDamagedError, match=r"pixels, shard 1: chunk 0 of c\.1\.0\.0\.0\.0\.0\.0 does not match"
        ):
            store.read_clips([1], [range(3)])


def test_a_source_that_is_not_what_its_marker_says_gets_no_copy(written, store_path, tmp_path):
    one, other = (next((store_path / "cls").glob(f"c.{shard}.*")) for shard in (0, 2))
    shutil.copyfile(other, one)
    cache = tmp_path / "cache"
    store = open_through(store_path, cache)
    found, direct = (one.read_clips([0], [range(4)]).cls for one in (store, open_store(store_path)))
    assert np.array_equal(found, direct)
    assert not [path for path in copies(cache) if path.name.startswith("cls.c.0")]


def test_a_full_disk_is_asked_for_no_more_and_nothing_fails(written, tmp_path, caplog, monkeypatch):
    cache, pwrite, usage = tmp_path / "cache", os.pwrite, shutil.disk_usage(tmp_path)
    room = 2 * max(file.stat().st_size for file in shard_files(written[0]))

    def count():
        return sum(path.stat().st_blocks * 512 for path in cache.glob("*/*c.*"))

    def write(handle, data, place):
        if count() + len(data) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(handle, data, place)

    monkeypatch.setattr(os, "pwrite", write)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=room - count()))
    for _ in range(2):
        assert_same(read_all(open_through(written[0], cache)), written[1])
    assert f"{cache} keeps no more than {describe_bytes(int(0.95 * room))}: No space left on device" in caplog.text
    assert 0 < count() <= room and not list(cache.glob("*/.*.partial"))


def test_markers_from_before_there_were_fingerprints_are_read_without_copies(written, tmp_path, monkeypatch):
    read_marker = StoreReader.read_marker
    monkeypatch.setattr(StoreReader, "read_marker", lambda *of: replace(read_marker(*of), files=None))
    assert_same(read_all(open_through(written[0], tmp_path / "cache")), written[1])
    assert not copies(tmp_path / "cache")


def test_threads_and_processes_make_each_copy_once(written, tmp_path, monkeypatch):
    made, fill = [], ShardCache._fill

    def count(cache, *arguments):
        made.append(None)
        time.sleep(0.002)
        return fill(cache, *arguments)

    monkeypatch.setattr(ShardCache, "_fill", count)
    stores = [open_through(written[0], tmp_path / "cache") for _ in range(4)]
    threads = [threading.Thread(target=read_all, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == len(copies(tmp_path / "cache"))


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_fillers_leave_nothing_wrong(written, tmp_path, monkeypatch, count):
    monkeypatch.setattr(shard_cache, "_RUN_BYTES", 2000)  # so that a copy takes long enough to be killed in
    cache, draw, at_work = tmp_path / "cache", random.Random(count), multiprocessing.get_context("fork")
    most = sum(file.stat().st_size for file in shard_files(written[0])) // 2
    left = 0
    for _ in range(count):
        child = at_work.Process(target=fill_for_ever, args=(written[0], cache, most))
        child.start()
        time.sleep(draw.uniform(0.02, 0.08))
        child.kill()
        child.join()
        left += len(list(cache.glob("*/.*.partial")))
        assert_same(read_all(open_through(written[0], cache, most)), written[1])
    assert left, "some were killed in the middle of a copy"
    assert sum(path.stat().st_size for path in cache.glob("*/*c.*")) <= most


def fill_for_ever(path, cache, most):
    _chunk_reads._threads.cache_clear()  # those of the process that was forked are not here
    while True:
        read_all(open_through(path, cache, most))


def test_what_is_no_cache_is_left_alone(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/a.mp4").write_bytes(b"a")
    (tmp_path / "file").write_bytes(b"a")
    for make in (lambda path: ShardCache(path, ENOUGH), describe_cache, clear_cache):
        with pytest.raises(
            ConfigError, match=f"videos is no cache of s4v: it holds no {TAG_NAME}.*Nothing was changed"
        ):
            make(tmp_path / "videos")
    with pytest.raises(ConfigError, match="no cache of s4v: there is nothing"):
        describe_cache(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="--cache takes a folder"):
        ShardCache(tmp_path / "file", ENOUGH)
    with pytest.raises(EnvironmentFailedError, match="cannot be made"):
        ShardCache(tmp_path / "file/below", ENOUGH)
    assert (tmp_path / "videos/a.mp4").read_bytes() == b"a"


def test_a_cache_is_described_and_cleared(written, store_path, tmp_path):
    cache = tmp_path / "cache"
    for path in (written[0], store_path):
        read_all(open_through(path, cache))
    (cache / "notes.txt").write_text("mine")
    facts = describe_cache(cache)
    held = sum(path.stat().st_size for path in copies(cache))
    assert facts["bytes"] == held and {one["store"] for one in facts["stores"]} == {str(written[0]), str(store_path)}
    assert all(one["bytes"] == held // 2 and one["files"] == len(copies(cache)) // 2 for one in facts["stores"])
    lines = render_cache(facts)
    assert len(lines) == 3 and f"{store_path}: " in "".join(lines)
    assert clear_cache(cache) == held
    assert describe_cache(cache)["stores"] == [] and (cache / "notes.txt").read_text() == "mine"
    assert Path(cache / TAG_NAME).is_file()


def test_half_of_what_is_free_is_taken_where_nobody_says(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    assert ShardCache(tmp_path / "cache").most_bytes == pytest.approx(free / 2, rel=0.05)


def test_starting_again_takes_no_more(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=600))
    monkeypatch.setattr(ShardCache, "_count_bytes", lambda _: 400)
    assert ShardCache(tmp_path / "cache").most_bytes == 500


def test_a_disk_without_locks_is_refused_and_leaks_nothing(tmp_path, monkeypatch):
    open_files = Path("/proc/self/fd")
    before = len(list(open_files.iterdir())) if open_files.is_dir() else 0

    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(shard_cache.fcntl, "flock", flock)
    for _ in range(20):
        with pytest.raises(EnvironmentFailedError, match=r"cannot be used: Function not implemented\. .*flock"):
            ShardCache(tmp_path / "cache", ENOUGH)
    if before:
        assert len(list(open_files.iterdir())) <= before + 2


def test_a_damaged_copy_on_a_disk_that_became_read_only_is_passed_by(written, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    read_all(open_through(written[0], cache))
    flip(next(path for path in copies(cache) if path.name.startswith("cls")), 40, 1)

    def unlink(path, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    store = open_through(written[0], cache)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        assert_same(read_all(store), written[1])


def test_a_marker_that_cannot_be_read_for_a_moment_costs_no_training(written, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    store = open_through(written[0], tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(reader, "read_marker_state", refuse)
        assert_same(read_all(store), written[1])
    assert not copies(tmp_path / "cache")
    monkeypatch.setattr(reader, "_MARKER_LIFE_S", -1.0)
    again = open_through(written[0], tmp_path / "cache")
    assert_same(read_all(again), written[1])
    assert copies(tmp_path / "cache")


def test_a_copy_that_cannot_be_made_is_tried_no_more_than_twice(store_path, tmp_path, caplog, monkeypatch):
    one, other = (next((store_path / "cls").glob(f"c.{shard}.*")) for shard in (0, 2))
    shutil.copyfile(other, one)
    made, fill = [], ShardCache._fill
    monkeypatch.setattr(ShardCache, "_fill", lambda *of: made.append(None) or fill(*of))
    store = open_through(store_path, tmp_path / "cache")
    for _ in range(4):
        store.read_clips([0], [range(4)], arrays=["cls"])
        store._sharded("cls")._shards.clear()
    assert len(made) == 1
    assert caplog.text.count("it is not what its done-marker says") == 1


def test_who_stops_waits_for_no_copy(written, tmp_path, monkeypatch):
    store, cache = open_through(written[0], tmp_path / "cache"), tmp_path / "cache"
    monkeypatch.setattr(shard_cache, "_RUN_BYTES", 100)
    pread = os.pread

    def read_and_stop(*arguments):
        store._copies.stop()
        return pread(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", read_and_stop)
        with store.copying():
            assert_same(read_all(store), written[1])
    assert not copies(cache)
    store._sharded_arrays.clear()
    with store.copying():
        assert_same(read_all(store), written[1])
    assert len(copies(cache)) == len(shard_files(written[0]))


def test_processes_may_make_the_cache_at_once(tmp_path, monkeypatch):
    is_file = Path.is_file

    def see_nothing(path):  # the tag comes between two looks
        found = is_file(path)
        if path.name == TAG_NAME and not found:
            path.write_text('{"made_by": "s4v"}')
        return found

    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(Path, "is_file", see_nothing)
    ShardCache(tmp_path / "cache", ENOUGH)


def test_a_small_cache_empties_no_other_for_what_never_fits(written, tmp_path):
    cache = tmp_path / "cache"
    read_all(open_through(written[0], cache))
    held = len(copies(cache))
    for path in copies(cache)[:1]:
        path.unlink()
    assert_same(read_all(open_through(written[0], cache, 100)), written[1])
    assert len(copies(cache)) == held - 1


def test_a_cache_whose_folder_was_removed_is_made_again(written, tmp_path):
    store, cache = open_through(written[0], tmp_path / "cache"), tmp_path / "cache"
    shutil.rmtree(cache)
    assert_same(read_all(store), written[1])


def test_copies_that_came_later_are_read_in_place_of_files_that_are_open(written, tmp_path):
    store, cache = open_through(written[0], tmp_path / "cache", waits=False), tmp_path / "cache"
    assert_same(read_all(store), written[1])
    row = next(iter(good_rows(store)))
    for file in store.list_files(np.array([row]), np.array([0]), np.arange(4)[None], ARRAYS):
        assert store.bring(*file)
    assert_same(read_all(store), written[1])
    opened = [shard.path for name in ARRAYS for shard in store._sharded(name)._shards.values()]
    assert sum(path.parent.parent == cache for path in opened) == 3
