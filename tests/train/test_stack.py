"""Several heads in one read: each is what it would be alone, and one that ends does not end the others."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from s4v.store.reader import StoreReader
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_heads, train_run
from s4v.train.networks.linear_probe import classify_together
from s4v.train.networks.parts import Classifier
from s4v.train.run_folder import open_run, read_metrics
from s4v.train.tasks import recognition as tasks

RATES = (1e-4, 1e-3, 3e-2)


def config_for(store, out, **changes):
    values = dict(features=store, out=out, epochs=2, batch_size=4, device="cpu", warmup_epochs=1.0)
    return TrainConfig(**{**values, "checkpoint_minutes": 0.0, **changes})


def heads_of(config, out, rates=RATES):
    return [replace(config, out=out / str(place), learning_rate=rate) for place, rate in enumerate(rates)]


SIDE = dict(side_width=64, layers=(1, 5))


LINEAR = dict(head="linear")


@pytest.mark.parametrize(
    "options",
    [
        SIDE,
        dict(head="attentive", clip_norm=0.5),
        dict(LINEAR, clip_norm=0.1, set=("penalty=0.01",)),
        dict(LINEAR, precision="bf16"),
    ],
    ids=["side4video", "attentive", "linear", "linear-bf16"],
)
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
    assert sorted(rows) == of_one, "in training and in validation"


def test_one_product_for_all_probes_is_each_ones_own():
    """As a GPU computes it; a CPU has a product for each, whose bits are those of a probe alone."""
    torch.manual_seed(0)
    x, classifiers = torch.randn(5, 48), [Classifier(48, 7) for _ in range(3)]
    together = classify_together(x, classifiers)
    for one, own in zip(together, classifiers, strict=True):
        torch.testing.assert_close(one, own(x), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classify_together(x, classifiers), together), "float32 in any precision"


@pytest.mark.parametrize("options", [SIDE, LINEAR], ids=["side4video", "linear"])
def test_a_head_that_is_not_finite_stops_alone(assert_same_run, options, int8_store, tmp_path, caplog):
    config = config_for(int8_store, tmp_path, epochs=3, **options)
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


def test_a_training_goes_on_as_long_as_a_head_is_left(int8_store, tmp_path):
    config = config_for(int8_store, tmp_path, **SIDE)
    summaries = train_heads(heads_of(config, tmp_path / "h", (1e30, 1e31)), tmp_path / "state")
    assert all("became NaN or infinite in epoch 1" in one["stopped"] for one in summaries)


@pytest.mark.parametrize("options", [SIDE, LINEAR], ids=["side4video", "linear"])
def test_a_head_that_gets_no_better_stops_alone(assert_same_run, options, int8_store, tmp_path):
    """As it does alone; what it left is as it left it."""
    config = config_for(int8_store, tmp_path, epochs=5, patience=2, **options)
    rates = (1e-12, 3e-2)
    summaries = train_heads(heads_of(config, tmp_path / "h", rates), tmp_path / "state")
    for place, rate in enumerate(rates):
        alone = train_run(replace(config, out=tmp_path / f"alone{place}", learning_rate=rate))
        assert_same_run(tmp_path / f"h/{place}", tmp_path / f"alone{place}")
        assert summaries[place]["epochs"] == alone["epochs"]
    assert summaries[0]["epochs"] == 3


@pytest.mark.parametrize(
    ("batch", "options"),
    [
        (4, SIDE),
        (10, LINEAR),
        *(pytest.param(*at, marks=pytest.mark.slow) for at in ((0, SIDE), (10, SIDE), (4, LINEAR))),
    ],
)
def test_heads_that_were_stopped_go_on_to_the_same_bit(
    assert_same_run, batch, options, int8_store, tmp_path, interrupted
):
    """In the middle of a step: some heads have learnt from its batch, others not."""
    config = config_for(int8_store, tmp_path, **options)
    with interrupted(tasks, "classification_loss", batch + 1):
        train_heads(heads_of(config, tmp_path / "h"), tmp_path / "state")
    train_heads([replace(one, resume=True) for one in heads_of(config, tmp_path / "h")], tmp_path / "state")
    train_heads(heads_of(config, tmp_path / "whole"), tmp_path / "whole-state")
    for place in range(len(RATES)):
        assert_same_run(tmp_path / f"h/{place}", tmp_path / f"whole/{place}")
    ours, theirs = load_file(tmp_path / "state"), load_file(tmp_path / "whole-state")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_heads_that_differ_in_more_than_they_may_are_refused(int8_store, tmp_path):
    config = config_for(int8_store, tmp_path)
    with pytest.raises(ValueError, match="heads of one training differ in out, learning_rate, weight_decay"):
        train_heads([config, replace(config, out=tmp_path / "b", epochs=3)], tmp_path / "state")
    with pytest.raises(ValueError, match="share an order_seed"):
        train_heads([config, replace(config, out=tmp_path / "b", seed=3)], tmp_path / "state")
    assert not list(tmp_path.iterdir())


def test_metrics_of_heads_are_their_own(int8_store, tmp_path):
    told = []
    heads = heads_of(config_for(int8_store, tmp_path, **SIDE), tmp_path / "h")
    train_heads(heads, tmp_path / "state", lambda metrics, epochs: told.append((len(metrics), epochs)))
    assert told == [(3, 2), (3, 2)]
    rates = [read_metrics(open_run(head.out))[-1]["learning_rate"] for head in heads]
    assert [rate / rates[0] for rate in rates] == pytest.approx([rate / RATES[0] for rate in RATES])
    assert all(math.isfinite(json.loads((head.out / "stats.json").read_text())["seconds"]) for head in heads)
