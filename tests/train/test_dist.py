"""DiST as a network; tests/golden holds it against the reference's own modules."""

from dataclasses import replace
from pathlib import Path

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
from s4v.tests.golden.cases import SUBJECTS, read_case, relative
from s4v.train.clips import ClipLoader, ClipPlan, codec_for
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run
from s4v.train.networks import parts
from s4v.train.networks.dist import Dist, ramp_to_cosine
from s4v.train.paper.presets import DIST_PRESETS
from s4v.train.run_folder import load_checkpoint, open_run
from s4v.train.settings import plan_network, resolve_preset
from s4v.train.tasks import recognition

CPU = torch.device("cpu")
build = SUBJECTS["dist"]("dist").build


@pytest.fixture(scope="module")
def golden():
    return read_case("dist")


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
    network = golden.load().train()
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


def test_without_a_warmup_the_rate_begins_at_its_peak():
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
        assert (
            f"--for dist --frames train={frames},val={4 * frames},{frames} --out NEW.zarr" in message
            and not (tmp_path / "run").exists()
        )


def test_a_store_without_texts_of_classes_is_refused_in_one_line(float_store, tmp_path):
    line = ["train", "--head", "dist", "--features", str(float_store), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 1 and not (tmp_path / "run").exists()
    assert result.stderr.count("\n") == 1 and "lacks what --head dist reads: `text/classes`" in result.stderr
    assert "once more with --class-template '{}': it adds them" in result.stderr
    assert "--class-template '{}' --out NEW.zarr" in result.stderr


def test_layers_without_the_last_block_are_refused(class_texts_store, tmp_path):
    """Its end reads the class token of that block."""
    line = ["train", "--head", "dist", "--features", str(class_texts_store), "--out", str(tmp_path / "run")]
    last = open_store(class_texts_store).layout.layers[-1]
    result = CliRunner().invoke(app, [*line, "--layers", "0"])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and not (tmp_path / "run").exists()
    assert f"the class token of the last block, {last}; --layers ends with 0" in result.stderr


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
    network = golden.load()
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


def test_a_training_that_was_stopped_goes_on_to_the_same_bit(assert_same_run, class_texts_store, tmp_path, interrupted):
    """In bf16, with blocks computed again; then it is played backwards."""
    more = dict(precision="bf16", checkpoint_activations=True)
    train_run(config_for(class_texts_store, tmp_path / "whole", **more))
    with interrupted(recognition, "classification_loss", 3):
        train_run(config_for(class_texts_store, tmp_path / "run", **more))
    train_run(config_for(class_texts_store, tmp_path / "run", resume=True, **more))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert evaluate_run(tmp_path / "run", is_backwards=True)["is_backwards"]


def test_two_processes_learn_what_one_does(trained_by_two, assert_learnt_alike, class_texts_store, tmp_path):
    train_run(config_for(class_texts_store, tmp_path / "one", learning_rate=1e-12))
    assert_learnt_alike(tmp_path / "one", trained_by_two / "dist")


def test_a_run_is_evaluated_on_the_other_kind_of_store(class_texts_store, half_steps_store, tmp_path):
    train_run(config_for(half_steps_store, tmp_path / "run", epochs=1))
    own = evaluate_run(tmp_path / "run")
    other = evaluate_run(tmp_path / "run", features=class_texts_store)
    assert own["videos"] == other["videos"] == 2 and own["loss"] != other["loss"]
    with pytest.raises(ConfigError, match="Evaluate on a store with 8 frames"):
        evaluate_run(tmp_path / "run", is_backwards=True)
    assert evaluate_run(tmp_path / "run", features=class_texts_store, is_backwards=True)["is_backwards"]


def test_the_cosine_is_that_of_the_formula(golden):
    network = golden.load()
    embedding = golden.io["eval_embedding"]
    expected = network.logit_scale.exp() * F.cosine_similarity(embedding[:, None], network.class_texts[None], dim=-1)
    torch.testing.assert_close(network.compare_texts(embedding), expected)
