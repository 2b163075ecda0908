"""Shards that are fetched before a step needs them."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from s4v.train.shard_prefetch import ShardPrefetch


class Store:
    """Each row is a file of 10 bytes."""

    def __init__(self, ahead_bytes=10, fails=False):
        self.brought, self.ahead_bytes, self._fails = [], ahead_bytes, fails

    def list_files(self, rows, views, places, arrays):
        return [(name, int(row), f"c.{row}") for row in rows for name in arrays]

    def bring(self, array, shard, file):
        if self._fails:
            raise RuntimeError("a disk")
        self.brought.append((array, shard))
        return 10


def plans(*batches):
    return [
        SimpleNamespace(rows=np.array(rows), views=np.array(rows) * 0, places=np.zeros((len(rows), 1)))
        for rows in batches
    ]


def join(prefetch):
    for thread in prefetch._threads:
        thread.join(10)


def wait_until(is_so):
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_files_are_fetched_in_order_and_once_and_no_further_than_that():
    store = Store(ahead_bytes=20)
    prefetch = ShardPrefetch(store, plans([3, 1], [1, 4], [5, 3], [6, 7], [8]), ["cls"])
    wait_until(lambda: len(store.brought) == 4)
    time.sleep(0.05)
    assert [row for _, row in store.brought] == [3, 1, 4, 5], "those of the batch that is read count for nothing"
    prefetch.reach(2)
    wait_until(lambda: len(store.brought) == 6)
    prefetch.reach(4)
    join(prefetch)
    assert [row for _, row in store.brought] == [3, 1, 4, 5, 6, 7, 8]


def test_who_goes_closes_it():
    store = Store()
    prefetch = ShardPrefetch(store, plans([1], [2], [3], [4]), ["cls"])
    wait_until(lambda: len(store.brought) == 2)
    prefetch.close()
    join(prefetch)
    assert not any(thread.is_alive() for thread in prefetch._threads) and len(store.brought) == 2


def test_an_error_is_told_and_stops_nobody(caplog):
    prefetch = ShardPrefetch(Store(fails=True), plans([1]), ["cls"])
    join(prefetch)
    prefetch.reach(1)
    assert "shards are not fetched ahead any more" in caplog.text and "a disk" in caplog.text


@pytest.mark.parametrize("arrays", [["cls"], ["patches", "cls", "pixels"]])
def test_one_file_is_always_fetched_however_large(arrays):
    store = Store(ahead_bytes=1)
    prefetch = ShardPrefetch(store, plans([1], [2]), arrays)
    wait_until(lambda: len(store.brought) == len(arrays) + 1)
    prefetch.close()
