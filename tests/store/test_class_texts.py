"""`text/classes`: class names through the frozen text tower, asked for later, kept, and read instead of the tower."""

import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from safetensors.torch import load_file
from torch import nn

from s4v.backbone import text_tower
from s4v.backbone.text_tower import encode_class_texts, load_text_tower
from s4v.errors import ConfigError, StoreDamagedError, StoreMismatchError, WeightsError
from s4v.extract import caption_texts
from s4v.extract.extraction import extract_dataset
from s4v.store import class_texts as class_texts_module
from s4v.store.checksums import write_checksums
from s4v.store.class_texts import (
    fill_template,
    has_current_class_texts,
    read_class_template,
    read_class_texts,
    write_class_texts,
)
from s4v.store.info import describe_store, render_info
from s4v.store.merge import merge_stores
from s4v.store.reader import open_store
from s4v.store.verify import verify_store
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run
from s4v.train.networks import NETWORKS
from s4v.train.networks.contract import Network, NetworkKind
from s4v.train.networks.zero_shot import score_class_names

TEMPLATE = "a video of {}"
NEW = {"train/aaa/new1.mp4": "aaa", "val/walk/a.mp4": "walk"}


@pytest.fixture(scope="module")
def tower():
    return load_text_tower("tiny-clip", weights="random:0", device=torch.device("cpu"))


@pytest.fixture
def config(video_folder, float_store, make_config, tmp_path):
    """The extraction of a finished store, which it may change."""
    return make_config(video_folder, shutil.copytree(float_store, tmp_path / "s.zarr"))


@pytest.mark.slow  # three extractions
def test_a_finished_store_gets_its_class_names_as_texts(config, contents, tower):
    before = contents(config.out)
    extract_dataset(replace(config, class_template=TEMPLATE))
    store = open_store(config.out)
    classes = read_class_texts(store)
    assert classes.texts == ("a video of run", "a video of walk") and classes.template == TEMPLATE
    np.testing.assert_array_equal(classes.embedding, tower.encode(list(classes.texts)))
    assert classes.embedding.dtype == np.float32 and classes.embedding.shape == (2, 128)
    plain = zarr.open_group(config.out, mode="r")["text/classes"]
    np.testing.assert_array_equal(plain[:], classes.embedding)
    assert plain.attrs["template"] == TEMPLATE
    after = contents(config.out)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"text/zarr.json", "text/classes/zarr.json", "text/classes/c.0.0"}
    assert "text/classes/zarr.json" in json.loads((config.out / "checksums.json").read_text())
    assert verify_store(store) == []
    assert describe_store(store)["arrays"]["text/classes"]["template"] == TEMPLATE
    assert any("text/classes" in line and "in 'a video of {}'" in line for line in render_info(describe_store(store)))
    extract_dataset(config)
    extract_dataset(replace(config, class_template=TEMPLATE))
    assert contents(config.out) == after


def test_names_alone_have_no_quotation_marks():
    assert fill_template("{}", ('"air drumming"', "abseiling ", "a {} b")) == ("air drumming", "abseiling", "a {} b")
    assert fill_template("{} {}", ("x",)) == ("x x",)


def test_another_template_replaces_them(config, tower):
    extract_dataset(replace(config, class_template=TEMPLATE))
    extract_dataset(replace(config, class_template="{}"))
    classes = read_class_texts(open_store(config.out))
    assert classes.texts == ("run", "walk")
    np.testing.assert_array_equal(classes.embedding, tower.encode(["run", "walk"]))
    assert verify_store(open_store(config.out)) == []


@pytest.mark.slow
def test_they_stand_beside_captions_that_change(
    captioned_folder, captioned_store, make_captioned_config, tmp_path, tower
):
    """The texts of captions are replaced; those of classes are the same file."""
    root = shutil.copytree(captioned_folder, tmp_path / "videos")
    table = (root / "videos.csv").read_text().splitlines()
    (root / "videos.csv").write_text("\n".join([f"{table[0]},label", *(f"{line},ring" for line in table[1:])]) + "\n")
    config = make_captioned_config(root, tmp_path / "s.zarr", class_template="{}")
    extract_dataset(config)
    store = open_store(config.out)
    chunk = (config.out / "text/classes/c.0.0").stat().st_ino
    np.testing.assert_array_equal(read_class_texts(store).embedding, tower.encode(["ring"]))
    extract_dataset(replace(config, text_layers="1", class_template=None))
    assert (config.out / "text/classes/c.0.0").stat().st_ino == chunk and has_current_class_texts(store)
    merge_stores([config.out], tmp_path / "merged.zarr")
    merged = open_store(tmp_path / "merged.zarr")
    np.testing.assert_array_equal(read_class_texts(merged).embedding, tower.encode(["ring"]))
    assert verify_store(merged) == [] and verify_store(store) == []


@pytest.mark.slow
def test_they_follow_classes_that_are_added(video_folder, make_config, make_video, config, tmp_path, tower):
    extract_dataset(replace(config, class_template=TEMPLATE))
    root = shutil.copytree(video_folder, tmp_path / "videos")
    for seed, name in enumerate(NEW, start=70):
        make_video(root / name, seed=seed)
    extract_dataset(make_config(root, config.out, append=True))
    store = open_store(config.out)
    assert read_class_texts(store).texts == ("a video of aaa", "a video of run", "a video of walk")
    np.testing.assert_array_equal(read_class_texts(store).embedding, tower.encode(list(read_class_texts(store).texts)))
    assert verify_store(store) == []


def test_texts_of_other_classes_are_void_and_nobodys_damage(config):
    extract_dataset(replace(config, class_template=TEMPLATE))
    file = config.out / "zarr.json"
    group = json.loads(file.read_text())
    group["attributes"]["s4v"]["classes"]["names"] = ["run", "stand", "walk"]
    file.write_text(json.dumps(group))
    write_checksums(config.out)
    store = open_store(config.out)
    assert not has_current_class_texts(store) and read_class_template(config.out) == TEMPLATE
    with pytest.raises(StoreMismatchError, match=r"holds no texts of its classes: .*--class-template"):
        read_class_texts(store)
    assert not [one for one in verify_store(store) if one.where.startswith("text/")]
    assert "text/classes" not in describe_store(open_store(config.out))["arrays"]


@pytest.mark.slow  # as captions are
def test_damage_is_found_and_mended(config, contents, flip_byte, caplog):
    extract_dataset(replace(config, class_template=TEMPLATE))
    whole = contents(config.out)
    flip_byte(config.out / "text/classes/c.0.0", 100)
    assert [one.where for one in verify_store(open_store(config.out))] == ["text/classes/c.0.0"]
    with pytest.raises(StoreDamagedError, match=r"text/classes is damaged.*--repair"):
        read_class_texts(open_store(config.out))
    extract_dataset(replace(config, repair=True))
    assert contents(config.out) == whole and verify_store(open_store(config.out)) == []
    (config.out / "text/classes/c.0.0").unlink()
    extract_dataset(replace(config, repair=True))
    assert contents(config.out) == whole
    assert "is lost" not in caplog.text
    flip_byte(config.out / "text/classes/zarr.json", 300)
    assert "text/classes/zarr.json" in {one.where for one in verify_store(open_store(config.out))}
    extract_dataset(replace(config, repair=True))
    assert "the template of its classes' texts (--class-template) was damaged and is lost" in caplog.text
    assert verify_store(open_store(config.out)) == []
    extract_dataset(replace(config, repair=True, class_template=TEMPLATE))
    assert contents(config.out) == whole


@pytest.mark.parametrize("value", [None, 3, "no place"])
def test_a_template_that_is_none_ends_in_one_line(config, value):
    extract_dataset(replace(config, class_template=TEMPLATE))
    file = config.out / "text/classes/zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attributes": {"template": value}}))
    with pytest.raises(StoreDamagedError, match=r"text/classes/zarr.json records no template"):
        read_class_template(config.out)
    assert {one.where for one in verify_store(open_store(config.out))} == {"text/classes/zarr.json"}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize(
    "point",
    [
        "texts of classes moved",
        *(pytest.param(f"texts of classes {state}", marks=pytest.mark.slow) for state in ("written", "void")),
    ],
)
def test_a_kill_leaves_the_old_ones_or_none_and_what_was_asked_for(
    config, contents, tower, monkeypatch, tmp_path, point
):
    extract_dataset(replace(config, class_template="{}"))
    encode = lambda texts: encode_class_texts(tower, texts)  # noqa: E731
    undisturbed = open_store(shutil.copytree(config.out, tmp_path / "undisturbed.zarr"))
    write_class_texts(undisturbed, TEMPLATE, encode)
    store = open_store(config.out)
    with monkeypatch.context() as patch:

        def stop(name):
            if name == point:
                raise Killed

        patch.setattr(class_texts_module, "kill_point", stop)
        with pytest.raises(Killed):
            write_class_texts(store, TEMPLATE, encode)
    if point == "texts of classes written":
        assert read_class_texts(store).texts == ("run", "walk")
        extract_dataset(replace(config, class_template=TEMPLATE))
    else:
        assert not has_current_class_texts(store), "no reader takes values for those of the other template"
        extract_dataset(config)  # which does not ask again
    assert contents(config.out) == contents(undisturbed.path)
    assert verify_store(open_store(config.out)) == [] and not list(config.out.glob(".*.partial"))


def test_zero_shot_reads_them_and_gives_the_same_bits(float_store, config, monkeypatch):
    monkeypatch.setattr(type(open_store(float_store).facts.backbone), "has_random_weights", False)
    before = score_class_names(open_store(float_store), "val")
    extract_dataset(replace(config, class_template=TEMPLATE))
    with monkeypatch.context() as patch:
        patch.setattr(text_tower, "load_store_text_tower", lambda *_, **__: pytest.fail("the tower was loaded"))
        after = score_class_names(open_store(config.out), "val")
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    asked = []
    load = text_tower.load_store_text_tower
    monkeypatch.setattr(
        text_tower, "load_store_text_tower", lambda *args, **options: asked.append(options) or load(*args, **options)
    )
    score_class_names(open_store(config.out), "val", prompt="{} it is")
    score_class_names(open_store(config.out), "val", weights="random:0")
    assert len(asked) == 2, "other texts, and weights that are to be compared with the store's, need the tower"


class Compared(Network):
    """Class tokens beside the texts of classes, as networks without a classifier read them."""

    arrays = ("cls",)

    def __init__(self, shape):
        super().__init__()
        self.project = nn.Linear(shape.width, 128)
        self.register_buffer("texts", torch.zeros(shape.num_classes, 128))

    def inputs(self, batch):
        return (batch.cls,)

    def prepare(self, store):
        self.texts.copy_(torch.from_numpy(read_class_texts(store).embedding))

    def forward(self, cls, codec=None):
        frames = F.normalize(self.project(cls[:, :, -1]).mean(dim=1), dim=-1)
        return 20 * frames @ F.normalize(self.texts, dim=-1).T


class ComparedKind(NetworkKind):
    name = "compared"
    tasks = ("recognition",)
    reads = "class tokens and the texts of classes"

    def plan(self, store, outputs, options, layers):
        return self.describe_shape(store, outputs, layers)

    def build(self, shape):
        return Compared(shape)


def test_a_run_keeps_the_texts_that_it_was_trained_with(config, monkeypatch, tmp_path):
    monkeypatch.setitem(NETWORKS, "compared", ComparedKind())
    training = TrainConfig(
        features=config.out, out=tmp_path / "run", head="compared", epochs=1, batch_size=4, device="cpu"
    )
    with pytest.raises(StoreMismatchError, match="holds no texts of its classes"):
        train_run(training)
    extract_dataset(replace(config, class_template="{}"))
    expected = read_class_texts(open_store(config.out)).embedding
    train_run(replace(training, out=tmp_path / "kept"))
    shutil.rmtree(config.out / "text")
    write_checksums(config.out)
    assert evaluate_run(tmp_path / "kept")["videos"] == 2
    np.testing.assert_array_equal(load_file(tmp_path / "kept/best.safetensors")["texts"], expected)


def test_many_classes_take_several_passes(monkeypatch):
    class Tower:
        def encode(self, texts):
            passes.append(len(texts))
            return np.array([[float(text)] for text in texts], np.float32)

    passes = []
    found = encode_class_texts(Tower(), [str(number) for number in range(2500)])
    assert passes == [1024, 1024, 452] and found[:, 0].tolist() == list(range(2500))


def test_what_cannot_be_had_is_refused(video_folder, make_config, captioned_folder, make_captioned_config, tmp_path):
    with pytest.raises(
        ConfigError, match=r"--class-template must hold {}, the place of a class's name; found 'a video'"
    ):
        make_config(video_folder, tmp_path / "x.zarr", class_template="a video")
    with pytest.raises(ConfigError, match=r"--class-template embeds class names, and no video of table has a class"):
        extract_dataset(make_captioned_config(captioned_folder, tmp_path / "x.zarr", class_template="{}"))
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.slow
def test_a_tower_that_is_lost_ends_a_run_that_asked_and_warns_one_that_did_not(config, monkeypatch, caplog):
    extract_dataset(replace(config, class_template=TEMPLATE))
    (config.out / "text/classes/c.0.0").write_bytes(b"")

    def lack(*_, **__):
        raise WeightsError("no text tower in this file")

    with monkeypatch.context() as patch:
        patch.setattr(caption_texts, "load_text_tower", lack)
        with pytest.raises(WeightsError, match="no text tower in this file"):
            extract_dataset(replace(config, class_template="{}"))
        with caplog.at_level(logging.WARNING):
            extract_dataset(replace(config, repair=True))
    assert "its classes have no texts, for lack of a text tower: no text tower in this file" in caplog.text
    extract_dataset(config)
    assert has_current_class_texts(open_store(config.out)) and verify_store(open_store(config.out)) == []
