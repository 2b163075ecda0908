"""Batch norm that counts groups of clips: of one process, or of several that train together.

How many clips a norm counts decides what a network learns, so it is a setting of its own. It does not follow from how
a step is shared out among processes and batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

_MOMENTUM = 0.1
"""Of running statistics, in a step: torch's own default, with which the reference trains."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Of each channel, over all that a norm counts together."""

    mean: torch.Tensor
    """(S,) float32."""
    variance: torch.Tensor
    """(S,) float32, of the whole group: not corrected by one."""
    count: torch.Tensor
    """() float32, numbers of a channel."""


# Set while a backward pass computes a layer again: batch norms have counted that batch already.
_is_recomputing = False
# Then: what several processes found in the first pass, in its order, so that they need not ask each other again.
_replayed: Iterator[Moments] = iter(())
# In a first pass that will be computed again: where that is written down, once for each checkpoint around it.
_recorders: list[list[Moments]] = []


def recomputing() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For a checkpoint's `context_fn`: batch norms do not count a batch again while it is computed again."""
    seen: list[Moments] = []

    @contextmanager
    def first() -> Iterator[None]:
        _recorders.append(seen)
        try:
            yield
        finally:
            _recorders.pop()

    @contextmanager
    def again() -> Iterator[None]:
        global _is_recomputing, _replayed
        before = _is_recomputing, _replayed
        _is_recomputing, _replayed = True, iter(seen)
        try:
            yield
        finally:
            _is_recomputing, _replayed = before

    return first() if _count_processes(None) > 1 else nullcontext(), again()


@dataclass(slots=True)
class NormGroups:
    """Which clips of a step the batch norms of a network count together; all norms of the network hold this object.

    The running statistics move once a step, to the mean over its groups, whatever batches it is made of.
    """

    clips: int
    """Of a group."""
    processes: Any = None
    """A torch process group whose batches together are one group; None where groups lie inside a process."""
    batch: int = 0
    """Which batch of the step is under way, from 0."""
    num_batches: int = 1
    """Of a step."""

    def split(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """(B, ...) of a process into its groups, as even as can be where B is no multiple of a group."""
        count = max(1, round(len(x) / self.clips))
        return [x] if count == 1 or self.processes is not None else x.tensor_split(count)

    def list_momenta(self, count: int) -> list[float]:
        """How far each of a batch's groups moves the running statistics, so that all of the step count the same."""
        total = count * self.num_batches
        places = range(self.batch * count, (self.batch + 1) * count)
        return [_MOMENTUM / (total - (total - 1 - place) * _MOMENTUM) for place in places]


def count_in_groups(network: nn.Module, groups: NormGroups) -> None:
    """Make all batch norms of a network count so."""
    for norm in _list_norms(network):
        norm.groups = groups


def has_norms(network: nn.Module) -> bool:
    """Whether there is any to count."""
    return bool(_list_norms(network))


def average_statistics(network: nn.Module) -> None:
    """Make the running statistics of all processes their mean, in one exchange.

    They move by a share of the way to what each process saw, so the mean has moved to the mean of that.
    """
    buffers = [b for norm in _list_norms(network) for b in (norm.running_mean, norm.running_var) if b is not None]
    if not buffers:
        return
    flat = torch.cat(buffers)
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    torch._foreach_copy_(buffers, list(flat.split([len(buffer) for buffer in buffers])))


def _list_norms(network: nn.Module) -> list[BatchNorm]:
    return [module for module in network.modules() if isinstance(module, BatchNorm)]


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over groups of clips; without groups over those of all processes, of one process torch's own."""

    groups: NormGroups | None = None
    """None counts all clips of a batch, of all processes that there are."""

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Any number of axes: all but the second are counted."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, T, N) -> (B, S, T, N), or (B, S) -> (B, S)."""
        groups = self.groups
        is_shared = _count_processes(None) > 1 if groups is None else groups.processes is not None
        if not self.training or (groups is None and not is_shared and not _is_recomputing):
            return super().forward(x)
        is_first = groups is None or groups.batch == 0
        if is_first and not _is_recomputing:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
        if is_shared:
            return self._normalise_shared(x, None if groups is None else groups.processes)
        return self._normalise([x] if groups is None else groups.split(x))

    def _normalise(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Groups of this process alone."""
        assert self.running_mean is not None and self.running_var is not None
        momenta = [_MOMENTUM] if self.groups is None else self.groups.list_momenta(len(parts))
        statistics, normalised = (self.running_mean, self.running_var), []
        for part, momentum in zip(parts, momenta, strict=True):
            if _is_recomputing or len(parts) > 1:
                # Autograd keeps them with each group, and would find them changed by the next.
                statistics = (statistics[0].clone(), statistics[1].clone())
            normalised.append(F.batch_norm(part, *statistics, self.weight, self.bias, True, momentum, self.eps))
        if not _is_recomputing and len(parts) > 1:
            with torch.no_grad():
                self.running_mean.copy_(statistics[0])
                self.running_var.copy_(statistics[1])
        return normalised[0] if len(normalised) == 1 else torch.cat(normalised)

    def _normalise_shared(self, x: torch.Tensor, processes: Any) -> torch.Tensor:
        """One group, of this and other processes: one exchange here, and one in the backward pass."""
        moments = next(_replayed) if _is_recomputing else _find_shared_moments(x, processes)
        for recorder in _recorders:
            recorder.append(moments)
        if not _is_recomputing:
            assert self.running_mean is not None and self.running_var is not None
            momentum = _MOMENTUM if self.groups is None else self.groups.list_momenta(1)[0]
            with torch.no_grad():
                self.running_mean.lerp_(moments.mean, momentum)
                self.running_var.lerp_(moments.variance * moments.count / (moments.count - 1), momentum)
        scale = (moments.variance + self.eps).rsqrt()
        return _SharedNorm.apply(x, self.weight, self.bias, moments.mean, scale, moments.count, processes)


def _count_processes(processes: Any) -> int:
    return dist.get_world_size(processes) if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def _find_shared_moments(x: torch.Tensor, processes: Any) -> Moments:
    """Of (B, S, ...) of several processes, in float32.

    Each sends its own mean, squares around it and count. Sums of squares around zero would cancel.
    """
    values = x.float()
    axes, count = _axes_but_channels(x), x.numel() // x.shape[1]
    mean = values.mean(axes)
    squares = (values - _along_channels(mean, x)).square().sum(axes)
    own = torch.cat([mean, squares, mean.new_full((1,), count)])
    everyone = [torch.empty_like(own) for _ in range(_count_processes(processes))]
    dist.all_gather(everyone, own, group=processes)
    means, all_squares, counts = torch.stack(everyone).split([len(mean), len(mean), 1], dim=1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    variance = (all_squares + counts * (means - mean).square()).sum(0) / total
    return Moments(mean, variance, total)


class _SharedNorm(torch.autograd.Function):
    """Normalises by moments of several processes; the gradient knows that they depend on every process's input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        scale: torch.Tensor,
        count: torch.Tensor,
        processes: Any,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.processes = processes
        y = (x.float() - _along_channels(mean, x)) * _along_channels(scale if weight is None else weight * scale, x)
        return (y if bias is None else y + _along_channels(bias, x)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        gradient = gradients[0].float()
        normalised = (x.float() - _along_channels(mean, x)) * _along_channels(scale, x)
        axes = _axes_but_channels(x)
        own = torch.stack([gradient.sum(axes), (gradient * normalised).sum(axes)])
        shared = own.clone()
        dist.all_reduce(shared, group=ctx.processes)
        of_mean, of_scale = (_along_channels(total / count, x) for total in shared)
        factor = scale if weight is None else weight * scale
        of_x = (gradient - of_mean - normalised * of_scale) * _along_channels(factor, x)
        of_bias, of_weight = (None, None) if weight is None else own
        return of_x.to(x.dtype), of_weight, of_bias, None, None, None, None


def _axes_but_channels(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(axis for axis in range(x.ndim) if axis != 1)


def _along_channels(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *(1,) * (x.ndim - 2))
