"""Losses of temporal grounding: by hand, where the reference divides by zero, and split among processes."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from s4v.train.networks.r2_tuning import R2Network, list_points
from s4v.train.tasks.grounding_losses import (
    PAPER_WEIGHTS,
    Annotation,
    GroundingWeights,
    assign_windows,
    contrast_layers,
    contrast_videos,
    find_boundary_loss,
    find_class_loss,
    find_losses,
    find_saliency_loss,
    find_terms,
)

NUM_VIDEOS, NUM_FRAMES = 5, 12
LENGTHS = torch.tensor([12, 9, 10, 12, 7])


def make_network(**changes):
    torch.manual_seed(0)
    sizes = dict(num_layers=3, width=16, text_width=12, num_patches=4, side_width=16, num_heads=2, **changes)
    return R2Network(**sizes).train()


@pytest.fixture
def batch():
    rng = torch.Generator().manual_seed(1)
    mask = torch.arange(NUM_FRAMES) < LENGTHS[:, None]
    tokens = torch.randn(NUM_VIDEOS, NUM_FRAMES, 3, 5, 16, generator=rng) * mask[:, :, None, None, None]
    words = torch.randn(NUM_VIDEOS, 3, 4, 12, generator=rng)
    word_mask = torch.arange(4) < torch.tensor([4, 2, 3, 4, 1])[:, None]
    draws = torch.arange(NUM_VIDEOS)
    inputs = tokens[:, :, :, 1:], tokens[:, :, :, 0], words * word_mask[:, None, :, None], word_mask, mask, draws
    starts = torch.tensor([[1.0, 6], [2, math.inf], [0, 4], [3, math.inf], [5, math.inf]])
    lengths = torch.tensor([[3.0, 5], [7, 0], [2, 2.5], [9, 0], [1, 0]])
    windows = torch.stack([starts, starts + lengths], dim=-1)
    saliency = torch.rand(NUM_VIDEOS, NUM_FRAMES, generator=rng) * mask
    return inputs, Annotation(saliency, torch.tensor([2, 8, 1, 9, 6]), windows)


def terms_of(network, inputs, annotation):
    return find_terms(network(*inputs), annotation, inputs[4])


@pytest.mark.parametrize("highlights", [False, True])
def test_a_batch_that_is_split_has_the_loss_and_the_gradients_of_the_whole(batch, highlights):
    """Each process says its own part; terms are gathered with their gradients."""
    changes = dict(strides=(1,), has_boundaries=False, has_times=False) if highlights else {}
    weights = GroundingWeights(has_columns=not highlights)
    inputs, annotation = batch
    grads, losses = [], []
    for parts in ([slice(0, 5)], [slice(0, 2), slice(2, 5)]):
        network = make_network(**changes)
        own = [
            terms_of(network, [values[part] for values in inputs], Annotation(*(values[part] for values in annotation)))
            for part in parts
        ]
        others = iter(zip(*own, strict=True))

        def gather(values, others=others):
            return torch.cat(next(one for one in others if one[0] is not None))

        found = find_losses(own[0].gather(gather), weights)
        losses.append(found)
        sum(found.values()).backward()
        grads.append({name: p.grad for name, p in network.named_parameters() if p.requires_grad})
    assert losses[0].keys() == losses[1].keys()
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value, rtol=1e-5, atol=1e-7, msg=name)
    largest = max(grad.abs().max() for grad in grads[0].values())
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).abs().max() < 1e-6 * largest, name


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(processes_run):
    """With the loop's way of gathering, and with what is dropped."""
    done = processes_run(2, Path(__file__).with_name("grounding_of_processes.py"))
    assert done.returncode == 0, done.stderr


def test_a_gathered_batch_is_that_of_all_processes(batch):
    inputs, annotation = batch
    terms = terms_of(make_network(), inputs, annotation)
    twice = terms.gather(lambda values: torch.cat([values, values]))
    assert all(len(values) == 2 * NUM_VIDEOS for values in twice)
    highlights = terms_of(
        make_network(strides=(1,), has_boundaries=False), inputs, annotation._replace(windows=None)
    ).gather(lambda values: values)
    assert highlights.reach is None and highlights.reach_target is None


def test_points_stand_for_the_shortest_window_that_fits():
    """By hand, of 8 frames at levels of 1 and 4."""
    points = list_points((1, 4), 8)
    windows = torch.tensor([[[0.0, 6.0], [2.0, 4.0], [math.inf, math.inf]]])
    target, reach = assign_windows(points, windows)
    # Level 1 takes what reaches 0 to 4 frames, within 1.5 of the middle: of [0, 6] places 2 to 4, of [2, 4] the same.
    assert target[0].tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 1, 1]
    assert reach[0, 2:5].tolist() == [[0, 2], [1, 1], [2, 0]]
    # Of level 4 both places are 4 frames or more from an end of [0, 6]; [2, 4] is too short for its range.
    assert reach[0, 8:].tolist() == [[0, 1.5], [1, 0.5]]
    assert not reach[0, target[0] == 0].any()


def test_without_windows_there_is_no_boundary_to_learn(batch):
    """0, with gradients of 0, where the reference has 0/0."""
    inputs, annotation = batch
    nowhere = annotation._replace(windows=torch.full_like(annotation.windows, math.inf))
    network = make_network()
    losses = find_losses(terms_of(network, inputs, nowhere))
    assert losses["reg"] == 0 and all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
    assert not network.boundary_head.hidden.weight.grad.any()


def test_the_focal_loss_is_its_formula(batch):
    terms = terms_of(make_network(), *batch)
    logits, target = terms.logits.double(), terms.target.double()
    p = torch.where(target > 0, logits.sigmoid(), 1 - logits.sigmoid())
    loss = -((1 - p) ** 2) * p.log()
    expected = loss[terms.level_mask].mean()
    assert find_class_loss(terms).item() == pytest.approx(expected.item(), rel=1e-5)
    weighted = (torch.where(target > 0, 0.9, 0.1) * loss)[terms.level_mask].mean()
    assert find_class_loss(terms, 0.9).item() == pytest.approx(weighted.item(), rel=1e-5)


def test_the_papers_own_weights_are_an_option(batch):
    terms = terms_of(make_network(), *batch)
    released, paper = find_losses(terms), find_losses(terms, PAPER_WEIGHTS)
    assert paper["reg"].item() == pytest.approx(released["reg"].item() / 2)
    assert paper["cls"] == find_class_loss(terms, 0.9) != released["cls"]
    assert released["reg"] == 0.2 * find_boundary_loss(terms)


def test_columns_are_videos_at_one_place_of_time(batch):
    """By hand: rows over frames, columns over videos at the positive frame of each."""
    terms = terms_of(make_network(), *batch)
    similarity, allowed = (values.detach().numpy() for values in (terms.similarity.double(), terms.is_allowed))
    rows, columns = [], []
    for b, place in enumerate(terms.positive.tolist()):
        rows.append(np.log(np.exp(similarity[b][allowed[b]]).sum()) - similarity[b, place])
        own = allowed[:, place]
        columns.append(np.log(np.exp(similarity[own, place]).sum()) - similarity[b, place])
    assert find_saliency_loss(terms, has_columns=False).item() == pytest.approx(np.mean(rows), rel=1e-5)
    assert find_saliency_loss(terms).item() == pytest.approx(np.mean(rows) + np.mean(columns), rel=1e-5)


def test_a_place_of_time_that_no_video_may_use_leaves_gradients_finite(batch):
    """In the reference's columns such a place makes them NaN."""
    terms = terms_of(make_network(), *batch)
    allowed = terms.is_allowed.clone()
    allowed[:, 0] = False
    assert 0 not in terms.positive
    similarity = terms.similarity.detach().requires_grad_()
    find_saliency_loss(terms._replace(is_allowed=allowed, similarity=similarity)).backward()
    assert torch.isfinite(similarity.grad).all() and not similarity.grad[:, 0].any() and similarity.grad.any()


def test_a_video_alone_has_no_other_to_stand_out_from(batch):
    inputs, annotation = batch
    alone = terms_of(make_network(), [v[:1] for v in inputs], Annotation(*(v[:1] for v in annotation)))
    weights = GroundingWeights()
    assert find_losses(alone, weights)["video_cal"] == 0
    assert find_saliency_loss(alone) == find_saliency_loss(alone, has_columns=False)
    assert find_losses(alone, replace(weights, layer_cal=1))["layer_cal"] > 0


def test_contrasts_are_infonce_both_ways():
    """By hand: of videos in each layer, of layers in each video."""
    rng = torch.Generator().manual_seed(3)
    frames, queries = torch.randn(2, 3, 4, 8, generator=rng).double()  # (B, K, S) each
    a, c = (F.normalize(x, dim=-1) for x in (frames, queries))

    def cross_entropy(scores, own):
        return math.log(sum(math.exp(s) for s in scores)) - scores[own]

    of_videos, of_layers = [], []
    for b in range(3):
        for k in range(4):
            for one, other in ((a, c), (c, a)):
                of_videos.append(cross_entropy([(one[b, k] @ other[v, k]).item() / 0.07 for v in range(3)], b))
                of_layers.append(cross_entropy([(one[b, k] @ other[b, i]).item() / 0.07 for i in range(4)], k))
    assert contrast_videos(frames, queries).item() == pytest.approx(np.mean(of_videos))
    assert contrast_layers(frames, queries).item() == pytest.approx(np.mean(of_layers))
