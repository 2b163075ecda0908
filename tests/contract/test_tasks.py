"""What every task of the table must do, and a toy that is added by a line and taken out again."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import nn

from s4v.errors import ConfigError
from s4v.files import read_json, write_json
from s4v.store.reader import open_store
from s4v.train.clips import find_labelled_rows, plan_evaluation
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run
from s4v.train.networks import NETWORKS
from s4v.train.networks.contract import Network, NetworkKind, NetworkShape, Outputs
from s4v.train.recipe import Recipe
from s4v.train.run_folder import open_run, open_store_of_run, read_metrics
from s4v.train.scorer import Scorer
from s4v.train.tasks import TASKS, find_task
from s4v.train.tasks.contract import EvaluationOptions, Task, refuse, require_rows, require_split


class Brightness(Task):
    """How bright a clip is, of every row that has a label: a figure that needs no annotation."""

    name = "brightness"
    figure = "val_fit"
    shown_figures = ("fit",)
    default_frames = 2

    def __init__(self, config, store):
        super().__init__(config, store)
        self.training = find_labelled_rows(store, config.train_split)
        self.validation = find_labelled_rows(store, config.val_split)
        require_rows(store, self.training, config, labels="labels", kind="labelled")

    @classmethod
    def find_recipe(cls, backbone_width):
        return Recipe(2, 1e-2, warmup_epochs=0.0, label_smoothing=None, batch_size=4)

    @classmethod
    def describe_outputs(cls, store):
        return Outputs(cls.name)

    @classmethod
    def check(cls, config):
        refuse(config.label_smoothing is not None, "--label-smoothing has no effect on --task brightness: leave it out")

    def compute_loss(self, network, output, batch, gather):
        return (output - batch.pixels.mean(dim=(1, 2, 3, 4))).square().mean()

    def validate(self, scorer):
        return {"val_fit": self.fit(scorer, self.validation)}

    @staticmethod
    def fit(scorer, data):
        plans, _ = plan_evaluation(data, num_frames=scorer.num_frames, batch_size=scorer.batch_size)
        return float(np.exp(-np.abs(scorer.run(plans)).mean()))

    @classmethod
    def evaluate_run(cls, run, options):
        store = open_store_of_run(run, options.features)
        data = find_labelled_rows(store, options.split)
        require_split(store, data, options.split, "labelled")
        figures = {"fit": cls.fit(Scorer.of_run(run, store, checkpoint=options.checkpoint), data)}
        write_json(run.path / f"eval_{options.file_stem}.json", figures)
        return figures

    @classmethod
    def render(cls, run, figures):
        return [f"{run}: {cls.describe_shares(figures)}"]


class Meter(Network):
    arrays = ("pixels",)

    def __init__(self):
        super().__init__()
        self.gain = nn.Linear(1, 1)

    def forward(self, pixels, patches, cls, codec=None):
        return self.gain(pixels.mean(dim=(1, 2, 3, 4))[:, None])[:, 0]


class MeterKind(NetworkKind):
    name = "meter"
    tasks = ("brightness",)
    reads = "pixels"

    def plan(self, store, outputs, options, layers):
        return self.describe_shape(store, outputs, layers)

    def build(self, shape):
        assert isinstance(shape, NetworkShape) and shape.num_classes == 0
        return Meter()


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setitem(TASKS, Brightness.name, Brightness)
    monkeypatch.setitem(NETWORKS, MeterKind.name, MeterKind())


def test_a_toy_task_is_trained_resumed_and_evaluated(toys, int8_store, tmp_path):
    options = dict(features=int8_store, task="brightness", head="meter", batch_size=4, device="cpu")
    config = TrainConfig(out=tmp_path / "run", **options)
    assert train_run(config)["epochs"] == 2
    run = open_run(tmp_path / "run")
    assert run.shape.task == "brightness" and run.frames == 2
    metrics = read_metrics(run)
    assert metrics[1]["train_loss"] < metrics[0]["train_loss"]
    figures = evaluate_run(tmp_path / "run", checkpoint="last")
    assert figures["fit"] == pytest.approx(metrics[-1]["val_fit"])
    assert find_task("brightness").render(run.path, figures) == [f"{run.path}: fit {figures['fit']:.1%}"]
    assert read_json(run.path / "eval_val.json") == figures
    with pytest.raises(ConfigError, match="--task brightness trains meter; found --head side4video"):
        TrainConfig(out=tmp_path / "other", **{**options, "head": "side4video"})
    with pytest.raises(ConfigError, match="--label-smoothing has no effect on --task brightness"):
        TrainConfig(out=tmp_path / "other", label_smoothing=0.1, **options)


def test_a_task_that_is_not_there_is_told(int8_store, tmp_path):
    with pytest.raises(ConfigError, match="--task takes recognition, retrieval; found 'brightness'"):
        TrainConfig(features=int8_store, out=tmp_path, task="brightness")


@pytest.mark.parametrize("name", TASKS)
class TestEveryTask:
    @pytest.fixture
    def store(self, request, name):
        return open_store(request.getfixturevalue("captioned_store" if TASKS[name].embeds_frames else "int8_store"))

    def test_its_facts_are_said(self, name, store):
        task = find_task(name)
        assert task.name == name and task.figure.startswith("val_") and task.default_frames > 0
        outputs = task.describe_outputs(store)
        assert outputs.task == name and bool(outputs.num_classes) != bool(outputs.embed_dim)
        assert any(name in kind.tasks and kind.is_trained for kind in NETWORKS.values())
        recipe = task.find_recipe(768).describe(None)
        assert set(recipe) <= {one.name for one in fields(TrainConfig)}

    def test_an_epoch_is_a_pure_function_of_its_number(self, name, store, tmp_path):
        config = TrainConfig(features=store.path, out=tmp_path, task=name, batch_size=4, device="cpu")
        task, again = find_task(name)(config, store), find_task(name)(config, store)
        for epoch in (0, 1):
            ours, theirs = (one.plan_epoch(epoch, num_frames=2) for one in (task, again))
            assert len(ours) == len(theirs) > 0
            for mine, other in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(mine.rows, other.rows)
                np.testing.assert_array_equal(mine.places, other.places)
        shares = [task.plan_epoch(0, num_frames=2, rank=rank, num_ranks=2) for rank in range(2)]
        first, second = ({*zip(one[0].rows, one[0].labels, strict=True)} for one in shares)
        assert not first & second

    def test_its_run_is_evaluated_and_told(self, name, store, tmp_path):
        train_run(
            TrainConfig(features=store.path, out=tmp_path / "run", task=name, epochs=1, batch_size=4, device="cpu")
        )
        metrics = read_metrics(open_run(tmp_path / "run"))[-1]
        assert find_task(name).figure in metrics
        figures = evaluate_run(tmp_path / "run", is_backwards=True)
        assert (tmp_path / "run/eval_val_backwards.json").is_file() and figures["is_backwards"]
        lines = find_task(name).render(tmp_path / "run", figures)
        assert lines and all("\n" not in line for line in lines) and "played backwards" in lines[0]
        assert "%" in find_task(name).describe_shares(metrics)

    def test_options_of_other_tasks_are_refused(self, name):
        task = find_task(name)
        strange = EvaluationOptions(num_clips=2, with_dual_softmax=True)
        with pytest.raises(ConfigError, match="has no effect on a .* run: leave it out"):
            task.check_evaluation(strange)


def test_scores_that_are_not_finite_stop_an_evaluation(toys, int8_store, tmp_path):
    from s4v.errors import EnvironmentFailedError

    train_run(TrainConfig(features=int8_store, out=tmp_path / "run", head="linear", epochs=1, device="cpu"))
    store, run = open_store(int8_store), open_run(tmp_path / "run")
    scorer = Scorer.of_run(run, store)
    with torch.no_grad():
        next(scorer.network.parameters()).fill_(float("nan"))
    from s4v.train.tasks.recognition import evaluate_classes

    with pytest.raises(EnvironmentFailedError, match="scores are not finite"):
        evaluate_classes(scorer, find_labelled_rows(store, "val"))
