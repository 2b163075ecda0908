"""Whole frames: `--input HxW`, `--resize whole`; what a store of 10 x 18 patches holds, and what is padding in it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from timm.models import register_model
from timm.models.eva import Eva

from s4v.backbone import open_clip_models as architectures
from s4v.backbone.vision_tower import build_backbone
from s4v.errors import ConfigError, StoreDamagedError, StoreMismatchError
from s4v.extract import codec_fit, codec_report
from s4v.extract.batching import batch_slots
from s4v.extract.codec_fit import FrameSample
from s4v.extract.extraction import extract_dataset
from s4v.store.fidelity import measure_fidelity, read_fidelity
from s4v.store.info import describe_store, render_info
from s4v.store.padding import find_padding
from s4v.store.reader import open_store
from s4v.store.records import View
from s4v.store.verify import verify_store

CPU = torch.device("cpu")
SIZE = (80, 144)
"""10 x 18 patches of 8 pixels."""


@register_model
def whole_frame_eva(pretrained: bool = False, **options: object) -> Eva:
    """EVA02's kind of block (pre-norm, rope), shrunken."""
    kept = {name: options[name] for name in ("num_classes", "global_pool") if name in options}
    model = Eva(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2.0, use_rot_pos_emb=True,
        ref_feat_shape=(2, 2), **kept,
    )  # fmt: skip
    model.default_cfg = {"pool_size": None}
    return model


TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TIMM = {"image_size": 32, "timm_model_name": "whole_frame_eva", "timm_pool": "token", "timm_proj": None}
MODEL = {"embed_dim": 24, "vision_cfg": TIMM, "text_cfg": TEXT, "custom_text": True}


@pytest.fixture(scope="module", autouse=True)
def small_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (folder / "whole-frame-eva.json").write_text(json.dumps(MODEL))
    open_clip.add_model_config(folder)
    architectures.read_architecture.cache_clear()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory, make_video):
    """Videos of three shapes: wide, tall, and of the canvas's own shape."""
    root = tmp_path_factory.mktemp("shapes")
    for number, size in enumerate([(80, 64), (64, 96), (144, 80)]):
        make_video(root / f"train/run/{number}.mp4", seed=number, size=size)
        make_video(root / f"val/run/{number}.mp4", seed=10 + number, size=size)
    return root


@pytest.fixture(scope="module")
def whole_config(shapes, make_config, tmp_path_factory):
    return make_config(
        shapes, tmp_path_factory.mktemp("whole") / "s.zarr", input_size=SIZE, resize="whole",
        views={"train": "flip", "": "centre"}, frames={"": 3}, batch_size=5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole_store(whole_config):
    extract_dataset(whole_config)
    return open_store(whole_config.out)


def test_the_rest_of_a_frame_is_the_mean_colour_which_normalises_to_about_zero(whole_store):
    info = build_backbone("tiny-clip", weights="random", device=CPU, image_size=SIZE).info
    assert info.mean_colour == (123, 117, 104)
    assert max(abs(c / 255 - m) / s for c, m, s in zip(info.mean_colour, info.mean, info.std, strict=True)) < 0.008
    rows = whole_store.read_manifest(["path", "views"]).to_pylist()
    for number, row in enumerate(rows):
        for place, made in enumerate(row["views"]):
            pixels = whole_store.read_clips([number], [[0]], view=place).pixels[0, 0, 0]
            assert pixels.shape == (*SIZE, 3)
            padding = whole_store.read_padding([number], place).reshape(10, 18)
            assert np.array_equal(padding.reshape(-1), find_padding(View(**made), (8, 8)))
            blocks = pixels.reshape(10, 8, 18, 8, 3).transpose(0, 2, 1, 3, 4)
            assert (blocks[padding] == info.mean_colour).all()
            assert all(len(np.unique(block.reshape(-1, 3), axis=0)) > 1 for block in blocks[~padding])


def test_readers_tell_the_padding_of_each_clip(whole_store):
    rows = whole_store.read_manifest(["video_id", "split"]).to_pylist()
    by_shape = {name: [i for i, row in enumerate(rows) if row["video_id"].endswith(f"{name}.mp4")] for name in "012"}
    wide, tall, own = (whole_store.read_padding(by_shape[name]) for name in "012")
    # 80 x 64 becomes 100 x 80, columns 22 to 121; 64 x 96 becomes 53 x 80.
    assert wide.sum(axis=1).tolist() == [10 * (18 - 14)] * 2
    assert tall.sum(axis=1).tolist() == [10 * (18 - 8)] * 2
    assert not own.any() and own.shape == (2, 180)
    both = whole_store.read_padding([by_shape["1"][0]] * 2, [0, 1]).reshape(2, 10, 18)
    assert np.array_equal(both[0], both[1, :, ::-1]), "the mirrored view's padding is mirrored"
    with pytest.raises(StoreMismatchError, match="1 views"):
        whole_store.read_padding([by_shape["1"][1]], 1)


def test_a_manifest_that_does_not_say_how_a_view_was_made_is_damaged(whole_store):
    for made in ([], [{**whole_store.read_manifest(["views"])["views"][0].as_py()[0], "width": 72}]):
        store = open_store(whole_store.path)
        store._views = pa.chunked_array([pa.array([made] * 6)])
        with pytest.raises(StoreDamagedError, match=r"videos\.parquet does not say how a view of row 2 was made"):
            store.read_padding([2])


def test_a_store_of_crops_has_no_padding(float_store):
    store = open_store(float_store)
    rows = np.flatnonzero(np.array(store.read_manifest(["status"])["status"].to_pylist()) == "ok")
    assert not store.read_padding(rows).any()


@pytest.mark.parametrize("model", ["tiny-clip", "whole-frame-eva"])
def test_tokens_of_whole_frames_are_the_live_ones_to_the_bit(model, whole_config, whole_store, tmp_path):
    config, store = whole_config, whole_store
    if model != "tiny-clip":
        config = replace(whole_config, model=model, out=tmp_path / "s.zarr")
        extract_dataset(config)
        store = open_store(config.out)
    layout = store.layout
    assert (layout.num_patches, layout.image_size, store.facts.backbone.grid) == (180, SIZE, (10, 18))
    backbone = build_backbone(model, weights="random", device=CPU, image_size=SIZE).load_weights()
    table = store.read_manifest(["num_cached_frames", "num_views"])
    counts = list(zip(*(table[name].to_pylist() for name in ("num_cached_frames", "num_views")), strict=True))
    embeddings = store.read_embeddings()
    for shard in range(layout.num_shards):
        rows = layout.shard_rows(shard)
        frames, views = zip(*(counts[row] for row in rows), strict=True)
        for slots in batch_slots(frames, views, config.batch_size):
            clips = [store.read_clips([rows[row]], [[frame]], view=view) for row, view, frame in slots]
            pixels = np.concatenate([clip.pixels[0, :, 0] for clip in clips])
            live = backbone.encode_frames(torch.from_numpy(pixels), layout.layers)
            stored = np.concatenate([clip.patches[0] for clip in clips])  # (B, L, N, D)
            for place, tokens in enumerate(live.patches):
                assert np.array_equal(stored[:, place], tokens.numpy())
            assert np.array_equal(np.concatenate([clip.cls[0] for clip in clips]), live.cls.numpy())
            kept = np.stack([embeddings[rows[row], view, frame] for row, view, frame in slots])
            assert np.array_equal(kept, live.embedding.numpy())


@pytest.fixture(scope="module")
def coded(whole_config, tmp_path_factory):
    """A store of codes, and the samples that its codec was fitted and measured on."""
    config = replace(
        whole_config, out=tmp_path_factory.mktemp("coded") / "s.zarr", dtype="int8", channels=16, layers="1,5"
    )
    samples = []

    def keep(of, place):
        def call(*given, **more):
            samples.append(given[place])
            return of(*given, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(codec_fit.FITS, "affine", keep(codec_fit.fit_codec, 1))
        patch.setattr(codec_report, "measure_codec", keep(codec_report.measure_codec, 2))
        extract_dataset(config)
    return open_store(config.out), samples


def picture_tokens(sample):
    """Tokens of patches that are not all of the mean colour, (n, D) of each layer: found by looking."""
    backbone = build_backbone("tiny-clip", weights="random", device=CPU, image_size=SIZE).load_weights()
    blocks = sample.pixels.reshape(-1, 10, 8, 18, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 180, 64 * 3)
    is_padding = (blocks == np.tile(backbone.info.mean_colour, 64)).all(axis=-1)
    assert is_padding.any() and np.array_equal(is_padding, sample.padding)
    tokens = backbone.encode_frames(torch.from_numpy(sample.pixels), (1, 5)).patches
    return [values.numpy()[~is_padding] for values in tokens]


def test_the_codec_is_fitted_on_the_picture_alone(coded):
    store, (fitted, _) = coded
    for place, tokens in enumerate(picture_tokens(fitted)):
        x = tokens.astype(np.float64)
        np.testing.assert_allclose(store.codec.mean[place], x.mean(axis=0), atol=1e-5)
        directions = np.linalg.eigh(np.cov(x.T))[1][:, -16:].T
        projected = store.codec.basis[place].T @ store.codec.basis[place]
        np.testing.assert_allclose(projected, directions.T @ directions, atol=5e-3)


def test_what_the_codec_costs_is_measured_on_the_picture_alone(coded):
    store, (_, measured) = coded
    told = read_fidelity(store.path)["layers"]
    for place, tokens in enumerate(picture_tokens(measured)):
        expected = measure_fidelity(tokens, store.codec.decode(store.codec.encode(tokens, place), place), place)
        assert told[place]["variance_kept"] == pytest.approx(expected.variance_kept, abs=1e-4)
        assert told[place]["error_median"] == pytest.approx(expected.error_median, rel=1e-3)


def test_too_few_tokens_of_the_picture_are_told():
    padding = np.ones((1, 180), bool)
    padding[0, :16] = False
    sample = FrameSample(np.zeros((1, *SIZE, 3), np.uint8), ("a",), padding)
    backbone = build_backbone("tiny-clip", weights="random", device=CPU, image_size=SIZE)
    with pytest.raises(ConfigError, match="1 frames of 1 videos have 16"):
        codec_fit.fit_codec("int8", sample, backbone, (0,), channels=16, batch_size=1)


@pytest.mark.slow  # four extractions
def test_a_store_goes_on_at_its_own_size(whole_config, whole_store, tmp_path, contents):
    """Cut short and taken up without --input, appended to, damaged and mended: the same as made at once."""
    config = replace(whole_config, out=tmp_path / "s.zarr")
    extract_dataset(replace(config, limit=2))
    plain = replace(config, input_size=None, resize=None, views=None, frames=None)
    extract_dataset(plain)
    files = contents(config.out)
    assert files == {**contents(whole_store.path), "zarr.json": files["zarr.json"]}
    shard = next((config.out / "patches").rglob("c.1.*"))
    data = bytearray(shard.read_bytes())
    data[40] ^= 1
    shard.write_bytes(data)
    assert verify_store(open_store(config.out))
    extract_dataset(replace(plain, repair=True))
    assert verify_store(open_store(config.out)) == []
    assert shard.read_bytes() == files[shard.relative_to(config.out).as_posix()]


@pytest.mark.slow
def test_rows_are_appended_at_the_stores_size(whole_config, shapes, tmp_path, make_video):
    root = tmp_path / "videos"
    shutil.copytree(shapes, root)
    config = replace(whole_config, root=root, out=tmp_path / "s.zarr")
    extract_dataset(config)
    make_video(root / "val/run/9.mp4", seed=40, size=(96, 64))
    extract_dataset(replace(config, input_size=None, resize=None, append=True))
    store = open_store(config.out)
    assert store.layout.num_rows == 7 and store.layout.image_size == SIZE
    assert verify_store(store) == []
    assert store.read_padding([6]).sum() == 10 * (18 - 16)


def test_another_size_than_a_stores_own_is_refused(whole_config, float_store, make_config, video_folder):
    with pytest.raises(StoreMismatchError, match=r"was begun with frames of 80x144; found --input 64x64\. Leave"):
        extract_dataset(replace(whole_config, input_size=(64, 64)))
    with pytest.raises(StoreMismatchError, match="was begun with frames of 64x64; found --input 80x144"):
        extract_dataset(make_config(video_folder, float_store, input_size=SIZE))


def test_a_codec_of_another_size_is_refused(whole_config, int8_store, tmp_path):
    config = replace(whole_config, out=tmp_path / "s.zarr", dtype="int8", codec_from=int8_store)
    with pytest.raises(StoreMismatchError, match=r"image_size \[64, 64\] there, \(80, 144\) here"):
        extract_dataset(config)


def test_the_size_that_a_model_has_anyway_makes_the_same_store(video_folder, float_store, make_config, tmp_path):
    config = make_config(video_folder, tmp_path / "s.zarr", input_size=(64, 64), prepare=True)
    extract_dataset(config)
    attributes = [open_store(path).attributes for path in (config.out, float_store)]
    assert {**attributes[0], "created": ""} == {**attributes[1], "created": ""}


def test_views_that_cut_have_nothing_to_cut(shapes, make_config, tmp_path):
    with pytest.raises(ConfigError, match="nothing for --views three to cut. Take --views centre or flip"):
        make_config(shapes, tmp_path / "s.zarr", resize="whole", views={"val": "three"})


def test_bad_sizes_are_told_before_anything_is_written(shapes, make_config, tmp_path):
    config = make_config(shapes, tmp_path / "s.zarr", input_size=(80, 150))
    with pytest.raises(ConfigError, match=r"found 80x150\. The nearest are 80x144, 80x152"):
        extract_dataset(config)
    with pytest.raises(ConfigError, match="--input takes 1 to 16384 pixels a side; found 0x64"):
        replace(config, input_size=(0, 64))
    config = replace(config, input_size=SIZE, resize="256x320")
    with pytest.raises(ConfigError, match="--resize 256x320 bends .* and tiny-clip sees 80x144 pixels"):
        extract_dataset(config)
    assert not config.out.exists()


def test_crops_need_not_be_square(shapes, make_config, tmp_path):
    config = make_config(shapes, tmp_path / "s.zarr", input_size=(48, 96), resize="224", views={"": "three"})
    extract_dataset(replace(config, limit=1))
    store = open_store(config.out)
    row = store.read_manifest(["views", "width", "height"]).to_pylist()[0]
    assert store.read_clips([0], [[0]], view=2).pixels.shape == (1, 1, 1, 48, 96, 3)
    assert [(view["resized_width"], view["resized_height"], view["x"], view["y"]) for view in row["views"]] == [
        (96, 76, 0, 14) for _ in range(3)
    ], "three crops of a frame that is no wider than they are"


def test_info_tells_of_another_size(whole_store, float_store):
    lines = render_info(describe_store(whole_store))
    assert "input     80 x 144 pixels, 10 x 18 patches; its weights were made for 64 x 64" in lines
    assert any("resize whole" in line for line in lines)
    assert not any(line.startswith("input") for line in render_info(describe_store(open_store(float_store))))


def test_means_of_patches_leave_padding_out(whole_config, tmp_path):
    config = replace(whole_config, cls="mean", out=tmp_path / "means.zarr")
    extract_dataset(config)
    store = open_store(config.out)
    for row in range(store.layout.num_rows):
        for view, _ in enumerate(store.read_manifest(["views"])["views"][row].as_py()):
            clips = store.read_clips([row], [[0, 1, 2]], view=view)
            is_picture = ~store.read_padding([row], view)[0]
            expected = clips.patches[0][:, :, is_picture].mean(axis=2)
            np.testing.assert_allclose(clips.cls[0], expected, rtol=1e-4, atol=1e-5)
