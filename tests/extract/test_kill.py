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

POINTS = (
    "before rename 1",
    "before rename 6",
    "after rename 6",
    "shard undone 3",
    "shard being written 2",
    "shard written 4",
    "shard durable 1",
    "shard durable 11",
    "shard done 5",
    "shard done 11",
    "before consolidation 1",
    "manifest written 1",
    "after consolidation 1",
)
APPEND_POINTS = ("append prepared 1", "append moved 1", "append moved 4", "append moved 7", "append in place 1")


def extract(root, out, *options, kill_at=None):
    command = [sys.executable, "-m", "s4v", "extract", "--model", "tiny-clip", "--weights", "random"]
    command += ["--dataset", "folder", "--root", str(root), "--out", str(out), "--frames", "train=6,4"]
    command += ["--dtype", "float32", "--device", "cpu", "--decoders", "2", *options]
    environment = {**os.environ, **({"S4V_KILL_AT": kill_at} if kill_at else {})}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process, code=0):
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err


@pytest.mark.parametrize("point", POINTS)
def test_a_run_killed_at_a_point_is_completed_by_the_same_command(point, video_folder, float_store, contents, tmp_path):
    out = tmp_path / "killed.zarr"
    finish(extract(video_folder, out, kill_at=point), -signal.SIGKILL)
    finish(extract(video_folder, out))
    assert contents(out, "zarr.json") == contents(float_store, "zarr.json")
    assert verify_store(open_store(out)) == []


def test_runs_killed_at_random_moments_are_completed_by_the_same_command(video_folder, float_store, contents, tmp_path):
    start = time.monotonic()
    finish(extract(video_folder, tmp_path / "whole.zarr"))
    seconds = time.monotonic() - start
    moments = random.Random(5)
    for number in range(10):
        out = tmp_path / f"{number}.zarr"
        process = extract(video_folder, out)
        time.sleep(moments.uniform(0.3, 1.0) * seconds)
        process.kill()
        process.communicate()
        finish(extract(video_folder, out))
        assert contents(out, "zarr.json") == contents(float_store, "zarr.json")


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
