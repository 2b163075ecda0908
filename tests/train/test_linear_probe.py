"""The linear probe: its norm, penalty and rate, and that it arrives where logistic regression does."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from s4v.errors import ConfigError, RunExistsError
from s4v.store.reader import StoreReader, open_store
from s4v.train.clips import ClipLoader, find_labelled_rows, plan_evaluation
from s4v.train.config import TrainConfig
from s4v.train.loop import train_run
from s4v.train.networks import NETWORKS
from s4v.train.networks.linear_probe import LinearProbe, LinearShape, RunningNorm
from s4v.train.run_folder import load_checkpoint, open_run
from s4v.train.settings import resolve_preset
from s4v.train.sweep import sweep_heads

PENALTY = 0.05


def config_for(store, out, **changes):
    values = dict(features=store, out=out, epochs=60, batch_size=4, device="cpu", head="linear", warmup_epochs=4.0)
    return TrainConfig(**{**values, "validate_every": 60, "checkpoint_minutes": 60.0, **changes})


def read_class_tokens(store, num_frames):
    """The mean class token of each training clip (n, D), and its label."""
    data = find_labelled_rows(store, "train")
    plans, _ = plan_evaluation(data, num_frames=num_frames, batch_size=len(data))
    loader = ClipLoader(store, arrays=("cls",), layers=store.layout.layers, device=torch.device("cpu"))
    (batch,) = loader.load(plans)
    return batch.cls[:, :, -1].mean(dim=1), batch.labels


def find_objective(x, labels, weight, bias, penalty):
    return F.cross_entropy(F.linear(x, weight, bias), labels, label_smoothing=0.1) + penalty / 2 * weight.square().sum()


def fit_by_lbfgs(x, labels, num_classes, penalty):
    """The lowest objective that there is, for it is convex."""
    weight, bias = (torch.zeros(*shape, dtype=torch.float64) for shape in ((num_classes, x.shape[1]), (num_classes,)))
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def measure():
        optimizer.zero_grad()
        loss = find_objective(x, labels, *parameters, penalty)
        loss.backward()
        return loss

    optimizer.step(measure)
    return float(measure().detach())


def test_a_trained_probes_objective_is_within_a_hundredth_of_lbfgs(int8_store, tmp_path):
    """At the same penalty, on the same clips, standardised in the same way; in steps of half of the videos."""
    own = dict(learning_rate=1e-2, weight_decay=0.0, set=(f"penalty={PENALTY}",))
    all_frames = dict(frames=6, val_split="train")  # a clip is the same in every epoch
    train_run(config_for(int8_store, tmp_path / "run", **own, **all_frames))
    run = open_run(tmp_path / "run")
    probe = load_checkpoint(run, "last").double()
    tokens, labels = read_class_tokens(open_store(int8_store), run.frames)
    with torch.no_grad():
        x = (tokens.double() - tokens.double().mean(0)) / (tokens.double().var(0, correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(probe.norm(tokens).double(), x, rtol=1e-3, atol=1e-3)
        ours = float(find_objective(x, labels, probe.classifier.weight, probe.classifier.bias, PENALTY))
    lowest = fit_by_lbfgs(x, labels, 2, PENALTY)
    assert lowest <= ours * (1 + 1e-6) and ours <= 1.01 * lowest


def test_the_norm_counts_all_clips_so_far():
    torch.manual_seed(0)
    clips, norm = 3 + 2 * torch.randn(40, 5), RunningNorm(5)
    for batch in clips.split(8):
        output = norm(batch)
    torch.testing.assert_close(norm.running_mean, clips.mean(0))
    torch.testing.assert_close(norm.running_var, clips.var(0, correction=0))
    torch.testing.assert_close(output, norm.eval()(clips[-8:]))
    norm.eval()(clips * 9)
    assert int(norm.num_batches_tracked) == 5, "an evaluation counts nothing"


def test_the_penalty_is_part_of_the_loss():
    probe = LinearProbe(3, 2, penalty=0.5)
    with torch.no_grad():
        probe.classifier.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 2, 0]]))
    assert probe.own_losses(None, None)["penalty"].item() == pytest.approx(1.25)
    assert LinearProbe(3, 2).own_losses(None, None) == {}


def test_a_penalty_below_zero_is_refused(int8_store, tmp_path):
    with pytest.raises(ConfigError, match="--set penalty takes a number from 0 up; found -1"):
        train_run(config_for(int8_store, tmp_path / "run", set=("penalty=-1",)))


def test_a_probe_from_before_has_the_norm_that_it_had(int8_store, tmp_path):
    """Its shape says nothing of a norm; killed, it goes on with the same command as it began."""
    config = config_for(int8_store, tmp_path / "run", epochs=3, validate_every=1)
    train_run(replace(config, out=tmp_path / "new"))
    out = shutil.copytree(tmp_path / "new", tmp_path / "run")
    saved = json.loads((out / "config.json").read_text())
    del saved["head"]["counts_all_clips"], saved["head"]["penalty"]
    (out / "config.json").write_text(json.dumps(saved))
    for name in ("state.safetensors", "metrics.jsonl", "last.json"):
        (out / name).unlink()
    shape = open_run(out).shape
    assert isinstance(shape, LinearShape) and not shape.counts_all_clips and shape.penalty == 0.0
    assert type(load_checkpoint(open_run(out), "best").norm).__name__ == "BatchNorm"
    train_run(replace(config, resume=True))
    assert not open_run(out).shape.counts_all_clips
    old, new = (load_file(folder / "last.safetensors") for folder in (out, tmp_path / "new"))
    assert old.keys() == new.keys() and not np.allclose(old["norm.running_var"], new["norm.running_var"])


@pytest.mark.parametrize(("head", "rate"), [("linear", 3e-3), ("attentive", 1e-3)])
@pytest.mark.parametrize("width", [192, 768, 1792])
def test_a_probe_alone_has_a_rate_of_its_own_whatever_the_backbone(int8_store, width, head, rate):
    attributes = copy.deepcopy(open_store(int8_store).attributes)
    attributes["layout"]["width"] = width
    store = StoreReader(Path("store/x.zarr"), attributes)
    config = TrainConfig(features=store.path, out=Path("runs/x"), head=head)
    found = resolve_preset(config, store)
    assert (found.learning_rate, found.weight_decay, found.epochs, found.warmup_epochs) == (rate, 0.15, 30, 4.0)
    assert rate in NETWORKS[head].tried_rates, "what `s4v compare` may choose, too"
    assert resolve_preset(replace(config, learning_rate=0.5), store).learning_rate == 0.5
    side = resolve_preset(replace(config, head="side4video"), store)
    assert side.learning_rate == (1e-3 if width <= 768 else 1e-4), "the reference's"


def test_a_probe_from_before_goes_on_at_the_rate_that_it_had(int8_store, tmp_path):
    """Without the option, as it was begun; an option against it is refused."""
    old = config_for(int8_store, tmp_path / "old", epochs=2, validate_every=1, learning_rate=1e-3, weight_decay=0.1)
    train_run(old)
    (old.out / "state.safetensors").unlink()
    (old.out / "metrics.jsonl").unlink()
    again = replace(old, learning_rate=None, weight_decay=None, resume=True)
    before = (old.out / "last.safetensors").read_bytes()
    train_run(again)
    assert (old.out / "last.safetensors").read_bytes() == before
    with pytest.raises(RunExistsError, match="learning_rate 0.001 there, 0.003 here"):
        train_run(replace(again, learning_rate=3e-3))


def test_a_sweep_from_before_goes_on_at_the_rate_that_it_had(int8_store, tmp_path):
    base = config_for(int8_store, tmp_path / "sweep", epochs=1, validate_every=1)
    begun = sweep_heads(base, learning_rates=(1e-3,), weight_decays=(0.0, 0.1))
    assert sweep_heads(base, weight_decays=(0.0, 0.1)) == begun
    new = sweep_heads(replace(base, out=tmp_path / "new"), weight_decays=(0.0, 0.1))
    assert [(head.learning_rate, head.weight_decay) for head in new.heads] == [(3e-3, 0.0), (3e-3, 0.1)]
