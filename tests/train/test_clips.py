import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s4v.errors import ConfigError, StoreMismatchError
from s4v.extract.extraction import extract_dataset
from s4v.store.reader import NO_FRAME, open_store
from s4v.train.clips import (
    ClipLoader,
    LabelledRows,
    find_labelled_rows,
    plan_evaluation,
    plan_training_epoch,
    plan_whole_rows,
    resolve_clip_frames,
    spread_clips,
    thin,
)
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run


def rows(count, cached=16, views=1):
    places = np.arange(count)
    one = np.ones(count, dtype=int)
    return LabelledRows(places, places % 3, cached * one, views * one, [[list(range(cached))]] * count)


@given(count=st.integers(1, 60), batch=st.integers(1, 20), frames=st.integers(1, 8), epoch=st.integers(0, 5))
def test_an_epoch_takes_each_row_at_most_once_and_a_frame_of_every_part(count, batch, frames, epoch):
    plans = plan_training_epoch(rows(count), num_frames=frames, batch_size=batch, seed=0, epoch=epoch)
    taken = np.concatenate([plan.rows for plan in plans])
    assert len(set(taken)) == len(taken)
    assert len(taken) == (count // batch * batch if count >= batch else count)
    for plan in plans:
        assert np.array_equal(plan.labels, plan.rows % 3)
        parts = np.arange(frames + 1) * 16 // frames
        assert ((plan.places >= parts[:-1]) & (plan.places < parts[1:])).all()


def test_an_epoch_is_a_function_of_seed_and_epoch():
    def plan(seed, epoch):
        return plan_training_epoch(rows(40), num_frames=4, batch_size=8, seed=seed, epoch=epoch)

    def same(a, b):
        pairs = zip(a, b, strict=True)
        return all(np.array_equal(x.rows, y.rows) and np.array_equal(x.places, y.places) for x, y in pairs)

    assert same(plan(0, 3), plan(0, 3))
    assert not same(plan(0, 3), plan(0, 4))
    assert not same(plan(0, 3), plan(1, 3))


@given(count=st.integers(4, 60), batch=st.integers(1, 9), num_ranks=st.integers(1, 4), views=st.integers(1, 3))
def test_ranks_share_an_epoch_in_equal_parts(count, batch, num_ranks, views):
    plans = [
        plan_training_epoch(
            rows(count, views=views), num_frames=4, batch_size=batch, seed=1, epoch=2, rank=rank, num_ranks=num_ranks
        )
        for rank in range(num_ranks)
    ]
    assert len({len(mine) for mine in plans}) == 1
    taken = np.concatenate([plan.rows for mine in plans for plan in mine])
    assert len(set(taken)) == len(taken)
    assert len({len(plan.rows) for mine in plans for plan in mine}) == 1
    assert all((plan.views < views).all() for mine in plans for plan in mine)


def test_steps_that_cannot_be_shared_out_are_refused():
    plan = dict(num_frames=4, seed=0, epoch=0)
    with pytest.raises(ConfigError, match="4 processes cannot share 3 training videos: start fewer"):
        plan_training_epoch(rows(3), batch_size=8, num_ranks=4, **plan)
    with pytest.raises(ConfigError, match="a step of 2 clips cannot hold 3 views of one video: raise --batch-size"):
        plan_training_epoch(rows(9, views=3), batch_size=2, views_per_video=3, **plan)


def test_several_views_of_a_video_stand_in_one_step():
    data = rows(10, views=3)
    data.num_views[7] = 1
    plans = plan_training_epoch(data, num_frames=4, batch_size=6, seed=0, epoch=0, views_per_video=2)
    seen = {}
    for plan in plans:
        for row, view in zip(plan.rows, plan.views, strict=True):
            seen.setdefault(row, []).append((view, id(plan)))
    assert len(plans) == 3
    for row, found in seen.items():
        views, steps = zip(*found, strict=True)
        assert len(set(steps)) == 1
        assert len(set(views)) == len(views) == (1 if row == 7 else 2)
        assert row != 7 or views == (0,)


def test_evaluation_takes_every_view():
    plans, owner = plan_evaluation(rows(2, views=3), num_frames=4, batch_size=4)
    assert owner.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.concatenate([plan.views for plan in plans]).tolist() == [0, 1, 2, 0, 1, 2]


@given(cached=st.integers(1, 40), frames=st.integers(1, 16), clips=st.integers(1, 5))
def test_spread_clips_lie_in_range_and_in_order(cached, frames, clips):
    found = spread_clips(cached, frames, clips)
    assert len(found) == clips
    for clip in found:
        assert len(clip) == frames
        assert clip == sorted(clip)
        assert 0 <= clip[0] <= clip[-1] < cached


def test_one_spread_clip_is_the_thinned_video():
    assert spread_clips(16, 8, 1) == [thin(list(range(16)), 8)] == [list(range(1, 16, 2))]
    assert spread_clips(16, 8, 2) == [list(range(0, 16, 2)), list(range(1, 16, 2))]


def test_evaluation_takes_recorded_clips_and_knows_whose_they_are():
    clips = [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 2]]]
    data = LabelledRows(np.array([4, 9]), np.array([0, 1]), np.array([8, 8]), np.array([1, 1]), clips)
    plans, owner = plan_evaluation(data, num_frames=2, batch_size=2)
    assert owner.tolist() == [0, 0, 1]
    assert [plan.rows.tolist() for plan in plans] == [[4, 4], [9]]
    assert plans[0].places.tolist() == [[1, 3], [5, 7]]


def test_only_good_labelled_rows_of_the_split_are_used(float_store):
    store = open_store(float_store)
    data = find_labelled_rows(store, "train")
    assert len(data) == 8
    assert set(data.num_cached_frames) == {6}
    assert len(find_labelled_rows(store, "val")) == 2
    assert len(find_labelled_rows(store, "test")) == 0


def test_clip_longer_than_the_cache_is_refused(float_store):
    store = open_store(float_store)
    assert resolve_clip_frames(None, np.array([16, 8]), store) == 8
    assert resolve_clip_frames(None, np.array([6, 4]), store) == 4
    with pytest.raises(StoreMismatchError, match="a clip of 8 frames was asked for, rows of .* hold as few as 4"):
        resolve_clip_frames(8, np.array([6, 4]), store)


def test_loader_hands_over_planned_clips_in_order(float_store):
    store = open_store(float_store)
    data = find_labelled_rows(store, "train")
    plans = plan_training_epoch(data, num_frames=3, batch_size=2, seed=0, epoch=0)
    loader = ClipLoader(store, arrays=("patches", "cls", "pixels"), layers=(1, 5), device=torch.device("cpu"))
    batches = list(loader.load(plans))
    assert len(batches) == len(plans) == 4
    for plan, batch in zip(plans, batches, strict=True):
        expected = store.read_clips(plan.rows, plan.places, layers=(1, 5))
        assert torch.equal(batch.patches, torch.from_numpy(expected.patches))
        assert torch.equal(batch.cls, torch.from_numpy(expected.cls))
        assert batch.labels.tolist() == plan.labels.tolist()
        assert batch.pixels.shape == (2, 3, 3, 64, 64)
        mean, std = (np.array(store.attributes["backbone"][k]) for k in ("mean", "std"))
        by_hand = (expected.pixels[0, 0, 0] / 255 - mean) / std
        np.testing.assert_allclose(batch.pixels[0, 0].permute(1, 2, 0), by_hand, atol=1e-5)


def uneven_rows(counts):
    counts = np.asarray(counts)
    places, one = np.arange(len(counts)), np.ones(len(counts), dtype=int)
    return LabelledRows(places, places % 3, counts, one, [[list(range(count))] for count in counts])


@given(counts=st.lists(st.integers(1, 90), min_size=1, max_size=120), batch=st.integers(1, 9), epoch=st.integers(0, 3))
def test_whole_rows_are_padded_beside_rows_of_like_length(counts, batch, epoch):
    data = uneven_rows(counts)
    plans = plan_whole_rows(data, batch_size=batch, seed=0, epoch=epoch)
    assert sorted(np.concatenate([plan.rows for plan in plans])) == list(range(len(counts)))
    for plan in plans:
        lengths = data.num_cached_frames[plan.rows]
        assert plan.places.shape == (len(plan.rows), lengths.max()) and len(plan.rows) <= batch
        for clip, length in zip(plan.places, lengths, strict=True):
            assert clip.tolist() == [*range(length), *[NO_FRAME] * (len(clip) - length)]
        assert np.array_equal(plan.labels, plan.rows % 3)
    again = plan_whole_rows(data, batch_size=batch, seed=0, epoch=epoch)
    assert all(np.array_equal(one.rows, other.rows) for one, other in zip(plans, again, strict=True))


def test_batches_by_length_waste_little():
    counts = np.random.default_rng(0).integers(1, 400, 640)
    plans = plan_whole_rows(uneven_rows(counts), batch_size=8, seed=0, epoch=0)
    padding = sum(int((plan.places == NO_FRAME).sum()) for plan in plans)
    assert padding < 0.1 * counts.sum(), "at random it would be two thirds"


@given(counts=st.lists(st.integers(1, 20), min_size=3, max_size=30), frames=st.integers(1, 12))
def test_a_clip_of_a_short_row_shows_frames_twice(counts, frames):
    data = uneven_rows(counts)
    for plan in plan_training_epoch(data, num_frames=frames, batch_size=4, seed=0, epoch=0):
        lengths = data.num_cached_frames[plan.rows][:, None]
        assert ((plan.places >= 0) & (plan.places < lengths)).all() and (np.diff(plan.places, axis=1) >= 0).all()


def test_rows_of_any_length_are_trained_on(make_config, video_folder, tmp_path):
    config = make_config(video_folder, tmp_path / "s.zarr", sampling="fps:5", frames=None)
    extract_dataset(config)
    store = open_store(config.out)
    data = find_labelled_rows(store, "train")
    assert resolve_clip_frames(None, data.num_cached_frames, store) == 8, "though the shortest row has six frames"
    loader = ClipLoader(
        store, arrays=("patches", "cls", "pixels"), layers=store.layout.layers, device=torch.device("cpu")
    )
    plans = plan_whole_rows(data, batch_size=3, seed=0, epoch=0)
    for plan, batch in zip(plans, loader.load(plans), strict=True):
        is_frame = torch.from_numpy(plan.places >= 0)
        assert (batch.frame_mask is None) == bool(is_frame.all())
        for values in (batch.pixels, batch.patches, batch.cls):
            assert not values[~is_frame].any() and values[is_frame].flatten(1).any(dim=1).all()
    config = TrainConfig(features=store.path, head="linear", out=tmp_path / "run", epochs=1, device="cpu", batch_size=4)
    train_run(config)
    assert evaluate_run(tmp_path / "run")["videos"] == 2
