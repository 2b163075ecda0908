"""Class tokens that a store codes reach networks as tokens: the loader decodes them on the training device."""

import numpy as np
import pytest
import torch

from s4v.extract.extraction import extract_dataset
from s4v.store.reader import open_store
from s4v.train.clips import ClipLoader, ClipPlan, cls_codec_for
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def coded(build_once, video_folder, make_config):
    options = dict(dtype="int8", cls_dtype="int8", cls_channels=24)
    return build_once("coded.zarr", lambda out: extract_dataset(make_config(video_folder, out, **options)))


def load(store, layers, places, arrays=("cls",)):
    loader = ClipLoader(store, arrays=arrays, layers=layers, device=CPU)
    rows = np.arange(len(places))
    plan = ClipPlan(rows, np.zeros_like(rows), np.asarray(places), np.zeros_like(rows))
    (batch,) = loader.load([plan])
    return batch, loader.count_bytes(plan)


@pytest.mark.parametrize("taken", [None, (1,), (4, 2)])
def test_a_batch_has_the_tokens_that_the_reader_decodes(coded, taken):
    store, places = open_store(coded), [[0, 3], [2, 1], [1, 1]]
    layers = tuple(store.layout.layers[place] for place in taken or range(len(store.layout.layers)))
    codes = store.read_clips(range(3), places, layers=layers, arrays=("cls",)).cls
    batch, num_bytes = load(store, layers, places)
    assert batch.cls.shape == (3, 2, len(layers), 192) and batch.cls.dtype == torch.float32
    np.testing.assert_allclose(batch.cls.numpy(), store.decode_cls(codes, layers), rtol=1e-5, atol=1e-5)
    assert codes.dtype == np.int8 and num_bytes == codes.nbytes == 3 * 2 * len(layers) * 24, "what is read are codes"


def test_a_frame_that_is_none_has_a_class_token_of_zeros(coded):
    store = open_store(coded)
    batch, _ = load(store, store.layout.layers, [[0, 1, 2], [3, -1, -1]])
    assert batch.frame_mask.tolist() == [[True, True, True], [True, False, False]]
    is_zero = (batch.cls == 0).flatten(2).all(dim=2)
    assert torch.equal(is_zero, ~batch.frame_mask)
    assert store.cls_codec.mean.any(axis=1).all(), "codes of zeros would decode to the mean"


def test_a_store_that_does_not_code_them_is_widened_alone(float_store, int8_store):
    for path in (float_store, int8_store):
        store = open_store(path)
        assert cls_codec_for(store, store.layout.layers, CPU) is None
        batch, _ = load(store, store.layout.layers, [[0, 1]])
        stored = store.read_clips([0], [[0, 1]], arrays=("cls",)).cls
        assert np.array_equal(batch.cls.numpy(), stored.astype(np.float32))


@pytest.mark.parametrize("head", ["linear", "side4video"])
def test_networks_train_on_them_and_evaluate_on_stores_with_and_without(head, coded, float_store, tmp_path):
    config = TrainConfig(
        features=coded, out=tmp_path / "run", head=head, epochs=1, warmup_epochs=0.0, batch_size=4, device="cpu",
        **({} if head == "linear" else {"side_width": 64}),
    )  # fmt: skip
    assert train_run(config)["epochs"] == 1
    here, there = evaluate_run(config.out), evaluate_run(config.out, features=float_store)
    assert here["videos"] == there["videos"] == 2
    source = (config.out / "config.json").read_text()
    assert open_store(coded).facts.codecs["cls"].sha256 in source, "a run tells what it was trained on"
