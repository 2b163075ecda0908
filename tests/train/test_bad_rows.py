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


@given(count=st.integers(4, 30), views=st.integers(1, 3), together=st.integers(1, 3), data=st.data())
def test_a_substitute_is_a_clip_of_the_order_with_its_own_label(count, views, together, data):
    rows = data_of(count, views)
    for plan in plans_of(rows, views_per_video=together):
        steps = np.array(
            data.draw(st.lists(st.integers(0, count - 1), min_size=len(plan.rows), max_size=len(plan.rows)))
        )
        moved = plan.moved_on(steps)
        kept = steps == 0
        for name in ("rows", "views", "places", "labels"):
            assert np.array_equal(getattr(moved, name)[kept], getattr(plan, name)[kept])
        at = (plan.positions[:, 0] + steps) % count
        assert np.array_equal(moved.rows, plan.order.rows[at])
        for row, view, label in zip(moved.rows, moved.views, moved.labels, strict=True):
            assert view < views and label == rows.labels_by_view[row // 3, view]


def test_the_next_clip_of_the_order_stands_in():
    plans = plans_of(data_of(12))
    order = np.concatenate([plan.rows for plan in plans]).tolist()
    steps = np.array([0, 0, 2, 1])
    assert plans[0].moved_on(steps).rows.tolist() == [*order[:2], order[4], order[4]]
    assert plans[2].moved_on(np.array([0, 0, 0, 1])).rows.tolist() == [*order[8:11], order[0]]
    alone = plans[0].take(2)
    assert alone.rows.tolist() == [order[2]] and alone.places.shape == (1, 4) and alone.order is None


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
    found = set()
    for epoch in range(3):
        plans = plans_of(data, batch_size=2, epoch=epoch)
        order = np.concatenate([plan.rows for plan in plans]).tolist()
        for place, (plan, batch) in enumerate(zip(plans, make_loader(store, bad).load(plans), strict=True)):
            damaged = (plan.rows == lost) & (plan.places == 0).any(axis=1)
            expected = plan.moved_on(damaged.astype(int))
            if damaged.any():
                assert expected.rows[damaged] == order[(2 * place + int(np.argmax(damaged)) + 1) % len(order)]
            found |= set(damaged.tolist() if lost in plan.rows else ())
            clips = whole.read_clips(expected.rows, expected.places, view=expected.views)
            assert np.array_equal(batch.patches.numpy(), clips.patches)
            assert batch.labels.tolist() == expected.labels.tolist()
    assert bad.rows == {lost} and found == {True, False}
    (said,) = (record.getMessage() for record in caplog.records if "stand in" in record.getMessage())
    assert f"Read for video {whole.read_manifest(['video_id'])['video_id'][lost]}" in said
    assert said.endswith("Other clips stand in for those: video 1 of at most 1.")


def test_a_clip_of_a_damaged_row_that_is_whole_is_read(int8_store, tmp_path):
    """So what is learnt does not depend on when the damage was found."""
    store = damaged_store(int8_store, tmp_path, rows=(0,))
    data, whole = find_labelled_rows(store, "train"), open_store(int8_store)
    (plan,) = plans_of(data, batch_size=8)
    clip = int(np.flatnonzero(plan.rows == 0)[0])
    plan.places[clip] = [1, 2, 3, 4]
    plan.order.places[plan.positions[clip, 0], 0] = [1, 2, 3, 4]
    bad = BadRows(3)
    bad.take_over([0])
    (batch,) = make_loader(store, bad).load([plan])
    assert np.array_equal(batch.patches.numpy(), whole.read_clips(plan.rows, plan.places, view=plan.views).patches)


def test_damage_that_is_gone_when_it_is_looked_for_is_none(int8_store, monkeypatch):
    store, bad = open_store(int8_store), BadRows(0)
    data = find_labelled_rows(store, "train")
    plans, read, left = plans_of(data), ClipLoader._read_clips, [1]

    def read_once_wrong(loader, plan):
        if left and left.pop():
            raise StoreDamagedError("for a moment", row=int(plan.rows[0]))
        return read(loader, plan)

    monkeypatch.setattr(ClipLoader, "_read_clips", read_once_wrong)
    for plan, batch in zip(plans, make_loader(store, bad).load(plans), strict=True):
        assert batch.labels.tolist() == plan.labels.tolist()
    assert not bad.rows and not left


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
