import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from s4v.errors import ConfigError, EnvironmentFailedError
from s4v.store.codecs.affine import AffineCodec, check_finite, fit_basis, fit_scale, round_mantissas
from s4v.store.fidelity import measure_fidelity

TOKENS = hnp.arrays(np.float32, (3, 5, 8), elements=st.floats(-1000, 1000, width=32))


def scale_of(tokens):
    """(1, K) int8 steps for what is left of tokens (n, K) without their mean."""
    return fit_scale(np.abs(tokens).max(axis=0)[None], tokens.astype(np.float64).std(axis=0)[None])


@given(tokens=TOKENS)
def test_float32_codes_are_the_tokens(tokens):
    codec = AffineCodec(dtype="float32")
    assert np.array_equal(codec.decode(codec.encode(tokens, 0), 0), tokens)


@given(tokens=TOKENS)
def test_int8_error_is_at_most_half_a_step(tokens):
    scale = scale_of(tokens.reshape(-1, tokens.shape[-1]))
    codec = AffineCodec(dtype="int8", scale=scale)
    codes = codec.encode(tokens, 0)
    assert codes.dtype == np.int8
    assert codes.min() >= -127, "-128 is the fill value"
    assert np.all(np.abs(codec.decode(codes, 0) - tokens) <= scale[0] * 0.5001 + 1e-30)


def test_projection_keeps_what_lies_in_its_basis():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(8, 3)))[0].T.astype(np.float32)[None]
    mean = rng.normal(size=(1, 8)).astype(np.float32)
    inside = mean[0] + rng.normal(size=(4, 5, 3)).astype(np.float32) @ basis[0]
    codec = AffineCodec(dtype="float32", mean=mean, basis=basis)
    assert codec.encode(inside, 0).shape == (4, 5, 3)
    np.testing.assert_allclose(codec.decode(codec.encode(inside, 0), 0), inside, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
def test_torch_and_numpy_give_the_same_codes(dtype):
    tokens = np.random.default_rng(1).normal(size=(4, 6, 8)).astype(np.float32)
    scale = scale_of(tokens.reshape(-1, tokens.shape[-1])) if dtype == "int8" else None
    codec = AffineCodec(dtype=dtype, scale=scale)
    codes = codec.encode(tokens, 0)
    on_torch = codec.map_parts(torch.from_numpy)
    torch_codes = on_torch.encode(torch.from_numpy(tokens), 0)
    assert np.array_equal(codes, torch_codes.numpy())
    assert np.array_equal(codec.decode(codes, 0), on_torch.decode(torch_codes, 0).numpy())


def test_constant_zero_channel_decodes_to_zero():
    scale = fit_scale(np.array([[0.0, 2.0]]), np.array([[0.0, 0.4]]))
    codec = AffineCodec(dtype="int8", scale=scale)
    tokens = np.array([[[0.0, -2.0]]], dtype=np.float32)
    found = codec.decode(codec.encode(tokens, 0), 0)
    assert found[0, 0, 0] == 0
    assert found[0, 0, 1] == pytest.approx(-2, abs=float(scale[0, 1]) / 2)


def test_hash_changes_with_every_part():
    scale = np.ones((2, 4), np.float32)
    codecs = [
        AffineCodec(dtype="float16"),
        AffineCodec(dtype="float32"),
        AffineCodec(dtype="int8", scale=scale),
        AffineCodec(dtype="int8", scale=scale * 2),
        AffineCodec(dtype="int8", scale=scale, mean=scale),
    ]
    assert len({codec.sha256 for codec in codecs}) == len(codecs)
    assert AffineCodec(dtype="int8", scale=scale.copy()).sha256 == codecs[2].sha256


def test_int8_without_scale_is_refused():
    with pytest.raises(ConfigError, match="int8 codes, and no others, have a scale"):
        AffineCodec(dtype="int8")


@pytest.mark.parametrize("array", [np.asarray, torch.tensor])
def test_float16_overflow_names_the_block(array):
    tokens = array([[1.0, 70000.0]])
    codes = AffineCodec(dtype="float16").encode(tokens, 0)
    with pytest.raises(EnvironmentFailedError, match=r"block 17 reach 7e\+04, above float16's 65504"):
        check_finite(codes, tokens, 17)


def test_nan_names_the_block():
    tokens = np.array([[1.0, np.nan]])
    with pytest.raises(EnvironmentFailedError, match="block 3 produced NaN or infinity"):
        check_finite(tokens, tokens, 3)


def test_nan_names_the_video():
    tokens = np.ones((3, 2, 4), dtype=np.float32)
    tokens[1, 1, 2] = np.nan
    with pytest.raises(EnvironmentFailedError, match=r"block 3 produced NaN or infinity on b\.mp4"):
        check_finite(tokens, tokens, 3, ["a.mp4", "b.mp4"])


def test_where_most_channels_stand_still_the_others_keep_their_steps():
    absmax = np.array([[0.0, 0.0, 0.0, 2.0, 0.3]])
    scale = fit_scale(absmax, absmax / 4)
    np.testing.assert_allclose(scale[0, 3:], 1.5 * absmax[0, 3:] / 127, rtol=1e-6)
    assert (scale[0, :3] > 0).all() and (scale[0, :3] < scale[0, 4]).all()
    assert (fit_scale(np.zeros((1, 2)), np.zeros((1, 2))) == 1).all()


def test_a_code_that_overflows_where_its_token_does_not_is_told_so():
    tokens = np.full((1, 4), 4e4, dtype=np.float32)
    codec = AffineCodec(dtype="float16", basis=np.full((1, 1, 4), 0.5, dtype=np.float32))
    with pytest.raises(EnvironmentFailedError, match=r"codes of backbone block 2 pass .* its tokens reach 4e\+04"):
        check_finite(codec.encode(tokens, 0), tokens, 2)


def test_a_channel_that_stood_still_may_move_later():
    absmax = np.array([[4.0, 2.0, 1.0, 0.0]])
    codec = AffineCodec(dtype="int8", scale=fit_scale(absmax, absmax / 4))
    tokens = np.array([[[0.0, 0.0, 0.0, 0.01]]], dtype=np.float32)
    np.testing.assert_allclose(codec.decode(codec.encode(tokens, 0), 0), tokens, atol=1e-4)


def random_tokens(seed, num_tokens=400, width=24):
    """Tokens whose channels are mixed and whose variances fall by some law."""
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.5, 1) ** np.arange(width)
    mixing = np.linalg.qr(rng.normal(size=(width, width)))[0]
    return (rng.normal(size=(num_tokens, width)) * spread @ mixing + 3 * rng.normal(size=width)).astype(np.float32)


@given(seed=st.integers(0, 1000), channels=st.integers(1, 24))
def test_error_of_a_projection_is_the_variance_it_discards(seed, channels):
    tokens = random_tokens(seed)
    mean = tokens.mean(axis=0, dtype=np.float64)
    covariance = np.cov(tokens.T.astype(np.float64), bias=True)
    codec = AffineCodec(
        dtype="float32", mean=mean[None].astype(np.float32), basis=fit_basis(covariance, channels)[None]
    )
    decoded = codec.decode(codec.encode(tokens, 0), 0)
    discarded = np.linalg.eigvalsh(covariance)[: 24 - channels].sum()
    found = ((decoded - tokens).astype(np.float64) ** 2).sum(axis=1).mean()
    assert found == pytest.approx(discarded, rel=1e-3, abs=1e-6 * np.trace(covariance))
    kept = measure_fidelity(tokens, decoded, 0).variance_kept
    assert kept == pytest.approx(1 - discarded / np.trace(covariance), abs=1e-4)


@given(seed=st.integers(0, 1000))
def test_one_covariance_has_one_basis(seed):
    covariance = np.cov(random_tokens(seed).T)
    basis = fit_basis(covariance, 5)
    np.testing.assert_allclose(basis @ basis.T, np.eye(5), atol=1e-5)
    assert (np.take_along_axis(basis, np.abs(basis).argmax(axis=1)[:, None], axis=1) > 0).all()
    variances = np.diag(basis @ covariance @ basis.T)
    assert (np.diff(variances) <= 1e-6).all(), "most variance first"


@given(values=hnp.arrays(np.float16, (2, 7), elements=st.floats(-60000, 60000, width=16)), bits=st.integers(1, 9))
def test_kept_bits_bound_the_relative_error(values, bits):
    rounded = round_mantissas(values, bits)
    assert rounded.dtype == np.float16 and rounded.shape == values.shape
    normal = (np.abs(values) > 6.2e-5) & np.isfinite(rounded)
    error = np.abs(rounded.astype(np.float64) - values)
    assert (error[normal] <= np.abs(values[normal].astype(np.float64)) * 2.0 ** -(bits + 1) * 1.001).all()
    assert round_mantissas(values, None) is values


def massive_tokens(seed=0, num_tokens=4000, width=1024):
    """As giant ViTs have them: ordinary channels of uneven size, two channels that are large for all tokens, and a
    few tokens that reach hundreds of times the usual in those two and in one more.

    Source:
        Sun et al., "Massive Activations in Large Language Models", arXiv 2402.17762, which measures ViTs too.
    """
    spread = np.random.default_rng(99).lognormal(0, 0.3, width)  # the layer's own, whatever the sample
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(num_tokens, width)) * spread
    tokens[:, :2] += [40.0, -25.0]
    massive = rng.permutation(num_tokens)[: num_tokens // 200]
    tokens[massive[:, None], [0, 1, 2]] += rng.uniform(120, 180, (len(massive), 3)) * [1, -1, 1]
    return tokens.astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
def test_int8_keeps_massive_tokens_and_all_others(seed):
    fitted, fresh = massive_tokens(2 * seed), massive_tokens(2 * seed + 1)
    mean = fitted.mean(axis=0, keepdims=True)
    codec = AffineCodec(dtype="int8", mean=mean, scale=scale_of(fitted - mean))
    found = measure_fidelity(fresh, codec.decode(codec.encode(fresh, 0), 0), 0)
    assert found.error_median < 0.03
    assert found.normed_error_worst < 0.05


def test_clipping_massive_tokens_is_what_absmax_avoids():
    tokens = massive_tokens()
    mean = tokens.mean(axis=0, keepdims=True)
    absmax = np.percentile(np.abs(tokens - mean), 99, axis=0)[None]
    clipped = AffineCodec(dtype="int8", mean=mean, scale=fit_scale(absmax, np.zeros_like(absmax)))
    found = measure_fidelity(tokens, clipped.decode(clipped.encode(tokens, 0), 0), 0)
    assert found.normed_error_worst > 0.5


def test_fidelity_of_known_errors():
    tokens = np.array([[3.0, 4.0], [-3.0, -4.0], [0.0, 0.0], [0.0, 0.0]])
    decoded = tokens.copy()
    decoded[0, 1] += 1
    found = measure_fidelity(tokens, decoded, 7)
    assert found.layer == 7
    assert found.error_worst == pytest.approx(0.2)
    assert found.error_median == 0
    assert found.variance_kept == pytest.approx(1 - 1 / 50)
    assert found.cosine_worst == 0, "a token at the mean points nowhere"
    exact = measure_fidelity(tokens, tokens, 0)
    assert (exact.variance_kept, exact.error_worst, exact.normed_error_worst) == (1, 0, 0)
