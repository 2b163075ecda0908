"""Several heads in one read: each is what it would be alone, and one that ends does not end the others."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from s4v.errors import EnvironmentFailedError
from s4v.store.reader import StoreReader, open_store
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_heads, train_run
from s4v.train.run_folder import open_run, read_metrics
from s4v.train.tasks import recognition as tasks

RATES = (1e-4, 1e-3, 3e-2)


def config_for(store, out, **changes):
    values = dict(features=store, out=out, epochs=2, batch_size=4, device="cpu", warmup_epochs=1.0)
    return TrainConfig(**{**values, "checkpoint_minutes": 0.0, **changes})


def heads_of(config, out, rates=RATES):
    return [replace(config, out=out / str(place), learning_rate=rate) for place, rate in enumerate(rates)]


SIDE = dict(side_width=64, layers=(1, 5))


@pytest.mark.parametrize("options", [SIDE, dict(head="attentive", clip_norm=0.5)], ids=["side4video", "attentive"])
def test_heads_of_one_read_are_what_they_are_alone(assert_same_run, options, int8_store, tmp_path):
    config = config_for(int8_store, tmp_path, **options)
    summaries = train_heads(heads_of(config, tmp_path / "h"), tmp_path / "state")
    for place, rate in enumerate(RATES):
        alone = train_run(replace(config, out=tmp_path / f"alone{place}", learning_rate=rate))
        assert_same_run(tmp_path / f"h/{place}", tmp_path / f"alone{place}")
        timeless = {"seconds", "data_wait_share", "run", "stopped"}
        assert {k: v for k, v in summaries[place].items() if k not in timeless} == {
            k: v for k, v in alone.items() if k not in timeless
        }
    assert evaluate_run(tmp_path / "h/1")["videos"] == 2, "each is a run"


def test_training_clips_are_read_once_for_all_heads(int8_store, tmp_path, monkeypatch):
    rows, read = [], StoreReader.read_clips

    def watch(reader, chosen, *arguments, **options):
        rows.extend(chosen.tolist())
        return read(reader, chosen, *arguments, **options)

    monkeypatch.setattr(StoreReader, "read_clips", watch)
    config = config_for(int8_store, tmp_path, **SIDE)
    train_run(replace(config, out=tmp_path / "one"))
    of_one, rows[:] = sorted(rows), []
    train_heads(heads_of(config, tmp_path / "h"), tmp_path / "state")
    training = [row for row in rows if open_store(int8_store).read_manifest(["split"])["split"][row].as_py() == "train"]
    assert training and sorted(training) == [row for row in of_one if row in set(training)]


def test_a_head_that_is_not_finite_stops_alone(assert_same_run, int8_store, tmp_path, caplog):
    config = config_for(int8_store, tmp_path, epochs=3, **SIDE)
    rates = (1e-3, 1e30, 1e-4)
    summaries = train_heads(heads_of(config, tmp_path / "h", rates), tmp_path / "state")
    assert [one["stopped"] is None for one in summaries] == [True, False, True]
    assert [one["epochs"] for one in summaries] == [3, 0, 3]
    assert "h/1 stops, the others go on: " in caplog.text and "became NaN or infinite in epoch 1" in caplog.text
    for place in (0, 2):
        train_run(replace(config, out=tmp_path / f"alone{place}", learning_rate=rates[place]))
        assert_same_run(tmp_path / f"h/{place}", tmp_path / f"alone{place}")
    again = [replace(one, resume=True) for one in heads_of(config, tmp_path / "h", rates)]
    assert [one["stopped"] for one in train_heads(again, tmp_path / "state")] == [one["stopped"] for one in summaries]


def test_a_training_without_a_finite_head_is_an_error(int8_store, tmp_path):
    config = config_for(int8_store, tmp_path, **SIDE)
    with pytest.raises(EnvironmentFailedError, match="no head is left: .* became NaN or infinite in epoch 1"):
        train_heads(heads_of(config, tmp_path / "h", (1e30, 1e31)), tmp_path / "state")


def test_a_head_that_gets_no_better_stops_alone(assert_same_run, int8_store, tmp_path, monkeypatch):
    """As it does alone; what it left is as it left it."""
    config = config_for(int8_store, tmp_path, epochs=5, patience=2, **SIDE)
    rates = (1e-12, 3e-2)
    summaries = train_heads(heads_of(config, tmp_path / "h", rates), tmp_path / "state")
    for place, rate in enumerate(rates):
        alone = train_run(replace(config, out=tmp_path / f"alone{place}", learning_rate=rate))
        assert_same_run(tmp_path / f"h/{place}", tmp_path / f"alone{place}")
        assert summaries[place]["epochs"] == alone["epochs"]
    assert summaries[0]["epochs"] == 3


@pytest.mark.parametrize("batch", range(0, 12, 5))
def test_heads_that_were_stopped_go_on_to_the_same_bit(assert_same_run, batch, int8_store, tmp_path, monkeypatch):
    """In the middle of a step: some heads have learnt from its batch, others not."""
    seen, loss = [], tasks.classification_loss

    def stop(*arguments):
        seen.append(None)
        if len(seen) == batch + 1:
            raise KeyboardInterrupt
        return loss(*arguments)

    config = config_for(int8_store, tmp_path, **SIDE)
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "classification_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            train_heads(heads_of(config, tmp_path / "h"), tmp_path / "state")
    train_heads([replace(one, resume=True) for one in heads_of(config, tmp_path / "h")], tmp_path / "state")
    train_heads(heads_of(config, tmp_path / "whole"), tmp_path / "whole-state")
    for place in range(len(RATES)):
        assert_same_run(tmp_path / f"h/{place}", tmp_path / f"whole/{place}")
    ours, theirs = load_file(tmp_path / "state"), load_file(tmp_path / "whole-state")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_heads_that_differ_in_more_than_they_may_are_refused(int8_store, tmp_path):
    config = config_for(int8_store, tmp_path)
    with pytest.raises(
        ValueError, match="heads of one training differ in out, learning_rate, weight_decay, seed alone"
    ):
        train_heads([config, replace(config, out=tmp_path / "b", epochs=3)], tmp_path / "state")
    assert not list(tmp_path.iterdir())


def test_metrics_of_heads_are_their_own(int8_store, tmp_path):
    told = []
    heads = heads_of(config_for(int8_store, tmp_path, **SIDE), tmp_path / "h")
    train_heads(heads, tmp_path / "state", lambda metrics, epochs: told.append((len(metrics), epochs)))
    assert told == [(3, 2), (3, 2)]
    rates = [read_metrics(open_run(head.out))[-1]["learning_rate"] for head in heads]
    assert [rate / rates[0] for rate in rates] == pytest.approx([rate / RATES[0] for rate in RATES])
    assert all(math.isfinite(json.loads((head.out / "stats.json").read_text())["seconds"]) for head in heads)
