"""Attention: meaning by gradient and by a naive loop, and every implementation against the reference.

Legend: B batch, T query rows, S key/value rows, H query heads, K key/value heads, d and e sizes of a query-key and a
value head, r size of the shared part.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.kernels import dispatch
from stackwise_jax.kernels.attention import api, attention
from stackwise_jax.kernels.attention.arg_specs import ARG_SPECS, ArgSpec, make_args
from stackwise_jax.kernels.attention.bench import compile_attention
from stackwise_jax.kernels.attention.chunked import attention_chunked

B, T, H, K, D_HEAD = 2, 12, 4, 2, 8
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12], np.int32)
IMPLEMENTATIONS = ["reference", "chunked"]


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Five query rows per chunk at T = 12, so that the last chunk is padded."""
    monkeypatch.setattr("stackwise_jax.kernels.attention.chunked.MAX_SCORES", 5 * T)


def qkv(n_queries=T, n_keys=T, n_kv=K, dtype=np.float32, value_size=D_HEAD):
    rng = np.random.default_rng(0)
    shapes = (B, n_queries, H, D_HEAD), (B, n_keys, n_kv, D_HEAD), (B, n_keys, n_kv, value_size)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def shared_parts(r=4, n_queries=T, n_keys=T, dtype=np.float32):
    rng = np.random.default_rng(1)
    shapes = {"q_shared_BTHr": (B, n_queries, H, r), "k_shared_BSr": (B, n_keys, r)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def naive(q_BTHd, k_BSKd, v_BSKe, sees, scale=D_HEAD**-0.5, q_shared_BTHr=None, k_shared_BSr=None):
    """One query and head at a time, float64; sees(b, t, s) -> bool."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTHd, k_BSKd, v_BSKe))
    o = np.zeros((*q.shape[:3], v.shape[3]))
    for b, t, h in np.ndindex(*q.shape[:3]):
        kept = [s for s in range(k.shape[1]) if sees(b, t, s)]
        if kept:
            head = h // (q.shape[2] // k.shape[2])
            scores = k[b, kept, head] @ q[b, t, h]
            if q_shared_BTHr is not None:
                scores += np.asarray(k_shared_BSr, np.float64)[b, kept] @ np.asarray(q_shared_BTHr)[b, t, h]
            p = np.exp(scores * scale)
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
@pytest.mark.parametrize(("n_kv", "scale"), [(1, None), (2, 0.7), (4, None)])
def test_shared_part_and_values_of_another_size_equal_a_naive_loop(implementation, n_kv, scale):
    args, shared = qkv(n_kv=n_kv, value_size=5), shared_parts(r=4)
    got = jax.jit(partial(attention, causal=True, scale=scale, implementation=implementation))(*args, **shared)
    expected = naive(*args, lambda b, t, s: s <= t, scale=scale or (D_HEAD + 4) ** -0.5, **shared)
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shared_part_is_a_head_part_that_all_key_heads_have(implementation):
    (q_BTHd, k_BSKd, v_BSKe), shared = qkv(value_size=5), shared_parts(r=4)

    def loss(args, joined):
        q_BTHd, k_BSKd, v_BSKe, q_shared_BTHr, k_shared_BSr = args
        options = {"causal": True, "q_segment_ids_BT": SEGMENTS, "implementation": implementation}
        if joined:
            k_shared_BSKr = jnp.broadcast_to(k_shared_BSr[:, :, None], (B, T, K, 4))
            q_BTHd, k_BSKd = (
                jnp.concatenate(parts, -1) for parts in ((q_BTHd, q_shared_BTHr), (k_BSKd, k_shared_BSKr))
            )
        else:
            options |= {"q_shared_BTHr": q_shared_BTHr, "k_shared_BSr": k_shared_BSr}
        return jnp.sum(jnp.sin(attention(q_BTHd, k_BSKd, v_BSKe, **options)))

    args = q_BTHd, k_BSKd, v_BSKe, *shared.values()
    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (got, grads), (expected, grads_ref) = (value_and_grad(args, joined) for joined in (False, True))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for grad, grad_ref in zip(grads, grads_ref, strict=True):
        np.testing.assert_allclose(grad, grad_ref, atol=2e-6)


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

    def loss(args, shared, f, **options):
        return jnp.sum(jnp.sin(f(*args, causal=causal, scale=0.3, **shared, **segments, **options)))

    def of(f, **options):
        value_and_grad = jax.value_and_grad(partial(loss, f=f, **options), argnums=(0, 1))
        return jax.jit(value_and_grad)(qkv(value_size=5), shared_parts())

    got, grads = of(attention_chunked, max_scores=max_scores)
    expected, grads_ref = of(attention, implementation="reference")
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6), grads, grads_ref)


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
    shared = shared_parts(n_keys=9)
    with pytest.raises(ValueError, match="shared part of the queries and of the keys"):
        attention(q_BTHd, k_BSKd, v_BSKd, causal=True, q_shared_BTHr=shared["q_shared_BTHr"])
    with pytest.raises(ValueError, match=r"do not fit.*shared parts \(2, 12, 4, 4\) and \(2, 9, 3\)"):
        attention(q_BTHd, k_BSKd, v_BSKd, causal=True, **shared | {"k_shared_BSr": shared["k_shared_BSr"][..., :3]})
    with pytest.raises(ValueError, match='no implementation "flash"; write one of auto, reference, chunked, cudnn, '):
        attention(q_BTHd, k_BSKd, v_BSKd, causal=True, implementation="flash")


# Shapes of models.


@pytest.mark.parametrize("name", ARG_SPECS)
def test_named_shapes_are_arguments(name):
    spec = ARG_SPECS[name]
    args = jax.eval_shape(partial(make_args, spec), jax.random.key(0))
    o_BTHe = jax.eval_shape(partial(attention, causal=spec.causal), **args)
    assert o_BTHe.shape == (spec.batch, spec.rows, spec.heads, spec.value_size) and o_BTHe.dtype == spec.dtype


@pytest.mark.parametrize("causal", [True, False])
def test_flops_are_those_of_products_over_scores_that_are_seen(causal):
    spec = ArgSpec(2, 12, 4, 2, size=8, value_size=5, shared_size=3, causal=causal)
    seen = sum(s <= t or not causal for t in range(12) for s in range(12))
    per_score = {False: 2 * (8 + 3) + 2 * 5, True: 4 * 2 * (8 + 3) + 3 * 2 * 5}
    assert {backward: spec.flops(backward=backward) for backward in per_score} == {
        backward: 2 * 4 * seen * flops for backward, flops in per_score.items()
    }


@pytest.mark.parametrize("backward", [False, True])
def test_a_shape_compiles_and_runs_where_the_implementation_can(backward):
    spec = ArgSpec(1, 16, 2, 1, size=8, value_size=8, shared_size=4, dtype="float32")
    found = {name: compile_attention(spec, name, backward=backward) for name in api.IMPLEMENTATIONS}
    can = {name for name, call in found.items() if call is not None}
    assert can == {"reference", "chunked"} | ({"pallas"} if dispatch.cuda_capability() else set())
    found["reference"].run(2)
    assert found["reference"].temp_bytes > 0 and found["reference"].flops == spec.flops(backward=backward)
