"""Trainings as processes of their own, and what must be equal of two runs."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from s4v.train.run_folder import open_run, read_metrics

NORMS = Path(__file__).with_name("norms_of_processes.py")
"""Looks at norms whose groups span processes; its argument is how many."""

# Each line of the file that it is given is the arguments of one `s4v`, or of `python`; all ranks come here, by
# torchrun. One that begins with `stop` is interrupted in its sixth step, as by Ctrl-C.
RUN_ONE_AFTER_ANOTHER = """
import json, runpy, sys
from s4v import cli
from s4v.train.tasks import recognition
loss, seen = recognition.classification_loss, []
def stop(*arguments):
    seen.append(None)
    if len(seen) == 6:
        raise KeyboardInterrupt
    return loss(*arguments)
for line in open(sys.argv[1]):
    arguments = json.loads(line)
    if arguments[0] == "python":
        sys.argv = arguments[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
        continue
    is_stopped = arguments[0] == "stop"
    recognition.classification_loss = stop if is_stopped else loss
    sys.argv = ["s4v", *arguments[is_stopped:]]
    try:
        cli.main()
    except SystemExit as end:
        assert end.code == (130 if is_stopped else None) or not (is_stopped or end.code), line
"""


EVALUATE = ["--split", "train", "--device", "cpu", "--json"]


def run_torchrun(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="session")
def processes_run():
    """Run a script or a module under torchrun in so many processes."""
    return run_torchrun


@pytest.fixture(scope="session")
def assert_learnt_alike():
    """Two trainings that differ in the order of sums: metrics, and the gradients that AdamW saw."""

    def compare(first, second):
        metrics = (read_metrics(open_run(folder)) for folder in (first, second))
        for ours, theirs in zip(*metrics, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-4)
        ours, theirs = (load_file(folder / "state.safetensors") for folder in (first, second))
        compared = [name for name in ours if name.endswith("exp_avg")]
        assert len(compared) > 50
        for name in compared:
            largest = ours[name].abs().max()
            assert (ours[name] - theirs[name]).abs().max() <= 1e-3 * largest + 1e-6, name

    return compare


@pytest.fixture
def interrupted(monkeypatch):
    """A context that is interrupted, as by Ctrl-C, where a module's loss is asked for the so-manieth time.

    It gives the arguments of each time.
    """

    @contextmanager
    def interrupt(module, name, count):
        seen, loss = [], getattr(module, name)

        def stop(*arguments):
            seen.append(arguments)
            if len(seen) == count:
                raise KeyboardInterrupt
            return loss(*arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, stop)
            yield seen

    return interrupt


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
def trained_by_two(build_once, int8_store, captioned_store, class_texts_store):
    """Trainings in two processes, one torchrun for all: runs below a folder by name, and `said`, what was printed.

    First the two look at the norms that they share. Last they evaluate `plain`, on its training videos.

    plain is at the usual rate, mixed at another. The others move no weight: AdamW makes much of differences in the last
    bit of a gradient near zero. `groups` has norms of two clips, one process's; `stopped` is the same, interrupted
    in its sixth step.
    """
    still, mix = ["--learning-rate", "1e-12"], ["--mix", "both", "--learning-rate", "1e-3"]
    trainings = {
        "plain": (int8_store, ["--batch-size", "2"]),
        "still": (int8_store, ["--batch-size", "2", "--head", "side4video", *still]),
        "linear": (int8_store, ["--batch-size", "2", "--head", "linear", *still]),
        "dist": (class_texts_store, ["--batch-size", "2", "--head", "dist", *still]),
        "mixed": (int8_store, ["--batch-size", "1", "--head", "attentive", *mix]),
        "groups": (int8_store, ["--batch-size", "2", "--norm-clips", "2", *still]),
        "stopped": (int8_store, ["--batch-size", "1", "--norm-clips", "2", *still]),
        "retrieval": (captioned_store, ["--batch-size", "3", "--task", "retrieval", "--interaction", "wti", *still]),
    }
    common = ["--epochs", "2", "--warmup-epochs", "1", "--device", "cpu", "--checkpoint-minutes", "0", "--json"]

    def run(folder):
        with (folder / "commands").open("w") as file:
            file.write(json.dumps(["python", str(NORMS), "2"]) + "\n")
            for name, (store, options) in trainings.items():
                width = [] if name == "linear" else ["--side-width", "64"]
                where = ["--features", str(store), "--out", str(folder / name)]
                stop = ["stop"] if name == "stopped" else []
                file.write(json.dumps([*stop, "train", *where, *common, *width, *options]) + "\n")
            file.write(json.dumps(["eval", "--run", str(folder / "plain"), *EVALUATE]) + "\n")
        (folder / "commands.py").write_text(RUN_ONE_AFTER_ANOTHER)
        done = run_torchrun(2, folder / "commands.py", folder / "commands")
        assert done.returncode == 0, done.stderr
        (folder / "said").write_text(done.stdout)

    return build_once("two-processes", run)


@pytest.fixture(scope="session")
def finish():
    """Wait for a process; what it printed."""

    def wait(process):
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        return out

    return wait
