"""A store that lacks what a network reads is refused before anything is read, with all that it lacks in one line."""

import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from s4v.backbone.open_clip_models import SHIPPED
from s4v.cli import app
from s4v.errors import StoreMismatchError
from s4v.extract.extraction import extract_dataset
from s4v.retrieve.search import Searcher
from s4v.store.needs import StoreNeeds, find_lacks, require_needs
from s4v.store.reader import StoreReader, open_store
from s4v.train.compare import compare_methods
from s4v.train.config import TrainConfig
from s4v.train.loop import train_run
from s4v.train.networks import NETWORKS
from s4v.train.networks.zero_shot import classify_zero_shot


def config_for(store, out, **changes):
    own = dict(features=store, out=out, device="cpu", epochs=1, batch_size=2, frames=2)
    return TrainConfig(**{**own, **changes})


def extract_bare(folder, out, make_config, **changes):
    own = dict(model="test_vit4", weights="random", frames={"": 2}, layers="0", resize="224", num_decoders=1)
    extract_dataset(make_config(folder, out, **{**own, **changes}))


@pytest.fixture(scope="module")
def bare_store(build_once, video_folder, make_config):
    """Of a tower without a class token, a text tower and a head, and without pixels: with patches and embeddings."""
    return build_once(
        "without-pixels.zarr", lambda out: extract_bare(video_folder, out, make_config, with_pixels=False)
    )


@pytest.fixture
def nothing_is_read(monkeypatch):
    def refuse(self, *_, **__):
        raise AssertionError("the store was read")

    for name in ("read_clips", "read_embeddings", "read_manifest", "read_captions"):
        monkeypatch.setattr(StoreReader, name, refuse)


def test_all_that_lacks_is_told_at_once_with_the_command_that_makes_it(bare_store, nothing_is_read, tmp_path):
    with pytest.raises(StoreMismatchError) as error:
        train_run(config_for(bare_store, tmp_path / "run"))
    root = open_store(bare_store).facts.dataset.root
    assert str(error.value) == (
        f"{bare_store} lacks what --head side4video reads: class tokens (`cls`): test_vit4 has none; `pixels`: it was "
        "extracted with --no-pixels. Train with --head attentive. Train with --inputs tokens or --head linear. A store "
        f"that has them: `s4v extract --model test_vit4 --weights random:0 --dataset folder --root {shlex.quote(root)} "
        "--cls mean --out NEW.zarr`, and whatever else you gave, without --no-pixels."
    )
    with pytest.raises(StoreMismatchError, match="lacks what --head linear reads: class tokens.*Train with --head att"):
        train_run(config_for(bare_store, tmp_path / "run", head="linear"))
    assert not (tmp_path / "run").exists()


def test_retrieval_wants_a_head_and_a_text_tower_too_and_then_another_model(bare_store, nothing_is_read, tmp_path):
    with pytest.raises(StoreMismatchError) as error:
        train_run(config_for(bare_store, tmp_path / "run", task="retrieval"))
    told = str(error.value)
    for part in (
        "class tokens (`cls`)",
        "`pixels`",
        "`head`: the embedding of test_vit4",
        "a text tower: there is none",
    ):
        assert part in told
    assert "s4v extract --model vit-b16 --dataset folder" in told and "--cls" not in told and "--weights" not in told


def test_what_reads_patches_alone_is_trained_on_such_a_store(bare_store, tmp_path):
    summary = train_run(config_for(bare_store, tmp_path / "run", head="attentive"))
    assert summary["epochs"] == 1


def test_means_serve_whatever_reads_class_tokens(video_folder, make_config, tmp_path):
    extract_bare(video_folder, tmp_path / "s.zarr", make_config, cls="mean")
    for head in ("side4video", "linear"):
        assert train_run(config_for(tmp_path / "s.zarr", tmp_path / head, head=head))["epochs"] == 1


def test_means_are_no_class_tokens_for_a_head_that_projects_those(video_folder, make_config, tmp_path):
    config = make_config(video_folder, tmp_path / "s.zarr", cls="mean", limit=1)
    extract_dataset(config)
    store = open_store(config.out)
    assert find_lacks(store, NETWORKS["side4video"].needs["recognition"]) == []
    (lack,) = find_lacks(store, NETWORKS["side4video"].needs["retrieval"])
    assert lack.name == "cls" and lack.why.endswith("`cls` holds means of patch tokens")
    with pytest.raises(StoreMismatchError, match="--out NEW.zarr`, and whatever else you gave, without --cls mean"):
        require_needs(store, NETWORKS["side4video"].needs["retrieval"], "--head side4video")


def test_a_store_of_clip_lacks_nothing_but_texts_of_classes(offsets_store):
    store = open_store(offsets_store)
    for kind in NETWORKS.values():
        assert set(kind.needs) == set(kind.tasks)
        for needs in kind.needs.values():
            assert [lack.name for lack in find_lacks(store, needs)] == ["class_texts"] * needs.class_texts
    assert find_lacks(store, StoreNeeds()) == []


def test_offsets_that_lack_are_told_beside_those_that_there_are(float_store, bare_store, nothing_is_read, tmp_path):
    with pytest.raises(StoreMismatchError) as error:
        train_run(config_for(float_store, tmp_path / "run", head="tds-clip"))
    root = open_store(float_store).facts.dataset.root
    assert str(error.value) == (
        f"{float_store} lacks what --head tds-clip reads: pixels at offsets -2,-1,1,2 from its frames: it holds 0. "
        "Train with --head side4video. A store that has it: `s4v extract --model tiny-clip --weights random:0 "
        f"--dataset folder --root {shlex.quote(root)} --pixel-offsets -2..2 --out NEW.zarr`, and whatever else "
        "you gave."
    )
    with pytest.raises(StoreMismatchError, match="--pixel-offsets -2..2 --out NEW.zarr`.*without --no-pixels"):
        train_run(config_for(bare_store, tmp_path / "run", head="tds-clip"))
    assert not (tmp_path / "run").exists()


def test_comparing_leaves_out_what_cannot_be_and_says_why_before_any_training(bare_store, tmp_path):
    said = []
    lines = compare_methods(config_for(bare_store, tmp_path / "c", learning_rate=1e-3), say=said.append)
    assert [line.method for line in lines] == ["attentive"]
    assert [one.split(":")[0] for one in said[:2]] == ["no side4video", "no linear"]
    assert any(one.startswith("no zero-shot: ") for one in said)
    with pytest.raises(StoreMismatchError, match="lacks what --head linear reads"):
        compare_methods(config_for(bare_store, tmp_path / "d"), methods=("attentive", "linear"))


def test_asking_by_text_is_refused_and_a_video_finds_others(bare_store, tmp_path):
    with pytest.raises(StoreMismatchError, match="lacks what zero-shot reads: a text tower"):
        classify_zero_shot(open_store(bare_store), {"run": ["a run"]})
    first = open_store(bare_store).read_manifest(["video_id"])["video_id"][-1].as_py()
    line = ["retrieve", "--features", str(bare_store), "--index", str(tmp_path / "i"), "--device", "cpu"]
    asked = CliRunner().invoke(app, [*line, "--query", "a run"])
    assert asked.exit_code and not (tmp_path / "i").exists(), "told before the index is made"
    assert "a text tower: there is none beside test_vit4. Search by --like VIDEO, or with a trained run" in asked.output
    found = CliRunner().invoke(app, [*line, "--like", first])
    assert found.exit_code == 0 and "val/run/0.mp4" in found.stdout


def test_weights_without_a_text_tower_say_so_in_one_line(make_config, video_folder, tmp_path):
    shipped = load_file(SHIPPED["tiny-clip", "world"])
    seen = {name: values for name, values in shipped.items() if name.startswith("visual.")}
    save_file(seen, tmp_path / "visual.safetensors")
    config = make_config(video_folder, tmp_path / "s.zarr", weights=str(tmp_path / "visual.safetensors"), limit=1)
    extract_dataset(config)
    with Searcher(config.out, device=torch.device("cpu")) as searcher, pytest.raises(Exception) as error:
        searcher.find_text("a red ring")
    assert str(error.value) == (
        f"no text tower in these weights: {tmp_path / 'visual.safetensors'}. They cannot be asked by text; search by "
        "--like VIDEO, or with a trained run that brings a text tower."
    )


def test_a_run_is_not_evaluated_on_a_store_that_lacks_what_it_reads(bare_store, video_folder, make_config, tmp_path):
    from s4v.train.run_folder import open_run, require_matching_store

    extract_bare(video_folder, tmp_path / "s.zarr", make_config, cls="mean")
    train_run(config_for(tmp_path / "s.zarr", tmp_path / "run"))
    with pytest.raises(
        StoreMismatchError, match="the store lacks class tokens.*; the store lacks `pixels`: it was ext"
    ):
        require_matching_store(open_run(tmp_path / "run"), open_store(bare_store))
