"""`--for NAME`: what networks need of a store, theirs that are there and theirs that are not yet."""

from __future__ import annotations

from dataclasses import replace

import pytest

from s4v.errors import ConfigError, StoreMismatchError
from s4v.extract.extraction import extract_dataset
from s4v.extract.purposes import PURPOSES
from s4v.store.class_texts import read_class_texts
from s4v.store.needs import find_lacks
from s4v.store.offsets import describe_offsets
from s4v.store.reader import open_store
from s4v.store.texts import TextReader
from s4v.train.networks import NETWORKS


def test_every_network_has_a_line():
    assert set(NETWORKS) <= set(PURPOSES)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "zero-shot"])
def test_a_store_for_a_network_lacks_nothing(name, video_folder, make_config, tmp_path):
    config = make_config(video_folder, tmp_path / "s.zarr", purpose=name, limit=1)
    extract_dataset(config)
    store = open_store(config.out)
    for needs in NETWORKS[name].needs.values():
        assert find_lacks(store, needs) == []
    assert store.layout.with_pixels == ("pixels" in {a for n in NETWORKS[name].needs.values() for a in n.arrays})


def test_a_store_for_tds_clip(video_folder, make_config, tmp_path):
    config = make_config(video_folder, tmp_path / "s.zarr", purpose="tds-clip", splits=("val",))
    extract_dataset(config)
    store = open_store(config.out)
    assert describe_offsets(store.layout.pixel_offsets) == "-2..2" and store.facts.pixel_edge == "clamp"
    assert store.layout.layers == tuple(range(6))
    wrapped = make_config(video_folder, tmp_path / "k.zarr", purpose="tds-clip", dataset="k400", frames=None)
    assert wrapped.cached_edge == "wrap" and wrapped.recipe.sampling == "reference-k400"


def test_a_store_for_dist(video_folder, make_config, tmp_path):
    config = make_config(video_folder, tmp_path / "s.zarr", purpose="dist", frames=None, weights=None)
    extract_dataset(config)
    store = open_store(config.out)
    assert describe_offsets(store.layout.pixel_offsets) == "0,0.5step"
    rows = store.read_manifest(["split", "status", "num_cached_frames", "eval_clips", "validation_clip"]).to_pylist()
    for row in rows:
        if row["status"] == "ok":
            is_train = row["split"] == "train"
            assert row["num_cached_frames"] == (8 if is_train else 32)
            assert [len(clip) for clip in row["eval_clips"]] == [8] * (1 if is_train else 3)
            assert (row["validation_clip"] is None) == is_train
    assert read_class_texts(store).template == "{}"


def test_a_store_for_r2_tuning(captioned_folder, make_config, tmp_path):
    config = make_config(
        captioned_folder,
        tmp_path / "s.zarr",
        dataset="table",
        annotations=captioned_folder / "videos.csv",
        purpose="r2-tuning",
        sampling="fps:5",
        text_layers="last3",  # tiny-clip's text tower has no more
        frames=None,
        weights=None,
    )
    extract_dataset(config)
    store = open_store(config.out)
    assert store.layout.layers == (2, 3, 4, 5) and not store.layout.with_pixels
    assert store.facts.is_open_ended and store.facts.sampling == "fps:5", "what is given wins"
    choice = TextReader(store).choice
    assert choice.layers == (0, 1, 2)


def test_what_is_given_wins(video_folder, make_config, tmp_path):
    config = make_config(
        video_folder,
        tmp_path / "s.zarr",
        purpose="dist",
        layers="0,2",
        resize="256",
        pixel_offsets=(0, 1),
        frames={"": 4},
    )
    assert (config.layers, config.recipe.resize, config.recipe.frames) == ("0,2", "256", {"": 4})
    assert describe_offsets(config.cached_offsets) == "0,1" and config.recipe.sampling == "reference-dist"
    assert make_config(video_folder, tmp_path / "s.zarr").layers == "paper"


def test_a_store_that_is_there_stays_as_it_was_begun(float_store, video_folder, make_config):
    config = make_config(video_folder, float_store)
    with pytest.raises(StoreMismatchError, match=r"pixel_offsets.*there"):
        extract_dataset(replace(config, purpose="tds-clip"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"purpose": "i3d"}, "--for takes side4video, linear, .*; found 'i3d'"),
        ({"purpose": "tds-clip", "with_pixels": False}, "--no-pixels stores no frames, --pixel-offsets -2..2"),
        ({"purpose": "dist", "sampling": "fps:1", "frames": None}, "--sampling fps:1 takes as many frames"),
    ],
)
def test_what_does_not_go_together_is_told(video_folder, make_config, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(video_folder, tmp_path / "s.zarr", **changes)
