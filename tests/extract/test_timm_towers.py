"""timm's towers beside timm's own factory: the same weights, the same tokens, bit by bit."""

import sys

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from timm.models import register_model
from torch.nn import functional as F

from s4v.backbone import LIBRARIES, find_library
from s4v.backbone.contract import normalise_pixels
from s4v.backbone.text_tower import load_text_tower
from s4v.backbone.vision_tower import build_backbone
from s4v.errors import BackboneError, WeightsError

CPU = torch.device("cpu")

# Of each kind one: timm's model of that name, with few and narrow blocks and small pictures.
KINDS = {
    "small_dinov2": ("vit_small_patch14_dinov2", {"img_size": 70}),
    "small_registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 70}),
    "small_dinov3": ("vit_small_patch16_dinov3", {}),
    "small_pe": ("vit_pe_core_tiny_patch16_384", {"img_size": 64}),
    "small_siglip": ("vit_base_patch16_siglip_224", {"img_size": 64}),
    "small_aimv2": ("aimv2_large_patch14_224", {"img_size": 70}),
    "small_beit": ("beit_base_patch16_224", {"img_size": 64}),
    "small_mixed_rope": ("vit_small_patch16_rope_mixed_224", {"img_size": 64}),
    "small_relpos": ("vit_relpos_small_patch16_224", {"img_size": 64}),
    "small_hybrid": ("vit_small_r26_s32_224", {"img_size": 64}),
    "small_eva_clip": ("eva02_base_patch16_clip_224", {"img_size": 64}),
}


def _register(name, base, sizes):
    def build(pretrained=False, **options):
        own = {key: value for key, value in options.items() if not key.startswith("pretrained")}
        return timm.create_model(base, depth=3, embed_dim=64, num_heads=2, **sizes, **own)

    build.__name__, build.__module__ = name, __name__
    return register_model(build)


for kind, (base, sizes) in KINDS.items():
    setattr(sys.modules[__name__], kind, _register(kind, base, sizes))


@pytest.fixture
def factory(tmp_path):
    """timm's own model with weights that are none of its first ones, and their file."""

    def make(name):
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # layer scales of 1e-5 would hide what blocks do
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1) * 0.5)
        file = tmp_path / f"{name}.safetensors"
        save_file(model.state_dict(), file)
        return model, str(file)

    return make


def draw_pixels(info, count=2):
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (count, *info.image_size, 3), dtype=np.uint8))


def run_factory(model, info, pixels, layers, dtype=torch.float32):
    """Patches and prefix tokens of blocks as hooks see them, and what the model itself returns."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (info.mean, info.std))
    seen = []
    hooks = [model.blocks[layer].register_forward_hook(lambda _, __, out: seen.append(out)) for layer in layers]
    with torch.inference_mode():
        output = model(normalise_pixels(pixels, mean, std).to(dtype))
    for hook in hooks:
        hook.remove()
    prefix = model.num_prefix_tokens
    return [tokens[:, prefix:] for tokens in seen], [tokens[:, :prefix] for tokens in seen], output


def require_equal(name, model, file, layers):
    backbone = build_backbone(name, weights=file, device=CPU).load_weights()
    pixels = draw_pixels(backbone.info)
    patches, prefix, output = run_factory(model, backbone.info, pixels, layers)
    tokens = backbone.encode_frames(pixels, layers)
    for own, theirs in zip(tokens.patches, patches, strict=True):
        assert torch.equal(own, theirs)
        assert own.shape == (len(pixels), backbone.info.num_patches, backbone.info.width)
    assert torch.equal(tokens.embedding, output)
    if model.cls_token is None:
        assert tokens.cls is None and not backbone.info.has_class_token
    else:
        assert torch.equal(tokens.cls, torch.stack([one[:, 0] for one in prefix], dim=1))
    return backbone, tokens


@pytest.mark.parametrize("name", KINDS)
def test_tokens_and_embedding_are_those_of_timms_own_factory(name, factory):
    backbone, _ = require_equal(name, *factory(name), [0, 2])
    assert backbone.info.mean == tuple(backbone.tower.pretrained_cfg["mean"])
    assert backbone.info.weights.endswith(f"{name}.safetensors")
    assert backbone.info.describe().get("has_text_tower") is False


@pytest.mark.slow  # whole models
@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_dinov3",
        "vit_pe_core_tiny_patch16_384",
        "vit_base_patch16_siglip_224",
    ],
)
def test_whole_towers_are_those_of_timms_own_factory(name, factory):
    require_equal(name, *factory(name), [0, 5, 11])


def test_registers_stay_out_of_patches(factory):
    backbone, _ = require_equal("small_registers", *factory("small_registers"), [1])
    assert backbone.num_prefix_tokens == 5 and backbone.info.num_patches == 25
    pe, _ = require_equal("small_pe", *factory("small_pe"), [1])
    assert pe.num_prefix_tokens == 1
    plain = backbone.flops_per_frame, pe.flops_per_frame
    assert all(flops > 0 for flops in plain)


def test_the_head_is_told_only_where_it_is_a_projection_of_a_norm_of_the_class_token(factory):
    with_head = {"small_dinov2", "small_registers", "small_eva_clip", "small_mixed_rope", "small_hybrid"}
    for name in KINDS:
        backbone, tokens = require_equal(name, *factory(name), [2])
        head = {key: torch.from_numpy(np.asarray(values)) for key, values in backbone.read_head().items()}
        assert bool(head) == (name in with_head), name
        if head:
            normed = F.layer_norm(
                tokens.cls[:, -1], (64,), head["norm_weight"], head["norm_bias"], float(head["norm_eps"])
            )
            embedding = normed @ head["proj_weight"].T + head.get("proj_bias", torch.zeros(()))
            torch.testing.assert_close(embedding, tokens.embedding, atol=1e-4, rtol=1e-4)


def test_half_precision_is_timms_too_and_rotary_periods_stay_whole(factory):
    model, file = factory("small_dinov3")
    backbone = build_backbone("small_dinov3", weights=file, device=CPU, precision="bf16").load_weights()
    assert backbone.tower.rope.periods.dtype == torch.float32
    pixels = draw_pixels(backbone.info)
    patches, _, output = run_factory(model.bfloat16(), backbone.info, pixels, [0, 2], torch.bfloat16)
    tokens = backbone.encode_frames(pixels, [0, 2])
    assert all(torch.equal(own, theirs) for own, theirs in zip(tokens.patches, patches, strict=True))
    assert torch.equal(tokens.embedding, output.float())
    backbone.free_weights()
    again = backbone.load_weights().encode_frames(pixels, [0, 2])
    assert torch.equal(again.embedding, tokens.embedding)


def test_facts_are_those_of_the_towers_own_configuration():
    info = build_backbone("vit_small_patch14_dinov2", weights="random", device=CPU).info
    assert (info.image_size, info.grid, info.patch_size) == ((518, 518), (37, 37), (14, 14))
    assert (info.width, info.depth, info.embed_dim, info.mean) == (384, 12, 384, (0.485, 0.456, 0.406))
    assert {"has_class_token", "activation", "side_family"}.isdisjoint(info.describe())
    dinov3 = build_backbone("vit_small_patch16_dinov3", weights="random", device=CPU).info
    assert (dinov3.image_size, dinov3.grid) == ((256, 256), (16, 16)), "it takes any size: its configuration's counts"
    siglip = build_backbone("vit_base_patch16_siglip_224", weights="random", device=CPU).info
    assert siglip.describe()["has_class_token"] is False and siglip.mean == (0.5, 0.5, 0.5)


def test_a_name_that_both_libraries_know_is_open_clips_and_the_prefix_says_timms():
    both = set(timm.list_models()) & set(LIBRARIES["open_clip"]().list_models())
    assert "vit_medium_patch16_gap_256" in both, "else there is nothing to test"
    assert {find_library(name).title for name in both} == {"open_clip"}
    assert {find_library(f"timm/{name}").title for name in both} == {"timm"}
    info = build_backbone("timm/vit_medium_patch16_gap_256", weights="random", device=CPU).info
    assert (info.name, info.architecture) == ("timm/vit_medium_patch16_gap_256", "vit_medium_patch16_gap_256")


def test_a_tag_in_the_name_says_which_head_it_has():
    assert build_backbone("vit_base_patch16_clip_224.openai", weights="random", device=CPU).info.embed_dim == 512
    with pytest.raises(BackboneError, match=r"unknown model 'vit_base_patch16_clip_224\.opanai'.*Closest: vit_base_p"):
        build_backbone("vit_base_patch16_clip_224.opanai", weights="random", device=CPU)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet18",
            "resnet18 has no transformer blocks whose tokens timm hands out; s4v needs a ViT such as vit_small",
        ),
        ("naflexvit_base_patch16_gap", "does not cut pictures of one size into patches"),
        ("tnt_s_patch16_224", "does not cut pictures of one size into patches"),
    ],
)
def test_what_has_no_tokens_is_refused(name, message):
    with pytest.raises(BackboneError, match=message):
        build_backbone(name, weights="random", device=CPU)


def test_there_is_no_text_tower():
    with pytest.raises(BackboneError, match="small_pe has no text tower"):
        load_text_tower("small_pe", weights="random", device=CPU)


def test_files_of_other_models_are_refused(factory, tmp_path):
    model, _ = factory("small_dinov2")
    state = model.state_dict()
    changed = {
        "extra": {**state, "blocks.0.attn.more": torch.zeros(3)},
        "less": {name: value for name, value in state.items() if name != "blocks.1.norm1.weight"},
        "larger": {**state, "pos_embed": torch.zeros(1, 50, 64)},
        "wide": {**state, "blocks.0.norm1.weight": torch.zeros(65)},
    }
    expected = {
        "extra": r"does not fit this model: 1 are not known \(first: blocks.0.attn.more\)",
        "less": r"1 tensors are missing \(first: blocks.1.norm1.weight\)",
        "larger": r"pos_embed has shape \(1, 50, 64\), this model needs \(1, 26, 64\)",
        "wide": r"blocks.0.norm1.weight has shape \(65,\), this model needs \(64,\)",
    }
    for name, tensors in changed.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(WeightsError, match=expected[name]):
            build_backbone("small_dinov2", weights=str(tmp_path / f"{name}.safetensors"), device=CPU).load_weights()


def test_names_of_a_models_makers_are_renamed_as_timm_does(factory, tmp_path):
    model, _ = factory("small_registers")
    state = model.state_dict()
    # Theirs has a place for the class token, which is added to it, and a token of training.
    theirs = {"register_tokens" if name == "reg_token" else name: value for name, value in state.items()}
    place = torch.full((1, 1, 64), 0.5)
    theirs["cls_token"] = state["cls_token"] - place
    theirs["pos_embed"] = torch.cat([place, state["pos_embed"]], dim=1)
    torch.save({**theirs, "mask_token": torch.zeros(1, 64)}, tmp_path / "theirs.pth")
    backbone = build_backbone("small_registers", weights=str(tmp_path / "theirs.pth"), device=CPU).load_weights()
    loaded = backbone.tower.state_dict()
    assert set(loaded) == set(state)
    for name, values in state.items():
        torch.testing.assert_close(loaded[name], values, msg=name)
    # timm would interpolate the places of larger pictures without a word.
    theirs["pos_embed"] = torch.zeros(1, 1 + 6 * 6, 64)
    torch.save(theirs, tmp_path / "larger.pth")
    with pytest.raises(WeightsError, match="pos_embed has 37 places, this model needs 25 and at most 5 more"):
        build_backbone("small_registers", weights=str(tmp_path / "larger.pth"), device=CPU).load_weights()


def test_a_tag_that_is_not_cached_is_told_in_one_line_without_network(monkeypatch):
    asked = []

    def refuse(repository, file, *, revision, local_files_only):
        asked.append((repository, file, local_files_only))
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(WeightsError) as error:
        build_backbone("vit_small_patch14_dinov2", weights=None, device=CPU)
    assert str(error.value) == (
        "the weights vit_small_patch14_dinov2.lvd142m are not cached and cannot be downloaded "
        "(LocalEntryNotFoundError). Copy their file here and name it: --weights FILE; or use --weights random."
    )
    repository = "timm/vit_small_patch14_dinov2.lvd142m"
    files = [("model.safetensors", True), ("pytorch_model.bin", True), ("model.safetensors", False)]
    assert asked == [(repository, *file) for file in files], "the cache first, and one try to reach the hub"
    with pytest.raises(WeightsError, match="no weights 'lvd143m' .*: no such file, and its tags are lvd142m"):
        build_backbone("vit_small_patch14_dinov2", weights="lvd143m", device=CPU)


def test_a_tag_is_loaded_from_the_hubs_cache(monkeypatch, tmp_path):
    model = timm.create_model("test_vit").eval()
    file = tmp_path / "model.safetensors"
    save_file(model.state_dict(), file)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(file))
    backbone = build_backbone("test_vit", weights=None, device=CPU).load_weights()
    assert backbone.info.weights == "r160_in1k"
    pixels = draw_pixels(backbone.info)
    _, _, output = run_factory(model, backbone.info, pixels, [0])
    assert torch.equal(backbone.encode_frames(pixels, [0]).embedding, output)
