"""Other groupings of the same blocks are bitwise the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.errors import UsageError
from stackwise_jax.model import (
    Block,
    Rack,
    Stack,
    concat_blocks,
    create_simple_rack,
    init_rack,
    merge_alike,
    merge_params,
    regroup,
    regroup_params,
    run_stacks,
    split_blocks,
    split_params,
)

D, T, V = 32, 16, 50
BLOCK = Block(d_model=D, d_ff=48, n_heads=4, n_kv_heads=2)
OTHER = Block(d_model=D, d_ff=64, n_heads=4, attention_mode="bidirectional")


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def make_input() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (2, T, D))


@pytest.mark.parametrize("sizes", [(1,) * 6, (1, 3, 2)])
def test_regroup_there_and_back_is_identity(sizes):
    rack, key = create_simple_rack(3, 2, D, 48, 4, V), jax.random.key(0)
    tokens_BT = jax.random.randint(key, (2, T), 0, V)
    params = rack.init_params(key)
    other, other_params = regroup(rack, sizes), regroup_params(rack, params, sizes)
    assert [len(stack.blocks) for stack in other.stacks] == list(sizes)
    assert [stack.stack_id for stack in other.stacks] == list(range(len(sizes)))
    assert regroup(other, (2, 2, 2)) == rack
    assert_equal_trees(regroup_params(other, other_params, (2, 2, 2)), params)
    assert_equal_trees(init_rack(other, key), other_params)
    logits_BTV, other_BTV = (
        jax.jit(rack.apply)({"params": params}, tokens_BT) for rack, params in ((rack, params), (other, other_params))
    )
    np.testing.assert_array_equal(logits_BTV, other_BTV)


def test_regroup_keeps_unlike_blocks_in_order():
    rack = Rack((Stack((BLOCK,) * 2), Stack((OTHER,) * 2, 1)), V, D)
    params, tokens_BT = rack.init_params(jax.random.key(0)), jnp.ones((1, T), jnp.int32)
    mixed, mixed_params = regroup(rack, (1, 3)), regroup_params(rack, params, (1, 3))
    assert mixed.stacks[1].blocks == (BLOCK, OTHER, OTHER) and set(mixed_params["stacks"]["001"]) == {
        "block_000",
        "block_001",
        "block_002",
    }
    assert_equal_trees(regroup_params(mixed, mixed_params, (2, 2)), params)
    expected_BTV = jax.jit(rack.apply)({"params": params}, tokens_BT)
    np.testing.assert_allclose(jax.jit(mixed.apply)({"params": mixed_params}, tokens_BT), expected_BTV, atol=1e-5)


def test_regroup_of_host_arrays_stays_on_the_host():
    rack = create_simple_rack(2, 1, D, 48, 4, V)
    params = jax.tree.map(np.asarray, rack.init_params(jax.random.key(0)))
    for tree in (regroup_params(rack, params, (2,)), *split_blocks(params["stacks"]["000"], (1,))):
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree))


def test_regroup_refuses_wrong_sizes_and_half_frozen_stacks():
    rack = Rack((Stack((BLOCK,) * 2, freeze_blocks=True), Stack((BLOCK,) * 2)), V, D)
    for sizes in ((2, 1), (5,), (4, 0), ()):
        with pytest.raises(UsageError, match="do not fit a rack of 4 blocks"):
            regroup(rack, sizes)
    with pytest.raises(UsageError, match=r"stack 1 of the regrouped rack would join blocks 1\.\.3"):
        regroup(rack, (1, 3))
    assert [stack.freeze_blocks for stack in regroup(rack, (1, 1, 2)).stacks] == [True, True, False]


def test_concat_and_split_are_inverse():
    stacks = [Stack((BLOCK,) * n) for n in (1, 3, 2)]
    trees = [stack.init_params(jax.random.key(i)) for i, stack in enumerate(stacks)]
    whole = concat_blocks(trees)
    assert whole["blocks"]["attn"]["q"]["kernel"].shape == (6, D, D)
    for tree, again in zip(trees, split_blocks(whole, (1, 3, 2)), strict=True):
        assert_equal_trees(tree, again)


def test_merge_alike_groups_maximal_runs():
    a, b, mixed = Stack((BLOCK,) * 2, 0), Stack((OTHER,), 3), Stack((BLOCK, OTHER))
    a_frozen, a_remat = Stack((BLOCK,), 1, freeze_blocks=True), Stack((BLOCK,), remat=True)
    merged, sizes = merge_alike([a, a_frozen, b, a, mixed, mixed, a, a_remat])
    assert sizes == [(2, 1), (1,), (2,), (2,), (2,), (2,), (1,)]
    assert [stack.blocks for stack in merged[:2]] == [(BLOCK,) * 3, (OTHER,)]
    assert merged[-1].remat and not merged[0].remat
    assert merge_alike([Stack((BLOCK,), 7)]) == merge_alike([Stack((BLOCK,), 2, freeze_blocks=True)])


def test_merge_params_and_split_params_are_inverse():
    stacks = [Stack((BLOCK,) * 2), Stack((BLOCK,)), Stack((BLOCK, OTHER)), Stack((OTHER,))]
    trees = [stack.init_params(jax.random.key(i)) for i, stack in enumerate(stacks)]
    merged, sizes = merge_alike(stacks)
    merged_trees = merge_params(trees, sizes)
    assert len(merged_trees) == len(merged) == 3
    for tree, again in zip(trees, split_params(merged_trees, sizes), strict=True):
        assert_equal_trees(tree, again)


def make_trees(stacks):
    return [stack.init_params(jax.random.key(i)) for i, stack in enumerate(stacks)]


@pytest.mark.parametrize(
    ("counts", "mode", "remat"),
    [((2, 2, 2), "causal", False), ((2, 3), "bidirectional", True), ((1, 1, 2), "causal", True)],
)
def test_one_scan_over_merged_stacks_is_bitwise_the_stacks_in_turn(counts, mode, remat):
    block = BLOCK.clone(dropout=0.1)
    stacks = [Stack((block,) * n, i, remat=remat) for i, n in enumerate(counts)]
    trees = make_trees(stacks)
    merged, sizes = merge_alike(stacks)
    segment_ids_BT = jnp.repeat(jnp.asarray([[1, 2], [1, 0]]), T // 2, axis=1)

    def gradients(stacks, trees):
        def loss(trees, x_BTD):
            y_BTD = run_stacks(
                stacks,
                trees,
                x_BTD,
                positions_BT=jnp.arange(T)[None],
                segment_ids_BT=segment_ids_BT,
                attention_mode=mode,
                dropout_key=jax.random.key(9),
            )
            return jnp.sum(jnp.square(y_BTD)), y_BTD

        grads, y_BTD = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(trees, make_input())
        return y_BTD, *grads

    y_BTD, tree_grads, x_grads_BTD = gradients(stacks, trees)
    merged_y_BTD, merged_grads, merged_x_grads_BTD = gradients(merged, merge_params(trees, sizes))
    merged_tree_grads = split_params(merged_grads, sizes)
    np.testing.assert_array_equal(y_BTD, merged_y_BTD)
    if min(counts) >= 2:
        assert_equal_trees((tree_grads, x_grads_BTD), (merged_tree_grads, merged_x_grads_BTD))
        return
    # XLA inlines the loop of a single block and fuses its backward pass otherwise: equal but for the last bits.
    for a, b in zip(
        jax.tree.leaves((tree_grads, x_grads_BTD)),
        jax.tree.leaves((merged_tree_grads, merged_x_grads_BTD)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(a).max()))


@pytest.mark.parametrize("counts", [(1, 1, 1), (2, 2)])
def test_stacks_run_by_programs_of_their_own_are_bitwise_one_program_of_them_all(counts):
    """With positions and segments as data, as a batch has them; with constant masks XLA may round otherwise."""
    stacks = [Stack((BLOCK,) * n) for n in counts]
    trees, hidden_BTD = make_trees(stacks), make_input()
    merged, sizes = merge_alike(stacks)
    layout = {"positions_BT": jnp.tile(jnp.arange(T), (2, 1)), "segment_ids_BT": jnp.ones((2, T), jnp.int32)}
    at_once = jax.jit(lambda trees, x_BTD, layout: run_stacks(merged, trees, x_BTD, **layout))
    at_once_BTD = at_once(merge_params(trees, sizes), hidden_BTD, layout)
    for stack, tree in zip(stacks, trees, strict=True):
        hidden_BTD = jax.jit(stack.apply)({"params": tree}, hidden_BTD, **layout)
    np.testing.assert_array_equal(hidden_BTD, at_once_BTD)
