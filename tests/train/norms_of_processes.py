"""Run by every process of a torchrun: norms that count several processes are those of one process that has their clips.

Its argument is how many processes a norm counts.
"""

import sys

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from s4v.train.networks import norms
from s4v.train.networks.norms import BatchNorm, NormGroups, average_statistics
from s4v.train.networks.parts import make_again

exchanges = []


def count_calls(name):
    call = getattr(dist, name)

    def counted(*arguments, **options):
        exchanges.append(name)
        return call(*arguments, **options)

    return counted


def make(groups):
    torch.manual_seed(1)
    norm = BatchNorm(192)
    torch.nn.init.normal_(norm.weight)
    norm.groups = groups
    return norm


def compare(rank, world, span):
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

    def outer(x):
        return make_again(lambda x: norm(x).sin(), x, side_width=192)

    out = checkpoint(outer, own, use_reentrant=False, context_fn=norms.recomputing)
    weights = torch.linspace(-1, 1, whole.numel()).view(whole.shape)
    (out * weights.chunk(world)[rank]).sum().backward()
    assert exchanges == ([] if span == 1 else ["all_gather", "all_reduce"]), exchanges
    if groups is not None:
        exchanges.clear()
        average_statistics(torch.nn.Sequential(norm, BatchNorm(3)))
        assert exchanges == ["all_reduce"], exchanges

    # The same in one process, group by group.
    expected, x = torch.nn.BatchNorm2d(192), whole.clone().requires_grad_()
    expected.load_state_dict(make(None).state_dict())
    parts, means, variances = [], [], []
    for part in x.chunk(world // span):
        expected.running_mean, expected.running_var = torch.zeros(192), torch.ones(192)
        parts.append(expected(part).sin())
        means.append(expected.running_mean)
        variances.append(expected.running_var)
    (torch.cat(parts) * weights).sum().backward()
    close = dict(rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(out, torch.cat(parts).chunk(world)[rank], **close)
    torch.testing.assert_close(own.grad, x.grad.chunk(world)[rank], **close)
    gradient = norm.weight.grad
    dist.all_reduce(gradient)
    torch.testing.assert_close(gradient, expected.weight.grad, **close)
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0), **close)
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0), **close)
    dist.barrier()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    calls = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}
    for name in calls:
        setattr(dist, name, count_calls(name))
    span = int(sys.argv[1])
    compare(dist.get_rank(), dist.get_world_size(), span)
    for name, call in calls.items():
        setattr(dist, name, call)
    if dist.get_rank() == 0:
        print(f"norms of {span} of {dist.get_world_size()} processes")
