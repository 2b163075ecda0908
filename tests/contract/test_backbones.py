"""What every library of towers keeps to, and one of a test's own: a ViT with registers that reads no texts."""

import ast
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import s4v
from s4v.backbone import LIBRARIES, find_library
from s4v.backbone.contract import (
    DEFAULT_LOGIT_SCALE,
    DTYPES,
    Backbone,
    FrameTokens,
    TextTower,
    TowerLibrary,
    normalise_pixels,
)
from s4v.backbone.facts import BackboneInfo, read_side_family
from s4v.backbone.text_tower import load_text_tower
from s4v.backbone.vision_tower import build_backbone
from s4v.backbone.weights import WeightsSource, fill_tower, find_file, find_random, open_tensors, parameters_on_meta
from s4v.errors import BackboneError, StoreMismatchError, WeightsError
from s4v.extract.extraction import extract_dataset
from s4v.store.reader import open_store
from s4v.train.paper.presets import side_family

ROOT = Path(s4v.__file__).parent
CPU = torch.device("cpu")
WIDTH, DEPTH, REGISTERS, PATCH, SIZE = 24, 3, 2, 8, 32


class ToyTower(nn.Module):
    """A class token, registers and patches, which blocks mix; no projection behind the final norm."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.register_tokens_embedding = nn.Parameter(torch.zeros(1, REGISTERS, WIDTH))
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(WIDTH), "mix": nn.Linear(WIDTH, WIDTH)}) for _ in range(DEPTH)
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, images, layers):
        patches = self.patch_embed(images).flatten(2).mT  # (B, D, h, w) -> (B, N, D)
        prefix = torch.cat([self.cls_token, self.register_tokens_embedding], dim=1).expand(len(images), -1, -1)
        tokens, tapped = torch.cat([prefix, patches], dim=1), []
        for number, block in enumerate(self.blocks):
            normed = block["norm"](tokens)
            tokens = tokens + F.gelu(block["mix"](normed + normed.mean(dim=1, keepdim=True)))
            if number in layers:
                tapped.append(tokens)
        return tapped, self.norm(tokens[:, 0])


class ToyBackbone(Backbone):
    def __init__(self, tower: ToyTower, info: BackboneInfo, source: WeightsSource, device: torch.device) -> None:
        super().__init__(tower, info, device, tower)
        self._source = source

    @property
    def blocks(self):
        return self.tower.blocks

    def load_weights(self):
        tensors = open_tensors(self._source)
        fill_tower(self.tower, tensors, self._source, ("",), self.device, DTYPES[self.info.precision])
        return self

    def run_tower(self, images, layers):
        tapped, embedding = self.forward(images, layers)
        cls = torch.stack([tokens[:, 0] for tokens in tapped], dim=1)
        return FrameTokens([tokens[:, 1 + REGISTERS :] for tokens in tapped], cls, embedding)

    def read_head(self):
        norm = self.tower.norm
        head = {"norm_weight": norm.weight, "norm_bias": norm.bias, "proj_weight": torch.eye(WIDTH)}
        arrays = {name: values.float().numpy() for name, values in head.items()}
        return {**arrays, "norm_eps": np.float32(norm.eps), "logit_scale": np.float32(DEFAULT_LOGIT_SCALE)}


class ToyLibrary(TowerLibrary):
    title = "toy"
    short_names = ("toy",)

    def list_models(self):
        return ["toy-vit"]

    def build_backbone(self, name, *, weights, device, precision, seed):
        source = find_random(weights or "random", seed, "toy-vit", {"width": WIDTH}) or find_file(weights)
        if source is None:
            raise WeightsError(f"no weights {weights!r} for {name}: no such file")
        with parameters_on_meta():
            tower = ToyTower()
        info = BackboneInfo(
            name=name, architecture="toy-vit", weights=source.label, weights_sha256=source.sha256, width=WIDTH,
            depth=DEPTH, grid=(SIZE // PATCH, SIZE // PATCH), patch_size=(PATCH, PATCH), image_size=(SIZE, SIZE),
            embed_dim=WIDTH, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), precision=precision,
            device_type=device.type, side_family="eva",
        )  # fmt: skip
        return ToyBackbone(tower, info, source, device)


SMALL_MODELS = {"open_clip": "tiny-clip", "timm": "test_vit", "toy": "toy"}
"""Of each library a model that a test can afford, by the library's name in the table."""


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """The table with one line more."""
    monkeypatch.setitem(LIBRARIES, "toy", ToyLibrary)


@pytest.fixture(params=[*LIBRARIES, "toy"])
def library_name(request):
    return request.param


@pytest.fixture
def build(library_name):
    def make(**options):
        return build_backbone(SMALL_MODELS[library_name], **{"weights": "random", "device": CPU, **options})

    return make


def test_it_takes_frames_of_another_size_or_says_that_it_does_not(build, library_name):
    own = build().info
    height, width = own.image_size
    wider = (height, width + 2 * own.patch_size[1])
    if library_name == "toy":
        with pytest.raises(BackboneError, match=r"toy takes frames of 32x32 pixels alone; leave out --input"):
            build(image_size=wider)
        assert build(image_size=own.image_size).info == own
        return
    backbone = build(image_size=wider)
    assert backbone.info.num_patches == own.num_patches + 2 * own.grid[0]
    tokens = backbone.load_weights().encode_frames(images_for(backbone), [0])
    assert tokens.patches[0].shape == (3, backbone.info.num_patches, own.width)
    assert backbone.info.describe()["own_image_size"] == list(own.image_size)


def images_for(backbone, count=3):
    height, width = backbone.info.image_size
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def test_a_library_names_its_models(library_name):
    library = LIBRARIES[library_name]()
    assert isinstance(library, TowerLibrary) and library.title
    names = [*library.short_names, *library.list_models()]
    assert names and SMALL_MODELS[library_name] in names
    others = [LIBRARIES[name]() for name in LIBRARIES if name != library_name]
    assert not {*names} & {name for other in others for name in (*other.short_names, *other.list_models())}
    assert all(type(find_library(name)) is type(library) for name in names[:20])


def test_facts_fit_the_tokens(build):
    backbone = build().load_weights()
    info = backbone.info
    layers = [info.depth - 1, 0]
    tokens = backbone.encode_frames(images_for(backbone), layers)
    assert info.grid == tuple(size // patch for size, patch in zip(info.image_size, info.patch_size, strict=True))
    assert [tuple(patches.shape) for patches in tokens.patches] == [(3, info.num_patches, info.width)] * 2
    assert tokens.cls.shape == (3, 2, info.width)
    assert tokens.embedding.shape == (3, info.embed_dim) and tokens.embedding.dtype == torch.float32
    assert all(len(values) == 3 and min(values) >= 0 for values in (info.mean, info.std))
    assert backbone.flops_per_frame > 0
    one = backbone.encode_frames(images_for(backbone), [0])
    assert torch.equal(one.patches[0], tokens.patches[0]), "layers come in order of their numbers"


def test_the_head_turns_the_last_class_token_into_the_embedding(build):
    backbone = build().load_weights()
    tokens = backbone.encode_frames(images_for(backbone), [backbone.info.depth - 1])
    head = {name: torch.from_numpy(np.asarray(values)) for name, values in backbone.read_head().items()}
    assert {*head} - {"proj_bias"} == {"norm_weight", "norm_bias", "norm_eps", "proj_weight", "logit_scale"}
    assert all(values.dtype == torch.float32 for values in head.values())
    sizes = (backbone.info.width,)
    normed = F.layer_norm(tokens.cls[:, -1], sizes, head["norm_weight"], head["norm_bias"], float(head["norm_eps"]))
    expected = normed @ head["proj_weight"].T + head.get("proj_bias", torch.zeros(()))
    torch.testing.assert_close(expected, tokens.embedding, atol=1e-5, rtol=1e-5)


def test_weights_take_memory_only_while_they_are_wanted_and_no_gradient(build):
    backbone = build()
    assert not backbone.has_weights
    assert backbone.load_weights() is backbone and backbone.has_weights
    assert not any(parameter.requires_grad for parameter in backbone.tower.parameters())
    assert not backbone.tower.training
    before = backbone.encode_frames(images_for(backbone), [0]).embedding
    backbone.free_weights()
    assert not backbone.has_weights
    assert torch.equal(backbone.load_weights().encode_frames(images_for(backbone), [0]).embedding, before)


def test_random_weights_follow_from_the_seed(build):
    infos = [build(weights=weights).info for weights in ("random", "random:0", "random:1")]
    assert infos[0].weights == infos[1].weights == "random:0"
    assert infos[0].weights_sha256 == infos[1].weights_sha256 != infos[2].weights_sha256
    assert infos[0].precision == "fp32" and infos[0].device_type == "cpu"
    with pytest.raises(WeightsError, match="no weights '/none' for"):
        build(weights="/none")


def test_precision_is_that_of_the_tokens(build):
    backbone = build(precision="bf16").load_weights()
    tokens = backbone.encode_frames(images_for(backbone), [0])
    assert tokens.patches[0].dtype == tokens.cls.dtype == torch.bfloat16
    assert tokens.embedding.dtype == torch.float32


def test_a_text_tower_embeds_beside_the_frames_or_is_refused(library_name, build):
    name, info = SMALL_MODELS[library_name], build().info
    try:
        tower = load_text_tower(name, weights="random", device=CPU)
    except BackboneError as error:
        assert f"{name} has no text tower" in str(error)
        return
    assert isinstance(tower, TextTower)
    assert tower.encode(["a red ring", ""]).shape == (2, info.embed_dim)
    words = tower.encode_words(["a red ring"], 8)
    assert words.tokens.shape == (1, 8, info.embed_dim) and words.mask.shape == (1, 8)
    assert tower.find_cut(["a red ring"]) == {}
    assert len(tower.find_cut(["ring " * tower.context_length])) == 1


def test_unknown_models_are_refused_with_those_of_all_libraries():
    with pytest.raises(
        BackboneError, match="unknown model 'toi'.* Short names: vit-e, .*, toy; others are open_clip or"
    ):
        build_backbone("toi", weights="random", device=CPU)


def test_no_library_is_imported_before_a_model_of_it_is_asked_for():
    code = "import sys, s4v.backbone.facts, s4v.train.paper.presets; print({'open_clip', 'timm'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_no_one_else_imports_a_library_of_towers():
    """They stand in backbone/ alone; the demo, which trains a model of open_clip, is no part of the way."""
    folders = ("commands", "extract", "retrieve", "store", "train")
    found = []
    for file in (file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [(file.name, module) for module in modules if "open_clip" in module or "timm" in module]
    assert found == []


def test_the_family_of_side_blocks_is_a_fact_where_a_name_would_not_tell_it():
    clip, eva = {"architecture": "ViT-L-14"}, {"architecture": "EVA02-E-14"}
    assert (read_side_family(clip), read_side_family(eva)) == ("clip", "eva"), "as before stores told it"
    assert read_side_family({**clip, "side_family": "eva"}) == "eva"
    with pytest.raises(StoreMismatchError, match="knows the side blocks of clip, eva; .* ViT-L-14, has 'vit'"):
        read_side_family({**clip, "side_family": "vit"})
    tiny = build_backbone("tiny-clip", weights="random", device=CPU).info
    assert tiny.side_family == "clip" and "side_family" not in tiny.describe()
    assert build_backbone("toy", weights="random", device=CPU).info.describe()["side_family"] == "eva"


def test_a_store_of_ones_own_tower_reads_back_its_tokens(make_video, make_config, tmp_path, caplog, monkeypatch):
    for seed, name in enumerate(("a", "b", "c")):
        make_video(tmp_path / f"videos/{name}.mp4", num_frames=10, seed=seed)
    table = tmp_path / "videos.csv"
    table.write_text("path,split,caption\na.mp4,train,a column\nb.mp4,train,a column\nc.mp4,val,a column\n")
    config = make_config(
        tmp_path / "videos", tmp_path / "toy.zarr", model="toy", dataset="table", annotations=table,
        frames={"": 2}, layers="0,2", resize="224", num_decoders=1,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert extract_dataset(config).videos["ok"] == 3
    assert "its captions cannot train retrieval, for lack of a text tower: toy has no text tower" in caplog.text
    store = open_store(config.out)
    facts = store.attributes["backbone"]
    assert (facts["name"], facts["architecture"], facts["side_family"]) == ("toy", "toy-vit", "eva")
    assert side_family(store) == "eva"
    assert not {"open_clip_torch", "timm"} & {*store.attributes["libraries"]}, "only what computed it is noted"
    clips = store.read_clips([0, 1, 2], [[0, 1]] * 3)
    backbone = build_backbone("toy", weights="random", device=CPU).load_weights()
    pixels = torch.from_numpy(clips.pixels).flatten(0, 2)  # (B, T, 1, H, W, 3) -> (B*T, H, W, 3)
    tokens = backbone.encode_frames(pixels, [0, 2])
    patches = torch.stack(tokens.patches, dim=1).unflatten(0, (3, 2))  # (B*T, L, N, D) -> (B, T, L, N, D)
    np.testing.assert_allclose(store.decode_patches(clips.patches), patches, atol=1e-5)
    np.testing.assert_allclose(clips.cls, tokens.cls.unflatten(0, (3, 2)), atol=1e-5)
    np.testing.assert_allclose(store.read_embeddings()[:, 0, :2], tokens.embedding.unflatten(0, (3, 2)), atol=1e-5)
    assert extract_dataset(config).videos["ok"] == 3, "the same command finds nothing left to do"
    monkeypatch.delitem(LIBRARIES, "toy")
    with pytest.raises(BackboneError, match="unknown model 'toy'"):
        build_backbone("toy", weights="random", device=CPU)
    assert side_family(open_store(config.out)) == "eva", "stage two needs no library"


def test_normalised_pixels_are_those_of_the_facts():
    backbone = build_backbone("toy", weights="random", device=CPU)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (backbone.info.mean, backbone.info.std))
    white = normalise_pixels(torch.full((1, 2, 2, 3), 255, dtype=torch.uint8), mean, std)
    torch.testing.assert_close(white, ((1 - mean) / std).expand(1, 3, 2, 2))
