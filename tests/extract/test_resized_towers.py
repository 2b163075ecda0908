"""Towers for frames of another size than their weights were made for: the same as their libraries make of them."""

import copy
import json

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import register_model
from timm.models.eva import Eva
from torch import nn

from s4v.backbone import open_clip_models as architectures
from s4v.backbone.resizing import interpolate_positions
from s4v.backbone.vision_tower import build_backbone
from s4v.errors import BackboneError, ConfigError

CPU = torch.device("cpu")
SIZE = (80, 144)
"""10 x 18 patches of 8 pixels."""


@register_model
def resized_eva_rope(pretrained: bool = False, **options: object) -> Eva:
    """EVA02's kind of block (pre-norm, rope over a reference grid), shrunken."""
    kept = {name: options[name] for name in ("num_classes", "global_pool") if name in options}
    model = Eva(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2.0, qkv_fused=False, swiglu_mlp=True,
        use_rot_pos_emb=True, ref_feat_shape=(2, 2), **kept,
    )  # fmt: skip
    model.default_cfg = {"pool_size": None}
    return model


TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
OWN = {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8}
TIMM = {"image_size": 32, "timm_model_name": "resized_eva_rope", "timm_pool": "token", "timm_proj": None}
CONFIGS = {
    "resized-clip": {"embed_dim": 24, "vision_cfg": OWN, "text_cfg": TEXT},
    "resized-clip-wide": {"embed_dim": 24, "vision_cfg": {**OWN, "image_size": SIZE}, "text_cfg": TEXT},
    "resized-eva": {"embed_dim": 24, "vision_cfg": TIMM, "text_cfg": TEXT, "custom_text": True},
}


@pytest.fixture(scope="module", autouse=True)
def small_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    architectures.read_architecture.cache_clear()


def make_weights(name, path):
    """A library's own model with weights away from their initial values, and a file of them."""
    model = open_clip.create_model(name, pretrained=None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return model.eval()


def images(size=SIZE):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8))


def normalise(backbone, pixels):
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.info.mean, backbone.info.std))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def test_an_open_clip_tower_equals_open_clips_own_of_that_size(tmp_path):
    state = make_weights("resized-clip", tmp_path / "w.safetensors").state_dict()
    backbone = build_backbone("resized-clip", weights=str(tmp_path / "w.safetensors"), device=CPU, image_size=SIZE)
    wide = open_clip.create_model("resized-clip-wide", pretrained=None).eval()
    resize_pos_embed(state, wide)
    wide.load_state_dict(state)
    tokens = backbone.load_weights().encode_frames(images(), [0, 2])
    with torch.inference_mode():
        expected = wide.visual.forward_intermediates(
            normalise(backbone, images()), indices=[0, 2], output_fmt="NLC", output_extra_tokens=True
        )
    assert torch.equal(tokens.embedding, expected["image_features"])
    for ours, theirs in zip(tokens.patches, expected["image_intermediates"], strict=True):
        assert ours.shape == (2, 180, 64) and torch.equal(ours, theirs)
    assert torch.equal(tokens.cls[:, 1], expected["image_intermediates_prefix"][1][:, 0])


def test_a_timm_tower_equals_timms_own_of_that_size(tmp_path):
    model = make_weights("resized-eva", tmp_path / "w.safetensors")
    backbone = build_backbone("resized-eva", weights=str(tmp_path / "w.safetensors"), device=CPU, image_size=SIZE)
    tokens = backbone.load_weights().encode_frames(images(), [0, 2])
    batch = normalise(backbone, images())
    dynamic = Eva(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2.0, qkv_fused=False, swiglu_mlp=True,
        use_rot_pos_emb=True, ref_feat_shape=(2, 2), num_classes=24, global_pool="token", dynamic_img_size=True,
    ).eval()  # fmt: skip
    dynamic.load_state_dict(model.visual.trunk.state_dict(), strict=False)
    model.visual.set_input_size(SIZE)
    with torch.inference_mode():
        assert torch.equal(tokens.embedding, model.visual(batch))
        _, seen = dynamic.forward_intermediates(batch, indices=[0, 2], output_fmt="NLC")
    for ours, theirs in zip(tokens.patches, seen, strict=True):
        assert ours.shape == (2, 180, 32)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["resized-clip", "resized-eva"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_that_come_again_give_the_same_tokens(name, precision):
    backbone = build_backbone(name, weights="random", device=CPU, precision=precision, image_size=SIZE)
    assert not backbone.has_weights
    first = backbone.load_weights().encode_frames(images(), [1])
    again = backbone.load_weights().encode_frames(images(), [1])
    backbone.free_weights()
    assert not backbone.has_weights
    freed = backbone.load_weights().encode_frames(images(), [1])
    for other in (again, freed):
        assert torch.equal(other.patches[0], first.patches[0]) and torch.equal(other.embedding, first.embedding)
    plain = build_backbone(name, weights="random", device=CPU, precision=precision).load_weights()
    kinds = [{name: one.dtype for name, one in each.tower.named_buffers()} for each in (backbone, plain)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("name", ["resized-clip", "resized-eva"])
def test_facts_follow_the_size_before_there_are_weights(name):
    plain = build_backbone(name, weights="random", device=CPU)
    backbone = build_backbone(name, weights="random", device=CPU, image_size=SIZE)
    info = backbone.info
    assert (info.grid, info.num_patches, info.image_size, info.own_image_size) == ((10, 18), 180, SIZE, (32, 32))
    assert info.weights_sha256 == plain.info.weights_sha256
    assert backbone.flops_per_frame > 10 * plain.flops_per_frame
    assert info.describe()["own_image_size"] == [32, 32]
    same = build_backbone(name, weights="random", device=CPU, image_size=(32, 32))
    assert same.info == plain.info and "own_image_size" not in plain.info.describe()
    head, own = backbone.load_weights().read_head(), plain.load_weights().read_head()
    assert all(np.array_equal(head[key], own[key]) for key in own)
    backbone.resize_input((32, 32))
    assert backbone.info == plain.info


@pytest.mark.parametrize("name", ["resized-clip", "resized-eva"])
def test_a_grid_of_as_many_patches_in_another_shape_has_positions_of_its_own(name):
    own = build_backbone(name, weights="random", device=CPU).load_weights()
    other = build_backbone(name, weights="random", device=CPU, image_size=(16, 64)).load_weights()
    theirs, ours = (getattr(one.tower, "trunk", one.tower).state_dict() for one in (own, other))
    key = "positional_embedding" if name == "resized-clip" else "pos_embed"
    before = theirs[key].reshape(1, 17, -1)
    expected = resample_abs_pos_embed(before, new_size=[2, 8], old_size=[4, 4], num_prefix_tokens=1)
    assert not torch.equal(expected, before)
    torch.testing.assert_close(ours[key].reshape(1, 17, -1), expected, atol=1e-6, rtol=1e-6)


def test_positions_of_the_same_grid_are_untouched():
    positions = nn.Parameter(torch.randn(13, 8), requires_grad=False)
    assert interpolate_positions(positions, (3, 4), (3, 4), num_prefix=1) is positions
    wider = interpolate_positions(positions, (3, 4), (6, 8), num_prefix=1)
    assert torch.equal(wider[0], positions[0]) and wider.shape == (49, 8)


def test_sizes_that_are_no_multiples_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"8x8 pixels in resized-clip; found 81x150\. The nearest are 80x144, 80x152"):
        build_backbone("resized-clip", weights="random", device=CPU, image_size=(81, 150))
    with pytest.raises(ConfigError, match=r"found 3x16\. The nearest are 8x16\.$"):
        build_backbone("resized-eva", weights="random", device=CPU, image_size=(3, 16))


def test_a_tower_of_one_size_says_so():
    backbone = build_backbone("resized-eva", weights="random", device=CPU)
    backbone.tower.trunk = copy.copy(backbone.tower.trunk)
    backbone.tower.trunk.__class__ = type("Fixed", (nn.Module,), {})
    with pytest.raises(BackboneError, match="resized-eva takes frames of 32x32 pixels alone; leave out --input"):
        backbone.resize_input(SIZE)
