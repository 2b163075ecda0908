"""The paper's sizes and recipes, by the store's backbone and data set."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from s4v.errors import ConfigError, StoreMismatchError
from s4v.store.reader import StoreReader, open_store
from s4v.train.config import TrainConfig
from s4v.train.loop import train_run
from s4v.train.networks.side4video import Side4Video
from s4v.train.paper.presets import PRESETS, SIZES
from s4v.train.settings import resolve_preset, resolve_views

BACKBONES = {
    "b16": dict(architecture="ViT-B-16-quickgelu", width=768, depth=12, patch_size=[16, 16]),
    "l14": dict(architecture="ViT-L-14-quickgelu", width=1024, depth=24, patch_size=[14, 14]),
    "e14": dict(architecture="EVA02-E-14", width=1792, depth=64, patch_size=[14, 14]),
}


@pytest.fixture
def make_store(int8_store):
    """A store's reader with another backbone, data set and layers in its attributes; no tokens are read here."""

    def make(backbone, dataset, layers):
        attributes = copy.deepcopy(open_store(int8_store).attributes)
        attributes["backbone"] |= BACKBONES[backbone]
        attributes["dataset"]["name"] = dataset
        attributes["layout"] |= {"layers": list(layers), "width": BACKBONES[backbone]["width"]}
        return StoreReader(Path("store/x.zarr"), attributes)

    return make


def config(**options):
    return TrainConfig(features=Path("store/x.zarr"), out=Path("runs/x"), **options)


def every_second(depth):
    return tuple(range(1, depth, 2))


def test_the_table_holds_the_papers_sizes():
    """Tapped layers x S."""
    found = {name: f"{len(size.layers)}x{size.side_width}" for name, size in SIZES.items()}
    assert found == {"b16": "12x320", "b16-light": "6x192", "l14": "24x512", "l14-light": "12x320", "e14": "32x576"}
    assert all(size.layers[-1] == size.depth - 1 for size in SIZES.values()), "the last block is always tapped"
    assert len(PRESETS) == len({preset.name for preset in PRESETS}) == len(SIZES) * (3 + 3) == 30


@pytest.mark.parametrize(
    ("backbone", "layers", "dataset", "name", "expected"),
    [
        ("b16", range(12), "k400", "b16-k400", (320, 30, 1e-3, 4.0)),
        ("b16", range(12), "ssv1", "b16-ssv1", (320, 40, 1e-3, 4.0)),
        ("b16", every_second(12), "ssv2", "b16-light-ssv2", (192, 30, 1e-3, 4.0)),
        ("l14", range(24), "ssv1", "l14-ssv1", (512, 30, 1e-4, 4.0)),
        ("l14", every_second(24), "k400", "l14-light-k400", (320, 30, 1e-4, 4.0)),
        ("e14", every_second(64), "k400", "e14-k400", (576, 20, 1e-4, 4.0)),
        ("e14", every_second(64), "ssv1", "e14-ssv1", (576, 30, 1e-4, 6.0)),
        ("e14", every_second(64), "ssv2", "e14-ssv2", (576, 25, 1e-4, 6.0)),
    ],
)
def test_auto_goes_by_backbone_layers_and_data_set(make_store, backbone, layers, dataset, name, expected):
    found = resolve_preset(config(), make_store(backbone, dataset, layers))
    assert found.preset == name
    assert (found.side_width, found.epochs, found.learning_rate, found.warmup_epochs) == expected
    assert (found.weight_decay, found.label_smoothing) == (0.15, 0.1)
    assert found.layers == tuple(layers)


@pytest.mark.parametrize(
    ("backbone", "layers", "dataset", "options"),
    [
        ("b16", range(12), "folder", {}),
        ("b16", (3, 7, 11), "k400", {}),
        ("b16", (0, 1, 2, 3, 5, 6, 7, 8, 9, 11), "k400", {}),
        ("b16", (1, 2, 3, 5, 7, 9, 11), "k400", {}),
        ("b16", range(12), "k400", {"layers": (3, 7, 11)}),
        ("b16", range(12), "k400", {"preset": "none"}),
        ("b16", range(12), "k400", {"head": "linear"}),
    ],
)
def test_where_no_preset_fits_the_defaults_hold(make_store, backbone, layers, dataset, options):
    found = resolve_preset(config(**options), make_store(backbone, dataset, layers))
    assert found == config(
        **{**options, "preset": "none"},
        epochs=30,
        learning_rate=3e-3 if options.get("head") == "linear" else 1e-3,
        warmup_epochs=4.0,
        weight_decay=0.15,
        label_smoothing=0.1,
        batch_size=32,
        optimizer="adamw",
        undecayed="nothing",
        min_video_frames=0,
        interaction="mean",
    )


@pytest.mark.parametrize(
    ("backbone", "layers", "dataset", "name"),
    [
        ("b16", range(12), "msrvtt", "b16-msrvtt"),
        ("l14", every_second(24), "vatex", "l14-light-vatex"),
        ("e14", every_second(64), "msvd", "e14-msvd"),
        ("b16", range(12), "k400", "none"),
    ],
)
def test_retrieval_has_one_recipe(make_store, backbone, layers, dataset, name):
    found = resolve_preset(config(task="retrieval"), make_store(backbone, dataset, layers))
    assert (found.preset, found.side_width, found.epochs, found.learning_rate) == (name, 320, 5, 1e-4)
    assert (found.warmup_epochs, found.weight_decay, found.batch_size, found.clip_norm) == (0.5, 0.2, 128, 1.0)
    longer = resolve_preset(config(task="retrieval", epochs=20), make_store(backbone, dataset, layers))
    assert longer.warmup_epochs == 2.0, "a tenth of all epochs"


@pytest.mark.parametrize(
    ("backbone", "layers", "dataset", "name", "expected"),
    [
        ("b16", range(12), "ssv1", "tds-clip-b16-ssv1", (320, 40, 1e-3, 4.0)),
        ("l14", range(24), "k400", "tds-clip-l14-k400", (512, 30, 1e-4, 4.0)),
        ("b16", every_second(12), "ssv1", "none", (None, 30, 1e-3, 4.0)),
        ("e14", range(64), "ssv1", "none", (None, 30, 1e-4, 4.0)),
    ],
)
def test_tds_clip_has_presets_of_its_own(make_store, backbone, layers, dataset, name, expected):
    store = make_store(backbone, dataset, layers)
    found = resolve_preset(config(head="tds-clip"), store)
    assert found.preset == name
    assert (found.side_width, found.epochs, found.learning_rate, found.warmup_epochs) == expected
    if name != "none":
        assert resolve_preset(config(head="tds-clip", preset=name), store).batch_size == 256
        assert resolve_views(found, np.full(4, 2)) == 2, "of Kinetics too, unlike Side4Video"
        with pytest.raises(ConfigError, match="--preset has no effect on --head side4video: .*train --head tds-clip"):
            resolve_preset(config(preset=name), store)


def test_given_options_win(make_store):
    given = dict(epochs=3, learning_rate=0.5, warmup_epochs=0.0, weight_decay=0.0, label_smoothing=0.0, side_width=64)
    store = make_store("b16", "ssv1", range(12))
    assert resolve_preset(config(**given), store) == config(
        **given,
        preset="b16-ssv1",
        layers=tuple(range(12)),
        batch_size=32,
        norm_clips=32,
        optimizer="adamw",
        undecayed="nothing",
        min_video_frames=0,
        interaction="mean",
    )
    light = resolve_preset(config(layers=every_second(12)), store)
    assert light.preset == "b16-light-ssv1", "the layers that were asked for are the light network's"
    assert resolve_preset(config(preset="b16-light-k400"), store).layers == every_second(12)


def test_presets_that_do_not_fit_are_refused(make_store):
    store = make_store("l14", "k400", every_second(24))
    with pytest.raises(ConfigError, match="--preset takes auto, none, b16-k400, .*; found 'b16'"):
        resolve_preset(config(preset="b16"), store)
    with pytest.raises(ConfigError, match="--preset has no effect on --head linear"):
        resolve_preset(config(preset="l14-k400", head="linear"), store)
    with pytest.raises(StoreMismatchError, match="b16-k400 is for a CLIP backbone of width 768, 12 blocks.*width 1024"):
        resolve_preset(config(preset="b16-k400"), store)
    with pytest.raises(StoreMismatchError, match="missing 0,2,4"):
        resolve_preset(config(preset="l14-k400"), store)


def test_a_run_records_what_its_preset_came_to(int8_store, tmp_path):
    options = TrainConfig(features=int8_store, out=tmp_path / "run", epochs=1, side_width=64, device="cpu")
    assert train_run(options)["preset"] == "none"
    saved = json.loads((tmp_path / "run/config.json").read_text())["train"]
    assert (saved["preset"], saved["epochs"], saved["warmup_epochs"], saved["weight_decay"]) == ("none", 1, 4.0, 0.15)
    with pytest.raises(StoreMismatchError, match="is for a CLIP backbone"):
        train_run(replace(options, out=tmp_path / "other", preset="b16-k400"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("name", "frames", "batch_size"),
    [("b16-k400", 8, 256), ("b16-ssv2", 8, 256), ("b16-msrvtt", 12, 128)],
)
def test_a_named_preset_has_frames_and_clips_of_its_own(make_store, name, frames, batch_size):
    task = "retrieval" if name.endswith("msrvtt") else "recognition"
    store = make_store("b16", name.partition("-")[2], range(12))
    named = resolve_preset(config(preset=name, task=task), store)
    assert (named.frames, named.batch_size) == (frames, batch_size)
    assert resolve_preset(config(task=task), store).frames is None, "auto takes what the rows hold"
    assert resolve_preset(config(preset=name, task=task, frames=4, batch_size=3), store).frames == 4
    e14 = make_store("e14", "k400", every_second(64))
    assert resolve_preset(config(), e14).batch_size == 8
    assert resolve_preset(config(), make_store("e14", "ssv1", every_second(64))).batch_size == 16


def test_retrievals_batch_is_that_of_all_processes(make_store):
    store = make_store("b16", "msrvtt", range(12))
    assert resolve_preset(config(task="retrieval"), store, num_processes=8).batch_size == 16
    assert resolve_preset(config(task="retrieval", batch_size=5), store, num_processes=3).batch_size == 5
    with pytest.raises(
        ConfigError, match="a step of 128 clips cannot be shared out evenly among 3 processes: give --ba"
    ):
        resolve_preset(config(task="retrieval"), store, num_processes=3)
    recognition = make_store("b16", "k400", range(12))
    assert resolve_preset(config(), recognition, num_processes=8).batch_size == 32, "each one's"


def test_views_of_a_video_stand_in_one_step_where_all_rows_have_them(make_store):
    ssv2 = resolve_preset(config(), make_store("b16", "ssv2", range(12)))
    assert ssv2.preset == "b16-ssv2" and ssv2.views_per_video is None
    k400 = resolve_preset(config(), make_store("b16", "k400", range(12)))
    three, mixed, one = np.full(4, 3), np.array([3, 1]), np.ones(4, int)
    assert [resolve_views(ssv2, views) for views in (three, mixed, one)] == [2, 1, 1]
    assert resolve_views(k400, three) == 1
    given = replace(k400, views_per_video=3)
    assert resolve_views(given, three) == resolve_views(given, mixed) == 3
    with pytest.raises(StoreMismatchError, match="3 views of a video were asked for .*hold 1 .*: extract with --views"):
        resolve_views(given, one)
    with pytest.raises(StoreMismatchError, match="hold 1"):
        resolve_views(given, mixed, num_processes=2)


def test_a_preset_that_was_found_warns_of_fewer_frames_and_a_named_one_refuses(
    int8_store, tmp_path, monkeypatch, caplog
):
    """The tiny store as if its backbone were a paper's."""
    monkeypatch.setattr("s4v.train.settings.find_preset", lambda *_: "b16-k400")
    (paper,) = (preset for preset in PRESETS if preset.name == "b16-k400")
    tiny = replace(paper, depth=6, layers=tuple(range(6)), sizes={"side_width": 64})
    monkeypatch.setattr(Side4Video, "presets", (tiny,))
    monkeypatch.setattr(type(tiny), "is_beside", lambda *_: True)
    options = TrainConfig(features=int8_store, out=tmp_path / "run", epochs=1, device="cpu")
    assert train_run(options)["preset"] == "b16-k400"
    assert "clips of 4 frames: rows of" in caplog.text and "b16-k400 is trained with 8 (--frames)" in caplog.text
    with pytest.raises(StoreMismatchError, match="a clip of 8 frames was asked for, rows of .* as few as 4"):
        train_run(replace(options, out=tmp_path / "named", preset="b16-k400"))
    assert not (tmp_path / "named").exists()
    train_run(replace(options, out=tmp_path / "given", preset="b16-k400", frames=4))
