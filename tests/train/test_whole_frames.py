"""Training on frames that are no squares: the stem's patches are the backbone's, and grids of other shapes are told."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from s4v.errors import StoreMismatchError
from s4v.extract.extraction import extract_dataset
from s4v.store.reader import open_store
from s4v.train.config import TrainConfig
from s4v.train.loop import train_run
from s4v.train.networks import find_network
from s4v.train.networks.contract import Outputs
from s4v.train.networks.parts import PixelStem
from s4v.train.run_folder import begin_with, open_run, require_matching_store


@pytest.fixture(scope="module")
def wide_store(video_folder, build_once, make_config):
    """32 x 128 pixels: 4 x 16 patches, as many as a square of 64 pixels has."""

    def make(root):
        extract_dataset(make_config(video_folder, root / "s.zarr", input_size=(32, 128), resize="whole"))

    return build_once("wide-whole", make) / "s.zarr"


@pytest.fixture(scope="module")
def run(wide_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    train_run(TrainConfig(features=wide_store, out=out, task="recognition", epochs=1, batch_size=4, device="cpu"))
    return out


def test_the_stem_sees_the_patches_row_by_row():
    stem = PixelStem(64, 8).eval()
    pixels = torch.randn(1, 3, 3, 16, 32)
    whole = stem(pixels)  # (1, 3, N, S), of 2 x 4 patches
    for place in range(8):
        down, across = divmod(place, 4)
        one = stem(pixels[..., 8 * down : 8 * down + 8, 8 * across : 8 * across + 8])
        torch.testing.assert_close(whole[:, :, place], one[:, :, 0])


def test_a_side_network_learns_from_whole_frames(run, wide_store):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert np.isfinite(json.loads(lines[-1])["train_loss"])
    assert open_run(run).source["backbone"]["image_size"] == [32, 128]
    require_matching_store(open_run(run), open_store(wide_store))


def test_a_grid_of_another_shape_is_told_though_it_has_as_many_patches(run, float_store):
    store = open_store(float_store)
    assert store.layout.num_patches == open_run(run).shape.num_patches
    with pytest.raises(StoreMismatchError, match=r"image_size: \[64, 64\] in the store, \[32, 128\] in the run"):
        require_matching_store(open_run(run), store)
    network = find_network("side4video").build(open_run(run).shape)
    with pytest.raises(StoreMismatchError, match=r"saw frames of 32x128 pixels, and .* has frames of 64x64"):
        begin_with(run, network, store)
    begin_with(run, network, replace_size(store, [32, 128]))


def replace_size(store, size):
    """The same store, as if its frames had another size."""
    store.attributes["backbone"]["image_size"] = size
    return store


def test_patches_that_are_no_squares_have_no_stem(float_store):
    store = open_store(float_store)
    store.attributes["backbone"]["patch_size"] = [16, 4]
    kind = find_network("side4video")
    outputs = Outputs("recognition", num_classes=2)
    options = kind.read_options({}, {})
    with pytest.raises(StoreMismatchError, match=r"takes square patches; those of .* have 16 x 4 pixels"):
        kind.plan(store, outputs, options, store.layout.layers)
    shape = kind.plan(store, outputs, replace(options, inputs="tokens"), store.layout.layers)
    assert shape.num_patches == 64
