import json
import math
import threading

import numpy as np
import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.eva import Eva
from torch import nn

from s4v.backbone import open_clip_models as architectures
from s4v.backbone.text_tower import load_text_tower
from s4v.backbone.vision_tower import build_backbone, parse_layers, read_peak_flops
from s4v.backbone.weights import draw_random, parameters_on_meta
from s4v.device import find_device
from s4v.errors import BackboneError, ConfigError, WeightsError

CPU = torch.device("cpu")


def make_eva(sizes, options):
    kept = {"num_classes": options.get("num_classes", 0), "global_pool": options.get("global_pool", "token")}
    model = Eva(img_size=28, patch_size=14, embed_dim=32, num_heads=2, mlp_ratio=2.0, **sizes, **kept)
    model.default_cfg = {"pool_size": None}
    return model


@register_model
def eva_small_postnorm(pretrained: bool = False, **options: object) -> Eva:
    """ViT-E's kind of block (post-norm, no rope), shrunken."""
    return make_eva({"depth": 4, "use_post_norm": True}, options)


@register_model
def eva_small_rope(pretrained: bool = False, **options: object) -> Eva:
    """EVA02-B and -L's kind of block (pre-norm, rope, split qkv, SwiGLU), shrunken."""
    sizes = {
        "depth": 3,
        "qkv_fused": False,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "scale_attn_inner": True,
        "use_rot_pos_emb": True,
        "ref_feat_shape": (2, 2),
    }
    return make_eva(sizes, options)


TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CONFIGS = {
    "small-clip": {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": TEXT,
    },
    "small-eva": {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 28,
            "timm_model_name": "eva_small_postnorm",
            "timm_pool": "token",
            "timm_proj": None,
        },
        "text_cfg": TEXT,
        "custom_text": True,
    },
    "small-eva-rope": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 28, "timm_model_name": "eva_small_rope", "timm_pool": "token", "timm_proj": None},
        "text_cfg": TEXT,
        "custom_text": True,
    },
}
PAIR = {
    "small-pair": {**CONFIGS["small-clip"], "quick_gelu": False},
    "small-pair-quickgelu": CONFIGS["small-clip"],
}
"""One size with both activations, as open_clip names its own."""


@pytest.fixture(scope="module", autouse=True)
def small_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, config in {**CONFIGS, **PAIR}.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    architectures.read_architecture.cache_clear()


def randomise(model: nn.Module) -> nn.Module:
    """Weights away from their initial values: zero biases and unit norms would hide a swap."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(params=list(CONFIGS))
def reference(request, tmp_path):
    """open_clip's own model of a configuration, and its weights as a file."""
    model = randomise(open_clip.create_model(request.param, pretrained=None))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "weights.safetensors")
    return request.param, model, tmp_path / "weights.safetensors"


def images(size, count=3):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


def test_our_build_equals_open_clips_own_factory(reference):
    name, model, file = reference
    backbone = build_backbone(name, weights=str(file), device=CPU).load_weights()
    pixels = images(backbone.info.image_size[0])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.info.mean, backbone.info.std))
    batch = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    blocks = model.visual.trunk.blocks if hasattr(model.visual, "trunk") else model.visual.transformer.resblocks
    seen = []
    hooks = [block.register_forward_hook(lambda _m, _i, output: seen.append(output)) for block in blocks]
    with torch.inference_mode():
        expected = model.visual(batch)
    for hook in hooks:
        hook.remove()
    tokens = backbone.encode_frames(pixels, range(len(blocks)))
    assert torch.equal(tokens.embedding, expected)
    for layer, output in enumerate(seen):
        assert torch.equal(tokens.cls[:, layer], output[:, 0]), layer
        assert torch.equal(tokens.patches[layer], output[:, 1:]), layer


def test_head_turns_the_last_class_token_into_the_embedding(reference):
    name, _, file = reference
    backbone = build_backbone(name, weights=str(file), device=CPU).load_weights()
    tokens = backbone.encode_frames(images(backbone.info.image_size[0]), [backbone.info.depth - 1])
    head = {k: torch.from_numpy(np.asarray(v)) for k, v in backbone.read_head().items()}
    normed = nn.functional.layer_norm(
        tokens.cls[:, -1], (backbone.info.width,), head["norm_weight"], head["norm_bias"], float(head["norm_eps"])
    )
    expected = normed @ head["proj_weight"].T + head.get("proj_bias", torch.zeros(()))
    torch.testing.assert_close(expected, tokens.embedding, atol=1e-5, rtol=1e-5)
    assert float(head["logit_scale"]) == pytest.approx(math.log(1 / 0.07), abs=0.5)
    assert ("proj_bias" in head) == ("eva" in name)


def test_text_tower_equals_open_clips_own(reference):
    name, model, file = reference
    texts = ["a red ring moves left", "", "naïve ☃ " * 40]
    with torch.inference_mode():
        expected = model.encode_text(open_clip.get_tokenizer(name)(texts))
    found = load_text_tower(name, weights=str(file), device=CPU).encode(texts)
    # Not to the bit: torch picks another attention kernel where no parameter asks for a gradient.
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5, rtol=1e-5)


def test_torch_files_load_like_safetensors(reference, tmp_path):
    name, model, file = reference
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "weights.pt")
    pixels = images(build_backbone(name, weights="random", device=CPU).info.image_size[0])
    both = [
        build_backbone(name, weights=str(path), device=CPU).load_weights().encode_frames(pixels, [0]).embedding
        for path in (file, tmp_path / "weights.pt")
    ]
    assert torch.equal(*both)


def test_eva_files_without_open_clips_trunk_prefix_load(tmp_path):
    model = randomise(open_clip.create_model("small-eva", pretrained=None))
    state = {k.replace("visual.trunk.", "visual."): v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "eva.safetensors")
    backbone = build_backbone("small-eva", weights=str(tmp_path / "eva.safetensors"), device=CPU).load_weights()
    pixels = images(28)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.info.mean, backbone.info.std))
    with torch.inference_mode():
        expected = model.visual((pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std)
    assert torch.equal(backbone.encode_frames(pixels, [0]).embedding, expected)


def test_backbone_takes_no_gradient(reference):
    name, _, file = reference
    backbone = build_backbone(name, weights=str(file), device=CPU).load_weights()
    assert not any(p.requires_grad for p in backbone.tower.parameters())
    assert not backbone.tower.training


def test_weights_that_were_given_back_load_again(reference):
    name, _, file = reference
    backbone = build_backbone(name, weights=str(file), device=CPU)
    assert not backbone.has_weights
    pixels = images(backbone.info.image_size[0])
    before = backbone.load_weights().encode_frames(pixels, [0]).embedding
    flops = backbone.flops_per_frame
    backbone.free_weights()
    assert not backbone.has_weights and backbone.flops_per_frame == flops
    assert torch.equal(backbone.load_weights().encode_frames(pixels, [0]).embedding, before)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla T4", 65e12),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A10", None),
    ],
)
def test_a_gpus_peak_is_found_by_whole_words(name, peak):
    assert read_peak_flops(name) == peak


def test_building_takes_no_memory_for_parameters_and_keeps_buffers():
    with parameters_on_meta():
        tower = timm.create_model("eva_small_rope")
    assert all(p.is_meta for p in tower.parameters())
    buffers = dict(tower.named_buffers())
    assert buffers
    assert not any(b.is_meta for b in buffers.values())
    expected = dict(timm.create_model("eva_small_rope").named_buffers())
    assert all(torch.equal(buffers[name], expected[name]) for name in expected)
    assert not next(nn.Linear(2, 2).parameters()).is_meta, "outside, modules are built as ever"


def test_random_weights_depend_on_name_and_seed_alone():
    shape = torch.Size([4, 6])
    first = draw_random("a.weight", shape, 0)
    assert torch.equal(first, draw_random("a.weight", shape, 0))
    assert not torch.equal(first, draw_random("b.weight", shape, 0))
    assert not torch.equal(first, draw_random("a.weight", shape, 1))
    assert torch.equal(draw_random("ln.weight", torch.Size([5]), 0), torch.ones(5))
    assert torch.equal(draw_random("ln.bias", torch.Size([5]), 0), torch.zeros(5))


def test_precision_is_that_of_the_weights():
    backbone = build_backbone("small-clip", weights="random", device=CPU, precision="bf16").load_weights()
    assert {p.dtype for p in backbone.tower.parameters()} == {torch.bfloat16}
    tokens = backbone.encode_frames(images(32), [0, 2])
    assert tokens.patches[0].dtype == torch.bfloat16
    assert tokens.embedding.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("ViT-B-16-SigLIP", "has no class token"),
        ("RN50", "has no transformer blocks"),
        ("convnext_base", "has no transformer blocks"),
        ("ViTamin-S", "cannot be built|has no"),
    ],
)
def test_towers_without_class_token_or_blocks_are_refused_by_name(name, why):
    with pytest.raises(BackboneError, match=f"{name} .*({why})|{name} ({why})"):
        build_backbone(name, weights="random", device=CPU)


def test_unknown_model_names_the_closest():
    with pytest.raises(BackboneError, match="unknown model 'vit-b61'. Closest: .*vit-b16"):
        build_backbone("vit-b61", weights="random", device=CPU)


@pytest.mark.parametrize(
    ("alias", "architecture"),
    [
        ("vit-e", "EVA02-E-14"),
        ("vit-e-plus", "EVA02-E-14-plus"),
        ("vit-l", "ViT-L-14-quickgelu"),
        ("vit-b16", "ViT-B-16-quickgelu"),
        ("vit-b32", "ViT-B-32-quickgelu"),
    ],
)
def test_aliases_name_known_architectures_and_their_own_weights(alias, architecture):
    found, tag = architectures.resolve_model(alias)
    assert found == architecture
    assert tag in open_clip.pretrained.list_pretrained_tags_by_model(architecture)


def test_paper_layers():
    assert parse_layers("paper", 12) == tuple(range(12))
    assert parse_layers("paper", 24) == tuple(range(24))
    assert parse_layers("paper", 64) == tuple(range(1, 64, 2))
    assert parse_layers("all", 64) == tuple(range(64))
    assert parse_layers("last4", 12) == (8, 9, 10, 11)
    assert parse_layers("last12", 12) == parse_layers("all", 12)
    for text in ("last0", "last13"):
        with pytest.raises(ConfigError, match=f"must be last1 to last12 for this model; found {text}"):
            parse_layers(text, 12)
    assert parse_layers("3,1", 12) == (1, 3, 11), "the last block is always tapped"
    with pytest.raises(ConfigError, match=r"must lie in 0 to 11 for this model; found \[12, 40\]"):
        parse_layers("1,12,40", 12)
    with pytest.raises(ConfigError, match="--layers takes paper, all, last4 or numbers"):
        parse_layers("first", 12)


def test_weights_of_another_model_are_refused(tmp_path):
    other = open_clip.create_model("small-eva", pretrained=None)
    save_file({k: v.contiguous() for k, v in other.state_dict().items()}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"does not fit this model: .* tensors are missing.* are not known"):
        build_backbone("small-clip", weights=str(tmp_path / "w.safetensors"), device=CPU).load_weights()


def test_pickle_with_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("owned",))

    torch.save({"visual.proj": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match=r"evil\.pt is not a safetensors or torch file of plain tensors"):
        build_backbone("small-clip", weights=str(tmp_path / "evil.pt"), device=CPU).load_weights()


@pytest.mark.parametrize("content", ["text", {"state_dict": [1]}, {"module": 3}, {5: 6}])
def test_files_of_other_things_are_not_weights(tmp_path, content):
    if content == "text":
        (tmp_path / "w.pt").write_text("hello world")
    else:
        torch.save(content, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"w\.pt (is not a safetensors|holds no tensors|does not fit)"):
        build_backbone("small-clip", weights=str(tmp_path / "w.pt"), device=CPU).load_weights()


def test_unknown_weights_name_the_tags():
    with pytest.raises(WeightsError, match="no weights 'laion' for vit-b32: no such file, and its tags are"):
        build_backbone("vit-b32", weights="laion", device=CPU)
    with pytest.raises(WeightsError, match="--weights random takes a seed as random:0; found 'random:x'"):
        build_backbone("vit-b32", weights="random:x", device=CPU)
    with pytest.raises(WeightsError, match="small-clip has no default weights"):
        build_backbone("small-clip", weights=None, device=CPU)


@pytest.fixture
def clip_tensors():
    return randomise(open_clip.create_model("small-pair", pretrained=None)).state_dict()


def test_of_a_local_file_the_activation_is_told_and_recorded(clip_tensors, tmp_path, caplog):
    """One file, two models that compute something else of it."""
    save_file({name: tensor.contiguous() for name, tensor in clip_tensors.items()}, tmp_path / "w.safetensors")
    embeddings = {}
    for name, words, other, activation in (
        ("small-pair", "plain GELU", "small-pair-quickgelu", "gelu"),
        ("small-pair-quickgelu", "QuickGELU", "small-pair", "quick_gelu"),
    ):
        caplog.clear()
        backbone = build_backbone(name, weights=str(tmp_path / "w.safetensors"), device=CPU).load_weights()
        told = f"w.safetensors does not tell its activation: --model {name} computes {words}. If it was trained with"
        assert told in caplog.text and f"take --model {other}" in caplog.text
        assert backbone.info.describe()["activation"] == activation
        embeddings[name] = backbone.encode_frames(images(32), [0]).embedding
    assert not torch.allclose(*embeddings.values(), atol=1e-3)
    caplog.clear()
    build_backbone("small-pair", weights="random", device=CPU)
    save_file({name: tensor.contiguous() for name, tensor in clip_tensors.items()}, tmp_path / "one.safetensors")
    build_backbone("small-clip", weights=str(tmp_path / "one.safetensors"), device=CPU)
    assert not caplog.text, "nothing to choose"
    assert "activation" not in build_backbone("small-eva", weights="random", device=CPU).info.describe()


def save_as_openai(tensors, path):
    """A compiled program with OpenAI's names, in half precision, and the sizes that its files hold beside them."""
    sizes = {"input_resolution": 32, "context_length": 16, "vocab_size": 49408}
    root = torch.nn.Module()
    for name, tensor in {**tensors, **{name: torch.tensor(size) for name, size in sizes.items()}}.items():
        *folders, leaf = name.split(".")
        module = root
        for folder in folders:
            if not hasattr(module, folder):
                module.add_module(folder, torch.nn.Module())
            module = getattr(module, folder)
        module.register_buffer(leaf, tensor.half() if tensor.is_floating_point() else tensor)
    torch.jit.save(torch.jit.script(root), path)


def test_openais_own_files_are_read(clip_tensors, tmp_path, caplog):
    save_as_openai(clip_tensors, tmp_path / "ViT.pt")
    halves = {name: tensor.half() for name, tensor in clip_tensors.items()}
    torch.save(halves, tmp_path / "plain.pt")
    embeddings, texts = [], []
    for file in ("ViT.pt", "plain.pt"):
        caplog.clear()
        backbone = build_backbone("small-pair-quickgelu", weights=str(tmp_path / file), device=CPU).load_weights()
        assert ("does not tell its activation" in caplog.text) == (file == "plain.pt")
        embeddings.append(backbone.encode_frames(images(32), [0]).embedding)
        tower = load_text_tower("small-pair-quickgelu", weights=str(tmp_path / file), device=CPU)
        texts.append(tower.encode(["a red ring"]))
        assert backbone.read_head()["logit_scale"] == pytest.approx(float(halves["logit_scale"]))
    assert torch.equal(*embeddings)
    np.testing.assert_array_equal(*texts)
    with pytest.raises(WeightsError, match="ViT.pt were trained with QuickGELU and small-pair computes the other: use"):
        build_backbone("small-pair", weights=str(tmp_path / "ViT.pt"), device=CPU)
    whole = (tmp_path / "ViT.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="not a safetensors or torch file of plain tensors") as caught:
        build_backbone("small-pair-quickgelu", weights=str(tmp_path / "cut.pt"), device=CPU).load_weights()
    assert "\n" not in str(caught.value)


def test_plain_gelu_architecture_with_openai_weights_is_refused():
    with pytest.raises(WeightsError, match="trained with QuickGELU .* use the architecture ViT-B-32-quickgelu"):
        build_backbone("ViT-B-32", weights="openai", device=CPU)


def test_unreachable_hub_says_what_to_do(monkeypatch):
    def refuse(_config):
        raise ConnectionError("no route")

    monkeypatch.setattr(architectures, "download_pretrained", refuse)
    with pytest.raises(
        WeightsError, match="'openai' .* are not cached and cannot be downloaded .ConnectionError.*--weights FILE"
    ):
        build_backbone("vit-b32", weights=None, device=CPU)


def test_weights_may_hold_a_few_words_of_a_vocabulary(tmp_path, caplog):
    """Those are as in the whole file; others count as not said, with a warning."""
    architecture, _ = architectures.resolve_model("tiny-clip")
    whole = open_clip.create_model(architecture, pretrained=None).state_dict()
    tokenizer = open_clip.get_tokenizer(architecture)
    rows = torch.unique(tokenizer(["a red ring moves left"]))
    few = {
        **whole,
        "token_embedding.weight": whole["token_embedding.weight"][rows],
        "token_embedding.rows": rows.int(),
        "token_embedding.num_rows": torch.tensor(len(whole["token_embedding.weight"])),
    }
    for name, tensors in (("whole", whole), ("few", few)):
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / f"{name}.safetensors")
    towers = {
        name: load_text_tower("tiny-clip", weights=str(tmp_path / f"{name}.safetensors"), device=CPU)
        for name in ("whole", "few")
    }
    known = ["a red ring", "a ring moves left"]
    assert np.array_equal(towers["few"].encode(known), towers["whole"].encode(known))
    assert "does not know" not in caplog.text
    said = towers["few"].encode(["a zebra moves left", "a moves zebra giraffe left", "a moves left"])
    assert "does not know" in caplog.text and "'giraffe'" in caplog.text and "'zebra'" in caplog.text
    assert np.array_equal(said[0], said[2]) and np.array_equal(said[1], said[2])


def test_text_tower_refuses_other_weights_than_the_stores():
    with pytest.raises(WeightsError, match="the store was made with weights of hash abc"):
        load_text_tower("tiny-clip", weights="random", device=CPU, expected_sha256="abc")


def test_absent_device_is_refused():
    for name in ("nonsense", "meta"):
        with pytest.raises(ConfigError, match=f"--device {name} is not available here"):
            find_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--device cuda is not available here"):
            find_device("cuda")


@pytest.mark.slow
def test_vit_e_is_the_true_tower():
    backbone = build_backbone("vit-e", weights="random", device=CPU, precision="bf16")
    count = sum(p.numel() for p in backbone.tower.parameters())
    assert backbone.info.depth == 64
    assert backbone.info.width == 1792
    assert backbone.info.num_patches == 256
    assert 4.3e9 < count < 4.4e9


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ViT-B-16-quickgelu", 34.9e9), ("ViT-L-14-quickgelu", 161.8e9), ("EVA02-E-14", 2.30e12)],
)
def test_the_work_of_a_frame_is_that_of_its_matrix_products(name, expected):
    """Two for each of the multiply-adds that are published for these towers: 17.5, 80.9 and, at 224 pixels, 1150 G."""
    found = build_backbone(name, weights="random", device=CPU).flops_per_frame
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_a_compiled_tower_gives_the_same_tokens_from_one_kernel_for_all_batches():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8))
    backbone = build_backbone("tiny-clip", weights="random", device=CPU).load_weights()
    plain = backbone.encode_frames(pixels, (1, 5))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backbone.compile(4)
    for count in (3, 4, 2):
        compiled = backbone.encode_frames(pixels[:count], (1, 5))
        pairs = zip([*plain.patches, plain.cls, plain.embedding], [*compiled.patches, compiled.cls, compiled.embedding],
                    strict=True)  # fmt: skip
        for one, other in pairs:
            torch.testing.assert_close(one[:count], other, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_towers_that_two_threads_build_at_once_leave_torch_as_it_was():
    inside, may_leave, outside = threading.Event(), threading.Event(), []

    def build():
        with parameters_on_meta():
            inside.set()
            may_leave.wait(30)
            outside.append(torch.nn.Linear(2, 2).weight.is_meta)

    def build_too():
        with parameters_on_meta():
            outside.append(torch.nn.Linear(2, 2).weight.is_meta)

    register = torch.nn.Module.register_parameter
    first, second = threading.Thread(target=build), threading.Thread(target=build_too)
    first.start()
    assert inside.wait(30)
    second.start()
    own = torch.nn.Linear(2, 2).weight
    assert not own.is_meta and own.requires_grad, "a module of another thread is none of the tower's"
    may_leave.set()
    first.join()
    second.join()
    assert outside == [True, True] and torch.nn.Module.register_parameter is register
