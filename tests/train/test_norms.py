"""Batch norms count groups of clips, however a step is shared out."""

from pathlib import Path

import pytest
import torch
from torch import nn

from s4v.train.networks.norms import BatchNorm, NormGroups, count_in_groups
from s4v.train.networks.parts import make_again
from s4v.train.networks.side4video import SideNetwork


def make_norm(groups=None, width=5):
    torch.manual_seed(1)
    norm = BatchNorm(width)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.groups = groups
    return norm


def draw(clips, width=5):
    torch.manual_seed(2)
    return torch.randn(clips, width, 3, 4) * 3 + 1


@pytest.mark.parametrize("clips", [8, 9, 100])
def test_a_group_that_is_the_batch_is_torchs_norm_to_the_bit(clips):
    ours, theirs, x = make_norm(NormGroups(clips)), nn.BatchNorm2d(5), draw(8)
    theirs.load_state_dict(make_norm().state_dict())
    for _ in range(3):
        assert torch.equal(ours(x), theirs(x))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_groups_are_normalised_alone_and_the_statistics_move_once_a_step():
    x, norm = draw(12).requires_grad_(), make_norm(NormGroups(4))
    out, weights = norm(x), draw(12).flip(0)
    alone = make_norm(), make_norm(), make_norm()
    expected = torch.cat([one(part) for one, part in zip(alone, x.split(4), strict=True)])
    assert torch.equal(out, expected)
    gradient, of_alone = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (out, expected))
    assert torch.equal(gradient, of_alone)
    x = x.detach()
    means = torch.stack([part.mean((0, 2, 3)) for part in x.split(4)]).mean(0)
    variances = torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in x.split(4)]).mean(0)
    torch.testing.assert_close(norm.running_mean, 0.1 * means)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variances)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("num_batches", [2, 3, 6])
def test_batches_of_a_step_count_as_the_whole_step_does(num_batches):
    x, groups = draw(24), NormGroups(4)
    whole, parts = make_norm(NormGroups(4)), make_norm(groups)
    expected = whole(x)
    groups.num_batches, found = num_batches, []
    for groups.batch, part in enumerate(x.chunk(num_batches)):
        found.append(parts(part))
    assert torch.equal(torch.cat(found), expected)
    for ours, theirs in zip(parts.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_batch_that_is_no_multiple_is_shared_out_evenly():
    x, norm = draw(10), make_norm(NormGroups(4))
    assert torch.equal(norm(x), torch.cat([make_norm()(part) for part in (x[:5], x[5:])]))
    assert torch.equal(make_norm(NormGroups(4))(x[:3]), make_norm()(x[:3]))


def test_a_layer_that_is_computed_again_is_counted_once():
    x, norm = draw(8, width=192), make_norm(NormGroups(4), width=192)
    norm(x)
    once = [buffer.clone() for buffer in norm.buffers()]
    again = make_norm(NormGroups(4), width=192)
    inputs = x.requires_grad_()
    make_again(lambda x: again(x).sin(), inputs, side_width=192).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(again.buffers(), once, strict=True))


def test_every_norm_of_a_network_holds_the_groups():
    network, groups = nn.Sequential(BatchNorm(3), nn.Sequential(BatchNorm(3))), NormGroups(2)
    count_in_groups(network, groups)
    assert network[0].groups is network[1][0].groups is groups


@pytest.mark.parametrize(
    ("world", "span"),
    [(2, 2), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((2, 1), (4, 2)))],
)
def test_processes_have_the_norms_of_one_with_one_exchange_each_way(world, span, request, processes_run):
    """Also where the layer is computed again, inside a layer that is computed again."""
    if (world, span) == (2, 2):
        assert "norms of 2 of 2 processes" in (request.getfixturevalue("trained_by_two") / "said").read_text()
    else:
        done = processes_run(world, Path(__file__).with_name("norms_of_processes.py"), str(span))
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("groups", [None, NormGroups(4), NormGroups(2)])
def test_a_network_is_one_graph_whatever_its_norms_count(groups):
    torch.manual_seed(0)
    sizes = dict(num_classes=5, num_layers=2, width=24, side_width=64, num_patches=9, patch_px=8)
    network = SideNetwork(**sizes).train()
    if groups is not None:
        count_in_groups(network, groups)
    inputs = torch.randn(4, 3, 3, 24, 24), torch.randn(4, 3, 2, 9, 24), torch.randn(4, 3, 2, 24)
    torch._dynamo.reset()
    found = torch._dynamo.explain(network)(*inputs)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
