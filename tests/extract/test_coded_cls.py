"""`--cls-dtype` and `--cls-channels`: class tokens in a store's codes, from the fit of their codec to repair."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from s4v.backbone.vision_tower import build_backbone
from s4v.cli import app
from s4v.errors import ConfigError, StoreMismatchError
from s4v.extract import codec_fit
from s4v.extract.extraction import extract_dataset
from s4v.store.fidelity import measure_fidelity
from s4v.store.info import describe_store, render_info
from s4v.store.merge import merge_stores
from s4v.store.reader import open_store
from s4v.store.verify import verify_store

ROWS = [0, 2, 5]
CHANNELS = 24
CODED = {"dtype": "int8", "cls_dtype": "int8", "cls_channels": CHANNELS}


def read_cls(path, rows=ROWS):
    store = open_store(path)
    return store.decode_cls(store.read_clips(rows, [[0, 3]] * len(rows), arrays=("cls",)).cls)


def read_shards(path, *arrays):
    return {f"{name}/{file.name}": file.read_bytes() for name in arrays for file in (path / name).glob("c.*")}


@pytest.fixture(scope="module")
def coded(build_once, video_folder, make_config):
    return build_once("coded.zarr", lambda out: extract_dataset(make_config(video_folder, out, **CODED)))


@pytest.fixture(scope="module")
def sample_of(coded, video_folder, make_config, tmp_path_factory):
    """The codec that `coded` has once more, and what it was fitted on."""
    seen, fit = [], codec_fit.FITS["affine"]

    def watch(dtype, sample, *args, **options):
        seen.append(sample)
        return fit(dtype, sample, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(codec_fit.FITS, "affine", watch)
        config = make_config(video_folder, tmp_path_factory.mktemp("again") / "s.zarr", **CODED, prepare=True)
        extract_dataset(config)
    return open_store(config.out), seen


def test_the_codec_is_a_pca_of_the_class_tokens_of_the_frames_that_patches_are_fitted_on(coded, sample_of):
    store, (sample, numbers) = sample_of
    assert store.cls_codec.sha256 == open_store(coded).cls_codec.sha256, "a pure function of videos and seed"
    assert numbers.pixels.tolist() == list(range(len(sample.pixels))) and numbers.video_ids == sample.video_ids
    backbone = build_backbone("tiny-clip", weights="random", device=torch.device("cpu")).load_weights()
    layers, codec = store.layout.layers, store.cls_codec
    live = backbone.encode_frames(torch.from_numpy(sample.pixels), layers).cls.double().numpy()  # (n, L, D)
    for place in range(len(layers)):
        values = live[:, place]
        centred = values - values.mean(axis=0)
        np.testing.assert_allclose(codec.mean[place], values.mean(axis=0), atol=1e-5)
        variances, directions = np.linalg.eigh(np.cov(values.T, bias=True))
        kept = variances[::-1][:CHANNELS].sum() / variances.sum()
        projected = centred @ codec.basis[place].T.astype(np.float64)
        assert (projected**2).sum() / (centred**2).sum() == pytest.approx(kept, abs=1e-5)
        assert abs(codec.basis[place][0] @ directions[:, -1]) == pytest.approx(1, abs=1e-4)
        reach = np.maximum(1.2 * np.abs(projected).max(axis=0), 6 * projected.std(axis=0))
        np.testing.assert_allclose(codec.scale[place], reach / 127, rtol=1e-3)


def test_all_else_of_the_store_is_what_it_is_without(coded, int8_store):
    arrays = ("patches", "embedding", "pixels", "codec", "head")
    assert read_shards(coded, *arrays) == read_shards(int8_store, *arrays) != {}
    ours, theirs = open_store(coded), open_store(int8_store)
    assert ours.codec.sha256 == theirs.codec.sha256 and theirs.cls_codec is None
    assert ours.facts.format_version == 4 and theirs.facts.format_version == 3
    assert "coded_cls_dtype" not in theirs.attributes["layout"] and "cls_codec" not in theirs.attributes
    frame = (ours.layout.bytes_per_frame["cls"], theirs.layout.bytes_per_frame["cls"])
    assert frame == (len(ours.layout.layers) * CHANNELS, len(ours.layout.layers) * 192 * 2)
    assert verify_store(ours) == []


def test_class_tokens_lose_what_the_store_says_they_lose(coded, float_store):
    told = describe_store(open_store(coded))["fidelity"]
    live, decoded = read_cls(float_store), read_cls(coded)
    assert [one["layer"] for one in told["cls_layers"]] == list(open_store(coded).layout.layers)
    for place, one in enumerate(told["cls_layers"]):
        found = measure_fidelity(live[:, :, place], decoded[:, :, place], one["layer"])
        assert 0.3 < one["variance_kept"] < 0.9999
        assert found.variance_kept == pytest.approx(one["variance_kept"], abs=0.2), "other frames of few videos"


def test_without_a_projection_they_lose_little(video_folder, float_store, make_config, tmp_path):
    config = make_config(video_folder, tmp_path / "whole.zarr", cls_dtype="int8", channels=16)
    extract_dataset(config)
    store = open_store(config.out)
    assert store.layout.cls_channels == 192 and set(store.cls_codec.parts) == {"mean", "scale"}
    live, decoded = read_cls(float_store), read_cls(config.out)
    assert np.abs(decoded - live).max() <= 1.001 * store.cls_codec.scale.max() / 2
    assert min(one["variance_kept"] for one in describe_store(store)["fidelity"]["cls_layers"]) > 0.995


def test_info_tells_of_them(coded):
    facts = describe_store(open_store(coded))
    recorded = facts["cls_codec"]
    assert (recorded["dtype"], recorded["channels"], recorded["width"]) == ("int8", CHANNELS, 192)
    lines = render_info(facts)
    assert f"cls       int8, 24 of 192 channels, sha256 {recorded['sha256'][:12]}" in lines
    assert "class tokens:" in lines and any(line.startswith("  cls        int8     (11, 1, 6, ") for line in lines)
    told = json.loads(CliRunner().invoke(app, ["info", str(coded), "--json"]).stdout)
    assert told["cls_codec"] == recorded and len(told["fidelity"]["cls_layers"]) == len(told["layers"])


def test_floats_can_be_projected_and_be_wider_than_patches(video_folder, float_store, make_config, tmp_path):
    config = make_config(video_folder, tmp_path / "f.zarr", dtype="float16", cls_channels=12, limit=1)
    extract_dataset(config)
    store = open_store(config.out)
    assert set(store.cls_codec.parts) == {"mean", "basis"} and store.layout.cls_dtype == "float16"
    wide = make_config(video_folder, tmp_path / "w.zarr", dtype="float16", cls_dtype="float32", limit=1)
    extract_dataset(wide)
    assert open_store(wide.out).cls_codec.parts == {} and open_store(wide.out).layout.cls_dtype == "float32"
    np.testing.assert_array_equal(read_cls(wide.out, [0]), read_cls(float_store, [0]))


def test_what_comes_to_no_code_makes_the_store_that_there_always_was(video_folder, make_config, tmp_path):
    config = make_config(
        video_folder, tmp_path / "p.zarr", dtype="float16", cls_dtype="float16", cls_channels=192, prepare=True
    )
    extract_dataset(config)
    store = open_store(config.out)
    assert not store.layout.is_cls_coded and store.facts.format_version == 3 and not (store.path / "cls_codec").exists()


def test_means_of_patches_are_coded_too(video_folder, make_config, tmp_path):
    own = dict(model="test_vit4", frames={"": 4}, layers="0", resize="224", cls="mean", dtype="float32")
    plain = make_config(video_folder, tmp_path / "plain.zarr", **own, limit=3)
    extract_dataset(plain)
    config = make_config(video_folder, tmp_path / "means.zarr", **own, cls_dtype="int8", limit=3)
    extract_dataset(config)
    store = open_store(config.out)
    assert store.layout.class_tokens == "mean" and store.layout.is_cls_coded
    found, live = read_cls(config.out, [0, 2]), read_cls(plain.out, [0, 2])
    assert np.abs(found - live).max() <= 1.001 * store.cls_codec.scale.max() / 2
    assert "cls       means of patch tokens, in the place of class tokens; int8, 96 of 96" in "\n".join(
        render_info(describe_store(store))
    )


def test_a_store_takes_the_codecs_of_another(coded, int8_store, video_folder, make_config, tmp_path):
    shared = {"dtype": "int8", "codec_from": coded}
    config = make_config(video_folder, tmp_path / "s.zarr", **shared, cls_dtype="int8", limit=1)
    extract_dataset(config)
    assert read_shards(config.out, "cls_codec") == read_shards(coded, "cls_codec")
    first = (config.out / "cls" / "c.0.0.0.0.0").read_bytes()
    assert first == (coded / "cls" / "c.0.0.0.0.0").read_bytes()
    extract_dataset(replace(config, cls_channels=CHANNELS))
    refused = {
        "cls_dtype int8 there, float16 here": shared,
        "cls_channels 24 there, 12 here": {**shared, "cls_dtype": "int8", "cls_channels": 12},
        "class_tokens own there, mean here": {**shared, "cls_dtype": "int8", "cls": "mean"},
        "cls_dtype float16 there, int8 here": {**CODED, "codec_from": int8_store},
    }
    for why, changes in refused.items():
        with pytest.raises(StoreMismatchError, match=rf"the codec of .* \(--codec-from\) does not fit: {why}"):
            extract_dataset(make_config(video_folder, tmp_path / "no.zarr", **changes))
    assert not (tmp_path / "no.zarr").exists()


def test_what_cannot_be_is_refused_before_the_work(coded, video_folder, make_config, tmp_path):
    def extract(**changes):
        extract_dataset(make_config(video_folder, changes.pop("out", tmp_path / "no.zarr"), **changes))

    with pytest.raises(ConfigError, match="--cls-channels 193 is more than the 192 channels of tiny-clip"):
        extract(cls_channels=193)
    with pytest.raises(ConfigError, match="--cls-channels must be at least 1; found 0"):
        extract(cls_channels=0)
    with pytest.raises(ConfigError, match="--cls-dtype takes int8, float16, float32; found 'int4'"):
        extract(cls_dtype="int4")
    with pytest.raises(ConfigError, match="are of class tokens, and test_vit4 has none: leave them out, or take --cls"):
        extract(model="test_vit4", cls_dtype="int8", resize="224")
    with pytest.raises(
        ConfigError, match="--cls-channels 40 wants more than 40 class tokens.*2 videos have 28 frames. Take fewer"
    ):
        extract(cls_channels=40, calibration_videos=2)
    assert not (tmp_path / "no.zarr").exists()
    with pytest.raises(StoreMismatchError, match="layout.coded_cls_channels 24 there, 12 here"):
        extract(**{**CODED, "cls_channels": 12}, out=coded)
    with pytest.raises(StoreMismatchError, match="layout.coded_cls_dtype int8 there, None here"):
        extract(dtype="int8", out=coded)


@pytest.mark.parametrize(("channels", "frames"), [(4, 2), (64, 4), (100, 7), (10_000, 16)])
def test_as_many_frames_are_looked_at_as_the_directions_want(channels, frames):
    assert codec_fit.frames_for_cls(channels, num_videos=64) == frames


def test_plan_counts_them():
    line = "plan --model vit-e --videos 240436 --frames 8 --channels 64 --cls-dtype int8 --cls-channels 64 --device cpu"
    told = json.loads(CliRunner().invoke(app, [*line.split(), "--json"]).stdout)
    assert {name: size // told["frames"] for name, size in told["bytes_by_array"].items()} == {
        "patches": 524_288,
        "cls": 2_048,
        "embedding": 4_096,
        "pixels": 150_528,
    }
    assert told["total_bytes"] == 8 * 240_436 * 680_960 < 1.35e12
    assert "a frame       681.0 kB of all arrays" in CliRunner().invoke(app, line.split()).stdout


@pytest.mark.slow  # nine extractions
def test_parts_workers_append_retry_and_repair(coded, video_folder, make_config, make_video, flip_byte, tmp_path):
    root = shutil.copytree(video_folder, tmp_path / "videos")
    whole = make_config(root, tmp_path / "whole.zarr", **CODED)
    extract_dataset(whole)
    arrays = ("patches", "cls", "cls_codec", "codec", "embedding", "pixels")
    before = read_shards(whole.out, *arrays)
    assert before == read_shards(coded, *arrays)
    extract_dataset(make_config(root, tmp_path / "skeleton.zarr", **CODED, prepare=True))
    for number in (1, 2):
        shutil.copytree(tmp_path / "skeleton.zarr", tmp_path / f"{number}.zarr")
        extract_dataset(make_config(root, tmp_path / f"{number}.zarr", **CODED, part=(number, 2)))
    merge_stores([tmp_path / "1.zarr", tmp_path / "2.zarr"], tmp_path / "merged.zarr")
    assert read_shards(tmp_path / "merged.zarr", *arrays) == before
    shared = make_config(root, tmp_path / "workers.zarr", **CODED, num_workers=2)
    extract_dataset(shared)
    assert read_shards(shared.out, *arrays) == before
    for array in ("cls_codec/basis", "cls"):
        flip_byte(sorted((whole.out / array).glob("c.*"))[0])
    assert verify_store(open_store(whole.out))
    extract_dataset(replace(whole, repair=True))
    assert read_shards(whole.out, *arrays) == before and verify_store(open_store(whole.out)) == []
    make_video(root / "train/walk/broken.mp4", seed=77)
    extract_dataset(replace(whole, retry_failed=True))
    make_video(root / "train/run/new.mp4", seed=78)
    extract_dataset(replace(whole, append=True))
    store = open_store(whole.out)
    assert verify_store(store) == [] and store.facts.format_version == 4
    table = store.read_manifest(["video_id", "status"]).to_pylist()
    assert [row["status"] for row in table] == ["ok"] * 12
    good = [row for row in range(11) if table[row]["video_id"] != "train/walk/broken.mp4"]
    np.testing.assert_array_equal(read_cls(whole.out, good), read_cls(coded, good))
