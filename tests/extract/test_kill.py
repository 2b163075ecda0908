"""SIGKILL at every step of an extraction that could leave something half done, and at random moments."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from s4v.store.reader import open_store
from s4v.store.verify import verify_store

pytestmark = pytest.mark.slow

# A name and the how-manieth passing. Files that are renamed into place are named: videos.parquet first in the
# skeleton, then at the end; checksums.json after the last shard first without the manifest, then with it.
POINTS = (
    "before rename of videos.parquet 1",
    "before rename of checksums.json 1",
    "after rename of checksums.json 1",
    "shard durable 3",
    "shard being written 2",
    "shard written 4",
    "shard durable 1",
    "shard durable 11",
    "before rename of 000000.arrows 1",
    "after rename of 000004.arrows 1",
    "before rename of 000010.arrows 1",
    "shard done 5",
    "shard done 11",
    "before consolidation 1",
    "before rename of checksums.json 2",
    "before rename of videos.parquet 2",
    "after rename of videos.parquet 2",
    "manifest written 1",
    "before rename of checksums.json 3",
    "after consolidation 1",
)
RETRY_POINTS = (
    "before rename of checksums.json 1",
    "shard written 1",
    "swap prepared 1",
    "swap begun 1",
    "shard being written 1",
    "swap done 1",
    "before rename of 000009.arrows 1",
    "shard done 1",
    "before rename of videos.parquet 1",
)
REPAIR_POINTS = (
    "before rename of checksums.json 2",  # the first is that of the skeleton that is made to compare with
    "after rename of checksums.json 2",
    "file repaired 1",
    "swap begun 1",
    "before rename of 000007.arrows 1",
    "before rename of videos.parquet 2",
)
MERGE_POINTS = (
    "before rename of checksums.json 1",
    "before rename of c.3.0.0.0.0.0 1",
    "before rename of 000005.arrows 1",
    "after rename of 000005.arrows 1",
    "shard merged 11",
    "before rename of videos.parquet 2",
)
APPEND_POINTS = (
    "append prepared 1",
    "append moved 1",
    "append moved 4",
    "append moved 7",
    "append in place 1",
    "append away 1",
)


def start(*command, kill_at=None):
    environment = {**os.environ, **({"S4V_KILL_AT": kill_at} if kill_at else {})}
    command = [sys.executable, "-m", "s4v", *map(str, command)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def extract(root, out, *options, dtype="float32", kill_at=None):
    command = ["extract", "--model", "tiny-clip", "--weights", "random", "--dataset", "folder", "--root", root]
    command += ["--out", out, "--frames", "train=6,4", "--dtype", dtype, "--device", "cpu", "--decoders", "2"]
    return start(*command, *options, kill_at=kill_at)


def finish(process, code=0):
    _, err = process.communicate(timeout=180)
    assert process.returncode == code, err


def kill(process):
    process.kill()
    process.communicate()


def markers(store):
    return list((store / "_parts").glob("[0-9]*.arrows"))


def wait_for_marker(process, store, count=1):
    deadline = time.monotonic() + 120
    while len(markers(store)) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("point", POINTS)
def test_a_run_killed_at_a_point_is_completed_by_the_same_command(point, video_folder, float_store, contents, tmp_path):
    out = tmp_path / "killed.zarr"
    finish(extract(video_folder, out, kill_at=point), -signal.SIGKILL)
    finish(extract(video_folder, out))
    assert contents(out, "zarr.json") == contents(float_store, "zarr.json")
    assert verify_store(open_store(out)) == []


def test_runs_killed_at_random_moments_are_completed_by_the_same_command(video_folder, float_store, contents, tmp_path):
    """Between the first done-marker and the end: a start takes longer than all the rest."""
    process = extract(video_folder, tmp_path / "whole.zarr")
    wait_for_marker(process, tmp_path / "whole.zarr")
    first = time.monotonic()
    finish(process)
    seconds = time.monotonic() - first
    moments, unfinished = random.Random(5), 0
    for number in range(10):
        out = tmp_path / f"{number}.zarr"
        process = extract(video_folder, out)
        wait_for_marker(process, out)
        time.sleep(moments.uniform(0, seconds))
        kill(process)
        unfinished += len(markers(out)) < 11
        finish(extract(video_folder, out))
        assert contents(out, "zarr.json") == contents(float_store, "zarr.json")
        assert verify_store(open_store(out)) == []
    assert unfinished, "some were in the middle"


@pytest.mark.parametrize("moment", [0.3, 0.6, 0.9])
def test_a_run_killed_while_it_calibrates_fits_the_same_codec(moment, video_folder, int8_store, contents, tmp_path):
    whole, out = tmp_path / "whole.zarr", tmp_path / "killed.zarr"
    begin = time.monotonic()
    process = extract(video_folder, whole, dtype="int8")
    while not (whole / "zarr.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    seconds = time.monotonic() - begin
    finish(process)
    process = extract(video_folder, out, dtype="int8")
    time.sleep(moment * seconds)
    kill(process)
    finish(extract(video_folder, out, dtype="int8"))
    assert contents(out, "zarr.json") == contents(int8_store, "zarr.json")
    assert verify_store(open_store(out)) == []


@pytest.mark.parametrize("point", ["before rename of fidelity.json 1", "after rename of fidelity.json 1"])
def test_a_run_killed_while_it_measures_its_codec_is_completed(point, video_folder, int8_store, contents, tmp_path):
    out = tmp_path / "killed.zarr"
    finish(extract(video_folder, out, dtype="int8", kill_at=point), -signal.SIGKILL)
    finish(extract(video_folder, out, dtype="int8"))
    assert contents(out, "zarr.json") == contents(int8_store, "zarr.json")


@pytest.mark.parametrize("count", [1, 4])
def test_workers_whose_command_is_killed_leave_a_store_that_it_completes(
    count, video_folder, float_store, contents, tmp_path
):
    out = tmp_path / "killed.zarr"
    process = extract(video_folder, out, "--workers", "2")
    wait_for_marker(process, out, count)
    kill(process)
    finish(extract(video_folder, out, "--workers", "2"))  # workers of the first may still be at it
    assert contents(out, "zarr.json") == contents(float_store, "zarr.json")
    assert verify_store(open_store(out)) == []


@pytest.fixture
def mended(video_folder, float_store, make_video, tmp_path):
    """Videos of which the broken one decodes by now, the store from before, and where it stands."""
    root = shutil.copytree(video_folder, tmp_path / "videos")
    make_video(root / "train/walk/broken.mp4", seed=99)
    return root, shutil.copytree(float_store, tmp_path / "retried.zarr")


@pytest.mark.parametrize("point", RETRY_POINTS)
def test_a_retry_killed_at_a_point_is_completed_by_the_same_command(point, mended, contents, tmp_path):
    root, out = mended
    marker = open_store(out).read_manifest(["status"])["status"].to_pylist().index("failed")
    point = point.replace("000009", f"{marker:06d}")
    finish(extract(root, out, "--retry-failed", kill_at=point), -signal.SIGKILL)
    damage = verify_store(open_store(out))
    assert [one for one in damage if one.where != "videos.parquet"] == [], "what is undone is nobody's damage"
    finish(extract(root, out, "--retry-failed"))
    assert verify_store(open_store(out)) == []
    finish(extract(root, tmp_path / "fresh.zarr"))
    assert contents(out, "zarr.json") == contents(tmp_path / "fresh.zarr", "zarr.json")


@pytest.mark.parametrize("point", REPAIR_POINTS)
def test_a_repair_killed_at_a_point_is_completed_by_the_same_command(
    point, video_folder, float_store, contents, flip_byte, tmp_path
):
    out = shutil.copytree(float_store, tmp_path / "damaged.zarr")
    for name in ("patches/c.1.0.0.0.0.0", "pixels/c.7.0.0.0.0.0.0", "_parts/000004.arrows", "videos.parquet"):
        flip_byte(out / name)
    finish(extract(video_folder, out, "--repair", kill_at=point), -signal.SIGKILL)
    finish(extract(video_folder, out, "--repair"))
    assert verify_store(open_store(out)) == []
    assert contents(out, "zarr.json") == contents(float_store, "zarr.json")


@pytest.fixture(scope="module")
def parts(video_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    finish(extract(video_folder, folder / "skeleton.zarr", "--prepare"))
    stores = []
    for number in (1, 2):
        stores.append(shutil.copytree(folder / "skeleton.zarr", folder / f"{number}.zarr"))
        finish(extract(video_folder, stores[-1], "--part", f"{number}/2"))
    return stores


@pytest.mark.parametrize("point", MERGE_POINTS)
def test_a_merge_killed_at_a_point_is_completed_by_the_same_command(point, parts, float_store, contents, tmp_path):
    out = tmp_path / "merged.zarr"
    finish(start("merge", *parts, "--out", out, kill_at=point), -signal.SIGKILL)
    finish(start("merge", *parts, "--out", out))
    assert contents(out, "zarr.json") == contents(float_store, "zarr.json")
    assert verify_store(open_store(out)) == []


@pytest.mark.parametrize("point", APPEND_POINTS)
def test_an_append_killed_at_a_point_is_completed_by_the_same_command(
    point, video_folder, float_store, make_video, contents, tmp_path
):
    root = shutil.copytree(video_folder, tmp_path / "videos")
    make_video(root / "train/aaa/new.mp4", seed=70)
    make_video(root / "val/run/new.mp4", seed=71)
    whole, killed = (shutil.copytree(float_store, tmp_path / name) for name in ("whole.zarr", "killed.zarr"))
    finish(extract(root, whole, "--append"))
    finish(extract(root, killed, "--append", kill_at=point), -signal.SIGKILL)
    finish(extract(root, killed, "--append"))
    assert contents(killed, "zarr.json") == contents(whole, "zarr.json")
    assert verify_store(open_store(killed)) == []
