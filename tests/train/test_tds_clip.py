"""TDS-CLIP as a network; tests/golden holds it against the reference's own modules, BBYL9413/TDS-CLIP at cf4e58c."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import StoreMismatchError
from s4v.store.reader import open_store
from s4v.tests.golden.cases import SUBJECTS, read_case
from s4v.train.clips import ClipBatch
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run
from s4v.train.networks.side4video import SideNetwork
from s4v.train.networks.tds_clip import find_neighbours_maximum
from s4v.train.paper.presets import TDS_CLIP_PRESETS
from s4v.train.run_folder import open_run, require_matching_store
from s4v.train.tasks import recognition

SUBJECT = SUBJECTS["tds_clip"]("tds_clip")
build = SUBJECT.build


@pytest.fixture(scope="module")
def golden():
    return read_case("tds_clip")


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
    own, other = build(golden.config), golden.load()
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


def test_a_training_that_was_stopped_goes_on_to_the_same_bit(assert_same_run, offsets_store, tmp_path, interrupted):
    """In bf16, with layers computed again; then it is played backwards."""
    more = dict(precision="bf16", checkpoint_activations=True)
    train_run(config_for(offsets_store, tmp_path / "whole", **more))
    with interrupted(recognition, "classification_loss", 3):
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
