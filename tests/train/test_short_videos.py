"""Training videos that the reference's recipe leaves out because they are too short."""

import json
from dataclasses import replace

import pytest

from s4v.errors import ConfigError, RunExistsError, StoreMismatchError
from s4v.extract.extraction import extract_dataset
from s4v.store.reader import open_store
from s4v.train.compare import compare_methods
from s4v.train.config import TrainConfig
from s4v.train.loop import train_run
from s4v.train.networks.side4video import Side4Video
from s4v.train.paper.presets import PRESETS, SIZES
from s4v.train.recipe import Recipe
from s4v.train.sweep import sweep_heads

SHORT = {"train/run/3.mp4": 5, "train/walk/3.mp4": 7, "val/walk/0.mp4": 7}
"""Frames of the short videos; of all others there are 8 or more."""


@pytest.fixture(scope="module")
def store(make_video, make_config, tmp_path_factory):
    """Eight training videos, two of them below 8 frames, and two to validate on, of which one is."""
    root = tmp_path_factory.mktemp("short")
    for split, count in (("train", 4), ("val", 1)):
        for name in ("run", "walk"):
            for number in range(count):
                path = f"{split}/{name}/{number}.mp4"
                make_video(root / "videos" / path, seed=number, num_frames=SHORT.get(path, 8 + number))
    extract_dataset(make_config(root / "videos", root / "short.zarr", frames={"": 4}))
    return root / "short.zarr"


@pytest.fixture
def preset(monkeypatch):
    """The tiny store as if its backbone were a paper's, and its data set Kinetics."""
    recipe = Recipe(2, 1e-3, 0.5, batch_size=4, min_video_frames=8)
    tiny = replace(SIZES["b16"], depth=6).beside("recognition", "b16", "k400", recipe, {"side_width": 64})
    monkeypatch.setattr(Side4Video, "presets", (tiny,))
    find = lambda config, _: "b16-k400" if config.head == "side4video" else None  # noqa: E731
    monkeypatch.setattr("s4v.train.settings.find_preset", find)


def config_for(store, out, **changes):
    return TrainConfig(**{**dict(features=store, out=out, epochs=1, batch_size=3, device="cpu"), **changes})


def read_config(out):
    return json.loads((out / "config.json").read_text())["train"]


def test_of_the_presets_kinetics_alone_leaves_out_videos_below_8_frames():
    shortest = {preset.name: preset.recipe.min_video_frames for preset in PRESETS}
    assert {count for name, count in shortest.items() if name.endswith("-k400")} == {8}
    assert {count for name, count in shortest.items() if not name.endswith("-k400")} == {0}
    assert Recipe(1, 1.0).min_video_frames == 0


def test_what_a_preset_leaves_out_is_told_and_recorded(store, preset, tmp_path):
    said = []
    train_run(config_for(store, tmp_path / "run"), say=said.append)
    told = "2 training videos of fewer than 8 frames left out, as b16-k400 has it (--min-video-frames 0 takes them)"
    assert told in said
    saved = read_config(tmp_path / "run")
    assert saved["min_video_frames"] == 8 and saved["training_rows"].startswith("6 of sha256 ")
    assert len(open_store(store).read_manifest(["status"])) == 10, "the store keeps them"
    # Validation looks at both of its videos, as the reference's does.
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["val_top1"] in (0.0, 0.5, 1.0)


def test_an_option_says_otherwise(store, preset, tmp_path):
    said = []
    train_run(config_for(store, tmp_path / "all", min_video_frames=0), say=said.append)
    assert read_config(tmp_path / "all")["training_rows"].startswith("8 of") and "left out" not in " ".join(said)
    train_run(config_for(store, tmp_path / "some", head="linear", min_video_frames=6), say=said.append)
    assert said[-1] == "1 training video of fewer than 6 frames left out (--min-video-frames 0 takes them)"
    train_run(config_for(store, tmp_path / "none", head="linear"), say=said.append)
    assert read_config(tmp_path / "none")["min_video_frames"] == 0
    with pytest.raises(StoreMismatchError, match="every training video of .* fewer than 99 frames .*none is left"):
        train_run(config_for(store, tmp_path / "x", min_video_frames=99))
    with pytest.raises(ConfigError, match="^--min-video-frames must be a number from 0 up; found -1"):
        config_for(store, tmp_path / "x", min_video_frames=-1)
    assert not (tmp_path / "x").exists()


def test_a_run_from_before_goes_on_with_all_its_videos(store, preset, tmp_path):
    config = config_for(store, tmp_path / "run", epochs=1, min_video_frames=0)
    train_run(config)
    path = tmp_path / "run/config.json"
    saved = json.loads(path.read_text())
    del saved["train"]["min_video_frames"]
    path.write_text(json.dumps(saved))
    assert train_run(replace(config, min_video_frames=None, resume=True))["epochs"] == 1
    with pytest.raises(RunExistsError, match="min_video_frames 0 there, 8 here"):
        train_run(replace(config, min_video_frames=8, resume=True))


def test_methods_that_are_compared_and_heads_of_a_sweep_learn_from_the_same_videos(store, preset, tmp_path):
    base = config_for(store, tmp_path / "c", batch_size=None)
    compare_methods(base, methods=("side4video", "linear"))
    folders = ("side4video-0", "linear-0", "linear-choice/heads/000")
    rows = [read_config(tmp_path / "c" / name)["training_rows"].partition(" ")[0] for name in folders]
    assert rows == ["6", "6", "5"]
    sweep = sweep_heads(config_for(store, tmp_path / "s", hold_out=0.34), learning_rates=(1e-3, 1e-2))
    assert sweep.training_videos + sweep.held_out_videos == 6
    # A sweep that was begun by an older s4v goes on with what it held out then.
    sweep_heads(config_for(store, tmp_path / "old", hold_out=0.34, min_video_frames=0), learning_rates=(1e-3,))
    again = sweep_heads(config_for(store, tmp_path / "old", hold_out=0.34), learning_rates=(1e-3,))
    assert again.training_videos + again.held_out_videos == 8
