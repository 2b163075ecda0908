"""Trainings as processes of their own, and what must be equal of two runs."""

import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def assert_same_run():
    def compare(out, expected):
        for name in ("metrics.jsonl", "last.safetensors", "best.safetensors", "last.json", "best.json"):
            assert (out / name).read_bytes() == (expected / name).read_bytes(), name

    return compare


@pytest.fixture(scope="session")
def train():
    """Start `s4v train`, under torchrun where there is more than one process."""

    def start(store, out, *options, processes=1, side_width=64, **environment):
        command = [sys.executable, "-m"]
        if processes > 1:
            command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        command += [
            "s4v",
            "train",
            "--features",
            str(store),
            "--out",
            str(out),
            "--epochs",
            "2",
            "--warmup-epochs",
            "1",
        ]
        command += ["--side-width", str(side_width)] if side_width is not None else []
        command += ["--device", "cpu", "--checkpoint-minutes", "0", *options]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


@pytest.fixture(scope="session")
def finish():
    """Wait for a process; what it printed."""

    def wait(process):
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        return out

    return wait
