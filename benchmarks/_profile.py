"""Where the time of a step goes: seconds by kind of operation, and which operations are products."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "scaled_dot_product")
CONVOLUTIONS = ("convolution", "mkldnn_convolution", "cudnn_convolution", "slow_conv", "conv_depthwise")

# Of operations as torch calls them, without `aten::` and underlines; an operation inside another counts as that one.
GROUPS = {
    "products": PRODUCTS,
    "convolutions": CONVOLUTIONS,
    "batch norms": ("batch_norm", "native_batch_norm", "cudnn_batch_norm"),
    "layer norms": ("layer_norm", "native_layer_norm"),
    "activations": ("gelu", "sigmoid", "silu", "softmax", "log_softmax"),
    "our kernel over time": ("TimeKernel",),
    "pooling": ("max_pool", "avg_pool"),
    "AdamW": ("Optimizer.step", "fused_adamw", "foreach"),
    "copies, concatenations": ("copy", "cat", "clone", "stack", "constant_pad_nd", "fill", "zero"),
    "sums, additions, multiplications": (
        *("add", "sub", "mul", "div", "neg", "rsub", "sum", "mean", "addcmul", "square", "pow", "rsqrt", "clamp"),
        *("norm", "mv", "addmv", "threshold", "where"),
    ),
}
REST = "the rest: dispatch, allocation, Python"


def is_product(name: str) -> bool:
    """Whether an operation is a matrix product, attention or a convolution, by its name."""
    return strip(name).startswith((*PRODUCTS, *CONVOLUTIONS))


def strip(name: str) -> str:
    """`aten::_foo_` -> `foo`."""
    return name.removeprefix("aten::").strip("_")


def profile_step(step: Callable[[], object], device: torch.device, num_steps: int) -> dict[str, float]:
    """Seconds of a step by `GROUPS`, on a GPU its own; `REST` is what is left of the time."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, acc_events=True) as found:
        start = time.perf_counter()
        for _ in range(num_steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        whole = time.perf_counter() - start
    seconds: Counter[str] = Counter()
    for event in found.events():
        if event.device_type != DeviceType.CPU:  # a GPU's kernels: counted with what called them
            continue
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        seconds[find_group(event)] += own / 1e6
    seconds[REST] += whole - sum(seconds.values())
    return {name: seconds[name] / num_steps for name in (*GROUPS, REST) if seconds[name]}


def find_group(event: Any) -> str:
    """Of an operation: that of the outermost one around it that has a group."""
    for name in reversed([strip(one.name) for one in list_parents(event)]):
        for group, beginnings in GROUPS.items():
            if name.startswith(beginnings):
                return group
    return REST


def list_parents(event: Any) -> Iterator[Any]:
    """The operation itself, then what it is in, from the inside out."""
    while event is not None:
        yield event
        event = event.cpu_parent
