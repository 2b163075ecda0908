"""Training validates on one clip of the centre view; an evaluation looks at all that the store holds for it."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from s4v.extract.extraction import extract_dataset
from s4v.retrieve.trained_frames import TrainedFrames
from s4v.store.reader import open_store
from s4v.store.records import VIEW_NAMES
from s4v.train.clips import find_captioned_rows, find_labelled_rows, plan_evaluation, take_validation_clips
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run
from s4v.train.scorer import Scorer
from s4v.train.tasks import choose_task
from s4v.train.tasks.retrieval import embed_clips, evaluate_frozen_retrieval, read_frozen_clips

CENTRE = VIEW_NAMES["three"].index("centre")


def config_for(store, out, **changes):
    values = dict(features=store, out=out, epochs=1, batch_size=4, side_width=64, device="cpu", warmup_epochs=0.5)
    return TrainConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def tested(video_folder, make_config, tmp_path_factory):
    """Validation rows of three crops, two evaluation clips of 4 frames and one of training's own."""
    out = tmp_path_factory.mktemp("tested") / "s.zarr"
    options = dict(frames={"train": 6, "val": 12, "": 4}, clips={"val": 2}, validation_clip=("val",))
    extract_dataset(make_config(video_folder, out, **options, views={"val": "three"}, sampling="reference-sth"))
    return out


@pytest.fixture(scope="module")
def captioned(captioned_folder, make_captioned_config, tmp_path_factory):
    """Rows of three crops with captions, four frames each; the split test is called so, and there is no val."""
    root = tmp_path_factory.mktemp("captioned")
    table = root / "videos.csv"
    table.write_text((captioned_folder / "videos.csv").read_text().replace(",val,", ",test,"))
    config = make_captioned_config(captioned_folder, root / "s.zarr", annotations=table, views={"": "three"})
    extract_dataset(config)
    return config.out


@pytest.fixture
def seen(monkeypatch):
    """Clips that a network was shown outside of training: row, view and places of each."""
    clips = []
    run = Scorer.run

    def note(scorer, plans, *rest):
        for plan in plans:
            clips.extend(zip(plan.rows.tolist(), plan.views.tolist(), map(tuple, plan.places.tolist()), strict=True))
        return run(scorer, plans, *rest)

    monkeypatch.setattr(Scorer, "run", note)
    return clips


def test_training_validates_on_its_own_clip_of_the_centre(tested, tmp_path, seen):
    train_run(config_for(tested, tmp_path / "run"))
    data = find_labelled_rows(open_store(tested), "val")
    expected = zip(data.rows.tolist(), [CENTRE] * 2, map(tuple, data.validation_clips), strict=True)
    assert sorted(seen) == sorted(expected)
    seen.clear()
    evaluate_run(tmp_path / "run")
    all_clips = {(row, view, tuple(clip)) for row, clips in zip(data.rows.tolist(), data.eval_clips, strict=True)
                 for clip in clips for view in range(3)}  # fmt: skip
    assert sorted(seen) == sorted(all_clips) and len(all_clips) == 12
    own = {tuple(clip) for clip in data.validation_clips}
    assert not own & {clip for _, _, clip in all_clips}, "which is no clip of the test"


def test_a_killed_training_from_before_validates_as_it_did(tested, tmp_path, seen):
    config = config_for(tested, tmp_path / "run", epochs=2, resume=True)

    def kill(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(config, kill)
    recorded = json.loads((config.out / "config.json").read_text())
    assert recorded["train"].pop("validation") == "one clip of the centre view"
    (config.out / "config.json").write_text(json.dumps(recorded))
    seen.clear()
    assert train_run(config)["epochs"] == 2
    assert len(seen) == len(set(seen)) == 2 * 3 * 2, "all clips of all views, as its first epoch"


@pytest.mark.parametrize(
    ("sampling", "num_clips", "place"),
    [("reference-k400", 4, 0), ("reference-sth", 2, 0), ("reference-sth", 3, 1), ("uniform", 3, 1), ("uniform", 1, 0)],
)
def test_without_a_clip_of_its_own_the_nearest_one_serves(tested, sampling, num_clips, place):
    data = find_labelled_rows(open_store(tested), "val")
    clips = [[number, number + 10] for number in range(num_clips)]
    data = replace(data, eval_clips=[clips] * len(data), validation_clips=[None] * len(data), sampling=sampling)
    taken = take_validation_clips(data)
    assert taken.eval_clips == [[clips[place]]] * len(data)
    plans, owner = plan_evaluation(taken, num_frames=2, batch_size=9)
    assert owner.tolist() == [0, 1] and {int(view) for plan in plans for view in plan.views} == {CENTRE}


def test_retrieval_looks_at_the_centre_by_name(captioned, tmp_path, seen):
    store = open_store(captioned)
    data = find_captioned_rows(store, "test")
    expected = store.read_embeddings()[data.rows, CENTRE, :4]
    np.testing.assert_array_equal(read_frozen_clips(store, data, 4), expected)
    assert not np.array_equal(expected, store.read_embeddings()[data.rows, 0, :4])
    assert evaluate_frozen_retrieval(store, data, 4).scores.shape == (len(data), len(set(data.rows.tolist())))
    train_run(config_for(captioned, tmp_path / "run", task="retrieval", frames=4, val_split="test"))
    trained = TrainedFrames(tmp_path / "run")
    embed_clips(trained.scorer, data)
    assert {view for _, view, _ in seen} == {CENTRE}
    found = trained.embed(data.rows, [clips[0] for clips in data.eval_clips])
    np.testing.assert_array_equal(found.frames, embed_clips(trained.scorer, data))
    assert {view for _, view, _ in seen} == {CENTRE}


def test_without_a_split_named_the_one_that_is_there_is_evaluated(captioned, tmp_path, caplog):
    assert choose_task(open_store(captioned)) == "retrieval"
    train_run(config_for(captioned, tmp_path / "run", task="retrieval", frames=4))
    with caplog.at_level(logging.WARNING):
        figures = evaluate_run(tmp_path / "run")
    assert figures["split"] == "test" and "nothing to evaluate in split val: evaluating test (--split)" in caplog.text
    assert (tmp_path / "run/eval_test.json").is_file()


def test_a_split_that_cannot_be_evaluated_is_told_before_training(
    captioned_folder, make_captioned_config, tmp_path, caplog
):
    table = tmp_path / "videos.csv"
    table.write_text((captioned_folder / "videos.csv").read_text().replace(",val,", ",test,"))
    config = make_captioned_config(
        captioned_folder, tmp_path / "s.zarr", annotations=table, frames={"train": 6, "test": 3}, limit=99
    )
    extract_dataset(config)
    with caplog.at_level(logging.WARNING):
        train_run(config_for(config.out, tmp_path / "run", task="retrieval"))
    (line,) = [one.getMessage() for one in caplog.records if "cannot be evaluated there" in one.getMessage()]
    assert "have 6 frames, evaluation clips of the split test" in line and "as few as 3" in line
    assert "Train with --frames 3, or extract clips of 6 frames" in line
    caplog.clear()
    train_run(config_for(config.out, tmp_path / "three", task="retrieval", frames=3))
    assert "cannot be evaluated" not in caplog.text
    assert evaluate_run(tmp_path / "three", device=torch.device("cpu"))["split"] == "test"
