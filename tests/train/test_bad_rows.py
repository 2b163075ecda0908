"""Rows whose bytes stay damaged: a training goes on without them, as far as it may."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s4v.errors import ConfigError, StoreDamagedError
from s4v.store.reader import open_store
from s4v.train.bad_rows import BadRows
from s4v.train.clips import ClipLoader, LabelledRows, find_labelled_rows, plan_training_epoch
from s4v.train.config import TrainConfig
from s4v.train.loop import train_run
from s4v.train.resume_state import STATE_NAME


def data_of(count, views=1):
    views = np.full(count, views)
    return LabelledRows(np.arange(count) * 3, np.arange(count) % 5, np.full(count, 6), views, [[[0]]] * count)


def plans_of(data, **changes):
    return plan_training_epoch(data, **{"num_frames": 4, "batch_size": 4, "seed": 0, "epoch": 1, **changes})


@given(
    count=st.integers(4, 30),
    views=st.integers(1, 3),
    together=st.integers(1, 3),
    first=st.sets(st.integers(0, 29)),
    later=st.sets(st.integers(0, 29)),
)
def test_whoever_stands_in_does_not_depend_on_when_a_row_was_found(count, views, together, first, later):
    data = data_of(count, views)
    first, both = ({3 * row for row in rows if row < count} for rows in (first, first | later))
    for plan in plans_of(data, views_per_video=together):
        at_once, in_turn = plan.without(both), plan.without(first).without(both)
        if len(both) < count:
            assert np.array_equal(at_once.rows, in_turn.rows) and np.array_equal(at_once.places, in_turn.places)
            assert not set(at_once.rows.tolist()) & both
            same = ~np.isin(plan.rows, list(both))
            assert np.array_equal(at_once.rows[same], plan.rows[same])
        for row, view, label in zip(at_once.rows, at_once.views, at_once.labels, strict=True):
            assert label == data.labels_by_view[row // 3, view]


def test_the_next_clip_of_the_order_stands_in():
    data = data_of(12)
    plans = plans_of(data)
    order = np.concatenate([plan.rows for plan in plans]).tolist()
    bad = {order[2], order[3], order[11]}
    found = np.concatenate([plan.without(bad).rows for plan in plans]).tolist()
    assert found == [*order[:2], order[4], order[4], *order[4:11], order[0]]


def test_clips_of_an_evaluation_have_no_substitute(int8_store, tmp_path):
    store = damaged_store(int8_store, tmp_path, rows=(0,))
    loader = make_loader(store, BadRows(5))
    (plan,) = plans_of(find_labelled_rows(store, "train"), batch_size=8)
    with pytest.raises(StoreDamagedError, match="does not match its checksum"):
        list(loader.load([replace(plan, order=None, positions=None)]))


def damaged_store(store, tmp_path, rows):
    """A copy of a store, with a byte of the patches of some rows flipped; a shard has one row."""
    path = shutil.copytree(store, tmp_path / "damaged.zarr")
    for row in rows:
        (file,) = (path / "patches").glob(f"c.{row}.*")
        content = bytearray(file.read_bytes())
        content[40] ^= 8
        file.write_bytes(content)
    return open_store(path)


def make_loader(store, bad):
    cpu = torch.device("cpu")
    return ClipLoader(store, arrays=("patches", "cls"), layers=store.layout.layers, device=cpu, bad=bad)


def test_batches_hold_the_labels_and_tokens_of_who_stands_in(int8_store, tmp_path, caplog):
    whole = open_store(int8_store)
    data = find_labelled_rows(whole, "train")
    lost = int(data.rows[1])
    store, bad = damaged_store(int8_store, tmp_path, rows=(lost,)), BadRows(1)
    plans = plans_of(data, batch_size=2)
    for _ in range(2):
        for plan, batch in zip(plans, make_loader(store, bad).load(plans), strict=True):
            expected = plan.without({lost})
            clips = whole.read_clips(expected.rows, expected.places, view=expected.views)
            assert np.array_equal(batch.patches.numpy(), clips.patches)
            assert batch.labels.tolist() == expected.labels.tolist()
    assert bad.rows == {lost}
    (said,) = (record.getMessage() for record in caplog.records if "stand in" in record.getMessage())
    assert f"Read for video {whole.read_manifest(['video_id'])['video_id'][lost]}" in said
    assert said.endswith("Other clips stand in for its own: video 1 of at most 1.")


def config_for(store, out, **changes):
    values = dict(features=store, out=out, epochs=2, batch_size=2, side_width=64, device="cpu")
    return TrainConfig(**{**values, "checkpoint_minutes": 0.0, **changes})


def test_a_run_goes_on_without_as_many_as_it_may(int8_store, tmp_path, assert_same_run):
    rows = find_labelled_rows(open_store(int8_store), "train").rows[:2].tolist()
    store = damaged_store(int8_store, tmp_path, rows).path
    with pytest.raises(StoreDamagedError, match=r"checksum.*\(--max-bad N trains on without up to N such videos\.\)"):
        train_run(config_for(store, tmp_path / "none"))
    with pytest.raises(StoreDamagedError, match=r"checksum.*\(--max-bad allows 1 such videos\.\)"):
        train_run(config_for(store, tmp_path / "one", max_bad=1))
    summary = train_run(config_for(store, tmp_path / "two", max_bad=2))
    assert summary["bad_rows"] == rows
    assert json.loads((tmp_path / "two/stats.json").read_text())["bad_rows"] == rows
    clean = train_run(config_for(int8_store, tmp_path / "clean", max_bad=2))
    assert "bad_rows" not in clean
    # Stopped after an epoch in which both were found, it goes on to the same.
    part = config_for(store, tmp_path / "part", max_bad=2)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(part, stop)
    assert (tmp_path / "part" / STATE_NAME).is_file()
    summary = train_run(replace(part, resume=True, max_bad=7))
    assert summary["bad_rows"] == rows, "kept in the state, where one epoch may not meet both"
    assert_same_run(tmp_path / "two", tmp_path / "part")
    with pytest.raises(ConfigError, match="--max-bad must be a number from 0 up; found -1"):
        config_for(store, tmp_path / "x", max_bad=-1)


def test_processes_know_of_all(monkeypatch):
    bad = BadRows(2)
    bad.take_over([3])

    def gather(found, own):
        found[:] = [own, [5, 3]]

    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    bad.share()
    assert bad.rows == {3, 5}
    bad.take_over([7])
    with pytest.raises(StoreDamagedError, match="3 videos of the store cannot be read, --max-bad allows 2: rows 3, "):
        bad.share()


def test_an_error_of_no_row_is_raised():
    with pytest.raises(StoreDamagedError, match="the manifest"):
        BadRows(9).note(StoreDamagedError("the manifest"))
