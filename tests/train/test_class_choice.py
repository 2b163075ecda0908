"""Runs that classify by text, on classes that they were not trained with, and averaged with the frozen backbone."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from typer.testing import CliRunner

from s4v.backbone.text_tower import load_text_tower
from s4v.cli import app
from s4v.errors import ConfigError, StoreMismatchError
from s4v.extract.extraction import extract_dataset
from s4v.store.class_texts import read_class_texts
from s4v.store.manifest import read_table
from s4v.store.reader import open_store
from s4v.train.clips import ClipPlan
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run
from s4v.train.networks.contract import TextNetwork
from s4v.train.run_folder import load_checkpoint, open_run
from s4v.train.tasks.class_choice import read_class_names, score_frozen
from s4v.train.tasks.contract import TextOptions


@pytest.fixture(scope="module")
def trained(build_once, class_texts_store):
    def make(folder):
        more = dict(epochs=1, batch_size=4, side_width=64, device="cpu")
        train_run(TrainConfig(features=class_texts_store, out=folder / "run", head="dist", **more))

    return build_once("dist-run", make) / "run"


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def other_store(build_once, make_config, make_video):
    """The same two classes in split val, and a third one."""

    def make(folder):
        for seed, name in enumerate(("jump", "run", "walk")):
            make_video(folder / f"videos/train/{name}/{seed}.mp4", seed=seed)
            make_video(folder / f"videos/val/{name}/{seed}.mp4", seed=30 + seed)
        more = dict(dtype="int8", frames={"": 8}, sampling="reference-dist", class_template="{}")
        extract_dataset(make_config(folder / "videos", folder / "other.zarr", **more))

    return build_once("three-classes", make) / "other.zarr"


def probabilities(run, name):
    return np.stack(read_table(run / f"predictions_{name}.parquet")["probabilities"].to_pylist())


def test_another_store_has_its_own_classes(run, other_store):
    figures = evaluate_run(run, features=other_store)
    assert figures["classes"] == ["jump", "run", "walk"] and figures["class_source"] == "store"
    assert figures["files"] == "val_classes-of-store" and figures["videos"] == 3
    assert not (run / "eval_val.json").exists()
    own = evaluate_run(run)
    assert (own["class_source"], own["files"], own["classes"]) == ("run", "val", ["run", "walk"])
    assert probabilities(run, "val_classes-of-store").shape == (3, 3)


def test_classes_of_a_file_are_what_the_text_tower_makes_of_them(run, class_texts_store, tmp_path):
    """Of the run's own classes in another order, and one more; scores of two are in the same ratio."""
    file = tmp_path / "names.txt"
    file.write_text("walk\n\n a dog \nrun\n")
    figures = evaluate_run(run, of_texts=TextOptions(classes=file))
    assert figures["classes"] == ["walk", "a dog", "run"] and figures["class_source"] == str(file)
    evaluate_run(run)
    named, own = probabilities(run, "val_classes-names"), probabilities(run, "val")
    np.testing.assert_allclose(named[:, 2] / named[:, 0], own[:, 0] / own[:, 1], rtol=1e-3)
    tower = load_text_tower("tiny-clip", weights="random:0", device=torch.device("cpu"))
    stored = read_class_texts(open_store(class_texts_store)).embedding
    np.testing.assert_allclose(tower.encode(["walk", "a dog", "run"])[[2, 0]], stored, rtol=1e-4, atol=1e-5)


def test_the_command_says_whose_classes_they_are(run, tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("walk\nrun\n")
    result = CliRunner().invoke(app, ["eval", "--run", str(run), "--classes", str(file), "--zero-shot-average"])
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert f"classes of {file}, averaged with zero-shot" in said
    assert (run / "results_val_zero-shot-average_classes-names.html").is_file()
    figures = json.loads((run / "eval_val_zero-shot-average_classes-names.json").read_text())
    assert figures["is_zero_shot_average"] and figures["class_source"] == str(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("walk\njump\n", "of classes that were not named: 'run'. Add it to the file"),
        ("walk\n", "names 1 classes: a classifier needs two or more"),
        ("walk\nrun\nrun\n", "names 'run' more than once"),
        (None, "cannot be read as text"),
    ],
)
def test_files_of_names_that_will_not_do_are_told(run, tmp_path, text, message):
    file = tmp_path / "names.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises((ConfigError, StoreMismatchError), match=message):
        evaluate_run(run, of_texts=TextOptions(classes=file))


def test_names_keep_their_letters_and_lose_their_margins(tmp_path):
    (tmp_path / "names.txt").write_text(' Air Drumming \r\n"abseiling"\n', encoding="utf-8")
    assert read_class_names(tmp_path / "names.txt") == ("Air Drumming", '"abseiling"')


def test_heads_whose_classes_are_weights_refuse_others(int8_store, tmp_path):
    train_run(TrainConfig(features=int8_store, out=tmp_path / "run", head="linear", epochs=1, device="cpu"))
    for options in (TextOptions(classes=tmp_path / "names.txt"), TextOptions(with_zero_shot=True)):
        with pytest.raises(ConfigError, match="has no effect on a run of --head linear, whose classes are weights"):
            evaluate_run(tmp_path / "run", of_texts=options)


def test_a_store_of_other_classes_without_texts_is_refused(run, other_store, make_config, tmp_path):
    more = dict(dtype="int8", frames={"": 8}, sampling="reference-dist", limit=6)
    extract_dataset(make_config(other_store.parent / "videos", tmp_path / "plain.zarr", **more))
    with pytest.raises(StoreMismatchError, match="holds no texts of its classes: run the command that began this"):
        evaluate_run(run, features=tmp_path / "plain.zarr")


def test_a_store_of_the_same_classes_needs_no_texts(run, video_folder, make_config, tmp_path):
    more = dict(dtype="int8", frames={"": 8}, sampling="reference-dist")
    extract_dataset(make_config(video_folder, tmp_path / "plain.zarr", **more))
    assert evaluate_run(run, features=tmp_path / "plain.zarr")["class_source"] == "run"


def test_the_zero_shot_average_is_the_references(data_path):
    """From the golden output and frame embeddings."""
    io = load_file(data_path / "dist/io.safetensors")
    frames = io["frame_embedding"].unflatten(0, (2, 8))
    scale = load_file(data_path / "dist/state.safetensors")["backbone.base_encoder.logit_scale"].exp()
    frozen = scale * F.cosine_similarity(frames[:, :, None], io["text_features"], dim=-1).mean(dim=1)
    expected = io["eval_zero_shot_output"]
    torch.testing.assert_close(0.5 * io["eval_output"] + 0.5 * frozen, expected, rtol=1e-5, atol=1e-5)

    class Stored:
        """As a store holds them: two rows of one shard."""

        class layout:
            num_shards = 1
            shard_rows = staticmethod(lambda shard: range(2))

        read_embeddings = staticmethod(lambda rows: frames[:, None].numpy())

    network = TextNetwork(7, 32)
    network.take_class_texts(io["text_features"].numpy())
    network.logit_scale.copy_(scale.log())
    places = np.tile(np.arange(8), (1, 1))
    plans = [ClipPlan(np.array([row]), np.zeros(1, int), places, np.zeros(1, int)) for row in (1, 0)]
    found = torch.from_numpy(score_frozen(network, Stored, plans)).flip(0)
    torch.testing.assert_close(found, frozen, rtol=1e-5, atol=1e-5)


def test_the_average_looks_at_frames_with_tokens(run, class_texts_store):
    """Backwards at the others; half of the logits each."""
    store, network = open_store(class_texts_store), load_checkpoint(open_run(run))
    network.fit_clips(store, 4, np.array([8]))
    row = int(np.flatnonzero(np.asarray(store.read_manifest(["split"])["split"]) == "val")[0])
    wanted = ClipPlan(np.array([row]), np.zeros(1, int), np.arange(8)[None], np.zeros(1, int))
    frames = torch.from_numpy(store.read_embeddings(range(row, row + 1))[0, 0])
    for plan, places in ((wanted, [0, 2, 4, 6]), (network.reverse_plan(wanted), [7, 5, 3, 1])):
        expected = F.cosine_similarity(frames[places, None], network.class_texts, dim=-1).mean(dim=0)
        found = score_frozen(network, store, [plan])[0]
        np.testing.assert_allclose(found, expected * float(network.logit_scale.exp()), rtol=1e-5)
    plain, both = evaluate_run(run), evaluate_run(run, of_texts=TextOptions(with_zero_shot=True))
    assert both["files"] == "val_zero-shot-average" and both["loss"] != plain["loss"]
