"""How new stacks begin: identity at birth, and what may be copied onto what.

Legend: B batch, T sequence, D d_model.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.model import Block, Stack, can_copy, create_simple_rack, regroup, zero_outputs

D, T = 32, 16
BLOCK = Block(d_model=D, d_ff=48, n_heads=4, n_kv_heads=2, dropout=0.1)
OTHER = Block(d_model=D, d_ff=64, n_heads=4, attention_mode="bidirectional", freeze_up_proj=False)
BOUNDED = Block(d_model=D, d_ff=48, n_heads=4, residual_gain=0.5, spectral_norm=1.0)
STACKS = {"alike": (BLOCK,) * 3, "unlike": (BLOCK, OTHER), "bounded": (BOUNDED,) * 2}


def zeroed(blocks):
    stack = Stack(blocks)
    return stack, zero_outputs(stack, stack.init_params(jax.random.key(0)))


def names(path) -> list[str]:
    return [entry.key for entry in path]


@pytest.mark.parametrize("blocks", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_zeroed_outputs_make_the_identity(blocks, dtype):
    blocks = tuple(block.clone(compute_dtype=dtype, param_dtype=dtype, parent=None) for block in blocks)
    stack, params = zeroed(blocks)
    x_BTD = jax.random.normal(jax.random.key(1), (2, T, D)).astype(blocks[0].activation_dtype)
    run = jax.jit(lambda params, x_BTD, key: stack.apply({"params": params}, x_BTD, dropout_key=key))
    for key in (None, jax.random.key(2)):
        y_BTD = run(params, x_BTD, key)
        assert y_BTD.dtype == x_BTD.dtype and np.asarray(y_BTD).tobytes() == np.asarray(x_BTD).tobytes()
    assert (run(stack.init_params(jax.random.key(0)), x_BTD, None) != x_BTD).any()


@pytest.mark.parametrize("blocks", STACKS.values(), ids=STACKS)
def test_only_the_outputs_are_zeroed(blocks):
    stack, params = zeroed(blocks)
    before = stack.init_params(jax.random.key(0))
    for (path, leaf), old in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(before), strict=True):
        assert leaf.shape == old.shape and leaf.dtype == old.dtype
        if {"o", "down"} & set(names(path)):
            assert not leaf.any() and old.any()
        else:
            np.testing.assert_array_equal(leaf, old)


@pytest.mark.parametrize("blocks", STACKS.values(), ids=STACKS)
def test_a_zeroed_stack_learns(blocks):
    stack, params = zeroed(blocks)
    x_BTD, target_BTD = jax.random.normal(jax.random.key(1), (2, 2, T, D))
    loss = lambda params: jnp.square(stack.apply({"params": params}, x_BTD) - target_BTD).mean()

    @jax.jit
    def step(params):
        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - g, params, grads), value

    first, at_birth = step(params)
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(params), strict=True):
        assert np.isfinite(new).all()
        assert (new != old).any() == bool({"o", "down"} & set(names(path))), names(path)
    second, after_one = step(first)
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(second), jax.tree.leaves(first), strict=True))
    assert after_one < at_birth


def test_stacks_of_the_same_blocks_can_be_copied():
    stack = Stack((BLOCK,) * 2)
    assert can_copy(stack, Stack((BLOCK,) * 2, stack_id=7, freeze_blocks=True, remat=True))
    assert not can_copy(stack, Stack((BLOCK,) * 3))
    assert not can_copy(stack, Stack((BLOCK, OTHER)))
    assert not can_copy(stack, Stack((BLOCK.clone(d_ff=64, parent=None),) * 2))
    rack = create_simple_rack(2, 2, D, 48, 4, 50)
    assert can_copy(rack.stacks[0], rack.stacks[1])
    assert not can_copy(*regroup(rack, (1, 3)).stacks)
