"""Random features: their inner products are the stated kernels in expectation, and relative in position.

Legend: B batch, T sequence, H heads, d head size, F frequencies, M features, N pairs of vectors.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.errors import UsageError
from stackwise_jax.kernels.linear_attention import linear_attention
from stackwise_jax.model.features import (
    MODES,
    TYPES,
    KernelSpec,
    exact_kernel,
    frequencies,
    init_features,
    input_scale,
    key_features,
    query_features,
    rotary_angles,
    score_scale,
)
from stackwise_jax.model.rope import rope

D_HEAD, N, DRAWS = 16, 64, 24
SIZES = (64, 256, 1024, 4096)
KERNELS = [(type, mode) for type in TYPES for mode in MODES]
IN_EXPECTATION = [("gaussian", "linear"), ("linear", "linear")]
EXACT = [kernel for kernel in KERNELS if kernel not in IN_EXPECTATION]
THETA = 100.0  # turns even the slowest pair well within the positions used here


spec_of = partial(KernelSpec, bandwidth=1.0)  # at which every kernel falls off within these vectors


def vectors(seed=0, size=0.5, shape=(1, N, 1, D_HEAD)):
    """Two arrays of queries or keys; short ones, for the variance of exp(w . x) is exponential in their length."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape) * size, jnp.float32) for _ in range(2)]


def slope(errors):
    """Of log error over log M."""
    return np.polyfit(np.log(SIZES), np.log(errors), 1)[0]


def inner(spec, key, x_BTHd, y_BTHd, x_positions=None, y_positions=None):
    """phi(x) . phi(y) for one draw of the matrix."""
    params = init_features(spec, x_BTHd.shape[-1], key)
    x_BTHM, y_BTHM = (
        key_features(spec, params, z, None if at is None else jnp.full((1, 1), at), THETA)
        for z, at in ((x_BTHd, x_positions), (y_BTHd, y_positions))
    )
    return jnp.sum(x_BTHM * y_BTHM, axis=-1)


def rms_over_draws(difference):
    """Root mean square of difference(key) over pairs and draws of the matrix."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return float(jnp.sqrt(jnp.mean(jnp.square(jax.lax.map(jax.jit(difference), keys)))))


@pytest.mark.parametrize(("type", "mode"), KERNELS)
def test_error_of_the_inner_products_falls_as_one_over_the_root_of_the_features(type, mode):
    x_BTHd, y_BTHd = vectors()

    def error(n):
        spec = spec_of(type, mode, n)
        exact = exact_kernel(spec, x_BTHd, y_BTHd)
        return rms_over_draws(lambda key: inner(spec, key, x_BTHd, y_BTHd) - exact)

    errors = [error(n) for n in SIZES]
    assert slope(errors) == pytest.approx(-0.5, abs=0.1)
    spread = float(jnp.std(exact_kernel(spec_of(type, mode), x_BTHd, y_BTHd)))
    assert errors[-1] < 0.5 * spread, "the kernel itself is resolved"


def test_exact_kernels_are_those_of_the_formulas():
    x, y = np.array([0.3, -0.2, 1.0, 0.5]), np.array([-0.1, 0.4, 0.7, 0.5])
    delta = (x - y) / 2  # the root of the head size; the last entries are equal

    def exact(type, mode="softmax", **fields):
        spec = spec_of(type, mode, **fields)
        return float(exact_kernel(spec, jnp.asarray(x, jnp.float32)[None], jnp.asarray(y, jnp.float32)[None])[0])

    assert exact("gaussian") == exact("gaussian", "linear") == pytest.approx(np.exp(-(delta @ delta) / 2))
    assert exact("gaussian", bandwidth=3.0) == pytest.approx(np.exp(-(delta @ delta) / 18))
    assert exact("laplacian") == pytest.approx(np.exp(-np.abs(delta).sum() / 2))
    assert exact("cauchy") == pytest.approx(np.prod(1 / (1 + delta**2)))
    assert exact("uniform") == pytest.approx(np.prod(np.sin(delta[:3]) / delta[:3]))
    assert exact("linear") == pytest.approx(x @ y)
    for type in ("laplacian", "cauchy", "uniform"):
        assert exact(type, "linear") == pytest.approx(1 + exact(type) / 2)
    size, angle = np.linalg.norm(x) * np.linalg.norm(y), np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    arc_cosine = size * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / np.pi
    assert exact("linear", "linear") == pytest.approx(arc_cosine, rel=1e-5)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_features_of_linear_attention_are_finite_and_not_negative(type, size):
    spec = spec_of(type, "linear", 64)
    params = init_features(spec, D_HEAD, jax.random.key(1))
    q_BTHd, k_BTHd = vectors(size=size)
    for phi_BTHM in (query_features(spec, params, q_BTHd), key_features(spec, params, k_BTHd)):
        assert phi_BTHM.shape == (1, N, 1, 64) and phi_BTHM.dtype == jnp.float32
        assert np.isfinite(phi_BTHM).all() and (np.asarray(phi_BTHM) >= 0).all()
    assert (np.asarray(query_features(spec, params, q_BTHd)).sum(-1) > 0).all()


def test_exponents_of_keys_are_capped_and_everything_stays_finite():
    spec = KernelSpec("gaussian", "linear", 64, bandwidth=0.5)
    params = {"matrix": jnp.full((256, 64), 8.0)}
    x_BTHd = jnp.full((1, 8, 1, 256), 0.5)  # w . x - |x|^2 = 127

    def loss(x_BTHd):
        q_BTHM, k_BTHM = query_features(spec, params, x_BTHd), key_features(spec, params, x_BTHd)
        return jnp.sum(jnp.sin(linear_attention(q_BTHM, k_BTHM, x_BTHd, causal=True))), k_BTHM

    (_, k_BTHM), grad = jax.value_and_grad(loss, has_aux=True)(x_BTHd)
    np.testing.assert_allclose(k_BTHM, np.exp(60) / 8, rtol=1e-5)
    assert np.isfinite(grad).all() and np.abs(grad).max() > 0


def test_rows_that_see_long_keys_only_see_them_all_alike():
    spec = KernelSpec("gaussian", "linear", 64)
    params = init_features(spec, D_HEAD, jax.random.key(1))
    q_BTHd, k_BTHd = vectors(size=20.0)  # |k|^2 = 400 in the kernel, and exp(-400) is 0 in float32
    q_BTHM, k_BTHM = query_features(spec, params, q_BTHd), key_features(spec, params, k_BTHd)
    np.testing.assert_allclose(k_BTHM, np.exp(-60) / 8, rtol=1e-5)
    o_BTHd = linear_attention(q_BTHM, k_BTHM, k_BTHd, causal=False)
    np.testing.assert_allclose(o_BTHd, np.broadcast_to(k_BTHd.mean(1, keepdims=True), k_BTHd.shape), atol=1e-4)


@pytest.mark.parametrize(("type", "mode"), KERNELS)
def test_query_and_key_features_differ_by_a_factor_per_query(type, mode):
    spec = spec_of(type, mode, 64)
    params = init_features(spec, D_HEAD, jax.random.key(1))
    q_BTHd, _ = vectors(size=1.0)
    as_query, as_key = query_features(spec, params, q_BTHd), key_features(spec, params, q_BTHd)
    factor = as_query.max(-1, keepdims=True) / as_key.max(-1, keepdims=True)
    np.testing.assert_allclose(as_query, as_key * factor, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(as_query.max(-1) if (type, mode) == IN_EXPECTATION[0] else factor[..., 0] / 8, 1 / 8)


@pytest.mark.parametrize(("type", "mode"), EXACT)
def test_trigonometric_features_and_those_of_inner_products_are_relative_for_every_draw(type, mode):
    spec = spec_of(type, mode, 64)
    x_BTHd, y_BTHd = vectors(size=1.0)
    at = [inner(spec, jax.random.key(3), x_BTHd, y_BTHd, 5 + shift, 2 + shift) for shift in (0, 3, 40)]
    scale = max(1.0, np.abs(at[0]).max())
    for shifted in at[1:]:
        np.testing.assert_allclose(shifted, at[0], atol=1e-5 * scale)
    elsewhere = inner(spec, jax.random.key(3), x_BTHd, y_BTHd, 9, 2)
    assert np.abs(elsewhere - at[0]).max() > 1e-2 * scale, "positions do enter"


@pytest.mark.parametrize(("type", "mode"), IN_EXPECTATION)
def test_exponential_and_rectified_features_are_relative_in_expectation(type, mode):
    x_BTHd, y_BTHd = vectors()

    def error(n):
        spec = spec_of(type, mode, n)
        at = lambda key, shift: inner(spec, key, x_BTHd, y_BTHd, 5 + shift, 2 + shift)
        return rms_over_draws(lambda key: at(key, 40) - at(key, 0))

    assert slope([error(n) for n in SIZES]) == pytest.approx(-0.5, abs=0.1)
    assert relative_error(spec_of(type, mode)) < 1e-5


def relative_error(spec):
    """How much the exact kernel of vectors that RoPE has turned changes when both positions move by 40."""
    x_BTHd, y_BTHd = vectors(size=1.0)
    turn = lambda z_BTHd, position: rope(z_BTHd, jnp.full((1, 1), position), THETA)
    at = [exact_kernel(spec, turn(x_BTHd, 5 + shift), turn(y_BTHd, 2 + shift)) for shift in (0, 40)]
    return float(jnp.max(jnp.abs(at[1] - at[0]) / jnp.abs(at[0])))


@pytest.mark.parametrize("type", ["laplacian", "cauchy", "uniform"])
def test_rope_before_the_map_would_not_be_relative_for_kernels_that_rotations_change(type):
    assert relative_error(spec_of(type)) > 1e-3
    assert relative_error(KernelSpec("gaussian")) < 1e-5


def test_phases_are_those_that_frequencies_and_angles_say():
    """What `feature_attention` computes by itself from these arrays are the features of this file."""
    spec = KernelSpec("laplacian", "softmax", 64, bandwidth=0.7)
    params = init_features(spec, D_HEAD, jax.random.key(1))
    x_BTHd, _ = vectors(shape=(2, 8, 3, D_HEAD))
    positions_BT = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11]])
    turns_BTHF = positions_BT[:, :, None, None] * rotary_angles(spec, 50.0)
    phases_BTHF = x_BTHd @ frequencies(spec, params) + turns_BTHF
    phi_BTHM = jnp.concatenate([jnp.cos(phases_BTHF), jnp.sin(phases_BTHF)], axis=-1) / np.sqrt(32)
    np.testing.assert_allclose(key_features(spec, params, x_BTHd, positions_BT, 50.0), phi_BTHM, atol=1e-6)
    turned_BTHM = rope(key_features(spec, params, x_BTHd), positions_BT, 50.0)
    np.testing.assert_allclose(turned_BTHM, phi_BTHM, atol=1e-5)
    assert score_scale(spec, D_HEAD) == 8.0 and score_scale(KernelSpec("linear"), D_HEAD) == 0.25


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("type", TYPES)
def test_linear_attention_over_many_features_is_attention_with_the_exact_kernel(type, causal):
    spec = spec_of(type, "linear", 8192)
    params = init_features(spec, D_HEAD, jax.random.key(4))
    q_BTHd, k_BTHd = vectors(shape=(1, 24, 1, D_HEAD))
    v_BTHd = vectors(seed=1, size=1.0, shape=(1, 24, 1, D_HEAD))[0]
    attend = jax.jit(partial(linear_attention, causal=causal))
    got = attend(query_features(spec, params, q_BTHd), key_features(spec, params, k_BTHd), v_BTHd)
    pairs = [jnp.broadcast_to(x, (24, 24, D_HEAD)) for x in (q_BTHd[0, :, 0][:, None], k_BTHd[0, :, 0][None])]
    weights_TS = exact_kernel(spec, *pairs) * (np.tri(24) if causal else 1)
    expected = (weights_TS / weights_TS.sum(-1, keepdims=True)) @ v_BTHd[0, :, 0]
    np.testing.assert_allclose(got[0, :, 0], expected, atol=0.1)
    assert np.sqrt(np.mean((got[0, :, 0] - expected) ** 2)) < 0.02


@pytest.mark.parametrize("type", TYPES)
def test_the_same_key_draws_the_same_matrix(type):
    spec = spec_of(type, "linear", 64)
    draw = lambda seed, dtype=jnp.float32: init_features(spec, D_HEAD, jax.random.key(seed), dtype)["matrix"]
    assert draw(0).shape == (D_HEAD, 64 if type in ("gaussian", "linear") else 16)
    np.testing.assert_array_equal(draw(0), draw(0))
    np.testing.assert_array_equal(draw(0, jnp.bfloat16), draw(0).astype(jnp.bfloat16))
    assert not np.array_equal(draw(0), draw(1)) and np.isfinite(draw(0)).all()


@pytest.mark.parametrize(("type", "mode"), KERNELS)
def test_features_keep_bf16_in_softmax_mode_and_are_float32_in_linear_mode(type, mode):
    spec = spec_of(type, mode, 64)
    params = init_features(spec, D_HEAD, jax.random.key(1))
    exact, _ = vectors(size=1.0)
    positions_BT = jnp.arange(N)[None]
    got = query_features(spec, params, exact.astype(jnp.bfloat16), positions_BT)
    assert got.dtype == (jnp.bfloat16 if mode == "softmax" else jnp.float32)
    if mode == "softmax" and type != "linear":  # the frequencies enter in the dtype of the heads, too
        rounded = frequencies(spec, params).astype(jnp.bfloat16).astype(jnp.float32)
        params = {"matrix": rounded / input_scale(spec, D_HEAD)}
    expected = query_features(spec, params, exact.astype(jnp.bfloat16).astype(jnp.float32), positions_BT)
    np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"type": "sinc"}, "model.kernel.type is 'sinc'; write one of"),
        ({"mode": "hard"}, "model.kernel.mode is 'hard'; write one of"),
        ({"features": 0}, "model.kernel.features is 0; write a multiple of 2 for"),
        ({"features": 7}, "model.kernel.features is 7; write a multiple of 2 for"),
        ({"features": 66, "mode": "linear"}, "model.kernel.features is 66; write a multiple of 4 for"),
        ({"type": "gaussian", "features": -1, "mode": "linear"}, "model.kernel.features is -1; write at least 1 for"),
        ({"bandwidth": 0.0}, "model.kernel.bandwidth is 0.0; write a positive number"),
        ({"bandwidth": float("nan")}, "model.kernel.bandwidth is nan; write a positive number"),
        ({"type": "linear", "bandwidth": 2.0}, "the linear kernel has no bandwidth; leave it out"),
    ],
)
def test_impossible_kernels_are_refused_in_one_sentence(fields, sentence):
    with pytest.raises(UsageError, match=sentence):
        KernelSpec(**({"type": "laplacian"} | fields))


def test_specs_are_values():
    spec = KernelSpec("gaussian", "linear", 7)
    assert spec == KernelSpec("gaussian", "linear", 7) and len({spec, KernelSpec("gaussian", "linear", 7)}) == 1
    assert spec != KernelSpec("gaussian", "linear", 7, learn=True)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_heavy_tails_stay_finite_in_half_precision(dtype):
    spec = KernelSpec("laplacian", features=2**14)
    draws = [init_features(spec, 128, jax.random.key(seed), dtype)["matrix"] for seed in range(3)]
    assert all(np.isfinite(np.asarray(draw, np.float32)).all() for draw in draws)
    assert max(float(jnp.abs(draw.astype(jnp.float32)).max()) for draw in draws) > 1e4  # the tails are there
