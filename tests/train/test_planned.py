"""`s4v extract --for NAME`: what networks need of a store, theirs that are there and theirs that are not yet."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import ConfigError
from s4v.extract.extraction import extract_dataset
from s4v.store.class_texts import read_class_texts
from s4v.store.needs import find_lacks
from s4v.store.offsets import describe_offsets
from s4v.store.reader import open_store
from s4v.store.texts import TextReader
from s4v.train.networks import NETWORKS
from s4v.train.paper.planned import PLANNED, find_extraction


@pytest.fixture
def config_for(make_config, video_folder, tmp_path):
    """The extraction of a store for a network; what is given wins."""

    def make(name, root=video_folder, recipe=None, **given):
        return make_config(root, tmp_path / "s.zarr", **{"frames": None, **find_extraction(name, recipe), **given})

    return make


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "zero-shot"])
def test_a_store_for_a_network_lacks_nothing(config_for, name):
    config = config_for(name, frames={"": 4}, limit=1)
    extract_dataset(config)
    store, needs = open_store(config.out), NETWORKS[name].needs.values()
    assert all(find_lacks(store, one) == [] for one in needs)
    assert store.layout.with_pixels == any("pixels" in one.arrays for one in needs), "and holds no pixels for nothing"


def test_a_store_for_tds_clip(config_for):
    config = config_for("tds-clip", frames={"": 4}, splits=("val",))
    extract_dataset(config)
    store = open_store(config.out)
    assert describe_offsets(store.layout.pixel_offsets) == "-2..2" and store.facts.pixel_edge == "clamp"
    assert store.layout.layers == tuple(range(6))
    assert find_extraction("tds-clip", "k400")["pixel_edge"] == "wrap", "as its reader of Kinetics"


@pytest.mark.slow  # 32 frames of each video
def test_a_store_for_dist(config_for):
    config = config_for("dist", weights=None)
    extract_dataset(config)
    store = open_store(config.out)
    assert describe_offsets(store.layout.pixel_offsets) == "0,0.5step"
    columns = ["split", "status", "num_cached_frames", "eval_clips", "validation_clip"]
    for row in store.read_manifest(columns).to_pylist():
        if row["status"] == "ok":
            is_train = row["split"] == "train"
            assert row["num_cached_frames"] == (8 if is_train else 32)
            assert [len(clip) for clip in row["eval_clips"]] == [8] * (1 if is_train else 3)
            assert (row["validation_clip"] is None) == is_train
    assert read_class_texts(store).template == "{}"


@pytest.mark.slow  # a store with texts of blocks
def test_a_store_for_r2_tuning(config_for, captioned_folder):
    own = dict(dataset="table", annotations=captioned_folder / "videos.csv", sampling="fps:5", weights=None)
    # tiny-clip's text tower has three blocks.
    config = config_for("r2-tuning", root=captioned_folder, text_layers="last3", **own)
    extract_dataset(config)
    store = open_store(config.out)
    assert store.layout.layers == (2, 3, 4, 5) and not store.layout.with_pixels
    assert store.facts.is_open_ended and TextReader(store).choice.layers == (0, 1, 2)


def run(*options):
    result = CliRunner().invoke(app, ["plan", "--model", "tiny-clip", "--videos", "10", *map(str, options)])
    return result.exit_code, result.stdout, result.stderr


def test_what_is_set_is_told_and_what_is_given_wins():
    code, _, said = run("--for", "dist", "--layers", "0,2", "--frames", "train=16,8", "--class-template", "a {}")
    assert code == 1 and "--class-template are of captions and classes" in said
    assert "s4v plan: for dist: --sampling reference-dist --views centre --pixel-offsets 0,0.5step" in said
    assert "--layers" not in said
    assert "for linear: --no-pixels" in run("--for", "linear")[2]
    assert "for " not in run("--for", "side4video")[2], "a store is for it as it is"


def test_bytes_are_those_of_what_is_set():
    def pixels(*options):
        told = run("--layers", "all", *options)[1]
        return next(line.split()[1] for line in told.splitlines() if line.strip().startswith("pixels"))

    assert pixels() != pixels("--for", "tds-clip")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--for", "i3d"), "--for takes side4video, linear, attentive, tds-clip, dist, zero-shot, r2-tuning; found"),
        (("--for", "tds-clip", "--no-pixels"), "--no-pixels stores no frames, --pixel-offsets -2..2"),
    ],
)
def test_what_does_not_go_together_is_told(options, message):
    code, _, said = run(*options)
    assert code == 1 and message in said


def test_a_name_that_is_none_is_refused():
    assert not set(PLANNED) & set(NETWORKS), "a network that is there says itself what it needs"
    with pytest.raises(ConfigError, match="found 'slowfast'"):
        find_extraction("slowfast", None)
