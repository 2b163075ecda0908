"""What every network of the table must do, and a toy of each task that is added by a line and taken out again."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from s4v.errors import ConfigError, StoreMismatchError
from s4v.store.reader import open_store
from s4v.train.clips import ClipLoader, ClipPlan, codec_for, find_labelled_rows, plan_evaluation
from s4v.train.compare import compare_methods
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run
from s4v.train.networks import NETWORKS, find_network
from s4v.train.networks.contract import FrameNetwork, Network, NetworkKind, NetworkShape
from s4v.train.networks.parts import Tap
from s4v.train.networks.text_interaction import MeanInteraction
from s4v.train.recipe import Optimisation, ParameterGroup, Recipe
from s4v.train.run_folder import load_checkpoint, open_run
from s4v.train.scorer import Scorer
from s4v.train.settings import find_optimisation, plan_network
from s4v.train.tasks import TASKS, find_task

CPU = torch.device("cpu")
TRAINED = [(kind.name, task) for kind in NETWORKS.values() if kind.is_trained for task in kind.tasks]


def config_for(store, out, **changes):
    return TrainConfig(**{**dict(features=store, out=out, epochs=1, batch_size=4, device="cpu"), **changes})


@dataclass(frozen=True)
class ToyOptions:
    rank: int = 4
    shift: float = 0.0
    is_quick: bool = False


@dataclass(frozen=True, kw_only=True)
class ToyShape(NetworkShape):
    rank: int
    is_quick: bool


class ToyNetwork(Network):
    """Every second frame's tokens and every frame's pixels; class names' lengths as state that is no weight."""

    arrays = ("patches", "cls", "pixels")
    frames_per_token = 2

    def __init__(self, width, rank, num_classes):
        super().__init__()
        self.tap = Tap(width, 64)
        self.narrow = nn.Linear(64, rank)
        self.classifier = nn.Linear(rank + 3, num_classes)
        self.register_buffer("lengths", torch.zeros(num_classes))
        self.num_folded = self.num_reversed = 0
        self.folded_weight = None

    def prepare(self, store):
        self.lengths.copy_(torch.tensor([float(len(name)) for name in store.classes.names]))

    def parameter_groups(self):
        tap = tuple(self.tap.parameters())
        return [ParameterGroup(tap, 0.1), ParameterGroup((*self.narrow.parameters(), *self.classifier.parameters()))]

    def own_losses(self, output, batch):
        return {"small": 1e-3 * output.square().mean()}

    def reverse_batch(self, batch):
        self.num_reversed += 1
        return batch

    @contextmanager
    def folded(self, codec):
        self.num_folded += 1
        self.folded_weight = self.narrow.weight.T.contiguous()
        try:
            yield
        finally:
            self.folded_weight = None

    def forward(self, pixels, patches, cls, codec=None):
        assert pixels.shape[1] == 2 * patches.shape[1] == 2 * cls.shape[1]
        weight = self.narrow.weight.T if self.folded_weight is None else self.folded_weight
        read = self.tap.read_codes(patches[:, :, -1], codec, patches.shape[2] - 1).mean(dim=(1, 2))
        seen = torch.cat([read @ weight + self.narrow.bias, pixels.mean(dim=(1, 3, 4))], dim=1)
        return self.classifier(seen) + 0 * self.lengths


class Toy(NetworkKind):
    name = "toy"
    tasks = ("recognition",)
    reads = "tokens of every second frame, pixels of all"
    options = ToyOptions
    shape = ToyShape
    optimisation = {"recognition": Optimisation(schedule=lambda epoch, warmup, epochs: 0.5)}  # noqa: RUF012

    def find_recipe(self, task, width):
        return Recipe(2, 3e-3, warmup_epochs=0.0, batch_size=4)

    def plan(self, store, outputs, options, layers):
        return self.describe_shape(store, outputs, layers, rank=options.rank, is_quick=options.is_quick)

    def build(self, shape):
        return ToyNetwork(shape.width, shape.rank, shape.num_classes)


class ToyFrames(FrameNetwork):
    """The last class token, turned a little."""

    arrays = ("cls",)

    def __init__(self, width, embed_dim):
        super().__init__()
        self.turn = nn.Linear(width, embed_dim)
        self.interaction = MeanInteraction()
        self.text_arrays = self.interaction.text_arrays

    def forward(self, pixels, patches, cls, codec=None):
        return self.turn(cls[:, :, -1])


@dataclass(frozen=True, kw_only=True)
class ToyFrameShape(NetworkShape):
    embed_dim: int


class ToyRetrieval(NetworkKind):
    name = "toy-frames"
    tasks = ("retrieval",)
    reads = "class tokens"
    shape = ToyFrameShape

    def plan(self, store, outputs, options, layers):
        return self.describe_shape(store, outputs, layers, embed_dim=outputs.embed_dim)

    def build(self, shape):
        return ToyFrames(shape.width, shape.embed_dim)


@pytest.fixture
def toys(monkeypatch):
    """Two lines more in the table, for the time of a test."""
    for kind in (Toy(), ToyRetrieval()):
        monkeypatch.setitem(NETWORKS, kind.name, kind)


def test_a_toy_is_trained_evaluated_resumed_and_compared(toys, int8_store, tmp_path):
    config = config_for(int8_store, tmp_path / "toy", head="toy", epochs=None, set=("rank=5", "is_quick=yes"))
    summary = train_run(config)
    run = open_run(tmp_path / "toy")
    assert summary["epochs"] == 2 and run.shape == replace(run.shape, rank=5, is_quick=True)
    metrics = (tmp_path / "toy/metrics.jsonl").read_text()
    assert metrics.count('"learning_rate": 0.0015') == 2, "its own schedule, at half of its own rate"
    saved = load_file(tmp_path / "toy/best.safetensors")
    assert saved["lengths"].tolist() == [3.0, 4.0], "run and walk"
    assert evaluate_run(tmp_path / "toy")["videos"] == 2
    assert evaluate_run(tmp_path / "toy", is_backwards=True)["is_backwards"]
    assert train_run(replace(config, resume=True))["epochs"] == 2
    lines = compare_methods(config_for(int8_store, tmp_path / "c"), methods=("linear", "toy"))
    assert [line.reads for line in lines][1] == Toy.reads


def test_a_toy_embeds_frames_and_is_searched_with(toys, captioned_store, tmp_path):
    from s4v.retrieve.search import search_store

    train_run(config_for(captioned_store, tmp_path / "run", head="toy-frames", task="retrieval"))
    figures = evaluate_run(tmp_path / "run")
    assert figures["videos"] == 4 and set(figures["text_to_video"]) >= {"r1", "median_rank"}
    assert len(search_store(captioned_store, "a red ring moves left", run=tmp_path / "run", top=3)) == 3


def test_folding_and_reversing_are_asked_for_in_evaluation_alone(toys, int8_store):
    store = open_store(int8_store)
    config = config_for(int8_store, int8_store, head="toy")
    network = find_network("toy").build(plan_network(config, store))
    plans, _ = plan_evaluation(find_labelled_rows(store, "val"), num_frames=4, batch_size=2)
    scorer = Scorer(network, store, layers=store.layout.layers, num_frames=4, batch_size=2, device=CPU)
    forwards = scorer.run(plans)
    assert (network.num_folded, network.num_reversed) == (1, 0) and network.folded_weight is None
    backwards = replace(scorer, is_backwards=True).run(plans)
    assert network.num_reversed == len(plans) and not np.allclose(forwards, backwards), "its tokens are others then"
    assert find_optimisation(config).schedule(0, 0, 1) == 0.5


def test_options_of_a_network_are_checked(toys, int8_store, tmp_path):
    def plan(*words, head="toy"):
        return plan_network(config_for(int8_store, tmp_path, head=head, set=words), open_store(int8_store))

    assert plan("rank=7").rank == 7
    with pytest.raises(ConfigError, match="--set size: --head toy has no such option; it has is_quick, rank, shift"):
        plan("size=7")
    with pytest.raises(ConfigError, match="--set rank takes a value of type int; found 'many'"):
        plan("rank=many")
    with pytest.raises(ConfigError, match="--set is_quick takes a value of type bool; found '2'"):
        plan("is_quick=2")
    with pytest.raises(ConfigError, match="--set takes name=value; found 'rank'"):
        plan("rank")
    with pytest.raises(ConfigError, match="--set inputs: --head side4video has no such option; it has decorr"):
        plan("inputs=tokens", head="side4video")
    with pytest.raises(ConfigError, match="--task retrieval trains side4video, toy-frames; found --head toy"):
        config_for(int8_store, tmp_path, head="toy", task="retrieval")
    with pytest.raises(ConfigError, match="--side-width has no effect on --head toy"):
        config_for(int8_store, tmp_path, head="toy", side_width=64)
    with pytest.raises(ConfigError, match="--init has no effect on --head toy"):
        config_for(int8_store, tmp_path, head="toy", init=tmp_path)


def test_a_network_that_is_gone_leaves_runs_that_say_so(int8_store, tmp_path, monkeypatch):
    from s4v.errors import RunNotFoundError

    with monkeypatch.context() as patch:
        patch.setitem(NETWORKS, "toy", Toy())
        train_run(config_for(int8_store, tmp_path / "toy", head="toy"))
    with pytest.raises(
        RunNotFoundError, match="--head takes side4video, linear, attentive, tds-clip, dist; found 'toy'"
    ):
        open_run(tmp_path / "toy")


def test_offsets_that_a_store_lacks_are_refused(int8_store):
    with pytest.raises(StoreMismatchError, match=r"at offsets 0 .*missing -1,1\. .*--pixel-offsets=-1\.\.1"):
        ClipLoader(open_store(int8_store), arrays=("pixels",), layers=(0,), device=CPU, pixel_offsets=(-1, 0, 1))


def test_places_that_are_no_frame_are_zeros_and_masked(int8_store):
    store = open_store(int8_store)
    layers, rows = store.layout.layers, np.array([0, 1])
    whole = np.array([[0, 1, 2, 3], [0, 1, 2, 3]])
    short = np.array([[0, 1, 2, 3], [0, 1, -1, -1]])
    loader = ClipLoader(store, arrays=("patches", "cls", "pixels"), layers=layers, device=CPU)
    plans = [ClipPlan(rows, np.zeros(2, int), places, rows) for places in (whole, short)]
    full, padded = loader.load(plans)
    assert full.frame_mask is None and padded.frame_mask.tolist() == [[True] * 4, [True, True, False, False]]
    for name in ("patches", "cls", "pixels"):
        ours, theirs = getattr(padded, name), getattr(full, name)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1, :2], theirs[1, :2])
        assert not ours[1, 2:].any() and ours.dtype == theirs.dtype


@pytest.mark.parametrize(("name", "task"), TRAINED)
class TestEveryNetwork:
    @pytest.fixture
    def store(self, request, name, task):
        if TASKS[task].embeds_frames:
            return open_store(request.getfixturevalue("captioned_store"))
        needs = find_network(name).needs[task]
        fixture = "class_texts_store" if needs.class_texts else "int8_store"
        return open_store(request.getfixturevalue("offsets_store" if len(needs.pixel_offsets) > 1 else fixture))

    @pytest.fixture
    def network(self, name, task, store, tmp_path):
        shape = plan_network(config_for(store.path, tmp_path, head=name, task=task), store)
        torch.manual_seed(0)
        network = find_network(name).build(shape)
        network.prepare(store)
        return network

    @pytest.fixture
    def batch(self, network, store):
        loader = ClipLoader.for_network(network, store, layers=store.layout.layers, device=CPU)
        rows = np.flatnonzero(np.asarray(store.read_manifest(["status"])["status"]) == "ok")[:3]
        num_frames = network.fit_clips(store, 4, np.full(1, 8 if network.frames_per_token > 1 else 4))
        places = np.tile(np.arange(num_frames), (len(rows), 1))
        return next(loader.load([ClipPlan(rows, np.zeros(len(rows), int), places, rows)]))

    @pytest.fixture
    def codec(self, network, store):
        return codec_for(store, store.layout.layers, CPU) if "patches" in network.arrays else None

    def test_its_facts_are_said(self, name, task, network):
        kind = find_network(name)
        assert kind.name == name and kind.reads and set(kind.tasks) <= set(TASKS)
        assert set(network.arrays) <= {"patches", "cls", "pixels"} and 0 in network.pixel_offsets
        assert isinstance(network, FrameNetwork) == find_task(task).embeds_frames

    def test_what_it_needs_of_a_store_is_what_it_reads(self, name, task, network, store, tmp_path):
        kind, shape = find_network(name), plan_network(config_for(store.path, tmp_path, head=name, task=task), store)
        assert set(kind.needs) == set(kind.tasks)
        for needs in (kind.needs[task], kind.find_needs(task, kind.options()), kind.find_needs(task, shape)):
            assert set(network.arrays) == set(needs.arrays) and network.pixel_offsets == needs.pixel_offsets

    def test_its_output_is_the_tasks(self, task, network, store, batch, codec):
        found = network(*network.inputs(batch), codec)
        outputs = find_task(task).describe_outputs(store)
        expected = (3, outputs.num_classes) if outputs.num_classes else (3, 4, outputs.embed_dim)
        assert found.shape == expected and torch.isfinite(found).all()

    def test_codes_and_decoded_tokens_say_the_same(self, network, batch, codec):
        if codec is None:
            pytest.skip("it reads no codes")
        network.eval()
        decoded = torch.stack(
            [codec.decode(batch.patches[:, :, place], place) for place in range(batch.patches.shape[2])], dim=2
        )
        with torch.no_grad():
            of_codes = network(*network.inputs(batch), codec)
            of_tokens = network(*network.inputs(replace(batch, patches=decoded)), None)
        torch.testing.assert_close(of_codes, of_tokens, rtol=1e-4, atol=1e-4)

    def test_all_that_is_trained_is_in_one_group_and_gets_a_gradient(self, network, batch, codec):
        grouped = [id(p) for group in network.parameter_groups() for p in group.parameters]
        trained = {id(p) for p in network.parameters() if p.requires_grad}
        assert len(grouped) == len(set(grouped)) and set(grouped) == trained
        for parameter in network.parameters():
            if parameter.requires_grad and parameter.ndim > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.1)  # what begins at zero lets nothing through
        network(*network.inputs(batch), codec).square().sum().backward()
        without = [
            name
            for name, p in network.named_parameters()
            if p.requires_grad and p.grad is None and not name.startswith(("interaction.", "logit_scale"))
        ]
        assert without == []

    def test_computing_layers_again_changes_nothing_and_counts_a_batch_once(self, name, network, batch, codec):
        if not find_network(name).can_checkpoint_activations:
            pytest.skip("its layers are not computed again")
        start, found = {k: v.clone() for k, v in network.state_dict().items()}, []
        for is_again in (False, True):
            network.load_state_dict(start)
            network.checkpoints_activations = is_again
            network.zero_grad()
            network(*network.inputs(batch), codec).square().sum().backward()
            gradients = {f"gradient of {k}": p.grad for k, p in network.named_parameters() if p.grad is not None}
            found.append({**{k: v.clone() for k, v in network.state_dict().items()}, **gradients})
        torch.testing.assert_close(*found)

    def test_a_run_of_it_is_read_again_to_the_bit(self, name, task, store, tmp_path):
        train_run(config_for(store.path, tmp_path / "run", head=name, task=task))
        run = open_run(tmp_path / "run")
        assert run.shape == plan_network(config_for(store.path, tmp_path, head=name, task=task), store)
        again, state = load_checkpoint(run, "last").state_dict(), load_file(tmp_path / "run/last.safetensors")
        assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
