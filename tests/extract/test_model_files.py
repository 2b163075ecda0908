"""`--model PATH.json`: one's own configuration of open_clip's, with one's own weights."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from s4v.backbone import open_clip_models
from s4v.backbone.text_tower import load_store_text_tower, load_text_tower
from s4v.backbone.vision_tower import build_backbone
from s4v.errors import BackboneError, StoreMismatchError, WeightsError
from s4v.extract.extraction import extract_dataset
from s4v.store.reader import open_store
from s4v.train.compare import compare_methods
from s4v.train.config import TrainConfig

CPU = torch.device("cpu")
CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture
def own_model(tmp_path):
    """A configuration and its weights, as somebody trained them with open_clip."""
    folder = tmp_path / "own"
    folder.mkdir()
    torch.manual_seed(0)
    model = open_clip.CLIP(CONFIG["embed_dim"], CONFIG["vision_cfg"], CONFIG["text_cfg"]).eval()
    (folder / "mine.json").write_text(json.dumps(CONFIG))
    tensors = {name: values.contiguous() for name, values in model.state_dict().items() if name != "attn_mask"}
    save_file(tensors, folder / "mine.safetensors")
    return model, folder / "mine.json", folder / "mine.safetensors"


def extract(make_config, folder, out, file, weights, **changes):
    config = make_config(folder, out, model=str(file), weights=str(weights), **changes)
    extract_dataset(config)
    return open_store(out)


def test_towers_of_a_configurations_file_are_open_clips_own(own_model):
    model, file, weights = own_model
    backbone = build_backbone(str(file), weights=str(weights), device=CPU).load_weights()
    assert backbone.info.name == str(file) and backbone.info.architecture.startswith("mine@")
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (backbone.info.mean, backbone.info.std))
    with torch.inference_mode():
        expected = model.encode_image((pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std)
        tokens = open_clip.get_tokenizer("ViT-B-32", context_length=12)(["a red ring"])
        texts = model.encode_text(tokens)
    assert torch.equal(backbone.encode_frames(pixels, [2]).embedding, expected)
    tower = load_text_tower(str(file), weights=str(weights), device=CPU)
    assert tower.context_length == 12, "the file's own"
    np.testing.assert_array_equal(tower.encode(["a red ring"]), texts)


def test_zero_shot_works_with_it_and_the_file_may_move(own_model, video_folder, make_config, tmp_path, monkeypatch):
    _, file, weights = own_model
    monkeypatch.chdir(file.parent)
    out = tmp_path / "s.zarr"
    store = extract(make_config, video_folder, out, "mine.json", weights, frames={"": 2}, layers="all")
    assert store.facts.backbone.name == str(file), "so that it is found from elsewhere"
    monkeypatch.chdir(tmp_path)
    base = TrainConfig(features=out, out=tmp_path / "c", device="cpu", epochs=1, batch_size=2, frames=2)
    assert [line.method for line in compare_methods(base, methods=("zero-shot",))] == ["zero-shot"]
    shutil.move(file, tmp_path / "mine.json")
    config = make_config(video_folder, out, model="mine.json", weights=str(weights), frames={"": 2}, layers="all")
    assert extract_dataset(config).videos["ok"] == 10, "the same command goes on"


def test_a_file_that_says_something_else_by_now_is_refused(own_model, video_folder, make_config, tmp_path):
    _, file, weights = own_model
    store = extract(make_config, video_folder, tmp_path / "s.zarr", file, weights, limit=1)
    file.write_text(json.dumps({**CONFIG, "quick_gelu": True}))
    with pytest.raises(WeightsError, match=r"was made with the configuration mine@\w{12}; .* is mine@\w{12} by now"):
        load_store_text_tower(store)
    with pytest.raises(StoreMismatchError, match=r"backbone\.architecture mine@\w{12} there, mine@\w{12} here"):
        extract(make_config, video_folder, tmp_path / "s.zarr", file, weights, limit=1)


def test_a_hubs_configuration_brings_its_normalisation_and_may_lack_texts(tmp_path):
    file = tmp_path / "open_clip_config.json"
    only_vision = {name: CONFIG[name] for name in ("embed_dim", "vision_cfg")}
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    file.write_text(json.dumps({"model_cfg": only_vision, "preprocess_cfg": preprocess}))
    info = build_backbone(str(file), weights="random", device=CPU).info
    assert (info.mean, info.std, info.has_text_tower) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), False)
    with pytest.raises(BackboneError, match="has no text tower: its configuration has no text_cfg"):
        load_text_tower(str(file), weights="random", device=CPU)


def test_a_file_of_a_known_name_changes_nothing_of_that(tmp_path):
    file = tmp_path / "ViT-B-32.json"
    file.write_text(json.dumps(CONFIG))
    assert build_backbone(str(file), weights="random", device=CPU).info.width == 64
    assert open_clip_models.read_architecture("ViT-B-32")["embed_dim"] == 512


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"--model .*none\.json: the configuration cannot be read \(No such file or directory\)"),
        ("{", r"--model .*none\.json is not JSON: Expecting"),
        ("[1]", "is no configuration of open_clip's: it must hold embed_dim, vision_cfg and, for texts, text_cfg"),
        ('{"embed_dim": 24}', "is no configuration of open_clip's"),
        ('{"embed_dim": 24, "vision_cfg": {"breadth": 3}}', "a tower of .* cannot be built"),
    ],
)
def test_files_that_are_no_configurations_are_told_in_one_line(text, message, tmp_path):
    file = tmp_path / "none.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(BackboneError, match=message) as error:
        build_backbone(str(file), weights="random", device=CPU)
    assert "\n" not in str(error.value)


def test_weights_must_be_named(own_model):
    with pytest.raises(WeightsError, match="has no default weights: give --weights a file, or `random`"):
        build_backbone(str(own_model[1]), weights=None, device=CPU)
