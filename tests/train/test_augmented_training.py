"""Training on views that were drawn: which are taken, with which labels, and that all else stays on the centre."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4v.errors import ConfigError, StoreMismatchError
from s4v.extract.extraction import extract_dataset
from s4v.store.reader import open_store
from s4v.train.clips import (
    LabelledRows,
    find_captioned_rows,
    find_labelled_rows,
    hold_out_rows,
    plan_evaluation,
    plan_training_epoch,
    take_trained_views,
)
from s4v.train.config import TrainConfig
from s4v.train.loop import train_run
from s4v.train.run_folder import open_run
from s4v.train.tasks import recognition as tasks

VIEWS = {"train": "augment:3", "": "centre"}


@pytest.fixture(scope="module")
def sided(make_video, make_config, build_once):
    """Classes that a mirror image turns into each other, one that it turns into none of the store, and one that stays.

    Four training videos of each, three drawn views of a video; no crop, so that pixels tell whether they are mirrored.
    """

    def make(root):
        for place, name in enumerate(("going left", "going right", "a left turn", "waiting")):
            for number in range(4):
                make_video(root / f"v/train/{name}/{number}.mp4", seed=10 * place + number)
            make_video(root / f"v/val/{name}/0.mp4", seed=10 * place + 5)
        extract_dataset(make_config(root / "v", root / "s.zarr", views=VIEWS, augmentation=("flip",)))
        extract_dataset(make_config(root / "v", root / "plain.zarr"))

    return build_once("sided", make)


def config_for(store, out, **changes):
    values = dict(features=store, out=out, epochs=2, batch_size=4, side_width=64, device="cpu", warmup_epochs=1.0)
    return TrainConfig(**{**values, "checkpoint_minutes": 0.0, **changes})


def plan(data, **changes):
    return plan_training_epoch(data, **{"num_frames": 3, "batch_size": 4, "seed": 0, "epoch": 0, **changes})


def test_the_label_of_a_view_is_what_it_shows(sided):
    store = open_store(sided / "s.zarr")
    names = store.classes.names
    assert names == ("a left turn", "going left", "going right", "waiting")
    data = find_labelled_rows(store, "train")
    assert data.view_labels.shape == (16, 4)
    seen = set()
    for place, row in enumerate(data.rows):
        own = int(data.labels[place])
        pixels = store.read_clips([row] * 4, [[0]] * 4, view=range(4), arrays=("pixels",)).pixels[:, 0, 0]
        assert data.view_labels[place, 0] == own
        for view in (1, 2, 3):
            is_mirrored = np.array_equal(pixels[view], pixels[0][:, ::-1])
            assert is_mirrored or np.array_equal(pixels[view], pixels[0])
            counterpart = {"going left": 2, "going right": 1, "a left turn": -1, "waiting": 3}[names[own]]
            assert data.view_labels[place, view] == (counterpart if is_mirrored else own)
            seen.add((own, is_mirrored))
    assert len(seen) == 8, "every class is mirrored at least once, and at least once not"


def test_training_takes_every_view_that_has_a_label_and_no_other(sided):
    data = find_labelled_rows(open_store(sided / "s.zarr"), "train")
    place_of = {row: place for place, row in enumerate(data.rows.tolist())}
    taken = set()
    for epoch in range(80):
        for batch in plan(data, epoch=epoch):
            for row, view, label in zip(batch.rows.tolist(), batch.views.tolist(), batch.labels.tolist(), strict=True):
                assert label == data.view_labels[place_of[row], view] >= 0
                taken.add((row, view))
    held = {(int(data.rows[place]), view) for place, view in np.argwhere(data.view_labels >= 0).tolist()}
    assert taken == held


def test_two_views_of_a_video_stand_in_one_step(sided):
    data = find_labelled_rows(open_store(sided / "s.zarr"), "train")
    for batch in plan(data, views_per_video=2, epoch=3):
        rows, counts = np.unique(batch.rows, return_counts=True)
        assert (counts == np.minimum(2, [data.num_trained_views[data.rows == row][0] for row in rows])).all()
        assert len({*zip(batch.rows.tolist(), batch.views.tolist(), strict=True)}) == len(batch.rows)


def test_the_centre_alone_is_what_a_plain_store_trains(sided):
    stores = [open_store(sided / name) for name in ("s.zarr", "plain.zarr")]
    drawn, plain = (find_labelled_rows(store, "train") for store in stores)
    centre = take_trained_views(drawn, "centre", stores[0], "train")
    for mine, expected in zip(plan(centre, epoch=2), plan(plain, epoch=2), strict=True):
        for name in ("rows", "views", "places", "labels"):
            assert np.array_equal(getattr(mine, name), getattr(expected, name))
    only = take_trained_views(drawn, "augmented", stores[0], "train")
    assert not (only.view_labels[:, 0] >= 0).any()
    assert all((batch.views > 0).all() for batch in plan(only, epoch=1))


def test_evaluation_and_what_is_held_out_look_at_the_centre(sided):
    store = open_store(sided / "s.zarr")
    data = find_labelled_rows(store, "train")
    training, held_out = hold_out_rows(data, store, 0.25, seed=0, by_class=True)
    assert len(held_out) == 4 and training.view_labels.shape == (12, 4)
    for rows in (data, held_out):
        plans, owner = plan_evaluation(rows, num_frames=2, batch_size=5)
        assert {int(view) for one in plans for view in one.views} == {0}
        assert len(owner) == len(rows)
        assert np.array_equal(np.concatenate([one.labels for one in plans]), rows.labels)


@given(seed=st.integers(0, 9), num_views=st.integers(1, 5), together=st.integers(1, 3), num_ranks=st.integers(1, 3))
def test_processes_share_what_one_would_draw(seed, num_views, together, num_ranks):
    generator, one = np.random.default_rng(seed), np.ones(12, int)
    labels = np.where(generator.random((12, num_views)) < 0.6, np.arange(12)[:, None], -1)
    labels[:, 0] = np.arange(12)
    clips = [[[0, 1, 2, 3]]] * 12
    data = LabelledRows(np.arange(12), np.arange(12), 4 * one, num_views * one, clips, view_labels=labels)
    ranks = [
        plan(data, seed=seed, batch_size=3, views_per_video=together, num_ranks=num_ranks, rank=rank)
        for rank in range(num_ranks)
    ]
    assert len({len(mine) for mine in ranks}) == 1
    whole = plan(data, seed=seed, batch_size=3 // together * together * num_ranks, views_per_video=together)
    for step, expected in enumerate(whole):
        joined = [np.concatenate([getattr(mine[step], name) for mine in ranks]) for name in ("rows", "views", "labels")]
        assert all(map(np.array_equal, joined, (expected.rows, expected.views, expected.labels)))


def test_drawn_views_are_asked_for_where_there_are_none(int8_store, tmp_path):
    with pytest.raises(StoreMismatchError, match="--train-views augmented: rows of split 'train'.*augment:4,centre"):
        train_run(config_for(int8_store, tmp_path / "run", train_views="augmented"))
    with pytest.raises(ConfigError, match="--train-views takes all, centre, augmented; found 'some'"):
        config_for(int8_store, tmp_path / "run", train_views="some")
    with pytest.raises(StoreMismatchError, match=r"2 views of a video .* hold 1 .*--train-views centre"):
        train_run(config_for(int8_store, tmp_path / "run", train_views="centre", views_per_video=2))


def test_views_without_a_class_are_told(sided, tmp_path, caplog):
    store = open_store(sided / "s.zarr")
    data = find_labelled_rows(store, "train")
    take_trained_views(data, "all", store, "train")
    num_lost = int((data.view_labels < 0).sum())
    assert f"{num_lost} of 64 views of {store.path} are not trained on" in caplog.text


@pytest.mark.slow
def test_a_run_on_drawn_views_goes_on_to_the_same_bit(sided, tmp_path, interrupted, assert_same_run):
    store = sided / "s.zarr"
    whole = train_run(config_for(store, tmp_path / "whole", views_per_video=2))
    with interrupted(tasks, "classification_loss", whole["steps"] - 2):
        train_run(config_for(store, tmp_path / "run", views_per_video=2))
    train_run(config_for(store, tmp_path / "run", views_per_video=2, resume=True))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert open_run(tmp_path / "run").config["train_views"] == "all"


@pytest.mark.slow  # an extraction and a training
def test_captions_stand_beside_crops_alone(make_captioned_config, captioned_folder, tmp_path):
    config = make_captioned_config(
        captioned_folder, tmp_path / "s.zarr", views=VIEWS, augmentation=("crop", "flip", "grey")
    )
    extract_dataset(config)
    store = open_store(config.out)
    data = find_captioned_rows(store, "train")
    table = store.read_manifest(["views", "augmentations"]).to_pylist()
    for place, row in enumerate(data.rows):
        for view in (1, 2, 3):
            says_otherwise = table[row]["views"][view]["flip"] or table[row]["augmentations"][view]["grey"]
            assert data.view_labels[place, view] == (-1 if says_otherwise else data.labels[place])
    assert (data.view_labels[:, 0] == data.labels).all()
    assert (data.view_labels < 0).any() and (data.view_labels[:, 1:] >= 0).any()
