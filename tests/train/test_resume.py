"""Trainings that are killed and go on, in one process and in two."""

import json
import random
import shutil
import sys
import time
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from s4v.errors import ConfigError, EnvironmentFailedError, RunExistsError, RunNotFoundError, StoreDamagedError
from s4v.train import loop
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run
from s4v.train.run_folder import open_run, read_metrics
from s4v.train.tasks import recognition as tasks

NUM_STEPS = 8
"""Two epochs of eight training videos, two at a time."""


def config_for(store, out, **changes):
    values = dict(features=store, out=out, epochs=2, batch_size=2, side_width=64, device="cpu", warmup_epochs=1.0)
    return TrainConfig(**{**values, "checkpoint_minutes": 0.0, **changes})


@pytest.fixture(scope="module")
def undisturbed(int8_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, train_run(config_for(int8_store, out))


@pytest.mark.parametrize(
    "step", [step if step in (0, 5) else pytest.param(step, marks=pytest.mark.slow) for step in range(NUM_STEPS)]
)
def test_a_run_that_was_stopped_in_a_step_goes_on_to_the_same_bit(
    assert_same_run, step, undisturbed, int8_store, tmp_path, interrupted
):
    with interrupted(tasks, "classification_loss", step + 1) as seen:
        train_run(config_for(int8_store, tmp_path / "run"))
    before = len(seen)
    summary = train_run(config_for(int8_store, tmp_path / "run", resume=True))
    assert summary["steps"] == undisturbed[1]["steps"] == NUM_STEPS
    assert before == step + 1
    assert_same_run(tmp_path / "run", undisturbed[0])


@pytest.mark.parametrize("name", ["save_checkpoint", "save_state", "append_metrics"])
def test_a_run_that_was_stopped_at_the_end_of_an_epoch_goes_on(
    assert_same_run, name, undisturbed, int8_store, tmp_path, monkeypatch
):
    def stop(*_):
        raise KeyboardInterrupt

    config = config_for(int8_store, tmp_path / "run", checkpoint_minutes=60.0)
    with monkeypatch.context() as patch:
        patch.setattr(loop, name, stop)
        with pytest.raises(KeyboardInterrupt):
            train_run(config)
    train_run(config_for(int8_store, tmp_path / "run", resume=True))
    assert_same_run(tmp_path / "run", undisturbed[0])


def test_resuming_a_finished_run_changes_nothing(undisturbed, int8_store, tmp_path):
    out = shutil.copytree(undisturbed[0], tmp_path / "run")
    before = {p.name: p.read_bytes() for p in out.iterdir() if "tfevents" not in p.name}
    summary = train_run(config_for(int8_store, out, resume=True))
    assert summary["last"] == undisturbed[1]["last"]
    after = {p.name: p.read_bytes() for p in out.iterdir() if "tfevents" not in p.name}
    assert {n: b for n, b in after.items() if n != "stats.json"} == {
        n: b for n, b in before.items() if n != "stats.json"
    }
    assert summary["seconds"] > 0


def test_resume_starts_a_run_that_was_never_begun(assert_same_run, undisturbed, int8_store, tmp_path):
    train_run(config_for(int8_store, tmp_path / "new", resume=True))
    assert_same_run(tmp_path / "new", undisturbed[0])


def test_other_settings_are_refused_with_all_differences(undisturbed, int8_store, float_store, tmp_path):
    out = undisturbed[0]
    with pytest.raises(RunExistsError, match="Nothing was overwritten"):
        train_run(config_for(int8_store, out))
    with pytest.raises(RunExistsError, match="begun with other settings: batch_size 2 there, 4 here; seed 0 there, 3"):
        train_run(config_for(int8_store, out, resume=True, batch_size=4, seed=3))
    with pytest.raises(RunExistsError, match="begun with other settings: .*codec"):
        train_run(config_for(float_store, out, resume=True))
    copied = shutil.copytree(out, tmp_path / "copy")
    (copied / "state.safetensors").write_bytes((copied / "state.safetensors").read_bytes()[:-50])
    with pytest.raises(StoreDamagedError, match=r"state\.safetensors is not a whole state of this training"):
        train_run(config_for(int8_store, copied, resume=True))


def test_a_run_stops_when_it_gets_no_better(int8_store, tmp_path):
    summary = train_run(config_for(int8_store, tmp_path / "run", epochs=9, patience=2, learning_rate=1e-12))
    assert summary["epochs"] == 3, "the first epoch is the best so far, then two that are not better"
    again = train_run(config_for(int8_store, tmp_path / "run", epochs=9, patience=2, learning_rate=1e-12, resume=True))
    assert again["epochs"] == 3


@pytest.mark.slow  # three trainings
def test_patience_waits_for_validations(int8_store, tmp_path):
    slow = dict(epochs=9, patience=1, validate_every=3, learning_rate=1e-12)
    assert train_run(config_for(int8_store, tmp_path / "run", **slow))["epochs"] == 6, "3 is the first, 6 no better"


def test_other_rows_or_another_step_are_refused(undisturbed, int8_store, tmp_path):
    out = shutil.copytree(undisturbed[0], tmp_path / "run")
    config = json.loads((out / "config.json").read_text())
    config["train"] |= {"processes": 2, "training_rows": "9 of sha256 0"}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunExistsError, match="other settings: training_rows 9 of sha256 0 there, 8 of sha"):
        train_run(config_for(int8_store, out, resume=True))
    config["train"] |= {"batch_size": 3, "processes": 3}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunExistsError, match="batch_size 3 there, 2 here; processes 3 there, 1 here; training_rows"):
        train_run(config_for(int8_store, out, resume=True))


def test_epochs_are_validated_as_often_as_asked(int8_store, tmp_path):
    summary = train_run(config_for(int8_store, tmp_path / "run", epochs=5, validate_every=3))
    metrics = read_metrics(open_run(tmp_path / "run"))
    assert ["val_top1" in one for one in metrics] == [False, False, True, False, True], "and the last one"
    assert summary["best"]["epoch"] in (3, 5)
    assert evaluate_run(tmp_path / "run", with_page=True)["videos"] == 2
    assert (tmp_path / "run/results_val.html").stat().st_size > 20_000


def test_accumulated_batches_are_one_step_of_their_mean_gradient(int8_store, tmp_path, monkeypatch):
    gradients = []
    make = loop.make_optimizer

    def watch(groups, *options, **named):
        optimizer = make(groups, *options, **named)
        trained = [parameter for group in groups for parameter in group.parameters]
        optimizer.register_step_pre_hook(
            lambda *_: gradients.append([p.grad.clone() for p in trained if p.grad is not None])
        )
        return optimizer

    monkeypatch.setattr(loop, "make_optimizer", watch)
    once = dict(epochs=1, learning_rate=1e-9, head="linear", side_width=None)
    assert train_run(config_for(int8_store, tmp_path / "plain", **once))["steps"] == 4
    plain, gradients[:] = list(gradients), []
    assert train_run(config_for(int8_store, tmp_path / "two", **once, accumulate=2))["steps"] == 2
    for step, found in enumerate(gradients):
        for one, first, second in zip(found, plain[2 * step], plain[2 * step + 1], strict=True):
            torch.testing.assert_close(one, (first + second) / 2, rtol=1e-4, atol=1e-7)
    gradients.clear()
    train_run(config_for(int8_store, tmp_path / "clipped", **once, clip_norm=1e-3))
    norms = [torch.stack([g.norm() for g in found]).norm() for found in gradients]
    torch.testing.assert_close(torch.stack(norms), torch.full((4,), 1e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (dict(accumulate=0), "--accumulate must be at least 1; found 0"),
        (dict(patience=0), "--patience must be at least 1; found 0"),
        (dict(clip_norm=0.0), "--clip-norm must be a number above 0; found 0"),
        (dict(checkpoint_minutes=-1.0), "--checkpoint-minutes must be a number from 0 up; found -1"),
    ],
)
def test_options_out_of_range_are_refused(option, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        config_for(tmp_path, tmp_path, **option)


def test_wandb_is_asked_for_only_where_it_is_installed(int8_store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="--wandb needs the package wandb: pip install wandb"):
        train_run(config_for(int8_store, tmp_path / "run", wandb="project"))
    assert not (tmp_path / "run").exists(), "told before a run is begun"


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, which the project does without; `init` is the test's."""
    package = ModuleType("wandb")
    package.__spec__ = ModuleSpec("wandb", None)
    package.Error = type("Error", (Exception,), {})
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


def test_a_run_that_wandb_refuses_is_told_and_goes_on_with_resume(wandb, int8_store, tmp_path):
    def refuse(**_):
        raise wandb.Error("No API key configured. Use `wandb login` to log in.")

    wandb.init = refuse
    config = config_for(int8_store, tmp_path / "run", wandb="project")
    with pytest.raises(EnvironmentFailedError, match=r"No API key configured.*WANDB_MODE=offline.*--resume"):
        train_run(config)
    wandb.init = lambda **_: SimpleNamespace(log=lambda metrics: None, define_metric=lambda *_, **__: None)
    assert train_run(replace(config, resume=True))["epochs"] == config.epochs


@pytest.mark.slow  # three trainings
def test_a_run_that_goes_on_is_the_same_one_in_wandb(wandb, int8_store, tmp_path, monkeypatch):
    begun, logged, axes = [], [], {}

    def init(**options):
        begun.append((options["id"], options["resume"], options["name"]))
        return SimpleNamespace(
            log=logged.append, define_metric=lambda name, step_metric: axes.update({name: step_metric})
        )

    wandb.init = init
    config = config_for(int8_store, tmp_path / "run", wandb="project", log_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "accuracy_figures", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_run(config)
    train_run(replace(config, resume=True))
    train_run(replace(config, out=tmp_path / "other"))
    (first, how, name), again, other = begun
    assert (first, how, name) == again and how == "allow" and name == "run"
    assert other[0] != first and len(first) == 32
    assert [one["epoch"] for one in logged if "epoch" in one] == [1, 2, 1, 2]
    steps = [one["step/step"] for one in logged if "epoch" not in one]
    assert steps == [1, 2, 3, 4, *range(4, 9), *range(1, 9)], "the fourth was in no state, and is trained again"
    assert axes == {"*": "epoch", "step/*": "step/step"}


def test_the_run_that_another_began_with_may_go_once_it_has_a_state(
    assert_same_run, undisturbed, int8_store, tmp_path, monkeypatch
):
    first = shutil.copytree(undisturbed[0], tmp_path / "first")
    config = config_for(int8_store, tmp_path / "run", init=first)
    train_run(replace(config, out=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "accuracy_figures", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_run(config)
    shutil.rmtree(first)
    train_run(replace(config, resume=True))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(RunNotFoundError):
        train_run(replace(config, out=tmp_path / "new", resume=True))


def test_two_processes_train_as_one_does_on_their_joined_batches(trained_by_two, int8_store, tmp_path):
    lines = (trained_by_two / "said").read_text().strip().splitlines()
    assert len(lines) == 1 + 8 + 1, "one process speaks, once in each training"
    assert json.loads(lines[1])["steps"] == 4
    train_run(config_for(int8_store, tmp_path / "one", batch_size=4))
    one, two = (read_metrics(open_run(path)) for path in (tmp_path / "one", trained_by_two / "plain"))
    for ours, theirs in zip(one, two, strict=True):
        # AdamW makes much of the last bit of a gradient near zero, and processors differ in those: see the next test.
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("head", ["side4video", "linear"])
def test_two_processes_have_the_statistics_and_gradients_of_one(trained_by_two, int8_store, tmp_path, head):
    """At a rate that moves no weight."""
    options = dict(learning_rate=1e-12, head=head, side_width=64 if head == "side4video" else None)
    train_run(config_for(int8_store, tmp_path / "one", batch_size=4, **options))
    folders = (tmp_path / "one", trained_by_two / ("still" if head == "side4video" else "linear"))
    one, two = (load_file(folder / "state.safetensors") for folder in folders)
    compared = [name for name in one if name.endswith(("running_mean", "running_var", "exp_avg"))]
    assert len(compared) > (100 if head == "side4video" else 3)
    for name in compared:
        largest = one[name].abs().max()
        assert (one[name] - two[name]).abs().max() <= 1e-3 * largest + 1e-6, name


def test_two_processes_count_the_norms_of_one(trained_by_two, int8_store, tmp_path):
    """Norms of two clips: one process's, or half of the batch of one."""
    still = dict(learning_rate=1e-12, norm_clips=2)
    train_run(config_for(int8_store, tmp_path / "one", batch_size=4, **still))
    folders = {"one": tmp_path / "one", "two": trained_by_two / "groups"}
    train_run(config_for(int8_store, tmp_path / "batches", batch_size=2, accumulate=2, **still))
    folders["batches"] = tmp_path / "batches"
    train_run(config_for(int8_store, tmp_path / "all", batch_size=4, learning_rate=1e-12))
    states = {name: load_file(folder / "state.safetensors") for name, folder in folders.items()}
    for name, expected in states["one"].items():
        if name.endswith(("running_mean", "running_var", "exp_avg", "num_batches_tracked")):
            for other in ("two", "batches"):
                difference = (expected - states[other][name]).abs().max()
                assert difference <= 1e-3 * expected.abs().max() + 1e-6, (name, other)
    of_all = load_file(tmp_path / "all/state.safetensors")
    name = "head.norm.running_var"
    assert (of_all[name] - states["one"][name]).abs().max() > 1e-3 * of_all[name].abs().max(), "another network"


def test_a_run_of_two_processes_goes_on_in_one(trained_by_two, int8_store, tmp_path, caplog):
    """Whose norms each counted the clips of both; then one process has all of them."""
    out = shutil.copytree(trained_by_two / "stopped", tmp_path / "run")
    still = dict(learning_rate=1e-12, norm_clips=2)
    before = json.loads((out / "config.json").read_text())["train"]
    assert (before["batch_size"], before["processes"]) == (1, 2)
    config = config_for(int8_store, out, batch_size=1, resume=True, **still)
    assert train_run(config)["steps"] == NUM_STEPS
    train_run(config_for(int8_store, tmp_path / "one", batch_size=2, **still))
    states = [load_file(folder / "state.safetensors") for folder in (out, tmp_path / "one")]
    for name, expected in states[1].items():
        if name.endswith(("running_mean", "running_var", "exp_avg", "num_batches_tracked")):
            assert (expected - states[0][name]).abs().max() <= 1e-3 * expected.abs().max() + 1e-6, name
    ours, theirs = (read_metrics(open_run(folder)) for folder in (out, tmp_path / "one"))
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    with pytest.raises(RunExistsError, match="norm_clips 2 there, 1 here"):
        train_run(replace(config, norm_clips=1))


def kill_in_training(process, state, changes, pause=0.0):
    """Kill a process when its state file was replaced so often: it is training then, and alive."""
    limit, seen = time.monotonic() + 120, state.stat().st_mtime_ns if state.is_file() else None
    while changes:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit, "no state was saved"
        now = state.stat().st_mtime_ns if state.is_file() else None
        if now != seen:
            seen, changes = now, changes - 1
        time.sleep(0.0005)
    time.sleep(pause)
    assert process.poll() is None, "it was done before"
    process.kill()
    process.communicate()
    assert process.returncode == -9


def test_sigkill_in_training_leaves_the_same_metrics(assert_same_run, train, int8_store, tmp_path):
    """Twice in one run, of five epochs so that both fall into it; then it is finished."""
    options = ("--batch-size", "2", "--epochs", "5")
    out, moments = tmp_path / "run", random.Random(3)
    for _ in range(2):
        process = train(int8_store, out, *options, "--resume")
        kill_in_training(process, out / "state.safetensors", moments.randint(1, 4), moments.uniform(0, 0.02))
    config = config_for(int8_store, out, epochs=5)
    before = load_file(out / "state.safetensors")
    assert train_run(replace(config, resume=True))["steps"] == 20
    assert not torch.equal(before["head.classifier.weight"], load_file(out / "last.safetensors")["classifier.weight"])
    train_run(replace(config, out=tmp_path / "whole"))
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.slow
def test_sigkill_at_ten_random_moments_leaves_the_same_metrics(assert_same_run, train, int8_store, tmp_path):
    options = ("--batch-size", "2", "--epochs", "40")
    out, moments = tmp_path / "run", random.Random(4)
    for _ in range(10):
        process = train(int8_store, out, *options, "--resume")
        kill_in_training(process, out / "state.safetensors", moments.randint(1, 12), moments.uniform(0, 0.02))
    config = config_for(int8_store, out, epochs=40)
    train_run(replace(config, resume=True))
    train_run(replace(config, out=tmp_path / "whole"))
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_that_were_killed_go_on_to_the_same_bit(assert_same_run, finish, train, int8_store, tmp_path):
    options = ("--batch-size", "2", "--epochs", "20")
    finish(train(int8_store, tmp_path / "whole", *options, processes=2))
    out = tmp_path / "run"
    process = train(int8_store, out, *options, "--resume", processes=2)
    metrics, limit = out / "metrics.jsonl", time.monotonic() + 120
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.001)
    process.terminate()  # torchrun ends its workers
    process.communicate(timeout=60)
    assert len(metrics.read_text().splitlines()) < 20
    finish(train(int8_store, out, *options, "--resume", processes=2))
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_head_learns_what_the_plain_one_does(int8_store, tmp_path):
    options = dict(epochs=1, learning_rate=1e-12, layers=(1, 5), checkpoint_minutes=60.0)
    plain = train_run(config_for(int8_store, tmp_path / "plain", **options))
    compiled = train_run(config_for(int8_store, tmp_path / "compiled", with_compile=True, **options))
    for name, value in plain["last"].items():
        assert compiled["last"][name] == pytest.approx(value, rel=1e-4), name
    assert evaluate_run(tmp_path / "compiled")["videos"] == 2
