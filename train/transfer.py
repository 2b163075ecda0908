"""Batches on their way to a GPU: one stream of copies for a process, host memory that is bounded, and what was waited.

A batch is copied while the step on the one before it runs. The host goes on no further than that: a copy waits until
the step before the last has ended, so at most three batches lie on the device.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

Mark = Any
"""A moment on a stream; of a GPU an event."""


class Batch(Protocol):
    """What is copied."""

    def tensors(self) -> Iterable[torch.Tensor]:
        """All that there are."""
        ...


AnyBatch = TypeVar("AnyBatch", bound=Batch)


class Streams(Protocol):
    """The two streams of a device: of copies, and of the steps that use what was copied."""

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Host memory whose copies do not hold up the host."""
        ...

    def copying(self) -> AbstractContextManager[Any]:
        """What is queued inside goes to the stream of copies."""
        ...

    def mark_copies(self) -> Mark:
        """Where the stream of copies is now."""
        ...

    def mark_steps(self) -> Mark:
        """Where the stream of steps is now."""
        ...

    def hold_steps(self, mark: Mark, tensors: Iterable[torch.Tensor]) -> None:
        """Steps queued from now on wait for a mark, and use tensors that were made on the stream of copies."""
        ...

    def wait(self, mark: Mark) -> None:
        """Hold up the host until a mark is passed."""
        ...

    def is_past(self, mark: Mark) -> bool:
        """Whether a mark is passed; asks and does not wait."""
        ...

    def seconds_between(self, first: Mark, last: Mark) -> float:
        """Of two marks that are passed."""
        ...


class CudaStreams:
    """Those of a CUDA GPU; steps are on whatever stream is current."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Pinned memory; torch gives it back to a cache of its own, in sizes that are powers of two."""
        return torch.empty(shape, dtype=getattr(torch, dtype.name), pin_memory=True).numpy()

    def copying(self) -> AbstractContextManager[Any]:
        """See `Streams`."""
        return torch.cuda.stream(self._copies)

    def mark_copies(self) -> torch.cuda.Event:
        """An event there."""
        return self._copies.record_event(torch.cuda.Event(enable_timing=True))

    def mark_steps(self) -> torch.cuda.Event:
        """An event there."""
        return self._current.record_event(torch.cuda.Event(enable_timing=True))

    def hold_steps(self, mark: torch.cuda.Event, tensors: Iterable[torch.Tensor]) -> None:
        """See `Streams`."""
        self._current.wait_event(mark)
        for tensor in tensors:
            tensor.record_stream(self._current)

    def wait(self, mark: torch.cuda.Event) -> None:
        """See `Streams`."""
        mark.synchronize()

    def is_past(self, mark: torch.cuda.Event) -> bool:
        """See `Streams`."""
        return mark.query()

    def seconds_between(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        """See `Streams`."""
        return first.elapsed_time(last) / 1000

    @property
    def _current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)


@lru_cache
def find_streams(device: torch.device) -> Streams | None:
    """Those of a device, the same ones whenever they are asked for; None where there is nothing to copy to."""
    return CudaStreams(device) if device.type == "cuda" else None


class WaitMeter:
    """Seconds in which steps stood still for want of a batch: on a GPU by its own clock, else the host's."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._under_way: deque[tuple[Streams, Mark, Mark]] = deque()

    def add(self, seconds: float) -> None:
        """The host waited."""
        self._seconds += seconds

    def add_marks(self, streams: Streams, ended: Mark, began: Mark) -> None:
        """A step ended and the next one began."""
        self._under_way.append((streams, ended, began))

    @property
    def seconds(self) -> float:
        """Up to the last step that is known to have begun; it is not waited for others."""
        while self._under_way and self._under_way[0][0].is_past(self._under_way[0][2]):
            streams, ended, began = self._under_way.popleft()
            self._seconds += streams.seconds_between(ended, began)
        return self._seconds


def time_waiting(batches: Iterator[AnyBatch], meter: WaitMeter) -> Iterator[AnyBatch]:
    """The same batches; the host's time until each of them is there is waiting."""
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        meter.add(time.perf_counter() - start)
        if batch is None:
            return
        yield batch


def copy_ahead(batches: Iterator[AnyBatch], streams: Streams, meter: WaitMeter) -> Iterator[AnyBatch]:
    """The same batches, each copied to the device while the step on the one before it runs.

    Args:
        batches: Copies are queued when a batch is asked for.
        streams: Of the device.
        meter: Told what a step waited, from the end of the one before it.
    """
    ended = streams.mark_steps()
    steps: deque[Mark] = deque()
    ahead: tuple[AnyBatch, Mark] | None = None
    while True:
        if len(steps) > 1:
            streams.wait(steps.popleft())  # the step before the last: its batch's memory is free now
        with streams.copying():
            batch = next(batches, None)
            copied = streams.mark_copies()
        if ahead is not None:
            streams.hold_steps(ahead[1], ahead[0].tensors())
            meter.add_marks(streams, ended, streams.mark_steps())
            yield ahead[0]
            ended = streams.mark_steps()
            steps.append(ended)
        if batch is None:
            return
        ahead = batch, copied
