"""Networks of ours against golden files that references' own code made; `--golden DIR` takes those of any folder.

Each test checks one thing of each case, and skips with the reason where the case lacks the file.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from s4v.backbone.open_clip_texts import build_clip_text_tower
from s4v.tests.golden.cases import DATA, find_cases, our_names, relative
from s4v.train.config import TrainConfig
from s4v.train.networks import NETWORKS, find_network, parts
from s4v.train.networks.text_interaction import TextBatch, contrastive_loss
from s4v.train.paper.checkpoint_names import read_official_checkpoint
from s4v.train.recipe import OPTIMIZERS, learning_rate_at, set_learning_rate
from s4v.train.settings import find_optimisation

LEAN = pytest.mark.parametrize(
    ("least_width", "checkpoints"),
    [(0, False), (10**6, False), (10**6, True)],
    ids=["made again", "kept", "layers again"],
)
AGAIN = pytest.mark.parametrize("checkpoints", [False, True], ids=["once", "layers again"])


def test_there_are_cases(request):
    root = request.config.getoption("--golden")
    if root is not None:
        assert Path(root).is_dir(), f"--golden {root}: no such folder"
        assert find_cases(root), f"--golden {root}: no folder in it holds golden files"
    assert find_cases(DATA)


def test_evaluation_equals_the_reference(case):
    """Output, and what the case has of the inside."""
    case.subject and case.require_io("eval_output")
    for name, found in case.subject.trace(case.load(), case.inputs).items():
        if name in case.io:
            assert relative(found.reshape(case.io[name].shape), case.io[name]) < 1e-5, name


@AGAIN
def test_training_equals_the_reference(case, checkpoints, monkeypatch):
    """Output, and the running statistics that it leaves. What is computed again in the backward pass counts once."""
    monkeypatch.setattr(parts, "_LEAN_FROM_WIDTH", 0)
    subject = case.subject
    expected = case.require_io("train_output")
    network = case.load().train()
    network.checkpoints_activations = checkpoints
    output = network(*case.inputs)
    assert relative(output, expected) < 1e-5
    output.sum().backward()
    state = network.state_dict()
    assert not any(name.startswith("after_train.") for name in case.io) or case.statistics
    for name, tensor in case.statistics.items():
        assert relative(state[name], tensor) < 1e-5, (subject.variant, name)


def pair_gradients(case, found):
    """Ours and the reference's by name; of one of three projections our part of them."""
    for name, expected in case.subject.rename(case.read_tensors("grads.safetensors")).items():
        layer, _, part = name.rpartition(".")
        ours = found[name] if name in found else found[layer].chunk(3)["qkv".index(part)]
        yield name, ours, expected


def find_layer(name):
    """What is not a weight or a bias is a layer of its own."""
    return re.sub(r"\.(weight|bias)(\.[qkv])?$", "", name)


def find_scales(pairs, found):
    """The largest gradient of each layer; of one whose weight the golden file lacks, ours of that is looked at too."""
    scales = {}
    for name, _, expected in pairs:
        layer = find_layer(name)
        scales[layer] = max(scales.get(layer, 0.0), expected.abs().max().item())
    told = {name for name, _, _ in pairs}
    for layer in scales:
        weight = f"{layer}.weight"
        if weight in found and weight not in told:
            scales[layer] = max(scales[layer], found[weight].abs().max().item())
    return scales


@LEAN
def test_gradients_equal_the_reference(case, least_width, checkpoints, monkeypatch):
    """Relative to the largest gradient of the same layer, weight and bias together.

    Batch norm makes the gradients of biases before it sums that nearly cancel (some are zero): relative to their own
    size both sides are rounding. The next test compares them without that rounding on our side.
    """
    monkeypatch.setattr(parts, "_LEAN_FROM_WIDTH", least_width)
    golden, subject = case.subject and case.read_tensors("grads.safetensors"), case.subject
    found = case.find_gradients(torch.float32, checkpoints)
    pairs = list(pair_gradients(case, found))
    assert set(our_names(subject, golden)) == set(golden), "every golden gradient has a place in our network"
    scales = find_scales(pairs, found)
    for name, ours, expected in pairs:
        error = (ours - expected).abs().max().item() / scales[find_layer(name)]
        assert error < 1e-5, (name, error)


def test_gradients_equal_the_reference_in_double_precision(case):
    """Each tensor relative to its own size; what is left is the rounding of the golden file itself.

    But for gradients that cancel: a bias directly before a batch norm changes nothing, nor does a constant before a
    difference to a maximum.
    """
    if case.subject:
        case.require("grads.safetensors")
    found = case.find_gradients(torch.float64)
    pairs = list(pair_gradients(case, found))
    scales, num_compared = find_scales(pairs, found), 0
    for name, ours, expected in pairs:
        if ours.abs().max() > 1e-3 * scales[find_layer(name)]:
            assert relative(expected.double(), ours) < 2e-5, name
            num_compared += 1
    assert num_compared > len(pairs) / 2


def test_sizes_are_told_by_the_checkpoint(case):
    """What its names and shapes tell is what the config says."""
    subject = case.subject
    path = case.require("checkpoint.pt")
    official = read_official_checkpoint(path, tuple(case.config["tapped_layers"]))
    expected = subject.describe(case.config, official.state)
    assert official.released.title == subject.released.title
    for name in ("name", "task", "layers", "width", "num_patches", "patch_px", "side_width"):
        assert getattr(official.shape, name) == getattr(expected, name), name
    if not find_network(expected.name).classifies_by_text:
        assert official.shape.num_classes == expected.num_classes
    for name in (
        "temporal_width",
        "frames",
        "pooling_layers",
        "family",
        "embed_dim",
        "norm_eps",
        "has_projection_bias",
        "interaction",
    ):
        assert getattr(official.shape, name, None) == getattr(expected, name, None), name
    assert official.depth == case.config["layers"]


def test_the_text_tower_in_the_file_is_the_references(case):
    """Ids of words to texts. The tensors tell its sizes, the config its heads."""
    case.subject.describe(case.config)
    ids, expected = case.require_io("text_tokens"), case.require_io("text_features")
    path = case.require("checkpoint.pt")
    text = read_official_checkpoint(path).text
    tower = build_clip_text_tower(text, str(path), case.config.get("text_heads"))
    with torch.inference_mode():
        found = tower._tower(ids.long())
    assert relative(found, expected) < 1e-6


def test_every_parameter_decays_and_moves_as_the_references(case):
    """By name. The reference's rates are of its own base rate."""
    subject = case.subject
    golden = case.read_json("groups.json")
    network = subject.build(case.config, golden["trained"])
    optimizer = subject.make_optimizer(network, subject.make_config())
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = {names[id(p)]: (g["weight_decay"], g["rate_share"]) for g in optimizer.param_groups for p in g["params"]}
    renamed = our_names(subject, golden["trained"])
    assert all(subject.is_elsewhere(name) for name in golden["trained"] if name not in renamed)
    idle = set(our_names(subject, golden.get("no_gradient", ())).values())
    unit = max(told["rate"] for told in golden["trained"].values())
    for theirs, ours in renamed.items():
        expected = golden["trained"][theirs]
        if ours not in idle or ours in found:
            assert found[ours] == (expected["weight_decay"], pytest.approx(expected["rate"] / unit)), theirs
    assert set(found) <= set(renamed.values()), "nothing else is trained"
    not_trained = {name for name in golden["not_trained"] if not subject.is_elsewhere(name)}
    assert not set(our_names(subject, not_trained).values()) & set(found)


def test_new_networks_begin_as_the_references_in_distribution(case):
    """Mean, spread and furthest value of eight networks beside those of the reference's."""
    subject = case.subject
    golden = case.read_json("init.json")
    drawn = []
    for seed in range(8):
        torch.manual_seed(seed)
        drawn.append(dict(subject.build(case.config, golden["parameters"]).named_parameters()))
    renamed = our_names(subject, golden["parameters"])
    assert set(renamed) == set(golden["parameters"])
    for theirs, told in golden["parameters"].items():
        values = torch.stack([parameters[renamed[theirs]].detach() for parameters in drawn])
        require_drawn_alike(
            values.flatten(1).double().numpy(), told, theirs, golden["constructions"], case.config.get("embed_dim")
        )
    assert {name for name in drawn[0] if not subject.is_given(name)} == set(renamed.values())


def require_drawn_alike(values, told, name, constructions, embed_dim):
    """Of a parameter (8, n) of eight networks of ours.

    Args:
        values: As they begin.
        told: What init.json says of it.
        name: The reference's.
        constructions: How many networks of the reference were looked at.
        embed_dim: E, of retrieval.
    """
    if told["constant"]:
        np.testing.assert_array_equal(values, told["value"], err_msg=name)
        return
    size = math.prod(told["shape"])
    parts_joined = 3 if re.search(r"attn\.[qkv]_proj", name) else 1  # of one product here
    # EVA's weighting networks are 1024 wide in the reference, whatever the model: their bounds go by their width.
    is_wide = "weight_fc" in name and values.shape[1] != size
    assert is_wide or values.shape[1] == parts_joined * size, name
    if size == 1:  # one number in each: nothing to compare but that they are drawn
        assert values.std() > 0, name
        return
    spread = float(np.sqrt(np.mean(np.square(told["std"]))))
    if is_wide:
        spread *= (told["shape"][-1] / embed_dim) ** 0.5
    count = min(values.size, constructions * size)
    assert values.std() == pytest.approx(spread, rel=0.03 + 2.5 / count**0.5), name
    assert abs(values.mean()) < 5 * spread / values.size**0.5, name
    # A uniform distribution ends at 1.73 deviations, a normal one does not.
    furthest = np.abs(values - values.mean()).max() / values.std()
    assert (furthest < 2.2) == (told["farthest_over_std"] < 2.2), name


def require_equal_state(case, network, golden):
    """Each tensor to 1e-5 of its largest number."""
    state = {**network.state_dict(), **dict(network.named_parameters())}
    expected = case.subject.rename(golden)
    assert len(expected) == len(golden) > 0
    for name, tensor in expected.items():
        assert relative(state[name].detach(), tensor) < 1e-5, name


def test_steps_of_recognition_are_the_references(case):
    subject = case.subject
    told, golden = case.read_json("steps.json"), case.read_tensors("steps.safetensors")
    if "labels" not in told:
        pytest.skip(f"{case.name}: steps of another task")
    network = case.load().train()
    config = subject.make_config(learning_rate=told["rate"])
    assert (config.weight_decay, config.label_smoothing) == (told["weight_decay"], told["label_smoothing"])
    optimizer = subject.make_optimizer(network, config)
    labels, losses = torch.tensor(told["labels"]), []
    for _ in range(told["steps"]):
        loss = F.cross_entropy(network(*case.inputs), labels, label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(golden.pop("losses").tolist(), rel=1e-5)
    require_equal_state(case, network, golden)


@pytest.mark.parametrize("name", ["constant", "scheduled"])
def test_steps_of_retrieval_are_the_references(case, name, monkeypatch):
    subject = case.subject
    told, whole = case.read_json("steps.json"), case.read_tensors("steps.safetensors")
    if name not in told:
        pytest.skip(f"{case.name}: no such steps of retrieval")
    golden = {key.removeprefix(f"{name}."): value for key, value in whole.items() if key.startswith(f"{name}.")}
    given = {key.removeprefix("input."): value for key, value in whole.items() if key.startswith("input.")}
    settings = told[name]
    share = settings["backbone_coefficient"]
    monkeypatch.setattr("s4v.train.networks.side4video._BACKBONE_RATE_SHARE", share)
    network = subject.build(case.config, given)
    weighting = subject.rename({key: value for key, value in given.items() if "weight_fc" in key})
    network.load_state_dict(case.state | weighting | {"logit_scale": torch.tensor(told["logit_scale_log_before"])})
    config = subject.make_config(learning_rate=settings["rate"])
    optimisation, optimizer = find_optimisation(config), subject.make_optimizer(network, config)
    texts, losses, norms = TextBatch(given["text_tokens"], given["text_mask"].bool(), None), [], []
    for step in range(told["steps"]):
        rate = settings["rate"]
        if settings["total_steps"] > 0:
            epoch = (step + OPTIMIZERS[config.optimizer].rate_place) / settings["total_steps"] * config.epochs
            rate = learning_rate_at(epoch, config, optimisation.schedule)
        set_learning_rate(optimizer.param_groups, rate)
        frames = network(*case.inputs)
        loss = contrastive_loss(network.interaction(texts, frames).similarities, network.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm).item())
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(golden.pop("losses").tolist(), rel=1e-5)
    assert norms == pytest.approx(told["gradient_norms_before_clipping"][name], rel=1e-3)
    require_equal_state(case, network, golden)


def test_rates_are_the_references_from_the_start_to_the_end(schedule):
    """Of each recipe in the file that a preset of ours stands for."""
    golden, presets = json.loads(schedule.read_text()), all_presets()
    compared = 0
    for section, of_section in golden.items():
        for theirs, told in (of_section.get("recipes", {}) if isinstance(of_section, dict) else {}).items():
            for name in PRESETS_OF.get((section, theirs), ()):
                require_same_rates(presets[name], told)
                compared += 1
    if not compared:
        pytest.skip(f"{schedule} has no recipe of a preset of ours")


PRESETS_OF = {
    ("recognition", "k400_vitb16"): ("b16-k400", "b16-light-k400"),
    ("recognition", "k400_eva"): ("e14-k400",),
    ("recognition", "sthv1_vitb16"): ("b16-ssv1",),
    ("recognition", "sthv1_eva"): ("e14-ssv1",),
    ("recognition", "sthv2_vitl14"): ("l14-ssv2",),
    ("tds_clip", "k400_vitb16"): ("tds-clip-b16-k400",),
    ("tds_clip", "sthv1_vitb16"): ("tds-clip-b16-ssv1",),
    ("tds_clip", "sthv2_vitl14"): ("tds-clip-l14-ssv2",),
    ("dist", "ssv2_b16"): ("dist-b16-8f-ssv2", "dist-b16-16f-ssv2", "dist-b16-32f-ssv2"),
    ("retrieval", "all"): ("b16-msrvtt", "b16-msvd", "b16-vatex"),
}
"""By section and recipe of schedule.json."""


def all_presets():
    return {preset.name: preset for kind in NETWORKS.values() for preset in kind.presets}


def require_same_rates(preset, told):
    """At each twentieth of training, and where the file has it just before the warm-up ends."""
    recipe = preset.recipe
    head = next(kind.name for kind in NETWORKS.values() if preset in kind.presets)
    known = {name: recipe.describe(None)[name] for name in ("epochs", "warmup_epochs", "learning_rate")}
    config = TrainConfig(features=None, out=None, head=head, task=preset.task, **known)
    schedule = find_optimisation(config).schedule
    assert recipe.learning_rate == pytest.approx(told["base_rate"] * told.get("share", 1))
    found = [learning_rate_at(k / 20 * recipe.epochs, config, schedule) for k in range(21)]
    assert found == pytest.approx(told["rate"], rel=1e-6, abs=1e-12), preset.name
    if "just_below_warmup_end" in told:
        rate = learning_rate_at(config.warmup_epochs * (1 - 1e-9), config, schedule)
        assert rate == pytest.approx(told["just_below_warmup_end"], rel=1e-6)
