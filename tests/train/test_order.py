"""The order of an epoch's clips."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4v.errors import ConfigError, RunExistsError
from s4v.store.reader import open_store
from s4v.store.shard_cache import ShardCache
from s4v.train.clips import LabelledRows, plan_training_epoch
from s4v.train.config import TrainConfig
from s4v.train.loop import train_run
from s4v.train.order import ShardWindow, draw_order, read_through_cache


def draw(rows, seed=0, window=None):
    return draw_order(np.asarray(rows), np.random.default_rng(seed), window)


@given(
    rows=st.lists(st.integers(0, 400), max_size=200),
    size=st.integers(1, 9),
    shards=st.integers(1, 60),
    seed=st.integers(0, 5),
)
def test_every_clip_comes_once_whatever_the_window(rows, size, shards, seed):
    window = ShardWindow(shards, size)
    order = draw(rows, seed, window)
    assert sorted(order.tolist()) == list(range(len(rows)))
    assert np.array_equal(order, draw(rows, seed, window))


def test_without_a_window_the_order_is_as_ever():
    assert draw(range(50), seed=[3, 4]).tolist() == np.random.default_rng([3, 4]).permutation(50).tolist()


@pytest.mark.parametrize("window", [1, 2, 5])
def test_so_many_shards_are_read_at_a_time(window):
    size, num_shards = 16, 40
    order = draw(range(size * num_shards), 1, ShardWindow(window, size))
    shard = order // size
    first, last = (np.array([where(np.flatnonzero(shard == one)) for one in range(num_shards)]) for where in (min, max))
    open_at = np.array([((first <= place) & (place <= last)).sum() for place in range(len(order))])
    wraps = np.flatnonzero(last - first > len(order) // 2)  # those at both ends of the circle
    assert len(wraps) <= window and np.median(open_at) <= window + 1 + len(wraps)
    spans = np.delete(last - first, wraps)
    assert spans.max() <= (window + 2) * size
    assert spans.min() >= window * size / 3, "mixed among all of the window"


def test_clips_of_a_window_are_mixed_evenly():
    """A clip's place in its shard says nothing of when it comes: a chi-squared of quarters, over seeds."""
    size, num_shards, counts = 8, 64, np.zeros((size := 8, 4))
    for seed in range(200):
        order = draw(range(size * num_shards), seed, ShardWindow(4, size))
        quarter = np.empty(len(order), int)
        quarter[order] = np.arange(len(order)) * 4 // len(order)
        np.add.at(counts, (np.arange(len(order)) % size, quarter), 1)
    expected = counts.sum() / counts.size
    assert ((counts - expected) ** 2 / expected).sum() < 54, "of 31 degrees of freedom, one in 150"


def test_processes_share_the_same_order():
    data = LabelledRows(np.arange(48), np.arange(48), np.full(48, 4), np.ones(48, int), [[[0]]] * 48)
    plan = dict(num_frames=2, seed=0, epoch=3, window=ShardWindow(3, 4))
    alone = plan_training_epoch(data, batch_size=8, **plan)
    ranks = [plan_training_epoch(data, batch_size=4, rank=rank, num_ranks=2, **plan) for rank in range(2)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert whole.rows.tolist() == [row for part in parts for row in part.rows.tolist()]
        assert np.array_equal(whole.places, np.concatenate([part.places for part in parts]))


def config_for(store, out, **changes):
    values = dict(features=store, out=out, epochs=2, batch_size=2, side_width=64, device="cpu", window=3)
    return TrainConfig(**{**values, "checkpoint_minutes": 0.0, **changes})


def test_a_run_through_a_cache_learns_the_same(int8_store, tmp_path, assert_same_run):
    said = []
    train_run(config_for(int8_store, tmp_path / "direct"))
    cached = config_for(int8_store, tmp_path / "cached", cache=tmp_path / "cache", cache_size=10**9)
    train_run(cached, say=said.append)
    assert_same_run(tmp_path / "direct", tmp_path / "cached")
    assert any(
        "clips of 3 of " in line and f"shards are kept in {tmp_path / 'cache'}, 1.0 GB at most" in line for line in said
    )
    assert list((tmp_path / "cache").glob("*/patches.c.*"))
    saved = json.loads((tmp_path / "cached/config.json").read_text())["train"]
    assert (saved["window"], saved["cache"]) == (3, str(tmp_path / "cache"))


def test_a_run_keeps_the_order_that_it_began_with(int8_store, tmp_path, assert_same_run):
    whole = config_for(int8_store, tmp_path / "whole", epochs=3)
    train_run(whole)
    part = config_for(int8_store, tmp_path / "part", epochs=3)
    (stopped := StopAfter(2)).run(part)
    assert stopped.stopped
    train_run(replace(part, window=None, cache=tmp_path / "cache", cache_size=10**9, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "part")


class StopAfter:
    def __init__(self, epochs):
        self.epochs, self.stopped = epochs, False

    def run(self, config):
        def report(metrics, num_epochs):
            if metrics["epoch"] == self.epochs:
                self.stopped = True
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_run(config, report)


def test_a_run_that_mixes_all_shards_goes_on_so_through_a_cache(int8_store, tmp_path, assert_same_run):
    whole = config_for(int8_store, tmp_path / "whole", window=None)
    train_run(whole)
    part = replace(whole, out=tmp_path / "part")
    StopAfter(1).run(part)
    train_run(replace(part, cache=tmp_path / "cache", cache_size=10**9, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "part")
    assert json.loads((tmp_path / "part/config.json").read_text())["train"]["window"] is None


def test_a_window_must_fit_into_its_cache(int8_store, tmp_path):
    store = open_store(int8_store)
    shard = store.layout.rows_per_shard * 6 * sum(store.layout.bytes_per_frame.values())
    num_shards = store.layout.num_shards

    def read(shards, wanted=None, mixes_all=False):
        cache = ShardCache(tmp_path / "a", shards * shard)
        return read_through_cache(store, cache, 6.0, wanted=wanted, mixes_all=mixes_all)

    assert read(100) == 8 and num_shards < 64
    assert store.ahead_bytes == 100 * shard // 8
    assert read(100, num_shards) == num_shards
    assert read(6, 2) == 2 and store.ahead_bytes == 6 * shard // 8
    assert read(5, mixes_all=True) is None
    assert read(num_shards, num_shards) == num_shards and store.ahead_bytes > 0, "no more than there is"
    for wanted in (3, None):
        with pytest.raises(ConfigError, match=r"\d+ shards of .*, \d of them mixed at a time take .*--window"):
            read(6, wanted)
    with pytest.raises(ConfigError, match=r", and 5 shards of \S+ take"):
        read(4, mixes_all=True)
    with pytest.raises(ConfigError, match="the cache may hold 1.0 kB, and .*raise --cache-size, leave out --c"):
        train_run(config_for(int8_store, tmp_path / "run", window=None, cache=tmp_path / "a", cache_size=1000))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="--window must be at least 1; found 0"):
        config_for(int8_store, tmp_path / "run", window=0)
    with pytest.raises(ConfigError, match="--cache-size has no effect without --cache"):
        config_for(int8_store, tmp_path / "run", cache_size=10)


def test_a_window_of_shards_that_are_cut_otherwise_is_another_order(int8_store, tmp_path):
    config = config_for(int8_store, tmp_path / "run")
    StopAfter(1).run(config)
    path = tmp_path / "run/config.json"
    saved = json.loads(path.read_text())
    assert saved["train"]["rows_per_shard"] == open_store(int8_store).layout.rows_per_shard
    saved["train"]["rows_per_shard"] += 1
    path.write_text(json.dumps(saved))
    with pytest.raises(RunExistsError, match="rows_per_shard 2 there, 1 here"):
        train_run(replace(config, resume=True))
