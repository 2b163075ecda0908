"""`--pixel-format ycbcr420`: frames in half the bytes, from extraction to repair; tokens are of frames as they were."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from s4v.backbone.vision_tower import build_backbone
from s4v.cli import app
from s4v.device import find_device
from s4v.errors import ConfigError, StoreMismatchError
from s4v.extract.extraction import extract_dataset
from s4v.extract.plan import plan_command, render_plan
from s4v.extract.store_layout import plan_layout
from s4v.pages import draw_strip
from s4v.store.fidelity import compare_pixels
from s4v.store.info import describe_store, render_info
from s4v.store.pixel_formats import encode_pixels
from s4v.store.reader import open_store
from s4v.store.verify import verify_store

FORMAT = "ycbcr420"
PLANES = {"pixel_format": FORMAT}
TOKENS = ("patches", "cls", "embedding", "codec", "head")


def read_shards(path, *arrays):
    return {f"{name}/{file.name}": file.read_bytes() for name in arrays for file in (path / name).glob("c.*")}


@pytest.fixture(scope="module")
def planes(build_once, video_folder, make_config):
    """A float32 store of `video_folder`. Read it, do not change it."""
    return build_once("planes.zarr", lambda out: extract_dataset(make_config(video_folder, out, **PLANES)))


def test_tokens_are_those_of_a_store_of_rgb_to_the_byte(planes, float_store):
    assert read_shards(planes, *TOKENS) == read_shards(float_store, *TOKENS) != {}
    ours, theirs = open_store(planes), open_store(float_store)
    assert (ours.facts.format_version, theirs.facts.format_version) == (5, 3)
    assert "pixel_format" not in theirs.attributes["layout"] and not (planes / "pixels").exists()
    assert ours.read_manifest().equals(theirs.read_manifest()) and verify_store(ours) == []


def test_planes_are_those_of_the_frames_that_a_store_of_rgb_holds(planes, float_store):
    ours, theirs = open_store(planes), open_store(float_store)
    frames = ours.read_manifest(["num_cached_frames"])["num_cached_frames"].to_pylist()
    held = [(row, count) for row, count in enumerate(frames) if count]
    assert len(held) == 10
    for row, count in held:
        pixels = theirs.read_row(row, 1, count)["pixels"]
        assert np.array_equal(ours.read_row(row, 1, count)[FORMAT], encode_pixels(pixels, FORMAT))


def test_what_is_lost_is_told(planes, float_store):
    facts = describe_store(open_store(planes))
    told = facts["fidelity"]["pixels"]
    assert facts["fidelity"]["layers"] == [] and describe_store(open_store(float_store))["fidelity"] is None
    rows, places = [0, 2, 5], [[0, 3]] * 3
    live = open_store(float_store).read_clips(rows, places, arrays=("pixels",)).pixels.reshape(-1, 64, 64, 3)
    store = open_store(planes)
    decoded = store.decode_pixels(store.read_clips(rows, places, arrays=("pixels",)).pixels).reshape(live.shape)
    found = compare_pixels(live, decoded)
    assert found.psnr == pytest.approx(told["psnr"], abs=3), "other frames of such videos"
    assert 0 < told["error_mean"] < told["error_worst"] <= 255
    lines = render_info(facts)
    assert "pixels    ycbcr420" in lines and any(
        line.startswith("  ycbcr420   uint8    (11, 1, 6, 1, 6") for line in lines
    )
    assert lines[-1] == (
        f"pixels after decoding, on {facts['fidelity']['videos']} videos: {told['psnr']:.1f} dB PSNR, error of 255: "
        f"mean {told['error_mean']:.2f}, worst {told['error_worst']}"
    )
    told = json.loads(CliRunner().invoke(app, ["info", str(planes), "--json"]).stdout)
    assert told["pixel_format"] == FORMAT and told["bytes_per_frame"][FORMAT] == 64 * 64 * 3 // 2
    assert describe_store(open_store(float_store))["pixel_format"] == "rgb"


def test_beside_a_codec_both_are_told_with_offsets(video_folder, make_config, tmp_path):
    config = make_config(video_folder, tmp_path / "s.zarr", **PLANES, dtype="int8", pixel_offsets=(-1, 0, "0.5step"))
    extract_dataset(replace(config, splits=("val",)))
    store = open_store(config.out)
    assert store.read_row(0, 1, 4)[FORMAT].shape == (1, 4, 3, 64 * 64 * 3 // 2)
    lines = render_info(describe_store(store))
    assert "pixels    ycbcr420, at -1,0,0.5step of each frame" in lines
    assert any(line.startswith("after decoding, on") for line in lines) and "dB PSNR" in lines[-1]


def test_a_strip_shows_the_frames(planes, float_store):
    shown = [draw_strip(open_store(path), 0, "x") for path in (planes, float_store)]
    assert shown[0] != shown[1] and all(one.endswith("x</div>") for one in shown)


def test_a_store_goes_on_in_its_own_format_alone(planes, float_store, video_folder, make_config, contents):
    before = contents(planes)
    extract_dataset(make_config(video_folder, planes, **PLANES))
    assert contents(planes) == before
    with pytest.raises(StoreMismatchError, match="layout.pixel_format ycbcr420 there, None here"):
        extract_dataset(make_config(video_folder, planes))
    with pytest.raises(StoreMismatchError, match="layout.pixel_format None there, ycbcr420 here"):
        extract_dataset(make_config(video_folder, float_store, **PLANES))


def test_what_cannot_be_is_refused_before_any_work(video_folder, make_config, tmp_path):
    with pytest.raises(ConfigError, match="--pixel-format takes rgb, ycbcr420; found 'jpeg'"):
        make_config(video_folder, tmp_path / "s.zarr", pixel_format="jpeg")
    with pytest.raises(ConfigError, match="--no-pixels stores no frames, --pixel-format ycbcr420 says how: take one"):
        make_config(video_folder, tmp_path / "s.zarr", **PLANES, with_pixels=False)
    config = make_config(video_folder, tmp_path / "s.zarr", **PLANES, resize="224")
    info = build_backbone("tiny-clip", weights="random", device=find_device("cpu")).info
    for size, told in (((63, 64), "63x64"), ((64, 65), "64x65")):
        with pytest.raises(
            ConfigError, match=f"halves colours down and across, and tiny-clip sees {told} pixels: take"
        ):
            plan_layout(replace(config, resize="whole"), SimpleNamespace(info=replace(info, image_size=size)), 1, 1, 1)


def test_a_plan_counts_half_the_bytes(video_folder, make_config, tmp_path):
    plain = plan_command(make_config(video_folder, tmp_path / "s.zarr"), videos=10)
    half = plan_command(make_config(video_folder, tmp_path / "s.zarr", **PLANES), videos=10)
    sizes = dict(plain.bytes_by_array)
    sizes[FORMAT] = sizes.pop("pixels") // 2
    assert half.bytes_by_array == sizes and half.read_seconds_per_epoch < plain.read_seconds_per_epoch
    assert any(" with pixels" in line for line in render_plan(half, 1))
    line = "plan --model tiny-clip --videos 10 --frames 2 --device cpu --pixel-format ycbcr420 --json"
    told = json.loads(CliRunner().invoke(app, line.split()).stdout.splitlines()[-1])
    assert told["bytes_by_array"][FORMAT] == 20 * 64 * 64 * 3 // 2


def test_rows_that_are_kept_stay_as_they_are(planes, video_folder, make_config, make_video, flip_byte, tmp_path):
    root, out = shutil.copytree(video_folder, tmp_path / "videos"), shutil.copytree(planes, tmp_path / "s.zarr")
    before = read_shards(out, FORMAT, "patches")
    config = make_config(root, out, **PLANES)
    flip_byte(sorted((out / FORMAT).glob("c.*"))[0])
    assert verify_store(open_store(out))
    extract_dataset(replace(config, repair=True))
    assert read_shards(out, FORMAT, "patches") == before and verify_store(open_store(out)) == []
    make_video(root / "train/walk/broken.mp4", seed=77)
    make_video(root / "train/run/new.mp4", seed=78)
    extract_dataset(replace(config, retry_failed=True, append=True))
    store, plain = open_store(out), open_store(planes)
    assert verify_store(store) == [] and store.facts.format_version == 5
    table = store.read_manifest(["video_id", "status", "num_cached_frames"]).to_pylist()
    assert [row["status"] for row in table] == ["ok"] * 12
    good = [row for row in range(11) if table[row]["video_id"] != "train/walk/broken.mp4"]
    for row in good:
        count = table[row]["num_cached_frames"]
        assert np.array_equal(store.read_row(row, 1, count)[FORMAT], plain.read_row(row, 1, count)[FORMAT])
