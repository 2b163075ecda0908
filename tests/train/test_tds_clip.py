"""TDS-CLIP against the reference's own modules (golden files of BBYL9413/TDS-CLIP at cf4e58c), and as a network."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import StoreMismatchError
from s4v.store.reader import open_store
from s4v.train.clips import ClipBatch
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run
from s4v.train.networks import parts
from s4v.train.networks.side4video import SideNetwork
from s4v.train.networks.tds_clip import TdsClip, TdsShape, find_neighbours_maximum
from s4v.train.paper.checkpoint_names import rename_official
from s4v.train.paper.presets import TDS_CLIP_PRESETS
from s4v.train.recipe import find_biases, make_optimizer
from s4v.train.run_folder import open_run, require_matching_store
from s4v.train.settings import find_optimisation
from s4v.train.tasks import recognition

# The reference's names of what Side4Video lacks, or has elsewhere.
OWN_NAMES = {
    r"^visual\.side_conv1\.": "stem.frames.",
    r"^visual\.side_conv1_c5\.": "stem.differences.",
    r"^visual\.side_pre_bn3d\.": "stem.frames.norm.",
    r"^visual\.side_pre_bn3d_c5\.": "stem.differences.norm.",
    r"^visual\.transformer\.side_transformer\.(\d+)\.mse\.conv1\.": r"blocks.\1.gate.squeeze.",
    r"^visual\.transformer\.side_transformer\.(\d+)\.mse\.bn1\.": r"blocks.\1.gate.squeeze_norm.",
    r"^visual\.transformer\.side_transformer\.(\d+)\.mse\.conv2\.": r"blocks.\1.gate.excite.",
    r"^visual\.transformer\.side_transformer\.(\d+)\.mse\.bn2\.": r"blocks.\1.gate.excite_norm.",
}

# A bias directly before a batch norm changes nothing, nor does a constant before a difference to a maximum.
NO_GRADIENT = re.compile(r"stem\.\w+\.bias|.*gate\.squeeze_norm\.bias")


def rename(tensors):
    """Tensors of the reference under our names and in our shapes."""
    own, others = {}, {}
    for name, tensor in tensors.items():
        new_names = [re.sub(old, new, name) for old, new in OWN_NAMES.items() if re.match(old, name)]
        if not new_names:
            others[name] = tensor
        elif tensor.ndim == 5:  # (S, C, 3, p, p), channel before time -> (3 time steps, S, C*p*p)
            own[new_names[0]] = tensor.permute(2, 0, 1, 3, 4).flatten(2)
        else:  # (R, S, 1, 1) -> (R, S)
            own[new_names[0]] = tensor.flatten(1) if tensor.ndim == 4 else tensor
    return own | rename_official(others)


class Golden(NamedTuple):
    config: dict
    inputs: tuple
    io: dict
    grads: dict
    state: dict


def read_golden(folder):
    config, io = json.loads((folder / "config.json").read_text()), load_file(folder / "io.safetensors")
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("pixel_mean", "pixel_std"))
    pixels = (io["pixels_u8"].movedim(-1, -3).float() / 255 - mean) / std  # (B, T, O, 3, H, W)
    tokens = io["tokens"].unflatten(0, (config["batch"], config["frames"]))
    inputs = (pixels, tokens[:, :, :, 1:], tokens[:, :, :, 0])
    grads, state = (load_file(folder / f"{name}.safetensors") for name in ("grads", "state"))
    return Golden(config, inputs, io, rename(grads), rename(state))


@pytest.fixture(scope="module")
def golden(data_path):
    return read_golden(data_path / "tds_clip")


def build(config):
    kind = TdsClip()
    shape = TdsShape(
        name=kind.name,
        num_classes=config["classes"],
        layers=tuple(config["tapped_layers"]),
        width=config["width"],
        num_patches=(config["resolution"] // config["patch"]) ** 2,
        patch_px=config["patch"],
        side_width=config["side_dim"],
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
    for name, module in (
        ("stem", network.stem),
        ("gate_out_0", network.blocks[0].gate),
        ("block_0", network.blocks[0]),
    ):
        module.register_forward_hook(lambda _, __, output, name=name: steps.update({name: output}))
    with torch.inference_mode():
        steps["output"] = network(*golden.inputs)
    assert set(steps) == {"stem", "gate_out_0", "block_0", "output"}
    for name, found in steps.items():
        expected = golden.io[f"eval_{name}"]
        assert relative(found.view_as(expected), expected) < 1e-5, name


def gradients(golden, dtype):
    network = load(golden, dtype).train()
    output = network(*(tensor.to(dtype) for tensor in golden.inputs))
    (output * golden.io["train_cotangent"].to(dtype)).sum().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("checkpoints", [False, True], ids=["once", "layers again"])
def test_output_and_running_statistics_equal_the_reference_in_training(golden, checkpoints, monkeypatch):
    """A gate that is computed again in the backward pass counts its batch once."""
    monkeypatch.setattr(parts, "_LEAN_FROM_WIDTH", 0)
    network = load(golden).train()
    network.checkpoints_activations = checkpoints
    output = network(*golden.inputs)
    assert relative(output, golden.io["train_output"]) < 1e-5
    output.sum().backward()
    expected = rename({k.removeprefix("after_train."): v for k, v in golden.io.items() if k.startswith("after_train")})
    assert len(expected) == 6
    state = network.state_dict()
    for name, tensor in expected.items():
        assert relative(state[name], tensor) < 1e-5, name


@pytest.mark.parametrize("least_width", [0, 10**6], ids=["made again", "kept"])
def test_gradients_equal_the_reference(golden, least_width, monkeypatch):
    """Relative to the largest gradient of the same layer, as Side4Video's: batch norm makes biases' all but cancel."""
    monkeypatch.setattr(parts, "_LEAN_FROM_WIDTH", least_width)
    found, scale = gradients(golden, torch.float32), {}
    assert len(golden.grads) == 45 and set(golden.grads) <= set(found)
    for name, tensor in golden.grads.items():
        layer = name.rpartition(".")[0]
        scale[layer] = max(scale.get(layer, 0.0), tensor.abs().max().item())
    for name, tensor in golden.grads.items():
        error = (found[name] - tensor).abs().max().item() / scale[name.rpartition(".")[0]]
        assert error < 1e-5, (name, error)


def test_gradients_equal_the_reference_in_double_precision(golden):
    """Each tensor relative to its own size; what is left is the rounding of the golden file itself."""
    found = gradients(golden, torch.float64)
    assert sum(NO_GRADIENT.fullmatch(name) is not None for name in golden.grads) == 4
    for name, tensor in golden.grads.items():
        if NO_GRADIENT.fullmatch(name):
            assert found[name].abs().max() < 1e-12, name
        else:
            assert relative(tensor.double(), found[name]) < 2e-5, name


def test_what_users_have_is_what_the_golden_files_are_of(data_path):
    """The copies here against the whole set, whose checkpoint has the backbone too."""
    folder = Path(__file__).parents[3] / "shared/parity/tds_clip"
    if not folder.is_dir():
        pytest.skip("../shared/parity is not here: it is not part of the repository")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["model_state_dict"]
    own = load_file(data_path / "tds_clip/state.safetensors")
    assert {name for name in state if "side" in name or name.startswith("fc.")} == set(own)
    assert all(torch.equal(tensor, state[name]) for name, tensor in own.items())
    for name in ("io", "grads"):
        theirs, ours = (load_file(f / f"{name}.safetensors") for f in (folder, data_path / "tds_clip"))
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_decay_and_rates_are_the_references(golden, data_path):
    told = json.loads((data_path / "tds_clip/groups.json").read_text())
    config = TrainConfig(
        features=None,
        out=None,
        head="tds-clip",
        learning_rate=1e-3,
        weight_decay=TDS_CLIP_PRESETS[0].recipe.weight_decay,
        optimizer="adamw",
        undecayed=TDS_CLIP_PRESETS[0].recipe.undecayed,
    )
    network = build(golden.config)
    optimizer = make_optimizer(network.parameter_groups(), config, find_optimisation(config), find_biases(network))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = {names[id(p)]: (g["weight_decay"], g["rate_share"]) for g in optimizer.param_groups for p in g["params"]}
    renamed = {next(iter(rename({name: torch.zeros(1, 1, 1, 1, 1)}))): name for name in told["trained"]}
    assert set(renamed) == set(found), "nothing is left out, and nothing else is trained"
    for ours, theirs in renamed.items():
        assert found[ours] == tuple(told["trained"][theirs][key] for key in ("weight_decay", "rate")), ours


def test_new_networks_begin_as_the_references_in_distribution(golden, data_path):
    """Mean, spread and furthest value of eight networks beside those of the reference's five."""
    told = json.loads((data_path / "tds_clip/init.json").read_text())["parameters"]
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


def test_sizes_are_those_of_the_released_networks():
    """Trained parameters counted on TDS-CLIP's code, in millions."""
    for width, layers, patch_px, side_width, classes, counted in (
        (768, 12, 16, 320, 174, 24.22),
        (768, 12, 16, 320, 400, 24.30),
        (1024, 24, 14, 512, 174, 106.5),
    ):
        sizes = dict(width=width, tapped_layers=range(layers), patch=patch_px, side_dim=side_width, classes=classes)
        with torch.device("meta"):
            network = build({**sizes, "resolution": 224})
        count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        assert count == pytest.approx(counted, rel=5e-4), (sizes, count)


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_the_neighbours_maximum_sees_two_frames_at_the_ends(num_frames):
    x = torch.randn(2, num_frames, 3, 4)
    expected = [x[:, max(0, t - 1) : t + 2].amax(dim=1) for t in range(num_frames)]
    assert torch.equal(find_neighbours_maximum(x), torch.stack(expected, dim=1))


def test_of_equal_frames_the_first_has_the_gradient():
    x = torch.zeros(1, 4, 1, 1, requires_grad=True)
    find_neighbours_maximum(x).sum().backward()
    assert x.grad.flatten().tolist() == [2.0, 1.0, 1.0, 0.0]


def test_a_reversed_batch_is_that_of_the_video_played_backwards(golden):
    """Whatever is cached of it: frames around each cached one run backwards too."""
    video = torch.randn(20, 3, 16, 16)
    centres, offsets = torch.tensor([3, 7, 8, 14]), torch.arange(-2, 3)
    batch_of = lambda video, centres: ClipBatch(  # noqa: E731
        video[centres[:, None] + offsets][None], None, None, torch.zeros(1)
    )
    network, batch = build(golden.config), batch_of(video, centres)
    frames_reversed = replace(batch, pixels=batch.pixels.flip(1))  # as the reversed plan is read
    assert torch.equal(
        network.reverse_batch(frames_reversed).pixels, batch_of(video.flip(0), 19 - centres.flip(0)).pixels
    )


def test_pixels_of_other_offsets_are_refused(golden):
    pixels, patches, cls = golden.inputs
    for wrong in (pixels[:, :, :3], pixels[:, :, 2]):
        with pytest.raises(StoreMismatchError, match=r"at offsets -2, -1, 0, 1, 2; found \(2, 8, 3, "):
            build(golden.config)(wrong, patches, cls)


def test_it_begins_with_its_own_kind_and_with_no_half_of_another(golden):
    own, other = build(golden.config), load(golden)
    own.begin_with(other)
    trained = {name for name in golden.state if not name.startswith("classifier.")}
    assert all(torch.equal(own.state_dict()[name], golden.state[name]) for name in trained)
    sizes = dict(num_layers=4, width=64, side_width=64, num_patches=16, patch_px=4, num_classes=7)
    for one, another in ((own, SideNetwork(**sizes)), (SideNetwork(**sizes), own)):
        with pytest.raises(StoreMismatchError, match="its network has other sizes: stem"):
            one.begin_with(another)


def config_for(store, out, **changes):
    values = dict(features=store, out=out, head="tds-clip", epochs=2, batch_size=4, side_width=64, device="cpu")
    return TrainConfig(**{**values, "warmup_epochs": 1.0, "checkpoint_minutes": 0.0, **changes})


def test_a_training_that_was_stopped_goes_on_to_the_same_bit(assert_same_run, offsets_store, tmp_path, monkeypatch):
    """In bf16, with layers computed again; then it is played backwards."""
    more = dict(precision="bf16", checkpoint_activations=True)
    train_run(config_for(offsets_store, tmp_path / "whole", **more))
    loss, seen = recognition.classification_loss, []

    def stop(*arguments):
        seen.append(None)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(recognition, "classification_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            train_run(config_for(offsets_store, tmp_path / "run", **more))
    train_run(config_for(offsets_store, tmp_path / "run", resume=True, **more))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    run = open_run(tmp_path / "run")
    assert (run.shape.name, run.shape.side_width) == ("tds-clip", 64)
    assert evaluate_run(tmp_path / "run", is_backwards=True)["is_backwards"]


def test_a_store_without_the_offsets_is_refused_in_one_line(float_store, offsets_store, tmp_path):
    line = ["train", "--head", "tds-clip", "--features", str(float_store), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 1 and not (tmp_path / "run").exists()
    assert result.stderr.count("\n") == 1 and "pixels at offsets -2,-1,1,2 from its frames" in result.stderr
    train_run(config_for(offsets_store, tmp_path / "run", epochs=1))
    with pytest.raises(StoreMismatchError, match="the store lacks pixels at offsets -2,-1,1,2"):
        require_matching_store(open_run(tmp_path / "run"), open_store(float_store))


def test_presets_are_the_released_recipes():
    """Side, epochs, rate; in each a step of 256 clips, two of each video, 32 to a norm."""
    found = {
        preset.name: (preset.sizes["side_width"], preset.recipe.epochs, preset.recipe.learning_rate)
        for preset in TDS_CLIP_PRESETS
    }
    assert found == {
        "tds-clip-b16-k400": (320, 30, 1e-3),
        "tds-clip-b16-ssv1": (320, 40, 1e-3),
        "tds-clip-b16-ssv2": (320, 30, 1e-3),
        "tds-clip-l14-k400": (512, 30, 1e-4),
        "tds-clip-l14-ssv1": (512, 30, 1e-4),
        "tds-clip-l14-ssv2": (512, 30, 1e-4),
    }
    for preset in TDS_CLIP_PRESETS:
        recipe, depth = preset.recipe, 12 if "b16" in preset.name else 24
        assert preset.layers == tuple(range(depth))
        assert (recipe.step_clips, recipe.norm_clips, recipe.views_per_video, recipe.frames) == (256, 32, 2, 8)
        assert (recipe.warmup_epochs, recipe.weight_decay, recipe.label_smoothing) == (4.0, 0.15, 0.1)
        assert recipe.min_video_frames == (8 if preset.dataset == "k400" else 0)
