"""Batch norms count groups of clips, however a step is shared out."""

import os
import subprocess
import sys

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


SEVERAL = """
import os, sys, torch, torch.distributed as dist

from s4v.train.networks import norms
from s4v.train.networks.norms import BatchNorm, NormGroups, average_statistics
from s4v.train.networks.parts import make_again
from s4v.train.networks.side4video import SideNetwork
from torch.utils.checkpoint import checkpoint

dist.init_process_group("gloo")
rank, world, span = dist.get_rank(), dist.get_world_size(), int(sys.argv[1])
exchanges = []
for name in ("all_gather", "all_reduce"):
    def count(*arguments, _call=getattr(dist, name), _name=name, **options):
        exchanges.append(_name)
        return _call(*arguments, **options)
    setattr(dist, name, count)


def make(groups):
    torch.manual_seed(1)
    norm = BatchNorm(192)
    torch.nn.init.normal_(norm.weight)
    norm.groups = groups
    return norm


torch.manual_seed(2)
# Numbers far from zero: sums of their squares would cancel.
whole = torch.randn(8 * world, 192, 2, 2) + 1000
own = whole.chunk(world)[rank].clone().requires_grad_()
processes = None
for first in range(0, world, span) if span > 1 else ():
    group = dist.new_group(list(range(first, first + span)))
    processes = group if first <= rank < first + span else processes
groups = None if span == world else NormGroups(8 * span, processes)
norm = make(groups)
outer = lambda x: make_again(lambda x: norm(x).sin(), x, side_width=192)
out = checkpoint(outer, own, use_reentrant=False, context_fn=norms.recomputing)
weights = torch.linspace(-1, 1, whole.numel()).view(whole.shape)
(out * weights.chunk(world)[rank]).sum().backward()
found = list(exchanges)
if groups is not None:
    exchanges.clear()
    average_statistics(torch.nn.Sequential(norm, BatchNorm(3)))
    assert exchanges == ["all_reduce"], exchanges
assert found == ([] if span == 1 else ["all_gather", "all_reduce"]), found

# The same in one process, group by group.
expected, x = torch.nn.BatchNorm2d(192), whole.clone().requires_grad_()
expected.load_state_dict(make(None).state_dict())
parts, statistics = [], []
for part in x.chunk(world // span):
    expected.running_mean, expected.running_var = torch.zeros(192), torch.ones(192)
    parts.append(expected(part).sin())
    statistics.append((expected.running_mean, expected.running_var))
(torch.cat(parts) * weights).sum().backward()
close = dict(rtol=1e-2, atol=1e-2)
torch.testing.assert_close(out, torch.cat(parts).chunk(world)[rank], **close)
torch.testing.assert_close(own.grad, x.grad.chunk(world)[rank], **close)
gradient = norm.weight.grad
dist.all_reduce(gradient)
torch.testing.assert_close(gradient, expected.weight.grad, **close)
for ours, theirs in zip((norm.running_mean, norm.running_var), zip(*statistics), strict=True):
    torch.testing.assert_close(ours, torch.stack(theirs).mean(0), **close)
dist.barrier()
"""


@pytest.mark.parametrize(
    ("world", "span"),
    [(2, 2), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((2, 1), (4, 2)))],
)
def test_processes_have_the_norms_of_one_with_one_exchange_each_way(world, span, tmp_path):
    """Also where the layer is computed again, inside a layer that is computed again."""
    (tmp_path / "norms.py").write_text(SEVERAL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, tmp_path / "norms.py", str(span)], capture_output=True, text=True, env=environment)
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
