"""Several clips and views of a row: what is cached is what an evaluation then averages."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from s4v.backbone.vision_tower import build_backbone
from s4v.errors import ConfigError, StoreMismatchError
from s4v.extract.decode.sampling import SAMPLINGS
from s4v.extract.decode.views import VIEWS, render_view
from s4v.extract.decode.worker import decode
from s4v.extract.extraction import extract_dataset
from s4v.extract.plan import plan_command
from s4v.store.reader import open_store
from s4v.store.verify import verify_store
from s4v.train.clips import find_labelled_rows, plan_evaluation


def test_clips_stand_in_the_order_of_time_and_are_found_again(tmp_path, make_video):
    path = make_video(tmp_path / "v.mp4", num_frames=40)
    request = dict(
        path=str(path), num_frames=12, num_clips=3, sampling="reference-k400", resize="256", image_size=(64, 64)
    )
    facts, pixels = decode({**request, "views": "three", "decoder": "auto", "start_s": None, "end_s": None}, print)
    assert pixels.shape == (3, 12, 1, 64, 64, 3)
    assert facts["frame_indices"] == sorted(facts["frame_indices"])
    clips = [[facts["frame_indices"][place] for place in clip] for clip in facts["eval_clips"]]
    assert clips == SAMPLINGS["reference-k400"](40, 4, 3)
    assert sorted(place for clip in facts["eval_clips"] for place in clip) == list(range(12))
    one = {**request, "num_frames": 40, "num_clips": 1, "sampling": "uniform", "views": "centre", "decoder": "auto"}
    _, every_frame = decode({**one, "start_s": None, "end_s": None, "resize": "224", "image_size": (64, 64)}, print)
    assert every_frame.shape[:2] == (1, 40)
    views = VIEWS["three"](facts["width"], facts["height"], "256", (64, 64))
    assert facts["views"] == [{name: getattr(view, name) for name in view.__slots__} for view in views]


def test_views_of_a_frame_are_its_crops(tmp_path, make_frames):
    folder = make_frames(tmp_path / "v", num_frames=3)
    request = dict(
        path=str(folder), num_frames=3, sampling="uniform", resize="256x320", image_size=(64, 64), decoder="auto"
    )
    from PIL import Image

    _, pixels = decode({**request, "views": "three", "start_s": None, "end_s": None}, print)
    for place, file in enumerate(sorted(folder.iterdir())):
        frame = np.asarray(Image.open(file).convert("RGB"))
        for view, box in enumerate(VIEWS["three"](80, 64, "256x320", (64, 64))):
            assert np.array_equal(pixels[view, place, 0], render_view(frame, box))


@pytest.fixture(scope="module")
def several(video_folder, make_config, tmp_path_factory):
    """Training rows of one view of 6 frames; validation rows of three crops, two clips of 4 frames."""
    out = tmp_path_factory.mktemp("views") / "s.zarr"
    config = make_config(
        video_folder, out, frames={"train": 6, "": 8}, clips={"": 2}, views={"val": "three"}, sampling="reference-sth"
    )
    extract_dataset(config)
    return config


def test_rows_hold_the_views_and_clips_of_their_split(several):
    store = open_store(several.out)
    assert store.layout.num_views == 3
    rows = store.read_manifest(["split", "status", "num_views", "num_cached_frames", "num_frames", "eval_clips"])
    for row in rows.to_pylist():
        if row["status"] != "ok":
            continue
        expected = (1, 6, [[0, 1, 2, 3, 4, 5]]) if row["split"] == "train" else (3, 8, None)
        assert (row["num_views"], row["num_cached_frames"]) == expected[:2]
        assert expected[2] is None or row["eval_clips"] == expected[2]
        if row["split"] == "val":
            assert [len(clip) for clip in row["eval_clips"]] == [4, 4]
    assert verify_store(store) == []
    info = store.attributes
    assert info["clips"] == {"": 2} and info["views"] == {"val": "three"}


def test_tokens_are_those_of_each_views_pixels(several):
    store = open_store(several.out)
    backbone = build_backbone("tiny-clip", weights="random", device=torch.device("cpu")).load_weights()
    data = find_labelled_rows(store, "val")
    frames = list(range(8))
    seen = []
    for view in range(3):
        clips = store.read_clips(data.rows[:1], [frames], view=view)
        seen.append(clips.pixels[0, :, 0])
        live = backbone.encode_frames(torch.from_numpy(seen[-1]), store.layout.layers)
        for place, tokens in enumerate(live.patches):
            np.testing.assert_allclose(clips.patches[0, :, place], tokens.numpy(), rtol=1e-4, atol=1e-5)
        embedding = store.read_embeddings()[data.rows[0], view]
        np.testing.assert_allclose(embedding, live.embedding.numpy(), rtol=1e-4, atol=1e-5)
    assert not np.array_equal(seen[0], seen[1])


def test_an_evaluation_looks_at_every_clip_of_every_view(several):
    store = open_store(several.out)
    data = find_labelled_rows(store, "val")
    plans, owner = plan_evaluation(data, num_frames=4, batch_size=5)
    assert np.bincount(owner).tolist() == [6] * len(data)
    looked = [
        (int(row), int(view), tuple(places))
        for plan in plans
        for row, view, places in zip(plan.rows, plan.views, plan.places, strict=True)
    ]
    assert len(set(looked)) == len(looked) == 6 * len(data)
    for place, row in enumerate(data.rows):
        assert {one[2] for one in looked if one[0] == row} == {tuple(clip) for clip in data.eval_clips[place]}


def test_clips_that_cannot_share_the_frames_are_refused(several, tmp_path):
    config = replace(several, out=tmp_path / "s.zarr", clips={"val": 3})
    with pytest.raises(
        ConfigError, match=r"the 8 frames of split 'val' \(--frames\) cannot be shared evenly by 3 clips"
    ):
        extract_dataset(config)
    assert not config.out.exists()


def test_a_split_that_is_not_there_is_told(several, tmp_path, caplog):
    extract_dataset(replace(several, out=tmp_path / "s.zarr", views={"tset": "three"}, limit=1))
    assert "--views names tset: no video is in such a split" in caplog.text


def test_other_views_are_refused_and_planned(several):
    with pytest.raises(StoreMismatchError, match="views"):
        extract_dataset(replace(several, views={"": "centre"}))
    plan = plan_command(several)
    assert plan.frames == 9 * 6 + 2 * 8 * 3, "9 training videos, the broken one too, and two of three views"
