"""Attention: meaning by gradient and by a naive loop, and every implementation against the reference.

Legend: B batch, T query rows, S key/value rows, H query heads, K key/value heads, d head size.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.kernels.attention import api, attention
from stackwise_jax.kernels.attention.chunked import attention_chunked

B, T, H, K, D_HEAD = 2, 12, 4, 2, 8
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12], np.int32)
IMPLEMENTATIONS = ["reference", "chunked"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Five query rows per chunk at T = 12, so that the last chunk is padded."""
    monkeypatch.setattr("stackwise_jax.kernels.attention.chunked.MAX_SCORES", 5 * T)


def qkv(n_queries=T, n_keys=T, n_kv=K, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (B, n_queries, H, D_HEAD), (B, n_keys, n_kv, D_HEAD), (B, n_keys, n_kv, D_HEAD)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def naive(q_BTHd, k_BSKd, v_BSKd, sees):
    """One query and head at a time, float64; sees(b, t, s) -> bool."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTHd, k_BSKd, v_BSKd))
    o = np.zeros_like(q)
    for b, t, h in np.ndindex(*q.shape[:3]):
        kept = [s for s in range(k.shape[1]) if sees(b, t, s)]
        if kept:
            head = h // (q.shape[2] // k.shape[2])
            p = np.exp(k[b, kept, head] @ q[b, t, h] / np.sqrt(q.shape[3]))
            o[b, t, h] = (p / p.sum()) @ v[b, kept, head]
    return o


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("n_kv", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_equals_a_naive_loop(implementation, n_kv, causal, packed):
    args = qkv(n_kv=n_kv)
    segments = {"q_segment_ids_BT": SEGMENTS, "kv_segment_ids_BS": SEGMENTS} if packed else {}

    def sees(b, t, s):
        in_document = SEGMENTS[b, t] == SEGMENTS[b, s] != 0 if packed else True
        return in_document and (s <= t or not causal)

    got = jax.jit(partial(attention, causal=causal, implementation=implementation, **segments))(*args)
    np.testing.assert_allclose(got, naive(*args, sees), atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causality_and_segments_by_gradient(implementation):
    q_BTHd, k_BSKd, v_BSKd = qkv()

    @jax.jit
    def gradients(row):
        def output(k_BSKd, v_BSKd):
            o_BTHd = attention(
                q_BTHd, k_BSKd, v_BSKd, causal=True, q_segment_ids_BT=SEGMENTS, implementation=implementation
            )
            return jnp.sum(jnp.square(o_BTHd[:, row]))

        return jax.grad(output, argnums=(0, 1))(k_BSKd, v_BSKd)

    for row in range(T):
        reached_BS = sum(np.abs(g).sum((2, 3)) for g in gradients(row)) > 0
        for b in range(B):
            seen = [s <= row and SEGMENTS[b, s] == SEGMENTS[b, row] != 0 for s in range(T)]
            np.testing.assert_array_equal(reached_BS[b], seen)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_see_nothing_give_zero_and_no_nan(implementation):
    args = qkv()

    def total(args):
        o_BTHd = attention(*args, causal=False, q_segment_ids_BT=SEGMENTS, implementation=implementation)
        return jnp.sum(jnp.square(o_BTHd)), o_BTHd

    (_, o_BTHd), grads = jax.value_and_grad(total, has_aux=True)(args)
    padding = SEGMENTS == 0
    assert not np.asarray(o_BTHd)[padding].any() and np.asarray(o_BTHd)[~padding].any()
    for grad in grads:
        assert np.isfinite(grad).all() and not np.asarray(grad)[padding].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decoding_with_a_cache_equals_the_full_pass(implementation):
    q_BTHd, k_BSKd, v_BSKd = qkv()
    attend = jax.jit(partial(attention, causal=True, implementation=implementation))
    full = attention(q_BTHd, k_BSKd, v_BSKd, causal=True)
    unwritten = np.full((B, 6, K, D_HEAD), 1e6, np.float32)
    for start, stop in ((0, 4), (4, 5), (5, 12)):
        cached = [jnp.concatenate([x[:, :stop], unwritten[:, : 18 - stop]], 1) for x in (k_BSKd, v_BSKd)]
        positions = jnp.broadcast_to(jnp.arange(start, stop), (B, stop - start))
        got = attend(q_BTHd[:, start:stop], *cached, q_positions_BT=positions)
        np.testing.assert_allclose(got, full[:, start:stop], atol=2e-6)
        shifted = {"q_positions_BT": positions + 7, "kv_positions_BS": jnp.arange(cached[0].shape[1])[None] + 7}
        got = attend(q_BTHd[:, start:stop], *cached, **shifted)
        np.testing.assert_allclose(got, full[:, start:stop], atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("max_scores", [1, 5 * T, 100 * T])
def test_chunked_gradients_equal_the_reference(causal, packed, max_scores):
    segments = {"q_segment_ids_BT": SEGMENTS, "kv_segment_ids_BS": SEGMENTS} if packed else {}

    def loss(args, f, **options):
        return jnp.sum(jnp.sin(f(*args, causal=causal, **segments, **options)))

    got, grads = jax.jit(jax.value_and_grad(partial(loss, f=attention_chunked, max_scores=max_scores)))(qkv())
    expected, grads_ref = jax.jit(jax.value_and_grad(partial(loss, f=attention, implementation="reference")))(qkv())
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for grad, grad_ref in zip(grads, grads_ref, strict=True):
        np.testing.assert_allclose(grad, grad_ref, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bf16_in_bf16_out_and_close_to_f32(implementation):
    args = qkv(dtype=jnp.bfloat16)

    def loss(args, **options):
        o_BTHd = attention(*args, causal=True, **options)
        return jnp.sum(o_BTHd.astype(jnp.float32) ** 2), o_BTHd

    (_, o_BTHd), grads = jax.value_and_grad(loss, has_aux=True)(args, implementation=implementation)
    exact = [x.astype(jnp.float32) for x in args]
    (_, o_ref), grads_ref = jax.value_and_grad(loss, has_aux=True)(exact, implementation="reference")
    assert o_BTHd.dtype == jnp.bfloat16 and all(g.dtype == jnp.bfloat16 for g in grads)
    np.testing.assert_allclose(o_BTHd.astype(jnp.float32), o_ref, atol=0.02)
    for grad, grad_ref in zip(grads, grads_ref, strict=True):
        np.testing.assert_allclose(grad.astype(jnp.float32), grad_ref, atol=0.02 * np.abs(grad_ref).max())


def test_long_sequences_take_the_chunked_path_and_less_memory(monkeypatch):
    monkeypatch.setattr("stackwise_jax.kernels.attention.api.MAX_REFERENCE_SCORES", 256 * 256 - 1)
    monkeypatch.setattr("stackwise_jax.kernels.attention.chunked.MAX_SCORES", 32 * 256)
    args = [jax.ShapeDtypeStruct((1, 256, 2, 8), jnp.float32)] * 3

    def temp_bytes(**options):
        def loss(args):
            return jnp.sum(attention(*args, causal=True, **options) ** 2)

        return jax.jit(jax.grad(loss)).lower(args).compile().memory_analysis().temp_size_in_bytes

    all_scores = 2 * 256 * 256 * 4
    assert temp_bytes(implementation="reference") >= all_scores
    assert temp_bytes() < all_scores
    assert temp_bytes() == temp_bytes(implementation="chunked")
    monkeypatch.setattr("stackwise_jax.kernels.attention.api.MAX_REFERENCE_SCORES", 256 * 256)
    assert temp_bytes() == temp_bytes(implementation="reference")


def test_misfits_are_refused():
    q_BTHd, k_BSKd, v_BSKd = qkv(n_keys=9)
    with pytest.raises(ValueError, match="segment ids for the queries and for the keys"):
        attention(q_BTHd, k_BSKd, v_BSKd, causal=True, q_segment_ids_BT=SEGMENTS)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q_BTHd[:, :, :3], k_BSKd, v_BSKd, causal=True)
    assert set(api.IMPLEMENTATIONS) == set(IMPLEMENTATIONS)
