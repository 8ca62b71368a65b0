"""LoRA adapters: nothing at birth, exact when merged, the same however blocks are grouped.

Legend: B batch, T sequence, D d_model, V vocabulary, L blocks in a stack.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.adapters import adapter_count, init_adapter, merge_adapters, split_adapters
from stackwise_jax.curriculum.phase import AdapterSpec, StackAdapter
from stackwise_jax.errors import UsageError
from stackwise_jax.model import Block, Rack, Stack, combine, decode, init_cache, size_of, split_blocks

D, T, V = 32, 8, 50
BLOCK = Block(d_model=D, d_ff=48, n_heads=4, n_kv_heads=2)
OTHER = Block(d_model=D, d_ff=64, n_heads=2)
ALIKE, UNLIKE = Stack((BLOCK,) * 2), Stack((BLOCK, OTHER))
KEY = jax.random.key(0)


def adapter_on(name="stack", stack=0, **spec) -> StackAdapter:
    return StackAdapter(stack=stack, name=name, spec=AdapterSpec(**{"rank": 4, "alpha": 6.0, **spec}))


def trained(tree):
    """The adapter as if it had learned: b is no longer zero."""

    def fill(path, leaf):
        if path[-1].key != "b":
            return leaf
        return 0.1 * jax.random.normal(jax.random.key(len(jax.tree_util.keystr(path))), leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, tree)


def make_input() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (2, T, D))


def both_adapters(stack):
    return [init_adapter(stack, adapter_on(name, rank=rank), 0, KEY) for name, rank in (("stack", 4), ("trunk", 2))]


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_shapes_of_the_tree():
    tree = init_adapter(ALIKE, adapter_on(targets=("q", "v", "down"), dropout=0.25), 0, KEY)["blocks"]
    assert {part: set(tree[part]) for part in tree} == {"attn": {"q", "v"}, "mlp": {"down"}}
    leaves = tree["mlp"]["down"]["adapters"]["stack"]
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    assert shapes == {"a": (2, 48, 4), "b": (2, 4, D), "scale": (2,), "dropout": (2,)}
    np.testing.assert_array_equal(leaves["scale"], 1.5)
    np.testing.assert_array_equal(leaves["dropout"], 0.25)
    assert not leaves["b"].any()
    assert np.std(
        init_adapter(ALIKE, adapter_on(rank=64), 0, KEY)["blocks"]["mlp"]["down"]["adapters"]["stack"]["a"]
    ) == (pytest.approx(48**-0.5, rel=0.05))
    assert "dropout" not in init_adapter(ALIKE, adapter_on(), 0, KEY)["blocks"]["attn"]["q"]["adapters"]["stack"]
    assert set(init_adapter(UNLIKE, adapter_on(), 0, KEY)) == {"block_000", "block_001"}


def test_leaves_are_stored_as_the_weights_are():
    stack = Stack((Block(d_model=D, d_ff=48, n_heads=4, param_dtype="bf16"),))
    assert {leaf.dtype for leaf in jax.tree.leaves(init_adapter(stack, adapter_on(), 0, KEY))} == {
        jnp.dtype("bfloat16")
    }


@pytest.mark.parametrize("stack", [ALIKE, UNLIKE], ids=["alike", "unlike"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_adapters_at_zero_change_no_bit(stack, dtype):
    stack = stack.clone(
        blocks=tuple(block.clone(compute_dtype=dtype, parent=None) for block in stack.blocks), parent=None
    )
    params, batch = stack.init_params(KEY), (make_input(), jnp.tile(jnp.arange(T), (2, 1)), jnp.ones((2, T), jnp.int32))
    adapted = functools.reduce(combine, both_adapters(stack), params)
    apply = jax.jit(lambda params, batch: stack.apply({"params": params}, *batch))
    run = lambda params: apply(params, batch)
    np.testing.assert_array_equal(run(params), run(adapted))
    assert np.abs(run(params) - run(combine(params, trained(both_adapters(stack)[0])))).max() > 1e-3


@pytest.mark.parametrize("stack", [ALIKE, UNLIKE], ids=["alike", "unlike"])
def test_merged_equals_unmerged(stack):
    params, x_BTD = stack.init_params(KEY), make_input()
    trees = [trained(tree) for tree in both_adapters(stack)]
    run = jax.jit(lambda params: stack.apply({"params": params}, x_BTD))
    merged = functools.reduce(merge_adapters, trees, params)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(run(merged), run(functools.reduce(combine, trees, params)), atol=1e-5)
    np.testing.assert_allclose(run(merge_adapters(params, functools.reduce(combine, trees))), run(merged), atol=1e-6)
    assert np.abs(run(merged) - run(params)).max() > 1e-3


def test_merging_leaves_the_rest_as_it_was_and_adds_in_float32():
    stack = Stack((BLOCK.clone(param_dtype="bf16", parent=None),))
    params, tree = stack.init_params(KEY), trained(init_adapter(stack, adapter_on(targets=("up",)), 0, KEY))
    merged, up = merge_adapters(params, tree), tree["blocks"]["mlp"]["up"]["adapters"]["stack"]
    update = up["a"].astype(jnp.float32) @ up["b"].astype(jnp.float32) * 1.5
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(
        merged["blocks"]["mlp"]["up"]["kernel"], (kernel.astype(jnp.float32) + update).astype(jnp.bfloat16)
    )
    assert merged["blocks"]["attn"] is params["blocks"]["attn"]
    assert merged["blocks"]["mlp"]["gate"] is params["blocks"]["mlp"]["gate"]


def test_decoding_sees_the_adapters():
    rack = Rack((ALIKE, UNLIKE.clone(stack_id=1, parent=None)), V, D)
    params, tokens_BT = rack.init_params(KEY), jax.random.randint(KEY, (2, T), 0, V)
    for name, stack in zip(("000", "001"), rack.stacks, strict=True):
        params["stacks"][name] = combine(params["stacks"][name], trained(init_adapter(stack, adapter_on(), 0, KEY)))
    positions_BT = jnp.broadcast_to(jnp.arange(T), (2, T))
    decoded_BTV, _ = decode(rack, params, tokens_BT, positions_BT, init_cache(rack, 2, T))
    np.testing.assert_allclose(decoded_BTV, rack.apply({"params": params}, tokens_BT), atol=1e-5)


def test_an_adapter_does_not_depend_on_the_grouping_of_its_blocks():
    whole = init_adapter(Stack((BLOCK,) * 3), adapter_on(), 5, KEY)
    for size, tree in zip((1, 2), split_blocks(whole, (1, 2)), strict=True):
        first = 5 if size == 1 else 6
        assert_equal_trees(tree, init_adapter(Stack((BLOCK,) * size), adapter_on(stack=3), first, KEY))
    mixed = init_adapter(Stack((BLOCK, OTHER)), adapter_on(), 5, KEY)
    assert_equal_trees(mixed["block_000"], jax.tree.map(lambda x: x[0], whole["blocks"]))


def test_the_first_block_may_be_traced():
    stack, adapter = Stack((BLOCK,) * 2), adapter_on(dropout=0.1)
    make = jax.jit(functools.partial(init_adapter, stack, adapter))
    assert_equal_trees(make(4, KEY), init_adapter(stack, adapter, 4, KEY))


def test_streams_differ_by_adapter_block_matrix_and_key():
    def a_of(tree, part="attn", matrix="q", name="stack"):
        return tree["blocks"][part][matrix]["adapters"][name]["a"]

    tree = init_adapter(ALIKE, adapter_on(), 0, KEY)
    others = [
        a_of(tree)[1],
        a_of(tree, matrix="k")[0],
        a_of(init_adapter(ALIKE, adapter_on("trunk"), 0, KEY), name="trunk")[0],
        a_of(init_adapter(ALIKE, adapter_on(), 0, jax.random.key(1)))[0],
    ]
    assert all(np.abs(other - a_of(tree)[0]).max() > 0.01 for other in others)


def test_split_and_combine():
    tree = init_adapter(UNLIKE, adapter_on(dropout=0.5), 0, KEY)
    learnable, fixed = split_adapters(tree)
    assert_equal_trees(combine(learnable, fixed), tree)
    names = lambda tree: {path[-1].key for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}
    assert (names(learnable), names(fixed)) == ({"a", "b"}, {"scale", "dropout"})


@pytest.mark.parametrize("stack", [ALIKE, UNLIKE], ids=["alike", "unlike"])
def test_adapter_count(stack):
    adapter = adapter_on(targets=("q", "k", "up"))
    learnable, _ = split_adapters(init_adapter(stack, adapter, 0, KEY))
    assert adapter_count(stack.blocks, adapter.spec) == size_of(learnable)


def test_dropout_acts_on_the_adapter_alone_and_keeps_the_mean():
    params, x_BTD = ALIKE.init_params(KEY), make_input()
    dropping = combine(params, trained(init_adapter(ALIKE, adapter_on(dropout=0.5), 0, KEY)))
    plain = combine(params, trained(init_adapter(ALIKE, adapter_on(), 0, KEY)))
    run = jax.jit(lambda params, key: ALIKE.apply({"params": params}, x_BTD, dropout_key=key))
    keys = [jax.random.key(i) for i in range(2)]
    np.testing.assert_array_equal(run(plain, keys[0]), run(plain, None))
    np.testing.assert_array_equal(run(dropping, None), run(plain, None))
    np.testing.assert_array_equal(run(dropping, keys[0]), run(dropping, keys[0]))
    assert np.abs(run(dropping, keys[0]) - run(dropping, keys[1])).max() > 1e-3
    fresh = combine(params, init_adapter(ALIKE, adapter_on(dropout=0.5), 0, KEY))
    np.testing.assert_array_equal(run(fresh, keys[0]), run(params, None))
    near = jnp.mean(jnp.stack([run(dropping, jax.random.key(i)) for i in range(300)]), axis=0)
    assert np.abs(near - run(plain, None)).mean() < 0.2 * np.abs(run(dropping, keys[0]) - run(plain, None)).mean()


def test_dropout_of_blocks_is_not_moved_by_adapters():
    stack = Stack((BLOCK.clone(dropout=0.3, parent=None),) * 2)
    params, x_BTD = stack.init_params(KEY), make_input()
    run = jax.jit(lambda params: stack.apply({"params": params}, x_BTD, dropout_key=jax.random.key(3)))
    adapted = combine(params, init_adapter(stack, adapter_on(dropout=0.5), 0, KEY))
    np.testing.assert_array_equal(run(params), run(adapted))


def test_merging_into_the_wrong_stack_is_refused():
    params, tree = ALIKE.init_params(KEY), init_adapter(Stack((OTHER,) * 2), adapter_on(), 0, KEY)
    with pytest.raises(
        UsageError, match=r"an adapter of a matrix of shape \(2, 32, 32\) meets one of shape \(2, 32, 16\)"
    ):
        merge_adapters(params, tree)
    with pytest.raises(UsageError, match="of shape None"):
        merge_adapters(params, init_adapter(UNLIKE, adapter_on(), 0, KEY))
