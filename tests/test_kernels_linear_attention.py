"""Linear attention: meaning by a naive loop and by gradient, chunks against the reference, steps against the whole.

Legend: B batch, T query rows, S key/value rows, H query heads, K key/value heads, M features, e value size.
"""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.kernels import dispatch
from stackwise_jax.kernels.linear_attention import LinearState, init_linear_state, linear_attention, linear_step
from stackwise_jax.kernels.linear_attention.api import IMPLEMENTATIONS
from stackwise_jax.kernels.linear_attention.arg_specs import ARG_SPECS, ArgSpec, make_args
from stackwise_jax.kernels.linear_attention.bench import compile_linear_attention

B, T, H, K, M, E = 2, 21, 4, 2, 6, 5  # with chunks of at most 8 rows: three of 7, or at T = 22 a padded last one
BOTH = ["reference", "chunked"]
LAYOUTS = {  # segment ids of two sequences of 22 rows; 0 is padding
    "none": None,
    "one": [[1] * 22, [1] * 22],
    "packed": [[1] * 3 + [2] * 12 + [3] * 3 + [0] * 4, [1] * 8 + [2] * 8 + [3] * 6],
    "padded in front": [[0] * 5 + [1] * 17, [0] * 16 + [4] * 6],
    "padded between": [[1] * 7 + [0] * 8 + [2] * 7, [3] + [1] + [0] * 19 + [2]],
    "padded within": [[1] * 7 + [0] + [1] * 14, [2] * 6 + [0] * 9 + [2] * 3 + [0] * 2 + [3] * 2],
    "empty": [[0] * 22, [1] * 22],
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr("stackwise_jax.kernels.linear_attention.chunked.CHUNK", 8)


def qkv(n_queries=T, n_keys=None, n_kv=K, dtype=np.float32):
    rng = np.random.default_rng(0)
    n_keys = n_keys or n_queries
    q, k = (np.abs(rng.normal(size=(B, n, heads, M))) for n, heads in ((n_queries, H), (n_keys, n_kv)))
    return [jnp.asarray(x, dtype) for x in (q, k, rng.normal(size=(B, n_keys, n_kv, E)))]


def segments(layout, n):
    ids = LAYOUTS[layout]
    return None if ids is None else jnp.asarray(np.array(ids, np.int32)[:, :n])


@partial(jax.jit, static_argnames=("causal", "implementation"))
def attend(args, ids=None, **options):
    return linear_attention(*args, segment_ids_BT=ids, **options)


@partial(jax.jit, static_argnames=("causal", "implementation"))
def value_and_grads(args, ids=None, **options):
    """(o_BTHe, the gradients of the sum of sin(o) for q, k and v)."""

    def loss(args):
        o_BTHe = linear_attention(*args, segment_ids_BT=ids, **options)
        return jnp.sum(jnp.sin(o_BTHe.astype(jnp.float32))), o_BTHe

    (_, o_BTHe), grads = jax.value_and_grad(loss, has_aux=True)(args)
    return o_BTHe, grads


step = jax.jit(linear_step)


def naive(q_BTHM, k_BSKM, v_BSKe, sees):
    """One query and head at a time, float64; sees(b, t, s) -> bool."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTHM, k_BSKM, v_BSKe))
    o = np.zeros((*q.shape[:3], v.shape[3]))
    for b, t, h in np.ndindex(*q.shape[:3]):
        kept = [s for s in range(k.shape[1]) if sees(b, t, s)]
        if kept:
            head = h // (q.shape[2] // k.shape[2])
            w = k[b, kept, head] @ q[b, t, h]
            o[b, t, h] = (w / w.sum()) @ v[b, kept, head]
    return o


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("n_kv", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", ["none", "packed"])
def test_equals_a_naive_loop(implementation, n_kv, causal, layout):
    args, ids = qkv(n_kv=n_kv), segments(layout, T)

    def sees(b, t, s):
        return (s <= t or not causal) and (ids is None or ids[b, t] == ids[b, s] != 0)

    got = attend(args, ids, causal=causal, implementation=implementation)
    np.testing.assert_allclose(got, naive(*args, sees), atol=2e-6)


@pytest.mark.parametrize("implementation", BOTH)
def test_every_query_sees_all_of_another_sequence(implementation):
    args = qkv(n_queries=3, n_keys=11)
    got = attend(args, causal=False, implementation=implementation)
    np.testing.assert_allclose(got, naive(*args, lambda b, t, s: True), atol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [8, 21, 22])
def test_chunks_equal_the_reference_and_so_do_gradients(layout, causal, n):
    args, ids = qkv(n), segments(layout, n)

    o_BTHe, grads = value_and_grads(args, ids, causal=causal, implementation="chunked")
    o_ref, grads_ref = value_and_grads(args, ids, causal=causal, implementation="reference")
    np.testing.assert_allclose(o_BTHe, o_ref, atol=3e-6)
    for grad, grad_ref in zip(grads, grads_ref, strict=True):
        np.testing.assert_allclose(grad, grad_ref, atol=3e-6 * max(1.0, np.abs(grad_ref).max()))
    if ids is not None:
        padding = np.asarray(ids == 0)
        assert not any(np.asarray(x)[padding].any() for x in (o_BTHe, *grads))


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("causal", [True, False])
def test_what_is_seen_by_gradient(implementation, causal):
    (q_BTHM, k_BTKM, v_BTKe), ids = qkv(), segments("packed", T)

    @jax.jit
    def gradients(row):
        def output(k_BTKM, v_BTKe):
            o_BTHe = linear_attention(
                q_BTHM, k_BTKM, v_BTKe, causal=causal, segment_ids_BT=ids, implementation=implementation
            )
            return jnp.sum(jnp.square(o_BTHe[:, row]))

        return jax.grad(output, argnums=(0, 1))(k_BTKM, v_BTKe)

    for row in range(T):
        reached_BS = sum(np.abs(g).sum((2, 3)) for g in gradients(row)) > 0
        for b in range(B):
            seen = [(s <= row or not causal) and bool(ids[b, s] == ids[b, row] != 0) for s in range(T)]
            np.testing.assert_array_equal(reached_BS[b], seen)


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("causal", [True, False])
def test_bf16_in_bf16_out_and_close_to_f32(implementation, causal):
    args = qkv(dtype=jnp.bfloat16)

    o_BTHe, grads = value_and_grads(args, causal=causal, implementation=implementation)
    exact = [x.astype(jnp.float32) for x in args]
    o_ref, grads_ref = value_and_grads(exact, causal=causal, implementation="reference")
    assert o_BTHe.dtype == jnp.bfloat16 and all(g.dtype == jnp.bfloat16 for g in grads)
    np.testing.assert_allclose(o_BTHe.astype(jnp.float32), o_ref, atol=0.02)
    for grad, grad_ref in zip(grads, grads_ref, strict=True):
        np.testing.assert_allclose(grad.astype(jnp.float32), grad_ref, atol=0.02 * np.abs(grad_ref).max())


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("size", [1e-26, 1e24])
def test_features_of_any_size_give_the_same_values_and_gradients(implementation, size):
    """exp(w . x - |x|^2) of a key may be 1e26 or 1e-26; a factor that all keys share changes nothing."""
    q_BTHM, k_BTKM, v_BTKe = qkv()
    o_BTHe, (dq, dk, dv) = value_and_grads([q_BTHM, k_BTKM * size, v_BTKe], causal=True, implementation=implementation)
    o_ref, (dq_ref, dk_ref, dv_ref) = value_and_grads([q_BTHM, k_BTKM, v_BTKe], causal=True, implementation="reference")
    for got, expected in ((o_BTHe, o_ref), (dq, dq_ref), (dk * size, dk_ref), (dv, dv_ref)):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def in_steps(args, sizes, valid_BT=None):
    state, outputs, start = init_linear_state(B, K, M, E), [], 0
    for size in sizes:
        new = slice(start, start + size)
        state, o_BSHe = step(state, *(x[:, new] for x in args), None if valid_BT is None else valid_BT[:, new])
        outputs.append(o_BSHe)
        start += size
    return state, jnp.concatenate(outputs, axis=1)


@pytest.mark.parametrize("sizes", [[T], [1] * T, [9, 1, 1, 10]])
def test_steps_equal_the_causal_form(sizes):
    args = qkv()
    state, o_BTHe = in_steps(args, sizes)
    np.testing.assert_allclose(o_BTHe, attend(args, causal=True, implementation="reference"), atol=2e-6)
    np.testing.assert_allclose(state.norm_BKM, args[1].sum(axis=1), rtol=1e-5)
    assert [x.shape for x in state] == [(B, K, M, E), (B, K, M)]


@pytest.mark.parametrize("sizes", [[T], [1] * T, [9, 1, 1, 10]])
def test_rows_that_are_not_valid_leave_no_trace(sizes):
    args = qkv()
    valid_BT = np.random.default_rng(1).random((B, T)) < 0.6
    state, o_BTHe = in_steps([args[0], *(x.at[~valid_BT].set(1e6) for x in args[1:])], sizes, jnp.asarray(valid_BT))
    expected = naive(*args, lambda b, t, s: s <= t and valid_BT[b, s])
    np.testing.assert_allclose(np.asarray(o_BTHe)[valid_BT], expected[valid_BT], atol=2e-6)
    untouched, _ = step(state, *args, jnp.zeros((B, T), bool))
    for before, after in zip(state, untouched, strict=True):
        np.testing.assert_array_equal(before, after)


def needed_bytes(rows, implementation, causal, packed):
    """What the gradient's compiled program holds, by XLA's own account."""
    shapes = [(1, rows, 2, 16), (1, rows, 1, 16), (1, rows, 1, 8)]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    ids = jax.ShapeDtypeStruct((1, rows), jnp.int32) if packed else None

    def loss(args, ids):
        o_BTHe = linear_attention(*args, causal=causal, segment_ids_BT=ids, implementation=implementation)
        return jnp.sum(o_BTHe**2)

    m = jax.jit(jax.grad(loss)).lower(args, ids).compile().memory_analysis()
    held = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
    return held - m.alias_size_in_bytes


@pytest.mark.parametrize(("causal", "packed"), [(True, False), (True, True), (False, True), (False, False)])
def test_memory_grows_linearly_with_the_sequence(causal, packed):
    small, large = (needed_bytes(rows, "chunked", causal, packed) for rows in (512, 2048))
    assert 3.5 < large / small < 4.2


def test_memory_of_the_reference_grows_with_the_square():
    small, large = (needed_bytes(rows, "reference", True, True) for rows in (512, 2048))
    assert 13 < large / small < 16.2


def test_auto_is_the_linear_one():
    assert needed_bytes(512, "auto", True, True) == needed_bytes(512, "chunked", True, True)
    assert set(IMPLEMENTATIONS) == {*BOTH}


@pytest.mark.parametrize("name", ARG_SPECS)
def test_named_shapes_are_arguments(name):
    spec = ARG_SPECS[name]
    args = jax.eval_shape(partial(make_args, spec, spec.features), jax.random.key(0))
    o_BTHe = jax.eval_shape(
        partial(linear_attention, causal=spec.causal), *(args[n] for n in ("q_BTHN", "k_BTKN", "v_BTKe"))
    )
    assert o_BTHe.shape == (spec.batch, spec.rows, spec.heads, spec.value_size) and o_BTHe.dtype == spec.dtype


@pytest.mark.parametrize("maps", [False, True])
def test_a_shape_compiles_and_runs(maps):
    spec = ArgSpec(1, 16, 2, 1, size=4, value_size=8, features=8)
    for name in BOTH:
        call = compile_linear_attention(spec, name, maps=maps, backward=True)
        call.run(2)
        assert call.temp_bytes > 0


def test_misfits_are_refused():
    q_BTHM, k_BSKM, v_BSKe = qkv(n_queries=3, n_keys=11)
    with pytest.raises(ValueError, match="are the same rows"):
        linear_attention(q_BTHM, k_BSKM, v_BSKe, causal=True)
    with pytest.raises(ValueError, match="are the same rows"):
        linear_attention(q_BTHM, k_BSKM, v_BSKe, causal=False, segment_ids_BT=jnp.ones((B, 3), jnp.int32))
    with pytest.raises(ValueError, match="are the same rows"):
        linear_step(init_linear_state(B, K, M, E), q_BTHM, k_BSKM, v_BSKe)
    for wrong in ((q_BTHM[..., 1:], k_BSKM, v_BSKe), (q_BTHM[:, :, 1:], k_BSKM, v_BSKe), (q_BTHM, k_BSKM, v_BSKe[:1])):
        with pytest.raises(ValueError, match="do not fit"):
            linear_attention(*wrong, causal=False)
    assert isinstance(init_linear_state(B, K, M, E), LinearState)


def test_other_ways_to_compute_attention_give_way_and_say_so_once(caplog):
    q_BTHM, k_BSKM, v_BSKe = (jnp.ones((1, 4, 2, size)) for size in (8, 8, 3))
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "stackwise_jax"):
        for _ in range(2):
            linear_attention(q_BTHM, k_BSKM, v_BSKe, causal=True, implementation="pallas")
    (record,) = caplog.records
    assert record.getMessage() == "linear attention: chunked instead of pallas: there is no kernel of it"
    with pytest.raises(ValueError, match='no implementation "fast"'):
        linear_attention(q_BTHM, k_BSKM, v_BSKe, causal=True, implementation="fast")
