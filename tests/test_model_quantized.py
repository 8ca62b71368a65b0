"""Stacks whose weights are quantized: what they compute, what gets a gradient, and that they can be taken apart.

Legend: B batch, T sequence, D d_model, L blocks in a stack.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import same_bits

from stackwise_jax.adapters import detach_adapters, init_adapter, merge_adapters, split_adapters
from stackwise_jax.curriculum.phase import AdapterSpec, StackAdapter
from stackwise_jax.errors import UsageError
from stackwise_jax.memory.quantized import QuantizedTensor, dequantize, quantize, to_format
from stackwise_jax.model import (
    Block,
    Stack,
    combine,
    concat_blocks,
    create_block_spec,
    create_rack_from_config,
    create_simple_rack,
    insert_stack,
    merge_stacks,
    rack_from_dict,
    rack_to_dict,
    regroup_params,
    run_stacks,
    split_blocks,
    split_fixed,
    split_stack,
)
from stackwise_jax.model.linear import linear

D, T, V = 32, 8, 50
KEY = jax.random.key(0)
BLOCK = Block(d_model=D, d_ff=48, n_heads=2)
OTHER = Block(d_model=D, d_ff=64, n_heads=4, freeze_up_proj=False)
ALIKE, UNLIKE = Stack((BLOCK,) * 3), Stack((BLOCK, OTHER))
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}  # compiling is most of the time
formatted = jax.jit(to_format, static_argnums=1, compiler_options=QUICK)
dense = jax.jit(lambda tree: to_format(tree, "fp32"), compiler_options=QUICK)
merged = jax.jit(merge_adapters, compiler_options=QUICK)


def weights(stack: Stack, fmt: str) -> dict:
    return formatted(stack.init_params(KEY), fmt)


def adapters(stack: Stack) -> dict:
    """As if they had learned: `b` is not zero."""
    spec = StackAdapter(stack=0, name="stack", spec=AdapterSpec(rank=4, alpha=6.0))
    fill = lambda path, leaf: leaf + 0.05 if path[-1].key == "b" else leaf
    return jax.tree_util.tree_map_with_path(fill, init_adapter(stack, spec, 0, KEY))


def make_input() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (2, T, D))


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def output_and_gradients(stack: Stack, weights, adapters, x_BTD):
    """The output, and the gradients to the input and to the adapters."""

    def loss(x_BTD, adapters):
        y_BTD = stack.apply({"params": combine(weights, adapters)}, x_BTD)
        return jnp.sum(jnp.sin(y_BTD)), y_BTD

    gradients, y_BTD = jax.grad(loss, argnums=(0, 1), has_aux=True)(x_BTD, adapters)
    return y_BTD, gradients


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def output(stack: Stack, weights, x_BTD):
    return stack.apply({"params": weights}, x_BTD)


def assert_near(a, b, tolerance=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance), a, b)


@pytest.mark.parametrize("fmt, remat", [("int8", False), ("nf4", True)])
def test_a_stack_computes_and_learns_as_the_dense_stack_of_the_same_values(fmt, remat):
    stack = ALIKE.clone(remat=remat, parent=None)
    quantized, learned, x_BTD = weights(stack, fmt), adapters(stack), make_input()
    found = output_and_gradients(stack, quantized, learned, x_BTD)
    assert_near(found, output_and_gradients(ALIKE, dense(quantized), learned, x_BTD))
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(split_adapters(found[1][1])[0]))


def test_unlike_blocks_and_native_products():
    quantized, x_BTD = weights(UNLIKE, "fp8"), make_input()
    native = Stack(tuple(block.clone(quantized_matmul="native", parent=None) for block in UNLIKE.blocks))
    found, near, exact = (
        output(stack, params, x_BTD)
        for stack, params in ((UNLIKE, quantized), (native, quantized), (UNLIKE, dense(quantized)))
    )
    assert_near(found, exact)
    assert 1e-3 < np.max(np.abs(near - exact)) < 0.2


def test_a_bound_on_singular_values_holds_for_quantized_kernels():
    x_NI, kernel_IO = make_input(), quantize(jax.random.normal(KEY, (D, 24)), "int8")
    by_hand = {"kernel": dequantize(kernel_IO, jnp.float32)}

    @functools.partial(jax.jit, static_argnums=1, compiler_options=QUICK)
    def gradient(params, limit):
        loss = lambda x_NI: jnp.sin(linear(x_NI, params, jnp.float32, spectral_norm=limit)).sum()
        return jax.value_and_grad(loss)(x_NI)

    found = gradient({"kernel": kernel_IO}, 0.5)
    assert_near(found, gradient(by_hand, 0.5))
    assert abs(found[0] - gradient(by_hand, 0.0)[0]) > 0.1


def test_the_way_to_multiply_comes_from_the_configuration():
    rack = create_rack_from_config({"model": {"quantized_matmul": "native"}}, 64)
    assert rack.stacks[0].blocks[0].quantized_matmul == "native"
    assert rack_from_dict(rack_to_dict(rack)) == rack
    description = rack_to_dict(rack)
    del description["stacks"][0]["blocks"][0]["block"]["quantized_matmul"]  # as written before there was a choice
    assert rack_from_dict(description).stacks[0].blocks[0].quantized_matmul == "dequantize"
    with pytest.raises(UsageError, match=r"model.quantized_matmul is 'fast'.*dequantize"):
        create_block_spec(D, quantized_matmul="fast")


def test_merged_adapters_are_in_the_weights_and_the_format_stays():
    quantized, learned = weights(ALIKE, "int8"), adapters(ALIKE)
    found, exact = merged(quantized, learned), merged(dense(quantized), learned)
    assert jax.tree.structure(found) == jax.tree.structure(quantized)
    for got, expected, before in zip(*map(jax.tree.leaves, (dense(found), exact, dense(quantized))), strict=True):
        assert np.linalg.norm(got - expected) <= 0.01 * np.linalg.norm(expected)
        assert (expected == 1).all() or np.linalg.norm(expected - before) > 0.05 * np.linalg.norm(expected)
    with pytest.raises(
        UsageError, match=r"an adapter of a matrix of shape \(3, 32, 32\) meets one of shape \(3, 48, 32\)"
    ):
        merge_adapters(quantized["blocks"]["mlp"]["down"], learned["blocks"]["attn"]["q"])


def test_trees_are_cut_and_joined():
    quantized, learned = jax.device_get((weights(ALIKE, "nf4"), adapters(ALIKE)))
    learnable, fixed = split_fixed(ALIKE, quantized)
    assert isinstance(fixed["blocks"]["mlp"]["up"]["kernel"], QuantizedTensor)
    assert same_bits(combine(learnable, fixed), quantized)
    full = combine(quantized, learned)
    assert all(same_bits(a, b) for a, b in zip(detach_adapters(full), (quantized, learned), strict=True))
    parts = split_blocks(full, (1, 2))
    assert parts[1]["blocks"]["attn"]["q"]["kernel"].shape == (2, D, D)
    joined = concat_blocks(parts)
    assert same_bits(joined, full) and all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(joined))


def make_rack(fmt: str):
    rack = create_simple_rack(2, 2, D, 48, 2, V)
    params = rack.init_params(KEY)
    stacks = {name: formatted(tree, fmt) for name, tree in params["stacks"].items()}
    return rack, jax.device_get(params | {"stacks": stacks})


def test_regroup_and_edit_a_quantized_rack():
    rack, params = make_rack("nvfp4")
    there = regroup_params(rack, params, (1, 3))
    np.testing.assert_array_equal(there["stacks"]["001"]["blocks"]["attn_norm"]["scale"].shape, (3, D))
    edited = merge_stacks(rack, params, 0)
    back = split_stack(*edited[:2], 0, (2, 2))
    assert same_bits(back.params, params) and back.rack == rack
    apply = lambda rack, params: rack.apply({"params": params}, jnp.ones((1, T), jnp.int32))
    run = jax.jit(apply, static_argnums=0, compiler_options=QUICK)
    np.testing.assert_array_equal(run(edited.rack, edited.params), run(rack, params))
    longer = insert_stack(rack, params, 1, key=KEY, init="copy")
    assert same_bits(longer.params["stacks"]["001"], params["stacks"]["000"])


def test_stacks_of_unlike_formats_do_not_become_one():
    rack, params = make_rack("nf4")
    params["stacks"]["001"] = formatted(params["stacks"]["001"], "fp32")
    for join in (
        lambda: merge_stacks(rack, params, 0),
        lambda: regroup_params(rack, params, (4,)),
        lambda: concat_blocks([*params["stacks"].values()]),
    ):
        with pytest.raises(UsageError, match=r"\['dense', 'nf4'\] cannot become one stack"):
            join()


@pytest.mark.parametrize("fmt, remat", [("fp8", False), ("nf4", True)])
def test_one_block_at_a_time_is_dense(fmt, remat):
    """What the gradient needs beside its arguments grows with depth by activations alone."""
    block = Block(d_model=128, d_ff=384, n_heads=2, compute_dtype="bf16")
    dense_block = 2 * sum(n_in * n_out for n_in, n_out in block.matrices.values())

    def temporaries(n_blocks: int) -> int:
        stack = Stack((block,) * n_blocks, remat=remat)
        loss = lambda x_BTD, params: run_stacks([stack], [params], x_BTD).astype(jnp.float32).sum()
        params = jax.eval_shape(lambda key: to_format(stack.init_params(key), fmt), KEY)
        x_BTD = jax.ShapeDtypeStruct((1, 1, 128), jnp.bfloat16)
        return jax.jit(jax.grad(loss)).lower(x_BTD, params).compile().memory_analysis().temp_size_in_bytes

    one, eight = temporaries(1), temporaries(8)
    assert eight - one < 0.3 * dense_block and eight < 4 * dense_block
