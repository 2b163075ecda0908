"""Frames that a store holds as YCbCr 4:2:0 reach networks as pixels: the loader decodes them on the training device."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s4v.extract.extraction import extract_dataset
from s4v.store.pixel_formats import decode_pixels
from s4v.store.reader import open_store
from s4v.store.shard_cache import ShardCache
from s4v.train import pixel_decoding
from s4v.train.clips import ClipLoader, ClipPlan
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run
from s4v.train.pixel_decoding import decode_ycbcr420

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def planes(build_once, video_folder, make_config):
    options = dict(pixel_format="ycbcr420", pixel_offsets=(-2, -1, 0, 1, 2))
    return build_once("planes-around.zarr", lambda out: extract_dataset(make_config(video_folder, out, **options)))


def load(store, places, offsets=(0,)):
    loader = ClipLoader(store, arrays=("pixels",), layers=store.layout.layers, device=CPU, pixel_offsets=offsets)
    rows = np.arange(len(places))
    plan = ClipPlan(rows, np.zeros_like(rows), np.asarray(places), np.zeros_like(rows))
    (batch,) = loader.load([plan])
    return batch, loader.count_bytes(plan)


@given(
    lead=st.sampled_from([(), (1,), (3, 2), (0,)]), height=st.integers(1, 6), width=st.integers(1, 6),
    seed=st.integers(0, 99), at_once=st.integers(1, 7),
)  # fmt: skip
def test_torch_and_numpy_decode_alike(lead, height, width, seed, at_once):
    planes = np.random.default_rng(seed).integers(0, 256, (*lead, 6 * height * width), dtype=np.uint8)
    size = (2 * height, 2 * width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixel_decoding, "_FRAMES_AT_ONCE", at_once)
        found = decode_ycbcr420(torch.from_numpy(planes), size)
    assert found.shape == (*lead, 3, *size) and found.dtype == torch.float32
    expected = np.moveaxis(decode_pixels(planes, "ycbcr420", size), -1, -3).astype(np.float32)
    assert np.abs(found.numpy() - expected).max(initial=0) < 0.501, "the one is rounded, the other is not"


@pytest.mark.parametrize("offsets", [(0,), (1, 0), (-1, 0, 1)])
def test_a_batch_has_the_pixels_that_the_reader_decodes(planes, offsets):
    store, places = open_store(planes), [[0, 3], [2, 1], [1, 1]]
    batch, num_bytes = load(store, places, offsets)
    stored = store.read_clips(range(3), places, arrays=("pixels",), offsets=offsets).pixels
    pixels = np.moveaxis(store.decode_pixels(stored), -1, -3) / 255.0
    backbone = store.facts.backbone
    mean, std = (np.reshape(one, (3, 1, 1)) for one in (backbone.mean, backbone.std))
    expected = ((pixels - mean) / std).astype(np.float32)
    shown = batch.pixels if len(offsets) > 1 else batch.pixels[:, :, None]
    assert shown.shape == expected.shape == (3, 2, len(offsets), 3, 64, 64) and shown.dtype == torch.float32
    np.testing.assert_allclose(shown.numpy(), expected, atol=0.501 / 255 / min(backbone.std))
    assert num_bytes == stored.nbytes == 6 * len(offsets) * 64 * 64 * 3 // 2, "what is read are planes"


def test_a_frame_that_is_none_has_pixels_of_zeros(planes):
    batch, _ = load(open_store(planes), [[0, 1, 2], [3, -1, -1]])
    is_zero = (batch.pixels == 0).flatten(2).all(dim=2)
    assert torch.equal(is_zero, ~batch.frame_mask)


def test_they_are_read_through_a_cache(planes, tmp_path):
    store, plain = open_store(planes), open_store(planes)
    store.read_through(ShardCache(tmp_path / "cache", 2**30), waits=True)
    ours, theirs = load(store, [[0, 3], [1, 1]])[0], load(plain, [[0, 3], [1, 1]])[0]
    assert torch.equal(ours.pixels, theirs.pixels)
    assert any(file.name.startswith("ycbcr420.") for file in (tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize("inputs", ["all", "pixels"])
def test_a_network_trains_on_them_and_is_evaluated_on_stores_of_either_format(inputs, planes, float_store, tmp_path):
    config = TrainConfig(
        features=planes, out=tmp_path / "run", head="side4video", inputs=inputs, epochs=1, warmup_epochs=0.0,
        batch_size=4, device="cpu", side_width=64,
    )  # fmt: skip
    assert train_run(config)["epochs"] == 1
    here, there = evaluate_run(config.out), evaluate_run(config.out, features=float_store)
    assert here["videos"] == there["videos"] == 2
    assert '"pixel_format": "ycbcr420"' in (config.out / "config.json").read_text(), "a run tells what it learned from"


def test_a_network_that_looks_at_neighbours_trains_on_them(planes, tmp_path):
    config = TrainConfig(
        features=planes, out=tmp_path / "run", head="tds-clip", epochs=1, warmup_epochs=0.0, batch_size=4,
        device="cpu", side_width=64,
    )  # fmt: skip
    assert train_run(config)["epochs"] == 1
    assert evaluate_run(config.out)["videos"] == 2
