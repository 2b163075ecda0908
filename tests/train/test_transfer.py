"""Batches on their way to a GPU, on a CPU with streams that count, and on a GPU where there is one."""

import weakref
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from s4v.store.reader import open_store
from s4v.train import clips
from s4v.train.clips import ClipLoader, find_labelled_rows, plan_training_epoch
from s4v.train.transfer import CudaStreams, WaitMeter, copy_ahead, find_streams

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class CountingStreams:
    """Streams of a device that is there in name: what is queued is written down; steps end when waited for."""

    def __init__(self):
        self.log, self.ended, self.is_copying = [], set(), False
        self.bytes_held = self.most_bytes = 0

    def allocate(self, shape, dtype):
        values = np.zeros(shape, dtype)
        self.bytes_held += values.nbytes
        self.most_bytes = max(self.most_bytes, self.bytes_held)
        weakref.finalize(values, self._free, values.nbytes)
        return values

    def _free(self, size):
        self.bytes_held -= size

    @contextmanager
    def copying(self):
        self.is_copying = True
        yield
        self.is_copying = False

    def _mark(self, kind):
        self.log.append(kind)
        return len(self.log) - 1

    def mark_copies(self):
        assert self.is_copying
        return self._mark("copied")

    def mark_steps(self):
        return self._mark("step")

    def hold_steps(self, mark, tensors):
        assert self.log[mark] == "copied"
        self.held = list(tensors)
        self._mark(("hold", mark))

    def wait(self, mark):
        assert self.log[mark] == "step"
        self.ended.add(mark)
        self._mark(("wait", mark))

    def is_past(self, mark):
        return any(mark <= ended for ended in self.ended)

    def seconds_between(self, first, last):
        return float(last - first)


def batches_of(streams, count):
    for place in range(count):
        assert streams.is_copying, "copies go to their own stream"
        yield SimpleNamespace(place=place, tensors=lambda place=place: [torch.tensor(place)])


def test_a_copy_waits_for_the_step_before_the_last():
    streams, asked, done = CountingStreams(), [], []
    source = batches_of(streams, 6)

    def watch():
        for batch in source:
            asked.append((batch.place, len(done), len(streams.ended)))
            yield batch

    for batch in copy_ahead(watch(), streams, WaitMeter()):
        assert [int(one) for one in streams.held] == [batch.place], "the stream of steps waits for this copy"
        done.append(batch.place)
    assert done == list(range(6))
    for place, steps, ended in asked:
        assert steps == max(0, place - 1), "each is copied while the step before it runs, and no earlier"
        assert ended == max(0, steps - 1), "and no step but the last is still under way"


def test_waiting_is_the_time_between_a_steps_end_and_the_next_ones_beginning():
    streams, meter = CountingStreams(), WaitMeter()
    for _ in copy_ahead(batches_of(streams, 5), streams, meter):
        pass
    # Of steps that ended: from the mark at the end to the mark at the beginning, in the log's places.
    pairs = [(a, b) for _, a, b in meter._under_way]
    known = meter.seconds
    assert known > 0 and len(meter._under_way) == 2 < len(pairs), "steps that may not have begun are not asked"
    streams.ended.add(len(streams.log))
    assert meter.seconds == sum(b - a for a, b in pairs) and not meter._under_way


def make_loader(store, streams):
    return ClipLoader(
        store,
        arrays=("patches", "cls", "pixels"),
        layers=(1, 5),
        device=torch.device("cpu"),
        streams=streams,
    )


@pytest.fixture
def plans(float_store):
    data = find_labelled_rows(open_store(float_store), "train")
    plan_epoch = partial(plan_training_epoch, data, num_frames=3, batch_size=2, seed=0)
    return [plan for epoch in range(4) for plan in plan_epoch(epoch=epoch)]


def test_a_loader_with_streams_hands_over_the_same_batches(float_store, plans):
    store = open_store(float_store)
    for ours, theirs in zip(
        make_loader(store, CountingStreams()).load(plans), make_loader(store, None).load(plans), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours.tensors(), theirs.tensors(), strict=True))


@pytest.mark.parametrize("num_batches", [1, 3, 5])
def test_host_memory_ahead_is_bounded_in_bytes(float_store, plans, monkeypatch, num_batches):
    store, streams = open_store(float_store), CountingStreams()
    loader = make_loader(store, streams)
    size = loader.count_bytes(plans[0])
    small = 8 * 2  # labels
    one = store.read_clips(plans[0].rows, plans[0].places, layers=(1, 5))
    assert size == one.patches.nbytes + one.cls.nbytes + one.pixels.nbytes
    monkeypatch.setattr(clips, "READ_AHEAD_BYTES", num_batches * size)
    loaded = 0
    for batch in loader.load(plans):
        loaded += 1
        del batch
    assert loaded == len(plans) == 16
    # On a CPU the batch under way, and the one behind it, lie in the memory that they were read into.
    assert streams.most_bytes <= (num_batches + 2) * (size + small)
    assert num_batches > 1 or streams.most_bytes < 4 * (size + small)


def test_a_reader_that_is_left_reads_on_no_more(float_store, plans):
    loader = make_loader(open_store(float_store), CountingStreams())
    batches = loader.load(plans)
    next(batches)
    batches.close()
    assert len(list(loader.load(plans))) == len(plans), "and can be used again"


def test_there_is_nothing_to_copy_to_on_a_cpu():
    assert find_streams(torch.device("cpu")) is None


@NEEDS_CUDA
def test_a_process_has_one_stream_of_copies():
    device = torch.empty(1, device="cuda").device
    assert isinstance(find_streams(device), CudaStreams)
    assert find_streams(device) is find_streams(device)


@pytest.fixture
def no_sync():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@NEEDS_CUDA
def test_batches_are_copied_without_holding_up_the_host(float_store, plans, request):
    store, device = open_store(float_store), torch.device("cuda", torch.cuda.current_device())
    loader = ClipLoader(store, arrays=("patches", "cls", "pixels"), layers=(1, 5), device=device)
    request.getfixturevalue("no_sync")
    copied = [batch.patches.float().sum() for batch in loader.load(plans)]
    torch.cuda.set_sync_debug_mode("default")
    expected = [batch.patches.float().sum() for batch in make_loader(store, None).load(plans)]
    torch.testing.assert_close(torch.stack(copied).cpu(), torch.stack(expected))
