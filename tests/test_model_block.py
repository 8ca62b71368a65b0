"""What a block sees, where it puts positions, and what it computes in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.errors import UsageError
from stackwise_jax.model import Block, Stack
from stackwise_jax.model.linear import bound_kernel, linear
from stackwise_jax.model.mlp import mlp
from stackwise_jax.model.norm import rms_norm
from stackwise_jax.model.rope import rope

D, T = 32, 16


def make_block(**changes) -> Block:
    return Block(**{"d_model": D, "d_ff": 48, "n_heads": 4, "n_kv_heads": 2, **changes})


def make_input(key: int = 1, batch: int = 2) -> jax.Array:
    return jax.random.normal(jax.random.key(key), (batch, T, D))


def influence_TT(block: Block, **kwargs) -> np.ndarray:
    """How strongly output row t depends on input row s, by gradient."""
    params, x_TD = block.init_params(jax.random.key(0)), make_input(batch=1)[0]

    @jax.jit
    @jax.jacobian
    def jacobian_TDTD(x_TD):
        return block.apply({"params": params}, x_TD[None], **kwargs)[0]

    return np.abs(jacobian_TDTD(x_TD)).max(axis=(1, 3))


def test_causal_block_sees_only_the_past():
    grads_TT = influence_TT(make_block())
    assert np.all(grads_TT[np.triu_indices(T, 1)] == 0)
    assert np.all(grads_TT[np.tril_indices(T)] > 0)


def test_bidirectional_block_sees_everything():
    assert np.all(influence_TT(make_block(attention_mode="bidirectional")) > 0)


def test_a_call_overrides_the_attention_mode():
    assert np.all(influence_TT(make_block(), attention_mode="bidirectional") > 0)
    grads_TT = influence_TT(make_block(attention_mode="bidirectional"), attention_mode="causal")
    assert np.all(grads_TT[np.triu_indices(T, 1)] == 0)


@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
def test_segments_do_not_see_each_other(mode):
    segment_ids_T = np.repeat([1, 2, 3, 0], 4)
    grads_TT = influence_TT(make_block(), attention_mode=mode, segment_ids_BT=jnp.asarray(segment_ids_T)[None])
    same_TT = (segment_ids_T[:, None] == segment_ids_T[None]) & (segment_ids_T[:, None] != 0)
    expected_TT = same_TT & (np.tri(T, dtype=bool) if mode == "causal" else True) | np.eye(T, dtype=bool)
    np.testing.assert_array_equal(grads_TT > 0, expected_TT)


def test_a_packed_document_is_computed_as_if_it_stood_alone():
    block, x_BTD = make_block(), make_input()
    variables = {"params": block.init_params(jax.random.key(0))}
    segment_ids_BT = jnp.asarray(np.repeat([[1, 2]], 8, axis=1)).repeat(2, axis=0)
    positions_BT = jnp.tile(jnp.arange(8), 2)[None].repeat(2, axis=0)
    packed_BTD = block.apply(variables, x_BTD, positions_BT, segment_ids_BT)
    alone_BTD = jnp.concatenate([block.apply(variables, x_BTD[:, :8]), block.apply(variables, x_BTD[:, 8:])], axis=1)
    np.testing.assert_allclose(packed_BTD, alone_BTD, atol=1e-5)


def test_rope_depends_on_differences_of_positions_only():
    q_BTHd, k_BTHd = (jax.random.normal(jax.random.key(i), (1, T, 2, 8)) for i in range(2))
    positions_BT = jnp.arange(T)[None]

    def scores(shift):
        q_rotated, k_rotated = (rope(x_BTHd, positions_BT + shift, 1e4) for x_BTHd in (q_BTHd, k_BTHd))
        return jnp.einsum("BTHd,BSHd->BHTS", q_rotated, k_rotated)

    np.testing.assert_allclose(scores(0), scores(37), atol=1e-4)
    assert np.abs(scores(0) - jnp.einsum("BTHd,BSHd->BHTS", q_BTHd, k_BTHd)).max() > 0.1
    np.testing.assert_allclose(jnp.linalg.norm(rope(q_BTHd, positions_BT, 1e4)), jnp.linalg.norm(q_BTHd), rtol=1e-5)


def test_rope_rotates_the_pairs_i_and_i_plus_half():
    x_BTHd = jnp.zeros((1, 1, 1, 4)).at[0, 0, 0, 1].set(1.0)
    angle = 3 * 100.0 ** (-1 / 2)
    expected_d = [0, np.cos(angle), 0, np.sin(angle)]
    np.testing.assert_allclose(rope(x_BTHd, jnp.asarray([[3]]), 100.0)[0, 0, 0], expected_d, atol=1e-6)


def test_block_is_shift_invariant_and_uses_positions():
    block, x_BTD = make_block(), make_input()
    variables = {"params": block.init_params(jax.random.key(0))}

    def run(positions_T):
        return block.apply(variables, x_BTD, positions_T[None])

    np.testing.assert_allclose(run(jnp.arange(T)), run(jnp.arange(T) + 100), atol=1e-5)
    np.testing.assert_array_equal(run(jnp.arange(T)), block.apply(variables, x_BTD))
    assert np.abs(run(jnp.arange(T)) - run(2 * jnp.arange(T))).max() > 1e-4


def test_without_rope_positions_do_not_matter_and_theta_does_with_it():
    block, x_BTD = make_block(use_rope=False), make_input()
    variables = {"params": block.init_params(jax.random.key(0))}
    far_BT = 5 * jnp.arange(T)[None]
    np.testing.assert_array_equal(block.apply(variables, x_BTD), block.apply(variables, x_BTD, far_BT))
    outputs = [make_block(rope_theta=theta).apply(variables, x_BTD) for theta in (1e4, 1e2)]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-4


def test_gqa_equals_mha_with_repeated_keys_and_values():
    gqa, mha, x_BTD = make_block(), make_block(n_kv_heads=4), make_input()
    params = gqa.init_params(jax.random.key(0))

    def repeat(kernel):
        return jnp.repeat(kernel.reshape(D, 2, 8), 2, axis=1).reshape(D, D)

    attn = params["attn"] | {name: {"kernel": repeat(params["attn"][name]["kernel"])} for name in "kv"}
    np.testing.assert_allclose(
        gqa.apply({"params": params}, x_BTD), mha.apply({"params": params | {"attn": attn}}, x_BTD), atol=1e-5
    )


def test_swiglu_gates_with_silu_of_gate():
    block, x_BTD = make_block(), make_input()
    params = block.init_params(jax.random.key(0))["mlp"]
    gate, up, down = (params[name]["kernel"] for name in ("gate", "up", "down"))
    np.testing.assert_allclose(mlp(block, params, x_BTD), (jax.nn.silu(x_BTD @ gate) * (x_BTD @ up)) @ down, atol=1e-5)


def test_rms_norm_has_unit_scale_and_stays_in_the_dtype():
    x_BTD = 7.0 * make_input().astype(jnp.bfloat16)
    normed_BTD = rms_norm(x_BTD, {"scale": jnp.ones(D)}, 1e-6)
    assert normed_BTD.dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.mean(jnp.square(normed_BTD.astype(jnp.float32)), axis=-1), 1.0, atol=0.02)
    assert np.abs(rms_norm(x_BTD, {"scale": jnp.ones(D)}, 1e3)).max() < 2


def test_block_is_pre_norm_with_residuals():
    block, x_BTD = make_block(), make_input()
    params = block.init_params(jax.random.key(0))
    params["attn"]["o"]["kernel"] *= 0
    params["mlp"]["down"]["kernel"] *= 0
    np.testing.assert_array_equal(block.apply({"params": params}, x_BTD), x_BTD)
    large_BTD = block.apply({"params": block.init_params(jax.random.key(0))}, 1e3 * x_BTD) - 1e3 * x_BTD
    assert np.abs(large_BTD).max() < 50  # the branches see a normed input


def test_bf16_computes_in_bf16_and_stays_near_fp32():
    exact, short, x_BTD = make_block(), make_block(compute_dtype="bf16"), make_input()
    variables = {"params": exact.init_params(jax.random.key(0))}
    y_BTD = short.apply(variables, x_BTD)
    assert y_BTD.dtype == jnp.bfloat16
    assert linear(x_BTD, {"kernel": jnp.ones((D, 3))}, jnp.bfloat16).dtype == jnp.bfloat16
    error = np.abs(y_BTD.astype(jnp.float32) - exact.apply(variables, x_BTD)).max()
    assert 1e-4 < error < 0.1
    params = make_block(param_dtype="bf16").init_params(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def test_initial_scale_of_the_matrices():
    params = Block(d_model=256, d_ff=512, n_heads=4).init_params(jax.random.key(0))
    for group, name, gain in [("attn", "q", 1), ("mlp", "up", 1), ("attn", "o", 0.2), ("mlp", "down", 0.2)]:
        kernel = params[group][name]["kernel"]
        np.testing.assert_allclose(jnp.std(kernel), gain * kernel.shape[0] ** -0.5, rtol=0.03)


def test_dropout_is_a_pure_function_of_the_key_and_keeps_the_mean():
    block, x_BTD = make_block(dropout=0.5), make_input()
    variables = {"params": block.init_params(jax.random.key(0))}
    run = jax.jit(lambda key: block.apply(variables, x_BTD, dropout_key=key))
    a, b = (run(jax.random.key(i)) for i in (0, 1))
    np.testing.assert_array_equal(a, run(jax.random.key(0)))
    assert np.abs(a - b).max() > 0.1
    np.testing.assert_array_equal(block.apply(variables, x_BTD), make_block().apply(variables, x_BTD))
    drop = block._drop(jnp.ones((100, 100, 1)), jax.random.key(0), 0)
    assert set(np.unique(drop)) == {0.0, 2.0}
    np.testing.assert_allclose(drop.mean(), 1.0, atol=0.05)
    assert np.any(drop != block._drop(jnp.ones((100, 100, 1)), jax.random.key(0), 1))


def test_init_returns_the_documented_tree():
    block = make_block()
    params = block.init(jax.random.key(0), make_input())["params"]
    shapes = jax.tree.map(jnp.shape, params, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    assert shapes == {
        "attn_norm": {"scale": (D,)},
        "attn": {name: {"kernel": (D, 16 if name in "kv" else D)} for name in "qkvo"},
        "mlp_norm": {"scale": (D,)},
        "mlp": {"gate": {"kernel": (D, 48)}, "up": {"kernel": (D, 48)}, "down": {"kernel": (48, D)}},
    }
    jax.tree.map(np.testing.assert_array_equal, params, block.init_params(jax.random.key(0)))
    assert block.parameter_count() == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert block.parameter_count(trainable_only=True) == block.parameter_count() - D * 48
    assert make_block(freeze_up_proj=False).parameter_count(True) == block.parameter_count()


def test_specs_are_values():
    assert make_block(n_kv_heads=None) == make_block(n_kv_heads=4)
    assert hash(make_block()) == hash(make_block()) and make_block() != make_block(dropout=0.1)
    stack = Stack([make_block()] * 2, 3)
    assert stack == Stack(blocks=(make_block(), make_block()), stack_id=3) and hash(stack) == hash(stack.clone())
    assert stack.blocks[1].d_ff == 48


def test_residual_gain_multiplies_both_branches():
    x_BTD = make_input()
    params = make_block().init_params(jax.random.key(0))

    def branches(gain, silent=()):
        tree = jax.tree.map(jnp.asarray, params)
        for part, name in silent:
            tree[part] = {**tree[part], name: {"kernel": jnp.zeros_like(tree[part][name]["kernel"])}}
        return make_block(residual_gain=gain).apply({"params": tree}, x_BTD) - x_BTD

    for silent in ([("mlp", "down")], [("attn", "o")]):  # one branch at a time: the other's input depends on the first
        np.testing.assert_allclose(branches(0.25, silent), 0.25 * branches(1.0, silent), atol=1e-5)
    assert np.abs(branches(0.25)).max() < 0.5 * np.abs(branches(1.0)).max()


def test_residual_gain_acts_in_decoding_and_in_the_compute_dtype():
    block, x_BTD = make_block(residual_gain=0.5), make_input()
    params, positions_BT = block.init_params(jax.random.key(0)), jnp.broadcast_to(jnp.arange(T), (2, T))
    cache = block.init_cache(2, T, jnp.float32)
    decoded_BTD, _ = block.apply({"params": params}, x_BTD, positions_BT, cache, method="decode")
    np.testing.assert_allclose(decoded_BTD, block.apply({"params": params}, x_BTD), atol=1e-5)
    half = make_block(residual_gain=0.5, compute_dtype="bf16")
    assert half.apply({"params": params}, x_BTD).dtype == jnp.bfloat16


def test_gain_one_and_no_bound_leave_the_program_as_it_is():
    def program(**options):
        block = make_block(**options)
        params = block.init_params(jax.random.key(0))
        return str(jax.make_jaxpr(lambda params, x_BTD: block.apply({"params": params}, x_BTD))(params, make_input()))

    assert program(residual_gain=1.0, spectral_norm=0.0) == program()
    assert program(residual_gain=0.5).count(" mul ") == program().count(" mul ") + 2
    assert program(spectral_norm=1.0).count("max") >= program().count("max") + 7  # each matrix has its bound


@pytest.mark.parametrize("shape", [(32, 32), (48, 128), (96, 16)])
@pytest.mark.parametrize("key", range(3))
def test_a_bounded_kernel_has_the_norm_asked_for(shape, key):
    kernel_IO = jax.random.normal(jax.random.key(key), shape)
    largest = np.linalg.norm(kernel_IO, 2)
    for limit in (0.1, 0.5 * largest):
        bounded_IO = bound_kernel(kernel_IO, limit)
        assert limit * 0.999 <= np.linalg.norm(bounded_IO, 2) <= 1.05 * limit
        np.testing.assert_allclose(bounded_IO / kernel_IO, (bounded_IO / kernel_IO)[0, 0], rtol=1e-4)
    np.testing.assert_array_equal(bound_kernel(kernel_IO, 1.01 * largest), kernel_IO)


def test_a_bounded_linear_stretches_nothing_beyond_the_limit():
    kernel_IO, x_NI = (
        5.0 * jax.random.normal(jax.random.key(0), (D, 48)),
        jax.random.normal(jax.random.key(1), (100, D)),
    )
    y_NO = linear(x_NI, {"kernel": kernel_IO}, jnp.float32, spectral_norm=0.7)
    stretch_N = jnp.linalg.norm(y_NO, axis=1) / jnp.linalg.norm(x_NI, axis=1)
    assert 0.2 < stretch_N.max() <= 0.7 * 1.05
    half_NO = linear(x_NI, {"kernel": kernel_IO.astype(jnp.bfloat16)}, jnp.bfloat16, spectral_norm=0.7)
    assert half_NO.dtype == jnp.bfloat16
    np.testing.assert_allclose(half_NO.astype(jnp.float32), y_NO, atol=0.05)


def test_the_bound_is_on_the_kernel_and_not_on_adapters():
    kernel_IO, x_NI = 5.0 * jax.random.normal(jax.random.key(0), (D, D)), jax.random.normal(jax.random.key(1), (4, D))
    adapter = {"a": jnp.ones((D, 1)), "b": jnp.ones((1, D)), "scale": jnp.float32(2.0)}
    params = {"kernel": kernel_IO, "adapters": {"stack": adapter}}
    expected_NO = x_NI @ bound_kernel(kernel_IO, 1.0) + 2.0 * x_NI @ jnp.ones((D, D))
    np.testing.assert_allclose(linear(x_NI, params, jnp.float32, spectral_norm=1.0), expected_NO, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_bounded_kernel_are_those_of_the_quotient():
    kernel_IO, weights_IO = (jax.random.normal(jax.random.key(i), (D, 24)) for i in range(2))
    kernel_IO = kernel_IO.at[0].add(10.0)  # one singular value well above the others, so that u and v are exact
    grad = jax.jit(jax.grad(lambda kernel_IO: jnp.sum(weights_IO * bound_kernel(kernel_IO, 1.0))))
    u_II, sigma_O, vh_OO = np.linalg.svd(kernel_IO, full_matrices=False)
    along = np.sum(weights_IO * kernel_IO) / sigma_O[0] ** 2
    expected_IO = weights_IO / sigma_O[0] - along * np.outer(u_II[:, 0], vh_OO[0])
    np.testing.assert_allclose(grad(kernel_IO), expected_IO, atol=1e-5)
    for small_IO in (0.01 * kernel_IO, jnp.zeros_like(kernel_IO)):
        np.testing.assert_array_equal(grad(small_IO), weights_IO)


@pytest.mark.parametrize("options", [{}, {"remat": True}])
def test_a_bounded_stack_has_finite_gradients(options):
    stack = Stack((make_block(spectral_norm=0.5, residual_gain=0.5),) * 2, **options)
    params = jax.tree.map(lambda leaf: 10.0 * leaf, stack.init_params(jax.random.key(0)))
    grads = jax.jit(jax.grad(lambda params: jnp.sum(stack.apply({"params": params}, make_input()) ** 2)))(params)
    assert all(jnp.isfinite(leaf).all() and jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_heads": 5}, r"model\.n_heads 5 does not divide model\.d_model 32"),
        ({"n_kv_heads": 3}, r"model\.n_kv_heads 3 does not divide model\.n_heads 4"),
        ({"n_heads": 32, "n_kv_heads": 1}, r"even head size.*is 1"),
        ({"n_heads": 0}, r"model\.n_heads is 0; write at least 1"),
        ({"n_kv_heads": 0}, r"model\.n_kv_heads is 0; write at least 1"),
        ({"d_ff": -4}, r"model\.d_ff is -4"),
        ({"dropout": 1.0}, r"model\.dropout is 1\.0"),
        ({"residual_gain": 0.0}, r"model\.residual_gain is 0\.0; write a number above 0"),
        ({"spectral_norm": -1.0}, r"model\.spectral_norm is -1\.0; write a bound above 0"),
        ({"rope_theta": 0.0}, r"model\.rope_theta is 0\.0"),
        ({"attention_mode": "sideways"}, "attention mode 'sideways' is unknown"),
        ({"compute_dtype": "banana"}, "dtype 'banana' is unknown"),
    ],
)
def test_impossible_blocks_say_what_to_write(changes, sentence):
    with pytest.raises(UsageError, match=sentence):
        make_block(**changes)


def test_unknown_mode_in_a_call_is_refused():
    block = make_block()
    with pytest.raises(UsageError, match="'left' is unknown"):
        block.apply({"params": block.init_params(jax.random.key(0))}, make_input(), attention_mode="left")
