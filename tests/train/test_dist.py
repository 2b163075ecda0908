"""DiST against the reference's own modules (golden files of its code at 4b3a09b), and as a network."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import ConfigError, StoreMismatchError
from s4v.store.class_texts import read_class_texts
from s4v.store.reader import open_store
from s4v.train.clips import ClipLoader, ClipPlan, codec_for
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run
from s4v.train.networks import parts
from s4v.train.networks.dist import Dist, DistShape, ramp_to_cosine
from s4v.train.paper.presets import DIST_PRESETS
from s4v.train.recipe import find_biases, make_optimizer
from s4v.train.run_folder import load_checkpoint, open_run, read_metrics
from s4v.train.settings import find_optimisation, plan_network, resolve_preset
from s4v.train.tasks import recognition

CPU = torch.device("cpu")
PREFIX = "backbone.base_encoder."

# The reference's names below `dist_net.`, and ours.
NAMES = {
    r"temporal_stem\.": "stem.",
    r"input_linears\.(\d+)\.": r"blocks.\1.tap.",
    r"temporal_nets\.(\d+)\.ln\.": r"blocks.\1.temporal.norm.",
    r"temporal_nets\.(\d+)\.temporal_net\.c_fc1\.": r"blocks.\1.temporal.time.",
    r"temporal_nets\.(\d+)\.temporal_net\.c_fc2\.": r"blocks.\1.temporal.space.",
    r"temporal2integration_nets\.(\d+)\.linear_fuse\.": r"blocks.\1.to_integration.fuse.",
    r"temporal2integration_nets\.(\d+)\.cls_token": r"blocks.\1.to_integration.class_token",
    r"integration2temporal_nets\.(\d+)\.linear_fuse\.": r"blocks.\1.to_temporal.",
    r"integration_nets\.(\d+)\.ln\.": r"blocks.\1.integration.mlp_norm.",
    r"integration_nets\.(\d+)\.ln_temporal\.": r"blocks.\1.integration.time_norm.",
    r"integration_nets\.(\d+)\.ffn\.c_fc\.": r"blocks.\1.integration.mlp.expand.",
    r"integration_nets\.(\d+)\.ffn\.c_proj\.": r"blocks.\1.integration.mlp.project.",
    r"integration_nets\.(\d+)\.temporal_ffn\.c_fc1\.": r"blocks.\1.integration.time.narrow.",
    r"integration_nets\.(\d+)\.temporal_ffn\.c_fc2\.": r"blocks.\1.integration.time.time.",
    r"integration_nets\.(\d+)\.temporal_ffn\.c_proj\.": r"blocks.\1.integration.time.widen.",
    r"aggregated_spatial_cls_token": "frame_query",
    r"aggregated_cls_token": "clip_query",
    r"adapooling_nets\.(\d+)\.positional_embedding": r"pooling.\1.position",
    r"adapooling_nets\.(\d+)\.spatial_transformer\.ln_1\.": r"pooling.\1.frame_attention.norm.",
    r"adapooling_nets\.(\d+)\.spatial_transformer\.attn\.in_proj_": r"pooling.\1.frame_attention.qkv.",
    r"adapooling_nets\.(\d+)\.spatial_transformer\.attn\.out_proj\.": r"pooling.\1.frame_attention.project.",
    r"adapooling_nets\.(\d+)\.temporal_transformer\.ln_1\.": r"pooling.\1.clip_attention.norm.",
    r"adapooling_nets\.(\d+)\.temporal_transformer\.attn\.in_proj_": r"pooling.\1.clip_attention.qkv.",
    r"adapooling_nets\.(\d+)\.temporal_transformer\.attn\.out_proj\.": r"pooling.\1.clip_attention.project.",
    r"adapooling_nets\.(\d+)\.ln_out_spat_cls_token\.": r"pooling.\1.frame_norm.",
    r"adapooling_nets\.(\d+)\.ln_out_temp_cls_token\.": r"pooling.\1.clip_norm.",
    r"adapooling_nets\.(\d+)\.output_map_spatial_cls_token\.c_fc\.": r"pooling.\1.frame_mlp.expand.",
    r"adapooling_nets\.(\d+)\.output_map_spatial_cls_token\.c_proj\.": r"pooling.\1.frame_mlp.project.",
    r"adapooling_nets\.(\d+)\.output_map_cls_token\.c_fc\.": r"pooling.\1.clip_mlp.expand.",
    r"adapooling_nets\.(\d+)\.output_map_cls_token\.c_proj\.": r"pooling.\1.clip_mlp.project.",
    r"proj_spatial_cls_token\.": "class_projection.",
    r"ln_post\.": "end_norm.",
    r"proj$": "projection",
}


def reshape(name, tensor):
    """A tensor of the reference in our shape, by our name."""
    if name == "stem.weight":  # (C, 3, K, p, p) -> (K, C, 3*p*p)
        return tensor.permute(2, 0, 1, 3, 4).flatten(2)
    if name.endswith("time.weight"):  # (C, C, 3, 1, 1) -> (3, C, C)
        return tensor[..., 0, 0].permute(2, 0, 1)
    if name.endswith("space.weight"):  # (C, C, 1, 3, 3) -> (C, C, 3, 3)
        return tensor[:, :, 0]
    if name.endswith("fuse.weight"):  # (S, C, A, 1, 1) -> (S, A*C)
        return tensor[..., 0, 0].mT.flatten(1)
    if name.endswith(("narrow.weight", "widen.weight")):  # kernels of one place
        return tensor.flatten(1)
    if name.endswith("query"):  # (1, 1, S) -> (S,)
        return tensor.flatten()
    return tensor.flatten(0, -2) if name.endswith(("class_token", "position")) else tensor  # (1, 1, T, S) -> (T, S)


def rename(tensors):
    """Tensors of the reference under our names and in our shapes."""
    own = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(PREFIX)
        if name == "logit_scale":
            own[name] = tensor
            continue
        (new,) = [
            re.sub(old, new, name.removeprefix("dist_net."))
            for old, new in NAMES.items()
            if re.match(old, name.removeprefix("dist_net."))
        ]
        own[new] = reshape(new, tensor)
    return own


class Golden(NamedTuple):
    config: dict
    inputs: tuple
    io: dict
    grads: dict
    state: dict


def read_golden(folder):
    config, io = json.loads((folder / "config.json").read_text()), load_file(folder / "io.safetensors")
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("pixel_mean", "pixel_std"))
    pixels = (io["pixels_u8"].movedim(-1, -3).float() / 255 - mean) / std  # (B, T, 2, 3, H, W)
    tokens = io["tokens"].unflatten(0, (config["batch"], config["frames"]))
    inputs = (pixels, tokens[:, :, :, 1:], tokens[:, :, :, 0])
    state = {**rename(load_file(folder / "state.safetensors")), "class_texts": io["text_features"]}
    return Golden(config, inputs, io, rename(load_file(folder / "grads.safetensors")), state)


@pytest.fixture(scope="module")
def golden(data_path):
    return read_golden(data_path / "dist")


def build(config):
    kind = Dist()
    shape = DistShape(
        name=kind.name,
        num_classes=config["classes"],
        layers=tuple(config["tapped_layers"]),
        width=config["width"],
        num_patches=(config["resolution"] // config["patch"]) ** 2,
        patch_px=config["patch"],
        side_width=config["integration_dim"],
        temporal_width=config["temporal_dim"],
        frames=config["frames"],
        pooling_layers=config["pooling_layers"],
        embed_dim=config["embed_dim"],
    )
    return kind.build(shape)


def load(golden, dtype=torch.float32):
    network = build(golden.config)
    network.load_state_dict(golden.state)
    return network.eval().to(dtype)


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_every_step_equals_the_reference_in_evaluation(golden):
    network, steps = load(golden), {}
    block, pooling = network.blocks[0], network.pooling[0]
    block.temporal.register_forward_hook(lambda _, __, output: steps.update(temporal_0=output[:1]))
    block.register_forward_hook(
        lambda _, __, output: steps.update(integration_0=torch.cat([output[2][0, :, None], output[1][0]], dim=1))
    )
    pooling.register_forward_hook(
        lambda _, __, output: steps.update(pooling_0_frames=output[0].flatten(0, 1), pooling_0_clip=output[1])
    )
    with torch.inference_mode():
        steps["embedding"] = network.embed(*golden.inputs)
        steps["output"] = network(*golden.inputs)
        steps["scores"] = steps["output"].softmax(dim=-1)
    assert len(steps) == 7
    for name, found in steps.items():
        expected = golden.io[f"eval_{name}"]
        assert found.shape == expected.shape and relative(found, expected) < 1e-5, name
    assert relative(steps["output"], golden.io["train_output"]) < 1e-5


def gradients(golden, dtype, *, checkpoints=False):
    network = load(golden, dtype).train()
    network.checkpoints_activations = checkpoints
    output = network(*(tensor.to(dtype) for tensor in golden.inputs))
    assert relative(output, golden.io["train_output"].to(dtype)) < 1e-5
    (output * golden.io["train_cotangent"].to(dtype)).sum().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("checkpoints", [False, True], ids=["once", "blocks again"])
@pytest.mark.parametrize("least_width", [0, 10**6], ids=["made again", "kept"])
def test_gradients_equal_the_reference(golden, least_width, checkpoints, monkeypatch):
    monkeypatch.setattr(parts, "_LEAN_FROM_WIDTH", least_width)
    found = gradients(golden, torch.float32, checkpoints=checkpoints)
    assert len(golden.grads) == 80 and set(golden.grads) <= set(found)
    for name, tensor in golden.grads.items():
        assert relative(found[name], tensor) < 1e-5, name
    assert {name for name, gradient in found.items() if gradient is None} == {
        "blocks.3.to_temporal.weight",
        "blocks.3.to_temporal.bias",
    }


def count_kept_bytes(network, inputs):
    """Of activations that the backward pass would read."""
    kept = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *inputs)}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(*inputs)
    assert output.requires_grad
    return sum(kept.values())


def test_products_and_blocks_made_again_keep_less(golden, monkeypatch):
    network = load(golden).train()
    kept = []
    for least_width, checkpoints in ((10**6, False), (0, False), (10**6, True)):
        monkeypatch.setattr(parts, "_LEAN_FROM_WIDTH", least_width)
        network.checkpoints_activations = checkpoints
        kept.append(count_kept_bytes(network, golden.inputs))
    assert kept[1] < 0.7 * kept[0] and kept[2] < 0.4 * kept[0], kept


def test_what_users_have_is_what_the_golden_files_are_of(data_path):
    """The copies here against the whole set, whose checkpoint has both towers too."""
    folder = Path(__file__).parents[3] / "shared/parity/dist"
    if not folder.is_dir():
        pytest.skip("../shared/parity is not here: it is not part of the repository")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["model_state"]
    own = load_file(data_path / "dist/state.safetensors")
    assert {name for name in state if "dist_net" in name or name.endswith(".logit_scale")} == set(own)
    assert all(torch.equal(tensor, state[name]) for name, tensor in own.items())
    for name in ("io", "grads"):
        theirs, ours = (load_file(f / f"{name}.safetensors") for f in (folder, data_path / "dist"))
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_decay_and_rates_are_the_references(golden, data_path):
    told = json.loads((data_path / "dist/groups.json").read_text())
    recipe = DIST_PRESETS[0].recipe
    config = TrainConfig(
        features=None,
        out=None,
        head="dist",
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        optimizer=recipe.optimizer,
        undecayed=recipe.undecayed,
    )
    network = build(golden.config)
    optimizer = make_optimizer(network.parameter_groups(), config, find_optimisation(config), find_biases(network))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = {names[id(p)]: (g["weight_decay"], g["rate_share"]) for g in optimizer.param_groups for p in g["params"]}
    renamed = {next(iter(rename({name: torch.zeros((1,) * 5)}))): name for name in told["trained"]}
    without = {next(iter(rename({name: torch.zeros((1,) * 5)}))) for name in told["no_gradient"]}
    assert set(renamed) - without == set(found), "nothing is left out but what has no gradient"
    for ours in found:
        theirs = told["trained"][renamed[ours]]
        assert found[ours] == (theirs["weight_decay"], theirs["rate"] / 10), ours


def test_new_networks_begin_as_the_references_in_distribution(golden, data_path):
    """Mean, spread and furthest value of eight networks beside those of the reference's five."""
    told = json.loads((data_path / "dist/init.json").read_text())["parameters"]
    drawn = []
    for seed in range(8):
        torch.manual_seed(seed)
        drawn.append(dict(build(golden.config).named_parameters()))
    compared = set()
    for theirs, facts in told.items():
        (ours,) = rename({theirs: torch.zeros(facts["shape"])})
        compared.add(ours)
        values = torch.stack([parameters[ours].detach() for parameters in drawn]).flatten(1).double().numpy()
        assert values.shape[1] == np.prod(facts["shape"]), theirs
        if facts["constant"]:
            np.testing.assert_array_equal(values, facts["value"], err_msg=theirs)
            continue
        spread = float(np.sqrt(np.mean(np.square(facts["std"]))))
        fewest = min(values.size, 5 * values.shape[1])
        assert values.std() == pytest.approx(spread, rel=0.03 + 2.5 / fewest**0.5), theirs
        assert abs(values.mean()) < 5 * spread / values.size**0.5, theirs
        # A uniform distribution ends at 1.73 deviations, a normal one does not.
        furthest = np.abs(values - values.mean()).max() / values.std()
        assert (furthest < 2.2) == (facts["farthest_over_std"] < 2.2), theirs
    assert compared == set(drawn[0])


def test_the_schedule_is_the_references(data_path):
    (told,) = json.loads((data_path / "schedule.json").read_text())["dist"]["recipes"].values()
    peak = told["base_rate"] * told["share"]
    rates = [peak * ramp_to_cosine(36 * place / 20, 6, 36) for place in range(21)]
    np.testing.assert_allclose(rates, told["rate"], rtol=1e-6, atol=1e-12)
    assert ramp_to_cosine(0, 0, 36) == 1.0


def test_sizes_are_those_of_the_released_networks():
    """Trained parameters counted on DiST's code, in millions."""
    for width, layers, patch_px, frames, pooling_layers, counted in (
        (768, 12, 16, 8, 2, 19.00),
        (768, 12, 16, 8, 4, 26.11),
        (1024, 24, 14, 32, 2, 32.75),
        (1024, 24, 14, 32, 4, 39.87),
    ):
        sizes = dict(width=width, tapped_layers=range(layers), patch=patch_px, pooling_layers=pooling_layers)
        sizes |= dict(integration_dim=384, temporal_dim=96, classes=174, embed_dim=768 if layers == 24 else 512)
        with torch.device("meta"):
            network = build({**sizes, "frames": frames, "resolution": 224})
        count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        assert count == pytest.approx(counted, abs=0.0051), (sizes, count)


def test_presets_are_the_released_recipes():
    """Layers of pooling and T; in each a step of 256 clips, one of each video."""
    found = {preset.name: (preset.sizes["pooling_layers"], preset.recipe.frames) for preset in DIST_PRESETS}
    assert found == {
        **{f"dist-b16-{frames}f-k400": (4, frames) for frames in (8, 16, 32)},
        **{f"dist-b16-{frames}f-ssv2": (2, frames) for frames in (8, 16, 32)},
        "dist-l14-32f-k400": (4, 32),
        "dist-l14-32f-ssv2": (2, 32),
    }
    for preset in DIST_PRESETS:
        recipe, depth = preset.recipe, 12 if "b16" in preset.name else 24
        assert preset.layers == tuple(range(depth))
        assert (preset.sizes["side_width"], preset.sizes["temporal_width"]) == (384, 96)
        assert (recipe.step_clips, recipe.norm_clips, recipe.views_per_video) == (256, None, 1)
        assert (recipe.epochs, recipe.warmup_epochs, recipe.label_smoothing) == (36, 6.0, 0.1)
        assert (recipe.learning_rate, recipe.weight_decay, recipe.undecayed) == (3.2e-4, 1e-4, "vectors")


def config_for(store, out, **changes):
    values = dict(features=store, out=out, head="dist", epochs=2, batch_size=4, side_width=64, device="cpu")
    return TrainConfig(**{**values, "warmup_epochs": 1.0, "checkpoint_minutes": 0.0, **changes})


def test_a_preset_gives_sizes_that_have_no_option(class_texts_store, tmp_path, monkeypatch):
    """As --set would; what is given there wins."""
    store = open_store(class_texts_store)
    backbone = store.facts.backbone
    preset = replace(
        DIST_PRESETS[0],
        family="clip",
        width=backbone.width,
        depth=backbone.depth,
        patch_px=backbone.patch_size[0],
        layers=store.layout.layers,
    )
    monkeypatch.setattr(Dist, "presets", (preset,))
    config = config_for(class_texts_store, tmp_path, preset=preset.name, set=("temporal_width=24",), side_width=None)
    shape = plan_network(resolve_preset(config, store), store)
    assert (shape.side_width, shape.temporal_width, shape.pooling_layers, shape.frames) == (384, 24, 4, 8)


def plan(store, tmp_path, **changes):
    return plan_network(config_for(store.path, tmp_path, **changes), store)


def read_batch(network, store, num_frames):
    rows = np.flatnonzero(np.asarray(store.read_manifest(["status"])["status"]) == "ok")[:3]
    loader = ClipLoader.for_network(network, store, layers=store.layout.layers, device=CPU)
    return loader, ClipPlan(rows, np.zeros(3, int), np.tile(np.arange(num_frames), (3, 1)), rows)


def test_clips_follow_from_the_store(class_texts_store, half_steps_store, tmp_path):
    """T cached frames with pixels half a step on, or 2T; the same network reads both."""
    dense, half = open_store(class_texts_store), open_store(half_steps_store)
    assert plan(dense, tmp_path).frames == plan(half, tmp_path).frames == 4
    assert plan(dense, tmp_path, frames=2).frames == 2
    network = Dist().build(plan(half, tmp_path))
    network.prepare(half)
    assert network.fit_clips(half, 4, np.array([4, 4])) == 4
    loader, wanted = read_batch(network, half, 4)
    assert loader is not None
    (batch,) = loader.load([wanted])
    assert batch.pixels.shape[:3] == (3, 4, 2) and batch.patches.shape[1] == 4
    codec = codec_for(half, half.layout.layers, CPU)
    with torch.inference_mode():
        expected = network(*network.inputs(batch), codec)
        again = network(batch.pixels.flatten(1, 2), batch.patches, batch.cls, codec)
    assert torch.equal(expected, again), "of the same frames, wherever they come from"
    assert network.fit_clips(dense, 4, np.array([8, 9])) == 8
    loader, wanted = read_batch(network, dense, 8)
    (batch,) = loader.load([wanted])
    assert batch.pixels.shape[:2] == (3, 8) and batch.patches.shape[1] == batch.cls.shape[1] == 4
    assert network.fit_clips(half, 2, np.array([4])) == 4, "a store with both is read as clips of 2T where T is not all"


def test_a_store_without_dense_frames_is_refused_with_the_command(class_texts_store, half_steps_store, tmp_path):
    for path, frames in ((class_texts_store, 8), (half_steps_store, 3)):
        with pytest.raises(StoreMismatchError) as caught:
            train_run(config_for(path, tmp_path / "run", frames=frames))
        message = str(caught.value)
        assert f"a clip of --head dist is {frames} cached frames with pixels at 0,0.5step, or {2 * frames}" in message
        assert f"--for dist --frames train={frames},val={4 * frames},{frames} --out NEW.zarr" in message and not (tmp_path / "run").exists()


def test_a_store_without_texts_of_classes_is_refused_in_one_line(float_store, tmp_path):
    line = ["train", "--head", "dist", "--features", str(float_store), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 1 and not (tmp_path / "run").exists()
    assert result.stderr.count("\n") == 1 and "lacks what --head dist reads: `text/classes`" in result.stderr
    assert "once more with --class-template '{}': it adds them" in result.stderr
    assert "--class-template '{}' --out NEW.zarr" in result.stderr


def test_backwards_is_the_video_played_backwards(class_texts_store, half_steps_store, tmp_path):
    """Against each dense frame read by itself and put in reverse order; tokens are of frames 2T-1, 2T-3 and so on."""
    store = open_store(class_texts_store)
    network = Dist().build(plan(store, tmp_path))
    network.prepare(store)
    network.fit_clips(store, 4, np.array([8]))
    loader, wanted = read_batch(network, store, 8)
    (found,) = loader.load([network.reverse_plan(wanted)])
    found = network.reverse_batch(found)
    layers = store.layout.layers
    single = ClipLoader(store, arrays=("patches", "cls", "pixels"), layers=layers, device=CPU)
    frames = list(single.load([replace(wanted, places=np.full((3, 1), place)) for place in range(8)]))
    pixels = torch.cat([frames[place].pixels for place in range(7, -1, -1)], dim=1)
    patches = torch.cat([frames[place].patches for place in (7, 5, 3, 1)], dim=1)
    cls = torch.cat([frames[place].cls for place in (7, 5, 3, 1)], dim=1)
    assert torch.equal(found.pixels, pixels) and torch.equal(found.patches, patches) and torch.equal(found.cls, cls)
    network.fit_clips(open_store(half_steps_store), 4, np.array([4]))
    with pytest.raises(ConfigError, match="Evaluate on a store with 8 frames"):
        network.reverse_plan(wanted)


def test_inputs_of_other_sizes_are_refused(golden):
    pixels, patches, cls = golden.inputs
    for wrong in ((pixels[:, :, 0], patches, cls), (pixels[:, :4], patches[:, :4], cls[:, :4]),
                  (pixels, patches[:, :, :3], cls[:, :, :3])):  # fmt: skip
        with pytest.raises(StoreMismatchError, match="8 frames of 4 layers of 16 patches, and pixels of 16 frames"):
            build(golden.config)(*wrong)


def test_logits_are_of_float32_in_any_precision(golden):
    network = load(golden)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        output = network(*golden.inputs)
    assert output.dtype == torch.float32 and relative(output, golden.io["eval_output"]) < 0.1
    assert len(output.unique()) == output.numel()


def test_a_checkpoint_holds_the_texts_and_the_factor(half_steps_store, tmp_path):
    train_run(config_for(half_steps_store, tmp_path / "run", epochs=1))
    run, store = open_run(tmp_path / "run"), open_store(half_steps_store)
    assert (run.shape.frames, run.frames, run.shape.class_template) == (4, 4, "{}")
    network = load_checkpoint(run)
    np.testing.assert_array_equal(network.class_texts, read_class_texts(store).embedding)
    assert float(network.logit_scale) == pytest.approx(float(store.head["logit_scale"]))


def test_a_training_that_was_stopped_goes_on_to_the_same_bit(assert_same_run, class_texts_store, tmp_path, monkeypatch):
    """In bf16, with blocks computed again; then it is played backwards."""
    more = dict(precision="bf16", checkpoint_activations=True)
    train_run(config_for(class_texts_store, tmp_path / "whole", **more))
    loss, seen = recognition.classification_loss, []

    def stop(*arguments):
        seen.append(None)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(recognition, "classification_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            train_run(config_for(class_texts_store, tmp_path / "run", **more))
    train_run(config_for(class_texts_store, tmp_path / "run", resume=True, **more))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert evaluate_run(tmp_path / "run", is_backwards=True)["is_backwards"]


@pytest.mark.slow  # a training of eight others comes with it
def test_two_processes_learn_what_one_does(trained_by_two, class_texts_store, tmp_path):
    train_run(config_for(class_texts_store, tmp_path / "one", learning_rate=1e-12))
    folders = (tmp_path / "one", trained_by_two / "dist")
    first, second = (read_metrics(open_run(folder)) for folder in folders)
    for ours, theirs in zip(first, second, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)
    ours, theirs = (load_file(folder / "state.safetensors") for folder in folders)
    compared = [name for name in ours if name.endswith("exp_avg")]
    assert len(compared) > 50
    for name in compared:
        largest = ours[name].abs().max()
        assert (ours[name] - theirs[name]).abs().max() <= 1e-3 * largest + 1e-6, name


def test_a_run_is_evaluated_on_the_other_kind_of_store(class_texts_store, half_steps_store, tmp_path):
    train_run(config_for(half_steps_store, tmp_path / "run", epochs=1))
    own = evaluate_run(tmp_path / "run")
    other = evaluate_run(tmp_path / "run", features=class_texts_store)
    assert own["videos"] == other["videos"] == 2 and own["loss"] != other["loss"]
    with pytest.raises(ConfigError, match="Evaluate on a store with 8 frames"):
        evaluate_run(tmp_path / "run", is_backwards=True)
    assert evaluate_run(tmp_path / "run", features=class_texts_store, is_backwards=True)["is_backwards"]


def test_the_cosine_is_that_of_the_formula(golden):
    network = load(golden)
    embedding = golden.io["eval_embedding"]
    expected = network.logit_scale.exp() * F.cosine_similarity(embedding[:, None], network.class_texts[None], dim=-1)
    torch.testing.assert_close(network.compare_texts(embedding), expected)
