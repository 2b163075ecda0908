"""The giant, as a user without a GPU runs it: the true tower, on random weights."""

import os
import subprocess
import sys

import numpy as np
import pytest

from s4v.store.reader import open_store


@pytest.mark.slow
def test_one_frame_through_vit_e_stays_within_11_gb(one_video, tmp_path):
    out = tmp_path / "e.zarr"
    command = [sys.executable, "-m", "s4v", "extract", "--model", "vit-e", "--weights", "random", "--device", "cpu"]
    command += ["--precision", "bf16", "--dataset", "folder", "--root", str(one_video.parent), "--out", str(out)]
    command += ["--limit", "1", "--frames", "1", "--dtype", "float16", "--decoders", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_maxrss * 1024 <= 11e9

    store = open_store(out)
    assert store.layout.layers == tuple(range(1, 64, 2))
    clip = store.read_clips([0], [[0]])
    assert clip.patches.shape == (1, 1, 32, 256, 1792)
    assert np.isfinite(clip.patches).all()
