"""Where to compute: the one meaning of `--device auto`, the cores of this process, and its place among others."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
"""Kinds that `--device` takes; a GPU may have a number (`cuda:1`)."""


def find_auto_device(*, may_be_mps: bool = True) -> str:
    """What `auto` stands for here: a CUDA GPU, then Apple's, then the CPU."""
    import torch  # a second; who only counts cores does not wait for it

    has_mps = may_be_mps and torch.backends.mps.is_available()
    return "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"


def find_device(name: str, *, own_gpu: int | None = None) -> torch.device:
    """A device by its name, or the best one for `auto`.

    Args:
        name: Of `DEVICES`; a GPU may have a number.
        own_gpu: Which CUDA GPU is meant where it has none, as each of several processes has its own; then no Apple GPU.

    Raises:
        ConfigError: If there is no such device here.
    """
    import torch

    try:
        device = torch.device(find_auto_device(may_be_mps=own_gpu is None) if name == "auto" else name)
        if device.type == "cuda" and device.index is None and own_gpu is not None:
            device = torch.device("cuda", own_gpu)
        if device.type not in DEVICES:
            raise RuntimeError("no such kind of device")
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name} is not available here: {reason}. Use --device auto.") from error


def is_first_process() -> bool:
    """Whether this is the first of the processes that `torchrun` started, or the only one: it speaks and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def count_cores() -> int:
    """Cores that this process may run on: a batch system or `taskset` may leave it fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
