"""A data set's recipe fills new stores alone, and whoever goes on takes what is recorded."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import ConfigError, StoreMismatchError
from s4v.extract.config import RECIPE_FIELDS, ExtractConfig
from s4v.extract.datasets import FACTS, PLAIN_RECIPE, READERS
from s4v.extract.decode.sampling import SAMPLINGS, check_sampling
from s4v.extract.decode.views import NUM_VIEWS, RESIZES, VIEWS, centre_view
from s4v.extract.extraction import extract_dataset
from s4v.extract.plan import plan_command
from s4v.extract.recipe import describe_recipe, settle_recipe
from s4v.extract.target import Target
from s4v.files import hash_file
from s4v.store.reader import open_store
from s4v.store.records import VIEW_NAMES

CSV = "label,youtube_id,time_start,time_end,split\n"


def config_for(dataset, **changes):
    return ExtractConfig(model="none", dataset=dataset, root="nowhere", out="nowhere/s.zarr", **changes)


@pytest.fixture
def kinetics(tmp_path, make_video):
    """A root of two training videos and one of validation."""
    lines = {"train": [], "val": []}
    for number, split in enumerate(("train", "train", "val")):
        clip = f"abcdefgh{number:03d}"
        make_video(tmp_path / f"k400/{split}/{clip}_000005_000015.mp4", num_frames=30 + number, seed=number)
        lines[split].append(f"run {number % 2},{clip},5,15,{split}\n")
    for split, of in lines.items():
        (tmp_path / f"k400/{split}.csv").write_text(CSV + "".join(of))
    return tmp_path / "k400"


@pytest.fixture
def extract(kinetics, tmp_path):
    """Begin or go on with the store of `kinetics`, with no more than the options named; returns the config."""

    def run(**changes):
        values = dict(model="tiny-clip", weights="random", dataset="k400", root=kinetics, out=tmp_path / "s.zarr")
        config = ExtractConfig(**{**values, "num_decoders": 1, "device": "cpu", "layers": "5", **changes})
        extract_dataset(config)
        return config

    return run


@pytest.mark.parametrize("name", READERS)
def test_a_recipe_is_one_that_an_extraction_could_be_told(name):
    recipe = READERS[name].recipe
    config = config_for(name)
    assert config.recipe == recipe
    check_sampling(recipe.sampling)
    assert recipe.resize in RESIZES and set(recipe.views.values()) <= set(VIEWS)
    assert config.is_open_ended == (recipe.sampling not in SAMPLINGS) == (recipe.frames == {})
    for split in ("train", "val", "test") if recipe.frames else ():
        size = config.frames_of(split) / (config.clips_of(split) + config.validation_clips_of(split))
        assert size == (24 if split == "train" else 12) or name not in ("msrvtt", "msvd", "vatex")
        assert size == int(size) and (split == "train" or name not in FACTS or size in (8, 12))
    if name not in FACTS:
        assert recipe == PLAIN_RECIPE and settle_recipe(config, Target(config.out)).recipe == recipe


def test_what_is_given_wins_and_frames_go_with_their_clips():
    recipe = config_for("ssv2", resize="224").recipe
    assert recipe.resize == "224" and recipe.clips == {"val": 2, "": 1} and recipe.validation_clip == ("val",)
    eight = config_for("ssv2", frames={"": 8})
    assert (eight.clips_of("val"), eight.validation_clips_of("val"), eight.frames_of("val")) == (1, 0, 8)
    assert eight.views_of("val") == "three" and eight.recipe.sampling == "reference-sth"
    assert config_for("ssv2", clips={"": 1}).recipe.frames == PLAIN_RECIPE.frames


def test_other_samplings_than_a_recipes_rate_have_numbers_of_frames():
    config = config_for("qvhighlights", sampling="uniform")
    assert config.frames_of("train") == 16 and config.frames_of("val") == 8 and config.recipe.resize == "224"
    with pytest.raises(ConfigError, match=r"--sampling fps:0\.5 takes as many frames .*: leave out --frames"):
        config_for("qvhighlights", frames={"": 8})


def test_a_validation_clip_has_its_share_of_the_frames():
    config = config_for("folder", frames={"": 24}, clips={"val": 2}, validation_clip=("val",))
    assert config.frames_of("val") == 24
    with pytest.raises(ConfigError, match=r"24 frames of split 'val' .* by 4 clips .*--validation-clip"):
        replace(config, clips={"val": 4}).frames_of("val")


def test_a_new_store_records_the_recipe_and_a_resume_takes_what_is_recorded(extract):
    config = extract(limit=1)
    attributes = open_store(config.out).attributes
    assert attributes["frames"] == {"train": 16, "val": 32, "": 8} and attributes["recipe"] == "k400"
    assert (attributes["clips"], attributes["views"]) == ({"": 1, "val": 4}, {"": "centre", "val": "three"})
    extract()
    extract(resize="256", views={"": "centre", "val": "three"})
    store = open_store(config.out)
    assert store.read_manifest(["status"])["status"].to_pylist() == ["ok"] * 3
    assert store.attributes == attributes
    assert describe_recipe(config, Target.find(config)).startswith(f"as {config.out} was begun: train: 16 frames")


def test_an_option_against_what_is_recorded_is_refused(extract):
    extract(limit=1)
    with pytest.raises(StoreMismatchError, match=r"resize 256 there, 224 here") as caught:
        extract(resize="224")
    assert "\n" not in str(caught.value)
    with pytest.raises(StoreMismatchError, match=r"frames .* there"):
        extract(frames={"": 8})


@pytest.mark.parametrize(
    "how",
    [
        {},
        pytest.param({"repair": True, "part": (1, 1)}, marks=pytest.mark.slow),
        pytest.param({"append": True, "retry_failed": True}, marks=pytest.mark.slow),
    ],
)
def test_a_store_from_before_recipes_goes_on_as_it_was_begun(how, extract, make_video, kinetics):
    before = dict(frames={"train": 16, "": 8}, sampling="uniform", clips={"": 1}, resize="256", views={"": "centre"})
    config = extract(**before, limit=1)
    path = config.out / "zarr.json"
    metadata = json.loads(path.read_text())
    assert metadata["attributes"]["s4v"].pop("recipe") == "k400"
    path.write_text(json.dumps(metadata))
    hashes = json.loads((config.out / "checksums.json").read_text())
    (config.out / "checksums.json").write_text(json.dumps({**hashes, "zarr.json": hash_file(path)}))
    if "append" in how:
        make_video(kinetics / "val/abcdefgh009_000005_000015.mp4", num_frames=25)
        with (kinetics / "val.csv").open("a") as file:
            file.write("run 0,abcdefgh009,5,15,val\n")
    extract(**how)
    store = open_store(config.out)
    assert set(store.read_manifest(["status"])["status"].to_pylist()) == {"ok"}
    assert store.facts.recipe is None and "clips" not in store.attributes and "views" not in store.attributes
    assert set(store.read_manifest(["num_views"])["num_views"].to_pylist()) == {1}


def test_overwriting_begins_with_the_recipe_again(extract):
    before = dict(frames={"": 8}, sampling="uniform", clips={"": 1}, views={"": "centre"})
    extract(**before, limit=1)
    extract(overwrite=True, limit=1)
    assert open_store(extract(limit=1).out).facts.clips == {"": 1, "val": 4}


def test_what_is_cached_is_said_before_it_is(extract, kinetics, tmp_path):
    words = ["extract", "--dataset", "k400", "--model", "tiny-clip", "--weights", "random", "--root", str(kinetics)]
    words += ["--out", str(tmp_path / "told.zarr"), "--layers", "5", "--limit", "1"]
    told = CliRunner().invoke(app, words, catch_exceptions=False)
    line = "the recipe of k400 (Side4Video's of Kinetics-400): train: 16 frames, views centre; val: 32 frames (4 clips"
    assert told.exit_code == 0 and line in told.stderr
    again = CliRunner().invoke(app, [*words, "--resize", "256"], catch_exceptions=False)
    assert again.exit_code == 0 and "told.zarr was begun: " in again.stderr
    plain = CliRunner().invoke(app, [*words, "--overwrite", "--frames", "8"], catch_exceptions=False)
    info = CliRunner().invoke(app, ["info", str(tmp_path / "told.zarr")], catch_exceptions=False)
    assert "reference-k400 sampling, resize 256, by the recipe of k400" in info.stdout
    assert "with --frames as given: val: 8 frames, views three; other splits: 8 frames" in plain.stderr


def test_a_plan_tells_what_test_views_take(kinetics, tmp_path):
    config = ExtractConfig(model="tiny-clip", dataset="k400", root=kinetics, out=tmp_path / "s.zarr")
    plan = plan_command(config)
    assert plan.frames == 2 * 16 + 32 * 3
    assert (plan.splits["val"].views, plan.splits["val"].share) == (3, 96 / 128)
    words = ["plan", "--dataset", "k400", "--model", "tiny-clip", "--root", str(kinetics)]
    told = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    assert "val         1 x 32 frames x 3 views: 75.0% of the frames and bytes" in told


@pytest.mark.parametrize("name", FACTS)
def test_a_data_set_prints_its_recipe(name):
    told = CliRunner().invoke(app, ["datasets", name], catch_exceptions=False).stdout
    recipe = READERS[name].recipe
    assert f"recipe     {recipe.told_as}, trained by the presets of {recipe.name}" in told
    assert (f", for {recipe.network} (--for)" in told) == (recipe.network is not None)
    for split, frames in READERS[name].recipe.frames.items():
        assert f"{split or 'other splits'}: {frames} frames" in told
    facts = json.loads(CliRunner().invoke(app, ["datasets", name, "--json"], catch_exceptions=False).stdout)
    assert set(facts["recipe"]) == {"name", "told_as", "network", *RECIPE_FIELDS}


def test_our_own_choice_is_told_as_such():
    others = {name for name in FACTS if "which s4v takes here too" in READERS[name].recipe.told_as}
    assert others == {"k600", "k700", "ucf101", "hmdb51"}
    assert {READERS[name].recipe.name for name in others} == {"k400"}


def test_vatex_is_divided_as_the_reference_divides_it_where_its_lists_are(place):
    official = {"vatex_training_v1.0.json": []}
    lists = {"vatex_data/vatex_data.json": {}, "vatex_data/train_list.txt": "a\n"}
    cases = ((official, "official"), (lists, "hgr"), ({**official, **lists}, "hgr"))
    for number, (files, protocol) in enumerate(cases):
        root = place({f"{number}/{name}": content for name, content in files.items()}) / str(number)
        config = replace(config_for("vatex"), root=root)
        assert settle_recipe(config, Target(root / "s.zarr")).protocol == protocol
        given = replace(config, protocol="official")
        assert settle_recipe(given, Target(root / "s.zarr")).protocol == "official"


@pytest.mark.parametrize("name", VIEW_NAMES)
def test_views_are_what_their_names_say(name):
    frame = (320, 240, "256", (224, 224))
    views = VIEWS[name](*frame)
    assert len(views) == NUM_VIEWS[name] == len(VIEW_NAMES[name])
    assert views[VIEW_NAMES[name].index("centre")].x == pytest.approx(centre_view(*frame).x, abs=2)
    assert not views[VIEW_NAMES[name].index("centre")].flip
