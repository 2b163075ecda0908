"""What a training tells while an epoch is under way."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from s4v.commands.train import describe_outcome
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.logs import _open_board
from s4v.train.loop import train_run
from s4v.train.step_log import StepLog, cut_steps, describe_step, find_gradient_norm, read_steps
from s4v.train.tasks import contract
from s4v.train.tasks import recognition as tasks
from s4v.train.transfer import WaitMeter


def config_for(store, out, **changes):
    values = dict(features=store, out=out, epochs=2, batch_size=2, side_width=64, device="cpu", warmup_epochs=1.0)
    return TrainConfig(**{**values, "checkpoint_minutes": 0.0, **changes})


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def make_log(tmp_path, clock, loggers=(), **options):
    meter = WaitMeter()
    log = StepLog(
        {tmp_path: loggers},
        total=100,
        device=torch.device("cpu"),
        waiting=meter,
        clock=clock,
        **{"every": None, **options},
    )
    return log, meter


def tell(log, step, *paths):
    rates, norms = dict.fromkeys(paths, 0.01), {path: torch.tensor(2.0) for path in paths}
    log.tell(step, epoch=0.5, learning_rates=rates, gradient_norms=norms)


def test_the_numbers_are_those_since_they_were_last_told(tmp_path):
    clock, seen = Clock(), []
    log, meter = make_log(tmp_path, clock, loggers=[seen.append])
    for step, loss in enumerate([1.0, 2.0, 6.0], start=1):
        clock.now += 2
        meter.add(0.5)
        log.add({tmp_path: torch.tensor(loss)}, 4, step)
    tell(log, 3, tmp_path)
    clock.now += 100
    log.begin_epoch()  # a validation was no training
    clock.now += 3
    log.add({tmp_path: torch.tensor(5.0)}, 4, 4)
    tell(log, 4, tmp_path)
    first, second = read_steps(tmp_path)
    assert seen == [first, second]
    assert first["loss"] == 3.0 and first["clips_per_s"] == 2.0 and first["data_wait_share"] == 0.25
    assert first["seconds_left"] == 97 * 2 and first["gradient_norm"] == 2.0 and first["memory_bytes"] > 10**6
    assert second["loss"] == 5.0 and second["clips_per_s"] == 1.33 and second["data_wait_share"] == 0
    assert second["seconds_left"] == round(96 * 9 / 4, 1)


def test_steps_are_told_by_the_clock_or_by_their_number(tmp_path):
    clock = Clock()
    log, _ = make_log(tmp_path, clock)
    assert not log.is_due(1), "a short run is quiet"
    clock.now = 10.0
    assert log.is_due(2)
    log.add({tmp_path: torch.tensor(1.0)}, 4, 2)
    tell(log, 2, tmp_path)
    assert not log.is_due(3)
    by_number, _ = make_log(tmp_path, clock, every=3)
    assert [step for step in range(1, 10) if by_number.is_due(step)] == [3, 6, 9]


def test_a_gradients_norm_is_that_of_all_and_changes_nothing():
    parameters = [
        torch.nn.Parameter(torch.randn(3, 4)),
        torch.nn.Parameter(torch.randn(5)),
        torch.nn.Parameter(torch.ones(2)),
    ]
    (parameters[0].square().sum() + parameters[1].sum()).backward()
    before = [p.grad.clone() for p in parameters[:2]]
    torch.testing.assert_close(find_gradient_norm(parameters), torch.cat([g.flatten() for g in before]).norm())
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters[:2], before, strict=True))


@pytest.fixture(scope="module")
def told(int8_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "told"
    progress = []
    train_run(config_for(int8_store, out, log_every=1), progress=lambda *one: progress.append(one))
    return out, progress


def test_a_run_tells_of_its_steps_and_learns_what_it_learns_untold(told, assert_same_run, int8_store, tmp_path):
    out, progress = told
    steps = read_steps(out)
    assert [one["step"] for one in steps] == list(range(1, 9)) and [one["epoch"] for one in steps][3::4] == [1.0, 2.0]
    assert all(
        one["gradient_norm"] > 0 and one["clips_per_s"] > 0 and 0 <= one["data_wait_share"] <= 1 for one in steps
    )
    assert steps[-1]["seconds_left"] == 0
    epochs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum(one["loss"] for one in steps[:4]) / 4 == pytest.approx(epochs[0]["train_loss"])
    assert {one[:1] + one[2:3] for one in progress} == {("training", 8)} and progress[-1][1] == 8
    assert re.fullmatch(
        r"loss [\d.]+, rate [\d.e-]+, gradient [\d.]+, [\d.]+ clips/s, \d+% waiting, [\d.]+ GB", progress[-1][3]
    )
    train_run(config_for(int8_store, tmp_path / "quiet"))
    assert not (tmp_path / "quiet/steps.jsonl").exists() and not (tmp_path / "quiet/steps").exists()
    assert_same_run(out, tmp_path / "quiet")


def test_steps_that_are_trained_again_are_told_once(told, int8_store, tmp_path, interrupted):
    config = config_for(int8_store, tmp_path / "run", log_every=1, checkpoint_minutes=60.0)
    with interrupted(tasks, "classification_loss", 7):
        train_run(config)
    run = tmp_path / "run"
    assert [one["step"] for one in read_steps(run)] == list(range(1, 7)), "of which two are in no state"
    with (run / "steps.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # cut off by a kill
    train_run(replace(config, resume=True, log_every=2))
    steps = read_steps(run)
    assert [one["step"] for one in steps] == [1, 2, 3, 4, 6, 8]
    board = EventAccumulator(str(run / "steps")).Reload()
    assert [event.step for event in board.Scalars("gradient_norm")] == [1, 2, 3, 4, 6, 8], "others are hidden"
    same = ("step", "epoch", "learning_rate", "gradient_norm")
    whole = {one["step"]: one for one in read_steps(told[0])}
    assert [[one[name] for name in same] for one in steps] == [
        [whole[one["step"]][name] for name in same] for one in steps
    ]


def test_files_of_one_second_are_read_in_the_order_that_they_began_in(tmp_path, monkeypatch):
    monkeypatch.setattr(
        event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9)
    )  # after which comes 10, before it by name
    for step in range(2):
        board = _open_board(tmp_path, num_done=step)
        board.add_scalar("loss", 1.0, step)
        board.close()
    reader = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in reader.Scalars("loss")] == [0, 1]


def test_a_run_from_before_has_no_steps(tmp_path):
    cut_steps(tmp_path, 0)
    assert read_steps(tmp_path) == [] and not list(tmp_path.iterdir())


def test_the_results_page_draws_what_was_told(told, tmp_path):
    out, caption = told[0], "loss, rate, gradient, speed and waiting by step"
    copied = shutil.copytree(out, tmp_path / "run")
    evaluate_run(copied, with_page=True)
    assert caption in (copied / "results_val.html").read_text()
    (copied / "steps.jsonl").unlink()  # as a run from before has none
    evaluate_run(copied, with_page=True)
    assert caption not in (copied / "results_val.html").read_text()


def test_memory_that_nobody_counts_is_not_told():
    facts = dict(loss=1.0, learning_rate=1e-3, gradient_norm=0.5, clips_per_s=12.0, data_wait_share=0.031)
    facts["memory_bytes"] = None
    assert describe_step([facts]) == "loss 1, rate 0.001, gradient 0.5, 12 clips/s, 3% waiting"
    assert describe_step([facts, {**facts, "loss": 0.5}]) == "2 heads, loss 0.5 to 1, 12 clips/s, 3% waiting"


@pytest.mark.parametrize(
    ("best", "last", "said"),
    [
        (
            {"epoch": 4, "val_top1": 0.667},
            {"epoch": 10, "val_top1": 0.333},
            "best 66.7% (epoch 4), last 33.3% (epoch 10)",
        ),
        ({"epoch": 10, "val_top1": 0.5}, {"epoch": 10, "val_top1": 0.5}, "best and last 50.0% (epoch 10)"),
        ({"epoch": 4, "val_top1": 0.5}, {"epoch": 10}, "best 50.0% (epoch 4), 10 epochs"),
        ({"epoch": 10}, {"epoch": 10}, "10 epochs, none validated"),
    ],
)
def test_the_last_line_tells_best_and_last_with_their_epochs(best, last, said):
    summary = {"best": best, "last": last, "epochs": 10, "videos": {"train": 8, "val": 3}}
    line = describe_outcome(summary, lambda metrics: f"{metrics['val_top1']:.1%}" if "val_top1" in metrics else "")
    assert line == f"{said} (8 training videos, 3 validation videos)"


def test_a_run_without_validation_videos_is_told_so_once(int8_store, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(
        contract,
        "find_labelled_rows",
        lambda store, split, find=contract.find_labelled_rows: find(store, split if split == "train" else "none"),
    )
    train_run(config_for(int8_store, tmp_path / "run"))
    (message,) = [record.getMessage() for record in caplog.records if "no epoch is measured" in record.getMessage()]
    assert "in split 'val'" in message and "--val-split" in message
