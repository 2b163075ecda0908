"""`s4v sweep`: what is trained, what is chosen, and that a kill or a second process changes nothing."""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import ConfigError, EnvironmentFailedError, RunExistsError
from s4v.store.reader import open_store
from s4v.train import sweep as sweeps
from s4v.train.clips import find_labelled_rows, hold_out_rows
from s4v.train.config import TrainConfig
from s4v.train.loop import train_run
from s4v.train.run_folder import open_run
from s4v.train.sweep import count_heads_in_memory, render_sweep, sweep_heads, train_winner

RATES, DECAYS, SEEDS = (1e-3, 1e-2), (0.0, 0.15), (3, 4)
NUM_HEADS = len(RATES) * len(DECAYS) * len(SEEDS)
GRID = dict(learning_rates=RATES, weight_decays=DECAYS, seeds=SEEDS)


def config_for(store, out, **changes):
    values = dict(features=store, out=out, epochs=3, batch_size=2, device="cpu", head="linear", checkpoint_minutes=0.0)
    return TrainConfig(**{**values, **changes})


def without_paths(sweep):
    """What a sweep came to, wherever its folder is."""
    lines = [replace(head, run="") for head in sweep.heads]
    return replace(sweep, out=None, heads=lines, winner=replace(sweep.winner, run=""))


@pytest.fixture(scope="module")
def whole(int8_store, tmp_path_factory):
    config = config_for(int8_store, tmp_path_factory.mktemp("sweeps") / "whole")
    found = sweep_heads(config, **GRID)
    return config, found, train_winner(config, found)


def assert_same_sweep(assert_same_run, out, expected):
    names = [f"heads/{place:03d}" for place in range(NUM_HEADS)] + ["winner"]
    for name in names:
        assert_same_run(out / name, expected / name)
    ours, theirs = (json.loads((folder / "sweep.json").read_text()) for folder in (out, expected))
    assert [ours["winner"][k] for k in ("learning_rate", "top")] == [
        theirs["winner"][k] for k in ("learning_rate", "top")
    ]


def test_each_head_of_a_sweep_is_what_it_is_alone(assert_same_run, whole, int8_store, tmp_path):
    config, found, _ = whole
    assert len(found.heads) == NUM_HEADS and (found.training_videos, found.held_out_videos, found.reads) == (7, 1, 1)
    for place in (0, 5, 7):
        head = found.heads[place]
        own = dict(learning_rate=head.learning_rate, weight_decay=head.weight_decay, seed=head.seed)
        alone = replace(config, out=tmp_path / str(place), hold_out=0.1, order_seed=SEEDS[0], **own)
        assert train_run(alone)["last"]["val_top1"] == head.top
        assert_same_run(config.out / f"heads/{place:03d}", tmp_path / str(place))
    assert {(head.learning_rate, head.weight_decay, head.seed) for head in found.heads} == {
        (rate, decay, seed) for rate in RATES for decay in DECAYS for seed in SEEDS
    }


def test_the_winner_is_an_ordinary_run_on_all_of_train(assert_same_run, whole, tmp_path):
    config, found, summary = whole
    best = found.winner
    assert best.top == max(head.top for head in found.heads)
    assert summary["videos"] == {"train": 8, "val": 2}
    own = dict(learning_rate=best.learning_rate, weight_decay=best.weight_decay, seed=best.seed)
    train_run(replace(config, out=tmp_path / "alone", **own))
    assert_same_run(config.out / "winner", tmp_path / "alone")
    saved = open_run(config.out / "winner").config
    assert saved["order_seed"] is None and saved["hold_out"] is None, "its own order"


def test_the_table_tells_how_was_chosen(whole):
    lines = render_sweep(whole[1])
    assert len(lines) == NUM_HEADS + 3 and sum("| chosen |" in line for line in lines) == 1
    assert lines[0].startswith("| rate | decay | seed | epochs | held-out top1 | best epoch | its top1 |")
    assert "Heads in one read share batches" in lines[-1] and "on 1 others chose" in lines[-1]


def test_further_reads_give_the_same_figures(assert_same_run, whole, int8_store, tmp_path):
    config, found, _ = whole
    again = sweep_heads(replace(config, out=tmp_path / "parts"), **GRID, heads_per_read=3)
    assert again.reads == 3 and without_paths(replace(again, reads=1)) == without_paths(found)
    for place in range(NUM_HEADS):
        assert_same_run(tmp_path / f"parts/heads/{place:03d}", config.out / f"heads/{place:03d}")
    assert sweep_heads(replace(config, out=tmp_path / "parts"), **GRID).reads == 3, "as it was begun"


def test_memory_bounds_how_many_heads_are_trained_together(int8_store, tmp_path, monkeypatch):
    config, store = config_for(int8_store, tmp_path), open_store(int8_store)
    assert count_heads_in_memory(config, store) > 1000
    monkeypatch.setattr(sweeps.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 100_000}[name])
    width = store.layout.width
    assert count_heads_in_memory(config, store) == 50_000 // (16 * 2 * (width + 1))
    monkeypatch.setattr(sweeps.os, "sysconf", lambda name: 1)
    assert count_heads_in_memory(config, store) == 1


def test_what_cannot_be_swept_is_refused(whole, int8_store, tmp_path):
    config = whole[0]
    with pytest.raises(ConfigError, match="--learning-rate takes one or several different values; found"):
        sweep_heads(replace(config, out=tmp_path / "s"), learning_rates=(1e-3, 1e-3))
    with pytest.raises(ConfigError, match="--seeds takes one or several different values; found"):
        sweep_heads(replace(config, out=tmp_path / "s"), seeds=())
    with pytest.raises(ConfigError, match="--heads-per-read must be at least 1; found 0"):
        sweep_heads(replace(config, out=tmp_path / "s"), heads_per_read=0)
    with pytest.raises(ConfigError, match="--wandb has no effect on a sweep"):
        sweep_heads(replace(config, out=tmp_path / "s", wandb="p"))
    with pytest.raises(ConfigError, match="--hold-out must be a share above 0, at most 0.5; found 0.9"):
        replace(config, hold_out=0.9)
    with pytest.raises(RunExistsError, match="holds a sweep that was begun with other settings: grid"):
        sweep_heads(config, learning_rates=(1e-3,))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    with pytest.raises(RunExistsError, match="exists and holds no sweep"):
        sweep_heads(replace(config, out=tmp_path / "other"), **GRID)
    assert not (tmp_path / "s").exists()


def test_a_sweep_without_a_finite_head_is_an_error(int8_store, tmp_path):
    config = config_for(int8_store, tmp_path / "s", side_width=64, layers=(1, 5), head="side4video")
    with pytest.raises(EnvironmentFailedError, match="no head of the sweep is left: .* became NaN or infinite"):
        sweep_heads(config, learning_rates=(1e30, 1e31))


def test_what_is_held_out_follows_from_names_and_seed_and_is_of_all_classes(int8_store):
    store = open_store(int8_store)
    data = find_labelled_rows(store, "train")
    for share, count in ((0.25, 2), (0.5, 4), (0.01, 1)):
        training, held = hold_out_rows(data, store, share, seed=0, by_class=True)
        assert len(held) == count and sorted([*training.rows, *held.rows]) == data.rows.tolist()
        assert np.bincount(held.labels, minlength=2).max() <= -(-count // 2)
        again = hold_out_rows(data, store, share, seed=0, by_class=True)[1]
        assert again.rows.tolist() == held.rows.tolist()
    drawn = {tuple(hold_out_rows(data, store, 0.25, seed=seed, by_class=True)[1].rows) for seed in range(9)}
    assert len(drawn) > 3


def test_captions_of_a_video_are_held_out_together(captioned_store, tmp_path):
    config = config_for(captioned_store, tmp_path / "s", task="retrieval", head="side4video", side_width=64, epochs=1)
    found = sweep_heads(config, learning_rates=(1e-4, 1e-3), seeds=(0,))
    assert found.figure == "val_r1" and found.held_out_videos == 1
    assert train_winner(config, found)["videos"]["train"] == found.training_videos + 1


def run_command(store, out, processes=1):
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    options = "--head linear --learning-rate 1e-3,1e-2 --weight-decay 0,0.15 --seeds 3,4 --epochs 3 --device cpu"
    command += ["s4v", "sweep", "--features", str(store), "--out", str(out), "--checkpoint-minutes", "0", "--json"]
    command += [*options.split(), "--batch-size", str(2 // processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_sweep_that_was_killed_at_random_moments_goes_on_to_the_same_bit(
    assert_same_run, whole, int8_store, tmp_path
):
    """Once after some states were saved, and once after the winner's training has begun."""
    out, moments = tmp_path / "killed", random.Random(5)
    for state, changes in ((out / "state-0.safetensors", moments.randint(2, 9)), (out / "winner/state.safetensors", 1)):
        process, seen, limit = run_command(int8_store, out), None, time.monotonic() + 240
        while changes:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < limit
            now = state.stat().st_mtime_ns if state.is_file() else None
            seen, changes = (now, changes - 1) if now is not None and now != seen else (seen, changes)
            time.sleep(0.0005)
        process.kill()
        process.communicate()
    process = run_command(int8_store, out)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    answer = json.loads(stdout.splitlines()[-1])
    assert answer["ok"] and len(answer["heads"]) == NUM_HEADS and answer["run"] == str(out / "winner")
    assert_same_sweep(assert_same_run, out, whole[0].out)


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(whole, int8_store, tmp_path):
    process = run_command(int8_store, tmp_path / "two", processes=2)
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stderr
    (line,) = [one for one in stdout.splitlines() if one.startswith("{")]
    answer, found = json.loads(line), whole[1]
    for ours, theirs in zip(answer["heads"], found.heads, strict=True):
        assert (ours["top"], ours["best_epoch"], ours["epochs"]) == (theirs.top, theirs.best_epoch, theirs.epochs)
    assert answer["winner"]["learning_rate"] == found.winner.learning_rate
    assert answer["last"] == pytest.approx(whole[2]["last"], rel=1e-3)


def test_the_command_prints_the_table(whole, int8_store):
    command = ["sweep", "--features", str(int8_store), "--out", str(whole[0].out), "--head", "linear"]
    grid = ["--learning-rate", "1e-3,1e-2", "--weight-decay", "0,0.15", "--seeds", "3,4"]
    options = ["--epochs", "3", "--batch-size", "2", "--device", "cpu", "--checkpoint-minutes", "0"]
    result = CliRunner().invoke(app, [*command, *grid, *options], catch_exceptions=False)
    assert result.exit_code == 0 and "| chosen |" in result.stdout and "share batches" in result.stdout
    result = CliRunner().invoke(app, [*command, "--learning-rate", "high"], catch_exceptions=False)
    assert result.exit_code == 2 or "--learning-rate takes one or several numbers" in result.output
