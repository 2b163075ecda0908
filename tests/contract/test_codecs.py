"""What every codec of the table must do, and a toy that is added by a line in each of two files and taken out again."""

from __future__ import annotations

import json

import array_api_compat
import numpy as np
import pytest
import torch

from s4v.errors import ConfigError, StoreMismatchError
from s4v.extract import codec_fit
from s4v.extract.extraction import extract_dataset
from s4v.store.codecs import CODECS
from s4v.store.codecs.contract import Codec
from s4v.store.layout import DEFAULT_CODEC, StoreLayout
from s4v.store.reader import open_store
from s4v.store.verify import verify_store
from s4v.train.config import TrainConfig
from s4v.train.loop import train_run

LAYOUT = StoreLayout(
    num_rows=1,
    num_views=1,
    num_frames=1,
    layers=(0, 1),
    num_patches=5,
    width=8,
    channels=4,
    embed_dim=8,
    image_size=(4, 4),
    patch_dtype="int8",
)


class RootCodec(Codec):
    """Codes are roots of tokens with their signs: small numbers keep more of themselves. No affine map."""

    __slots__ = ()

    name = "root"

    @classmethod
    def part_shapes(cls, layout):
        return {"reach": (len(layout.layers), layout.width)}

    @classmethod
    def are_whole(cls, dtype, parts):
        return dtype == "int8" and set(parts) == {"reach"}

    def _reach(self, layer, like):
        xp = array_api_compat.array_namespace(like)
        return xp, xp.asarray(self.parts["reach"][layer], device=array_api_compat.device(like))

    def encode(self, tokens, layer):
        xp, reach = self._reach(layer, tokens)
        values = xp.astype(tokens, xp.float32)
        roots = xp.sign(values) * xp.sqrt(xp.abs(values) / reach)
        return xp.astype(xp.clip(xp.round(127 * roots), -127, 127), xp.int8)

    def decode(self, codes, layer):
        xp, reach = self._reach(layer, codes)
        values = xp.astype(codes, xp.float32) / 127
        return values * xp.abs(values) * reach


def fit_root(dtype, sample, backbone, layers, *, channels, batch_size, report):
    assert channels == backbone.info.width
    tokens_of = codec_fit.SampleTokens("calibrating the codec", sample, backbone, layers, batch_size, 1, report)
    reaches = []
    tokens_of.hand_to(
        lambda tokens: reaches.append(torch.stack([one.flatten(0, -2).abs().amax(0).float() for one in tokens]))
    )
    return RootCodec(dtype=dtype, reach=(1.2 * torch.stack(reaches).amax(0)).cpu().numpy())


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(CODECS, RootCodec.name, RootCodec)
    monkeypatch.setitem(codec_fit.FITS, RootCodec.name, fit_root)


def test_a_toy_codes_a_store_that_is_read_verified_and_trained_on(toy, video_folder, make_config, tmp_path):
    config = make_config(video_folder, tmp_path / "root.zarr", codec="root", dtype="int8", channels=192, num_decoders=1)
    extract_dataset(config)
    store = open_store(tmp_path / "root.zarr")
    assert store.facts.codec.name == "root" and store.facts.codec.parts == ("reach",) and verify_store(store) == []
    exact = make_config(video_folder, tmp_path / "exact.zarr", dtype="float32", num_decoders=1)
    extract_dataset(exact)
    ours, theirs = (one.read_clips([0], [[0, 1]]) for one in (store, open_store(exact.out)))
    for place in range(len(store.layout.layers)):
        decoded = store.codec.decode(ours.patches[:, :, place], place)
        tokens = theirs.patches[:, :, place]
        assert np.abs(decoded - tokens).max() <= 0.03 * np.abs(tokens).max()
    assert store.codec.as_affine(0, ours.patches) is None
    summary = train_run(
        TrainConfig(features=store.path, out=tmp_path / "run", epochs=1, batch_size=4, side_width=64, device="cpu")
    )
    assert summary["epochs"] == 1
    mixed = TrainConfig(
        **dict(features=store.path, out=tmp_path / "mixed", epochs=1, batch_size=4, side_width=64, device="cpu"),
        mix="mixup",
    )
    assert not store.codec.is_linear and train_run(mixed)["epochs"] == 1, "it is decoded first"
    with pytest.raises(StoreMismatchError, match="was begun with --codec root; found affine"):
        extract_dataset(make_config(video_folder, store.path, dtype="int8", channels=192, num_decoders=1))


def test_a_toy_codes_class_tokens_too(toy, video_folder, float_store, make_config, tmp_path):
    options = dict(codec="root", dtype="int8", channels=192, cls_dtype="int8", num_decoders=1, limit=2)
    extract_dataset(make_config(video_folder, tmp_path / "root.zarr", **options))
    store, exact = open_store(tmp_path / "root.zarr"), open_store(float_store)
    assert store.cls_codec.name == "root" and store.attributes["cls_codec"]["name"] == "root"
    assert store.attributes["codecs"]["cls"] == "root" and set(store.codec_arrays) == {"codec/reach", "cls_codec/reach"}
    tokens = exact.read_clips([0], [[0, 1]], arrays=("cls",)).cls
    decoded = store.decode_cls(store.read_clips([0], [[0, 1]], arrays=("cls",)).cls)
    assert np.abs(decoded - tokens).max() <= 0.03 * np.abs(tokens).max() and not np.array_equal(decoded, tokens)


def test_a_codec_that_is_gone_is_named(toy, video_folder, make_config, tmp_path, monkeypatch):
    path = tmp_path / "root.zarr"
    extract_dataset(make_config(video_folder, path, codec="root", dtype="int8", channels=192, num_decoders=1, limit=2))
    monkeypatch.delitem(CODECS, "root")
    with pytest.raises(StoreMismatchError, match="has a codec 'root'; this s4v knows affine. Update s4v."):
        _ = open_store(path).codec
    with pytest.raises(ConfigError, match="--codec takes affine; found 'cube'"):
        make_config(video_folder, tmp_path / "cube.zarr", codec="cube")


def test_a_codec_that_nothing_fits_is_told(toy, video_folder, make_config, tmp_path, monkeypatch):
    monkeypatch.delitem(codec_fit.FITS, "root")
    config = make_config(video_folder, tmp_path / "root.zarr", codec="root", num_decoders=1, limit=1)
    with pytest.raises(
        ConfigError, match="nothing fits a codec 'root'; those that can be fitted are affine.*--codec-f"
    ):
        extract_dataset(config)


def test_todays_codec_leaves_no_name_in_a_store(int8_store):
    """Stores stay what they were, to the byte."""
    recorded = json.loads((int8_store / "zarr.json").read_text())["attributes"]["s4v"]["codec"]
    assert set(recorded) == {"dtype", "parts", "sha256"}
    assert open_store(int8_store).facts.codec.name == DEFAULT_CODEC


@pytest.mark.parametrize("name", [name for name in CODECS if name != RootCodec.name])
class TestEveryCodec:
    @pytest.fixture(params=["all parts", "no parts"])
    def codec(self, name, request):
        generator = np.random.default_rng(0)
        kind = CODECS[name]
        parts = {part: generator.uniform(0.1, 1, shape) for part, shape in kind.part_shapes(LAYOUT).items()}
        if "basis" in parts:
            parts["basis"] = np.stack([np.linalg.qr(one.T)[0].T for one in parts["basis"]])
        parts = {part: array.astype(np.float32) for part, array in parts.items()}
        if request.param == "no parts":
            return kind(dtype="float32")
        assert kind.are_whole("int8", parts)
        return kind(dtype="int8", **parts)

    def test_codes_decode_on_any_library_alike(self, codec):
        width = LAYOUT.width if not codec.parts else LAYOUT.channels
        codes = np.random.default_rng(1).integers(-127, 128, (2, 5, width)).astype(codec.dtype)
        found = codec.decode(codes, 1)
        assert found.shape == (2, 5, LAYOUT.width) and found.dtype == np.float32
        moved = codec.map_parts(torch.from_numpy)
        np.testing.assert_allclose(moved.decode(torch.from_numpy(codes), 1).numpy(), found, rtol=1e-5, atol=1e-5)

    def test_an_affine_map_is_what_decoding_does(self, codec):
        codes = np.random.default_rng(2).integers(-127, 128, (3, LAYOUT.channels)).astype(np.int8)
        affine = codec.as_affine(0, codes)
        if affine is None:
            pytest.skip("it has none")
        scaled = codes * (1 if affine.scale is None else affine.scale)
        expected = scaled @ affine.matrix + (0 if affine.offset is None else affine.offset)
        np.testing.assert_allclose(codec.decode(codes, 0), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(affine.matrix @ affine.matrix.T, np.eye(LAYOUT.channels), atol=1e-5)

    def test_its_hash_is_of_all_that_decodes(self, codec):
        again = codec.map_parts(np.copy)
        assert type(again) is type(codec) and again.sha256 == codec.sha256
        for part in codec.parts:
            changed = codec.map_parts(np.copy)
            changed.parts[part].flat[0] += 1
            assert changed.sha256 != codec.sha256, part
