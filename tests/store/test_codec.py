import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from s4v.errors import ConfigError, EnvironmentFailedError
from s4v.store.codec import Codec, check_finite, fit_absmax_scale

TOKENS = hnp.arrays(np.float32, (3, 5, 8), elements=st.floats(-1000, 1000, width=32))


@given(tokens=TOKENS)
def test_float32_codes_are_the_tokens(tokens):
    codec = Codec(dtype="float32")
    assert np.array_equal(codec.decode(codec.encode(tokens, 0), 0), tokens)


@given(tokens=TOKENS)
def test_int8_error_is_at_most_half_a_step(tokens):
    scale = fit_absmax_scale(np.abs(tokens).max(axis=(0, 1))[None])
    codec = Codec(dtype="int8", scale=scale)
    codes = codec.encode(tokens, 0)
    assert codes.dtype == np.int8
    assert codes.min() >= -127, "-128 is the fill value"
    assert np.all(np.abs(codec.decode(codes, 0) - tokens) <= scale[0] * 0.5001 + 1e-30)


def test_projection_keeps_what_lies_in_its_basis():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(8, 3)))[0].T.astype(np.float32)[None]
    mean = rng.normal(size=(1, 8)).astype(np.float32)
    inside = mean[0] + rng.normal(size=(4, 5, 3)).astype(np.float32) @ basis[0]
    codec = Codec(dtype="float32", mean=mean, basis=basis)
    assert codec.encode(inside, 0).shape == (4, 5, 3)
    np.testing.assert_allclose(codec.decode(codec.encode(inside, 0), 0), inside, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
def test_torch_and_numpy_give_the_same_codes(dtype):
    tokens = np.random.default_rng(1).normal(size=(4, 6, 8)).astype(np.float32)
    scale = fit_absmax_scale(np.abs(tokens).max(axis=(0, 1))[None]) if dtype == "int8" else None
    codec = Codec(dtype=dtype, scale=scale)
    codes = codec.encode(tokens, 0)
    on_torch = codec.map_parts(torch.from_numpy)
    torch_codes = on_torch.encode(torch.from_numpy(tokens), 0)
    assert np.array_equal(codes, torch_codes.numpy())
    assert np.array_equal(codec.decode(codes, 0), on_torch.decode(torch_codes, 0).numpy())


def test_constant_zero_channel_decodes_to_zero():
    scale = fit_absmax_scale(np.array([[0.0, 2.0]]))
    codec = Codec(dtype="int8", scale=scale)
    tokens = np.array([[[0.0, -2.0]]], dtype=np.float32)
    assert np.array_equal(codec.decode(codec.encode(tokens, 0), 0), tokens)


def test_hash_changes_with_every_part():
    scale = np.ones((2, 4), np.float32)
    codecs = [
        Codec(dtype="float16"),
        Codec(dtype="float32"),
        Codec(dtype="int8", scale=scale),
        Codec(dtype="int8", scale=scale * 2),
        Codec(dtype="int8", scale=scale, mean=scale),
    ]
    assert len({codec.sha256 for codec in codecs}) == len(codecs)
    assert Codec(dtype="int8", scale=scale.copy()).sha256 == codecs[2].sha256


def test_int8_without_scale_is_refused():
    with pytest.raises(ConfigError, match="int8 codes, and no others, have a scale"):
        Codec(dtype="int8")


@pytest.mark.parametrize("array", [np.asarray, torch.tensor])
def test_float16_overflow_names_the_block(array):
    tokens = array([[1.0, 70000.0]])
    codes = Codec(dtype="float16").encode(tokens, 0)
    with pytest.raises(EnvironmentFailedError, match=r"block 17 reach 7e\+04, above float16's 65504"):
        check_finite(codes, tokens, 17)


def test_nan_names_the_block():
    tokens = np.array([[1.0, np.nan]])
    with pytest.raises(EnvironmentFailedError, match="block 3 produced NaN or infinity"):
        check_finite(tokens, tokens, 3)
