import json
import math
import time
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from s4v.backbone.vision_tower import FrameTokens, build_backbone
from s4v.cli import app
from s4v.errors import ConfigError
from s4v.extract.disk_space import require_space
from s4v.extract.plan import plan_extraction, probe_backbone
from s4v.store.layout import StoreLayout

VIT_E = StoreLayout(
    num_rows=240_436,
    num_views=1,
    num_frames=8,
    layers=tuple(range(1, 64, 2)),
    num_patches=256,
    width=1792,
    channels=1792,
    embed_dim=1024,
    image_size=(224, 224),
    patch_dtype="float16",
)
K400 = {"train": (240_436, 8)}


def told(*options):
    result = CliRunner().invoke(app, ["plan", *options, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_kinetics_with_the_giant():
    found = told("--model", "vit-e", "--videos", "240436", "--frames", "8", "--dtype", "float16")
    sizes = found["bytes_by_array"]
    assert round((sizes["patches"] + sizes["cls"]) / 1e12, 1) == 56.7
    assert round((sizes["patches"] + sizes["cls"] + sizes["pixels"]) / 1e12, 1) == 57.0
    small = told("--model", "vit-e", "--videos", "240436", "--frames", "8", "--dtype", "int8", "--channels", "256")
    assert 4.4 < small["total_bytes"] / 1e12 < 4.6


def test_the_plan_of_kinetics_in_words():
    options = ["plan", "--model", "vit-e", "--videos", "240436", "--frames", "8", "--dtype", "float16"]
    result = CliRunner().invoke(app, options)
    assert "56.7 TB of patches and class tokens, 57.0 TB with pixels" in result.stdout
    result = CliRunner().invoke(app, [*options, "--no-pixels"])
    assert "56.7 TB of patches and class tokens\n" in result.stdout


class SlowBackbone:
    """So many seconds a frame, and as many once more for the first pass."""

    def __init__(self, frame_s):
        self.frame_s = frame_s
        self.sizes = []

    def encode_frames(self, pixels, layers):
        time.sleep(self.frame_s * (len(pixels) + (not self.sizes)))
        self.sizes.append(len(pixels))
        return FrameTokens([], torch.zeros(1), torch.zeros(len(pixels), 1))


def test_a_probe_ends_after_its_seconds():
    layout = replace(VIT_E, image_size=(8, 8))
    for frame_s, sizes, expected in ((0.5, [1], 1.0), (0.05, [1, 1], 20)):
        backbone, start = SlowBackbone(frame_s), time.monotonic()
        rate = probe_backbone(backbone, layout, batch_size=16, seconds=0.4)
        assert time.monotonic() - start < max(0.6, 3 * frame_s)
        assert backbone.sizes[: len(sizes)] == sizes and max(backbone.sizes) < 16
        assert rate == pytest.approx(expected, rel=0.3)
    quick = SlowBackbone(0.001)
    assert 500 < probe_backbone(quick, layout, batch_size=16, seconds=0.4) <= 1000
    assert quick.sizes[-1] == 16, "there is time for passes as large as those of an extraction"


def test_a_probe_measures_a_real_backbone():
    backbone = build_backbone("tiny-clip", weights="random", device=torch.device("cpu")).load_weights()
    layout = replace(VIT_E, layers=(1, 5), image_size=(64, 64))
    start = time.monotonic()
    assert probe_backbone(backbone, layout, batch_size=8, seconds=0.5) > 1
    assert time.monotonic() - start < 2


def test_the_cache_breaks_even_when_it_cost_less_than_running_the_backbone():
    plan = plan_extraction(VIT_E, K400, frames_per_second=20, price_per_hour=2.0, read_bytes_per_s=1e12)
    assert plan.hours == pytest.approx(240_436 * 8 / 20 / 3600)
    assert plan.price == pytest.approx(2 * plan.hours)
    assert plan.break_even_epochs == pytest.approx(1, abs=0.01), "what is cached once is what one epoch would run"
    jittered = plan_extraction(
        VIT_E, {"train": (1000, 16), "val": (100, 8)}, frames_per_second=20, read_bytes_per_s=1e12
    )
    assert jittered.break_even_epochs == pytest.approx((16_000 + 800) / 8000, rel=0.01)


def test_a_cache_that_is_slower_than_the_backbone_never_pays():
    plan = plan_extraction(VIT_E, K400, frames_per_second=1000, read_bytes_per_s=500e6)
    assert plan.read_seconds_per_epoch > plan.forward_seconds_per_epoch
    assert math.isinf(plan.break_even_epochs)


def test_the_command_says_so_in_words(tmp_path, video_folder):
    common = ["plan", "--model", "tiny-clip", "--dataset", "folder", "--root", str(video_folder)]
    result = CliRunner().invoke(app, [*common, "--out", str(tmp_path / "new" / "x.zarr")])
    assert result.exit_code == 0, result.output
    assert "11, 160 cached frames" in result.stdout and "free there" in result.stdout
    assert "not known: state --rate" in result.stdout
    result = CliRunner().invoke(app, [*common, "--rate", "50", "--epochs", "2"])
    assert "breaks even after" in result.stdout and "it does not pay for 2 epochs" in result.stdout
    result = CliRunner().invoke(app, [*common, "--rate", "1e9"])
    assert "does not pay: reading its tokens takes longer" in result.stdout
    result = CliRunner().invoke(app, ["plan", "--model", "tiny-clip"])
    assert result.exit_code == 1 and "one of --videos N and --dataset NAME" in result.stderr


def test_an_extraction_that_cannot_fit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"needs 57\.0 TB more and its disk has .* free"):
        require_space(VIT_E, 240_436 * 8, tmp_path / "k400.zarr")
    require_space(VIT_E, 1, tmp_path / "one.zarr")
    require_space(replace(VIT_E, keep_bits=3), 240_436 * 8, tmp_path / "unknown.zarr")


def test_a_plan_of_whole_frames_counts_their_patches_and_tells_of_large_rows():
    options = ["--model", "vit-b16", "--videos", "100", "--frames", "104", "--input", "480x864", "--layers", "7,11"]
    found = told(*options, "--channels", "128")
    assert (found["image_size"], found["num_patches"]) == ([480, 864], 30 * 54)
    frames = 100 * 104
    assert found["bytes_by_array"]["patches"] == frames * 2 * 1620 * 128
    assert found["bytes_by_array"]["pixels"] == frames * 480 * 864 * 3
    assert found["bytes_per_row"] * 100 == found["total_bytes"]
    small = CliRunner().invoke(app, ["plan", *options, "--channels", "128"]).stdout
    assert "480 x 864 pixels, 1,620 patches" in small and "a row" not in small
    large = CliRunner().invoke(app, ["plan", *options, "--layers", "all", "--dtype", "float16"])
    assert "up to 3.2 GB, and an extraction holds two in memory. Fewer --layers" in large.stdout


def test_a_plan_takes_multiples_of_the_patch_alone():
    refused = CliRunner().invoke(app, ["plan", "--model", "vit-l", "--videos", "9", "--input", "480x854"])
    assert refused.exit_code != 0
    assert "patch, which is 14x14 pixels in vit-l; found 480x854. The nearest are 476x854, 490x854." in refused.output
    for text in ("480x", "x854", "480*854", "4²x8", "-8x8"):
        refused = CliRunner().invoke(app, ["plan", "--model", "vit-l", "--videos", "9", f"--input={text}"])
        assert f"--input takes HxW such as 480x864, height first, or N for a square; found '{text}'" in refused.output
    assert told("--model", "vit-b16", "--videos", "9", "--input", "448")["num_patches"] == 28 * 28
