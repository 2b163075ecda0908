"""Recipes against the reference's own optimisers, schedules and constructors: groups, rates, steps, initial weights."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from s4v.train.clips import ClipBatch
from s4v.train.config import TrainConfig
from s4v.train.networks import find_network
from s4v.train.networks.side4video import SideShape
from s4v.train.networks.text_interaction import MeanInteraction, TextBatch, WeightedTokenInteraction, contrastive_loss
from s4v.train.paper.presets import RETRIEVAL_RECIPE
from s4v.train.recipe import OPTIMIZERS, ParameterGroup, Recipe, find_biases, make_optimizer
from s4v.train.settings import find_optimisation
from s4v.train.tasks.retrieval import Retrieval

VARIANTS = ("recognition_clip", "recognition_eva", "retrieval_clip", "retrieval_eva")
WEIGHTING = {"text_weight_fc": "text_weight", "video_weight_fc": "frame_weight"}


def recipe_of(task):
    return RETRIEVAL_RECIPE if task == "retrieval" else Recipe(30, 1e-3)


def config_of(task, **changes):
    """What a training of a task comes to without a preset."""
    recipe = recipe_of(task)
    options = {name: value for name, value in recipe.describe(None).items() if name in TrainConfig.__dataclass_fields__}
    if task == "retrieval":
        del options["label_smoothing"]
    return TrainConfig(features=None, out=None, task=task, **{**options, **changes})


def build(folder, variant, **changes):
    """A new network of a golden file's sizes."""
    config = json.loads((folder / "config.json").read_text())
    task, _, family = variant.partition("_")
    is_retrieval = task == "retrieval"
    kind = find_network("side4video")
    ends = dict(embed_dim=config["embed_dim"], norm_eps=1e-5, has_projection_bias=family == "eva", interaction="wti")
    options = {"normalises_frames": False, "decorrelation": 0.0, "trains_end": True, "trains_logit_scale": True}
    shape = SideShape(
        name=kind.name,
        task=task,
        num_classes=0 if is_retrieval else config["classes"],
        layers=tuple(config["tapped_layers"]),
        width=config["width"],
        num_patches=(config["resolution"] // config["patch"]) ** 2,
        patch_px=config["patch"],
        side_width=config["side_dim"],
        family=family,
        **(ends if is_retrieval else {}),
        **options,
    )
    return kind.build(replace(shape, **changes))


def test_retrieval_steps_and_clips_as_the_reference_says(data_path):
    """What schedule.json says in words, on one parameter; the norm over all is cut by the loop (--clip-norm)."""
    recipe = RETRIEVAL_RECIPE
    assert (recipe.optimizer, recipe.clip_norm, recipe.undecayed) == ("uncorrected-adam", 1.0, "biases")
    assert OPTIMIZERS[recipe.optimizer].rate_place == 0, "the first step has rate 0"
    config = config_of("retrieval")
    optimisation = find_optimisation(config)
    assert (optimisation.betas, optimisation.eps) == ((0.9, 0.98), 1e-6)
    weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    group = ParameterGroup((weight,))
    optimizer = make_optimizer([group], config, optimisation)
    m = v = torch.zeros(1, 2)
    p = weight.detach().clone()
    for gradient in (torch.tensor([[0.3, -0.1]]), torch.tensor([[6.0, 8.0]]), torch.tensor([[0.0, 0.0]])):
        weight.grad = gradient.clone()
        optimizer.step()
        g = gradient * min(1.0, 1 / (gradient.norm().item() + 1e-6))
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g**2
        p = p - 1e-4 * (m / (v.sqrt() + 1e-6) + 0.2 * p)
        torch.testing.assert_close(weight.detach(), p, rtol=1e-6, atol=1e-8)


def test_the_factor_of_similarities_is_cut_at_a_hundred(data_path):
    network, config = build(data_path / "retrieval_clip", "retrieval_clip"), config_of("retrieval", learning_rate=1.0)
    config = replace(config, weight_decay=0.0)
    optimizer = make_optimizer(network.parameter_groups(), config, find_optimisation(config), find_biases(network))
    for gradient, expected in ((-1.0, math.log(100)), (1.0, None)):
        network.logit_scale.grad = torch.tensor(gradient)
        optimizer.step()
        found = network.logit_scale.item()
        assert found == pytest.approx(expected, rel=1e-6) if expected else found < math.log(100)


@pytest.fixture(scope="module")
def path(data_path):
    """Frames to loss, as the reference has it."""
    return load_file(data_path / "retrieval_path/io.safetensors")


def close(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def weigh(path, decorrelation, *, heeds_frame_mask):
    module = WeightedTokenInteraction(32, decorrelation=decorrelation, heeds_frame_mask=heeds_frame_mask)
    module.load_state_dict(
        {
            f"{WEIGHTING[name.partition('.')[0]]}.{name.partition('.')[2]}": tensor
            for name, tensor in path.items()
            if name.startswith(tuple(WEIGHTING))
        }
    )
    return module


@pytest.mark.parametrize("name", ["none", "clip.wti", "clip.wti_cdcr", "eva.wti", "eva.wti_cdcr"])
def test_frames_to_similarity_to_loss_and_back_is_the_references(path, name):
    """With frames that are not there: beside EVA alone, weighted, they do not count. `none` is both families'."""
    is_mean, decorrelation = name == "none", 1e-3 if name.endswith("cdcr") else 0.0
    weighted = weigh(path, decorrelation, heeds_frame_mask=name.startswith("eva."))
    module = MeanInteraction(normalises_frames=False) if is_mean else weighted
    frame_mask = path["video_mask"].bool()
    assert not frame_mask.all()
    expected = {key.removeprefix(f"{name}."): value for key, value in path.items() if key.startswith(f"{name}.")}
    leaves = {key: path[key].clone().requires_grad_() for key in ("frames", "logit_scale_log")}
    words = {key: path[key].clone().requires_grad_() for key in ("text_tokens", "text_embedding")}
    mask = path["text_mask"].bool()
    evaluated = module(TextBatch(words["text_tokens"], mask, words["text_embedding"]), leaves["frames"], frame_mask)
    scale = leaves["logit_scale_log"].exp()
    # Without weights the reference scales in evaluation too, which changes no rank.
    close(evaluated.similarities * (scale if is_mean else 1), expected["eval_similarity"])
    pairs = slice(0, len(path["frames"]))
    batch = TextBatch(words["text_tokens"][pairs], mask[pairs], words["text_embedding"][pairs])
    found = module(batch, leaves["frames"], frame_mask)
    close(scale * found.similarities, expected["train_similarity"])
    loss = contrastive_loss(found.similarities, leaves["logit_scale_log"]) + found.loss
    close(loss, expected["loss"])
    if decorrelation:
        close(found.loss / decorrelation, expected["cdcr"])
    loss.backward()
    assert sum(key.startswith("grad.") for key in expected) == (3 if is_mean else 11)
    for key, gradient in expected.items():
        if not key.startswith("grad."):
            continue
        key = key.removeprefix("grad.")
        if key in leaves:
            close(leaves[key].grad, gradient)
        elif key in words:
            close(words[key].grad[pairs], gradient)
        elif not key.endswith("2.bias"):  # the softmax does not see it: rounding
            network, _, part = key.partition(".")
            close(dict(module.named_parameters())[f"{WEIGHTING[network]}.{part}"].grad, gradient)


def test_with_all_frames_there_evas_weighting_is_the_same(path):
    """A clip of ours has all of its T frames, and then the families differ in nothing."""
    is_whole = path["video_mask"].bool().all(dim=1)
    assert 1 < is_whole.sum() < len(is_whole)
    texts = TextBatch(path["text_tokens"], path["text_mask"].bool(), None)
    found = weigh(path, 0.0, heeds_frame_mask=False)(texts, path["frames"])
    close(found.similarities[:, is_whole], path["eva.wti.eval_similarity"][:, is_whole])
    evas = weigh(path, 1e-3, heeds_frame_mask=True)
    pairs = slice(0, len(path["frames"]))
    words = TextBatch(path["text_tokens"][pairs], texts.mask[pairs], None)
    without, with_ones = evas(words, path["frames"]), evas(words, path["frames"], torch.ones(5, 4, dtype=torch.bool))
    close(with_ones.similarities, path["clip.wti.eval_similarity"][pairs])
    close(without.loss / 1e-3, path["clip.wti_cdcr.cdcr"])
    close(with_ones.loss / 1e-3, path["clip.wti_cdcr.cdcr"])


@pytest.mark.parametrize(("variant", "heeds"), [("retrieval_clip", False), ("retrieval_eva", True)])
def test_frames_that_a_batch_lacks_are_left_out_of_the_loss_beside_eva_alone(data_path, variant, heeds):
    network = build(data_path / variant, variant, interaction="wti")
    torch.manual_seed(0)
    num_clips, num_frames, embed_dim = 3, 4, network.interaction.text_weight[0].in_features
    frames = torch.randn(num_clips, num_frames, embed_dim)
    texts = TextBatch(torch.randn(num_clips, 5, embed_dim), torch.ones(num_clips, 5, dtype=torch.bool), None)
    frame_mask = torch.ones(num_clips, num_frames, dtype=torch.bool)
    frame_mask[1, 2:] = False
    identities = torch.arange(2 * num_clips).view(num_clips, 2)
    task = SimpleNamespace(config=config_of("retrieval"), _logit_scale=torch.tensor(2.0), _identities=identities)
    other = torch.where(frame_mask[..., None], frames, torch.randn_like(frames))
    losses = [
        Retrieval.compute_loss(
            task,
            network,
            shown,
            ClipBatch(None, None, None, torch.arange(num_clips), texts, mask),
            lambda values: values,
        )
        for shown, mask in ((frames, frame_mask), (other, frame_mask), (frames, None), (other, None))
    ]
    assert (losses[0] == losses[1]) == heeds
    assert (losses[0] == losses[2]) != heeds
    assert losses[2] != losses[3]
