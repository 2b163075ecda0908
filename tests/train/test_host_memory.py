"""Memory for batches that is used again."""

import gc
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s4v.train.host_memory import HostMemory, _round_up

MB = 2**20


def address(array):
    return array.__array_interface__["data"][0]


def test_what_nobody_holds_is_given_again():
    memory = HostMemory(64 * MB)
    first = memory.allocate((4, MB), np.uint8)
    where = address(first)
    del first
    assert address(memory.allocate((2, MB), np.float16)) == where


@pytest.mark.parametrize(
    "held",
    [
        lambda array: array[1:, 3],
        lambda array: array.reshape(-1)[::2],
        lambda array: array.view(np.int8).T,
        lambda array: torch.from_numpy(array),
        lambda array: torch.from_numpy(array)[2:].view(-1),
        lambda array: memoryview(array),
    ],
)
def test_what_is_held_by_a_view_is_not(held):
    memory = HostMemory(64 * MB)
    array = memory.allocate((4, MB), np.uint8)
    where, view = address(array), held(array)
    del array
    gc.collect()
    others = [memory.allocate((4, MB), np.uint8) for _ in range(4)]
    assert where not in map(address, others)
    del view
    assert address(memory.allocate((4, MB), np.uint8)) == where


def test_no_more_is_kept_than_was_said():
    memory = HostMemory(5 * MB)
    arrays = [memory.allocate((4 * MB,), np.uint8) for _ in range(3)]
    arrays.clear()
    assert memory._kept_bytes == 4 * MB and sum(map(len, memory._kept.values())) == 1
    memory.allocate((4 * MB,), np.uint8)
    assert memory._kept_bytes == 4 * MB, "given, and taken back at once"


def test_small_and_empty_arrays_are_ordinary():
    memory = HostMemory(MB)
    assert memory.allocate((3, 0, 5), np.float32).shape == (3, 0, 5)
    small = memory.allocate((7,), np.float16)
    assert small.flags.owndata and small.dtype == np.float16 and not memory._kept


@given(st.integers(2**18, 2**40))
def test_an_eighth_is_wasted_at_most(num_bytes):
    assert num_bytes <= _round_up(num_bytes) <= num_bytes * 9 / 8 + 8
    assert _round_up(_round_up(num_bytes)) == _round_up(num_bytes)


def test_threads_never_get_what_another_holds():
    memory, wrong = HostMemory(64 * MB), []

    def use(number):
        for turn in range(200):
            array = memory.allocate((MB // 2 + 7 * (turn % 5),), np.uint8)
            array[::4096] = number
            if (array[::4096] != number).any():
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
