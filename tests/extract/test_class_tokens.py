"""Stores of towers without a class token: no `cls` and no `head`, or means of patch tokens in the place of `cls`."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from s4v.backbone.vision_tower import build_backbone
from s4v.cli import app
from s4v.errors import ConfigError, StoreDamagedError, StoreMismatchError
from s4v.extract.extraction import extract_dataset
from s4v.store.info import describe_store, render_info
from s4v.store.merge import merge_stores
from s4v.store.reader import open_store
from s4v.store.verify import verify_store

MODEL = "test_vit4"
"""timm's smallest without a class token: 160 pixels, 100 patches, 96 channels, the mean of patches as embedding."""


@pytest.fixture(scope="module")
def few_videos(build_once, make_video):
    def write(root):
        for number in range(3):
            make_video(root / f"train/run/{number}.mp4", seed=number, num_frames=4)
        (root / "train/run/broken.mp4").write_bytes(b"not a video at all" * 50)

    return build_once("few_videos", write)


@pytest.fixture(scope="module")
def config_of(make_config, few_videos):
    def make(out, **changes):
        own = dict(model=MODEL, weights="random", frames={"": 2}, layers="0", resize="224", num_decoders=1)
        return make_config(changes.pop("root", few_videos), out, **{**own, "dtype": "float32", **changes})

    return make


@pytest.fixture(scope="module")
def bare(build_once, config_of):
    return build_once("bare.zarr", lambda out: extract_dataset(config_of(out)))


@pytest.fixture(scope="module")
def means(build_once, config_of):
    return build_once("means.zarr", lambda out: extract_dataset(config_of(out, cls="mean")))


def test_a_tower_without_a_class_token_makes_a_store_without_cls_and_head(bare):
    store = open_store(bare)
    assert store.layout.class_tokens == "none" and store.attributes["layout"]["class_tokens"] == "none"
    assert [spec.name for spec in store.layout.array_specs()] == ["patches", "embedding", "pixels"]
    assert not (bare / "cls").exists() and not (bare / "head").exists() and not store.has_head
    assert verify_store(store) == []
    facts = describe_store(store)
    assert "cls" not in facts["arrays"] and facts["class_tokens"] == "none"
    assert "cls       none: the backbone has no class token" in render_info(facts)
    clips = store.read_clips([0, 1], [[0, 1]] * 2)
    assert clips.cls is None and clips.patches is not None and clips.pixels is not None
    with pytest.raises(StoreMismatchError, match="has no array 'cls': its backbone has no class token"):
        store.read_clips([0], [[0]], arrays=("cls",))
    with pytest.raises(StoreMismatchError, match="has no `head`: the embedding of test_vit4 is no projection"):
        _ = store.head


def test_tokens_are_those_of_the_tower_run_live_on_the_stored_pixels(bare, means, config_of, tmp_path):
    backbone = build_backbone(MODEL, weights="random", device=torch.device("cpu")).load_weights()
    one = config_of(tmp_path / "one.zarr", batch_size=1, cls="mean")
    extract_dataset(one)
    store, plain, filled = open_store(one.out), open_store(bare), open_store(means)
    rows = [row for row, status in enumerate(store.read_manifest(["status"])["status"].to_pylist()) if status == "ok"]
    clips = store.read_clips(rows, [[0, 1]] * len(rows))
    for video, frame in np.ndindex(len(rows), 2):  # the store's own batches: one frame each
        tokens = backbone.encode_frames(torch.from_numpy(clips.pixels[video, frame]), store.layout.layers)
        np.testing.assert_array_equal(clips.patches[video, frame], torch.stack(tokens.patches, dim=1)[0])
        np.testing.assert_array_equal(clips.cls[video, frame], [one.mean(dim=1)[0] for one in tokens.patches])
        np.testing.assert_array_equal(store.read_embeddings()[rows[video], 0, frame], tokens.embedding[0])
    same = [one.read_clips(rows, [[0, 1]] * len(rows), arrays=("patches", "pixels")) for one in (plain, filled)]
    np.testing.assert_array_equal(same[0].patches, same[1].patches)
    np.testing.assert_array_equal(same[0].pixels, clips.pixels)


def test_means_stand_in_the_place_of_class_tokens(means):
    store = open_store(means)
    assert store.layout.class_tokens == "mean" and not store.has_head
    assert store.attributes["backbone"]["has_class_token"] is False
    assert verify_store(store) == []
    clips = store.read_clips([0, 2], [[0, 1]] * 2)
    assert clips.cls.shape == (2, 2, 2, 96) and clips.cls.dtype == np.float32
    np.testing.assert_allclose(clips.cls, clips.patches.mean(axis=3), atol=1e-5)
    assert any("means of patch tokens" in line for line in render_info(describe_store(store)))


def test_a_tower_with_a_class_token_can_be_asked_for_means_and_says_nothing_else(config_of, tmp_path, float_store):
    config = config_of(tmp_path / "clip.zarr", model="tiny-clip", cls="mean", limit=1)
    extract_dataset(config)
    store = open_store(config.out)
    assert store.attributes["layout"]["class_tokens"] == "mean" and store.has_head
    assert "has_class_token" not in store.attributes["backbone"]
    rows = np.flatnonzero(np.asarray(store.read_manifest(["status"])["status"].to_pylist()) == "ok")[:1]
    clips = store.read_clips(rows, [[0, 1]])
    np.testing.assert_allclose(clips.cls, clips.patches.mean(axis=3), atol=1e-5)
    assert "class_tokens" not in open_store(float_store).attributes["layout"], "stores as they were do not tell it"


def test_what_lacks_is_told_before_the_work_and_once(config_of, tmp_path, caplog):
    config = config_of(tmp_path / "b.zarr", limit=1)
    with caplog.at_level(logging.WARNING):
        extract_dataset(config)
    assert "test_vit4 has no class token: the store will have no `cls`" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        extract_dataset(config)
    assert "no class token" not in caplog.text


def test_a_store_goes_on_only_with_the_class_tokens_that_it_was_begun_with(config_of, tmp_path):
    extract_dataset(config_of(tmp_path / "b.zarr", limit=1))
    with pytest.raises(StoreMismatchError, match=r"layout\.class_tokens none there, mean here"):
        extract_dataset(config_of(tmp_path / "b.zarr", cls="mean"))
    with pytest.raises(ConfigError, match="--cls takes own, mean; found 'max'"):
        config_of(tmp_path / "c.zarr", cls="max")


@pytest.mark.slow  # eleven extractions
@pytest.mark.parametrize("cls", ["own", "mean"])
def test_append_parts_retry_and_repair_know_stores_without_class_tokens(
    cls, config_of, few_videos, tmp_path, make_video, flip_byte
):
    root = tmp_path / "videos"
    shutil.copytree(few_videos, root)
    shared = dict(root=root, cls=cls, dtype="int8", channels=16)
    whole = config_of(tmp_path / "whole.zarr", **shared)
    extract_dataset(whole)
    parts = [
        config_of(tmp_path / f"part{part}.zarr", **shared, codec_from=whole.out, part=(part, 2)) for part in (1, 2)
    ]
    for part in parts:
        extract_dataset(part)
    merge_stores([part.out for part in parts], tmp_path / "merged.zarr")
    merged = open_store(tmp_path / "merged.zarr")
    assert verify_store(merged) == []

    def read(path):
        store = open_store(path)
        status = store.read_manifest(["status"])["status"].to_pylist()
        rows = [row for row, one in enumerate(status) if one == "ok"]
        clips = store.read_clips(rows, [[0, 1]] * len(rows))
        return {"patches": clips.patches, "embedding": store.read_embeddings()[rows], "cls": clips.cls}

    def require_same(found, wanted):
        for name, values in wanted.items():
            if values is None:
                assert found[name] is None
            else:
                np.testing.assert_array_equal(found[name], values, err_msg=name)

    before = read(whole.out)
    assert (before["cls"] is None) == (cls == "own")
    require_same(read(tmp_path / "merged.zarr"), before)
    make_video(root / "train/run/broken.mp4", seed=77)
    extract_dataset(config_of(whole.out, **shared, retry_failed=True))
    mended = read(whole.out)
    assert len(mended["patches"]) == len(before["patches"]) + 1
    flip_byte(next((whole.out / "embedding").glob("c.*")))
    assert verify_store(open_store(whole.out))
    extract_dataset(config_of(whole.out, **shared, repair=True))
    require_same(read(whole.out), mended)
    make_video(root / "train/run/new.mp4", seed=78)
    extract_dataset(config_of(whole.out, **shared, append=True))
    assert verify_store(open_store(whole.out)) == []
    assert len(read(whole.out)["patches"]) == len(mended["patches"]) + 1


def test_a_store_of_three_arrays_that_lost_its_head_is_damaged_not_without_one(float_store, tmp_path):
    shutil.copytree(float_store, tmp_path / "s.zarr")
    shutil.rmtree(tmp_path / "s.zarr/head")
    store = open_store(tmp_path / "s.zarr")
    assert store.has_head
    assert any("head" in one.where for one in verify_store(store))


def test_a_store_that_says_anything_else_of_its_class_tokens_is_refused(bare, tmp_path):
    shutil.copytree(bare, tmp_path / "s.zarr")
    file = tmp_path / "s.zarr/zarr.json"
    node = json.loads(file.read_text())
    node["attributes"]["s4v"]["layout"]["class_tokens"] = "pooled"
    file.write_text(json.dumps(node))
    (tmp_path / "s.zarr/checksums.json").unlink()
    with pytest.raises(StoreDamagedError, match="class_tokens must be in own, mean, none, found 'pooled'"):
        open_store(tmp_path / "s.zarr")


def test_plan_counts_what_such_a_store_holds():
    runner = CliRunner()
    line = ["plan", "--model", MODEL, "--videos", "10", "--device", "cpu", "--json"]
    sizes = [
        json.loads(runner.invoke(app, [*line, *more]).stdout)["bytes_by_array"] for more in ([], ["--cls", "mean"])
    ]
    assert set(sizes[1]) - set(sizes[0]) == {"cls"}
    shown = runner.invoke(app, line[:-1]).stdout
    assert "of patches (the model has no class token), " in shown
