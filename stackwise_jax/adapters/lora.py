"""LoRA adapters (Hu et al. 2021): x W becomes x W + alpha / rank * (x A) B, with B = 0 at birth.

The adapter tree of a stack has the shape of the stack's own tree, with only the branches {"adapters": {name: {"a":
(in, rank), "b": (rank, out), "scale": ()[, "dropout": ()]}}} next to the kernels that it adapts, so that
`model.combine(weights, adapters)` is what the stack is applied with; several adapters are combined in the same way. `a`
and `b` learn; `scale` (alpha / rank) and `dropout`, which is there only when above 0, do not. As in the weights, every
leaf has a leading axis L (blocks) where the blocks of the stack are alike.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from stackwise_jax.curriculum.phase import AdapterSpec, StackAdapter
from stackwise_jax.errors import UsageError
from stackwise_jax.memory.quantized import QuantizedTensor, dequantize, quantize
from stackwise_jax.model import Block, Params, Stack, dtype_of
from stackwise_jax.model.linear import MATRICES
from stackwise_jax.model.partition import split_names
from stackwise_jax.model.stack import block_name
from stackwise_jax.random_streams import Stream, stream_key

STREAMS = {"stack": Stream.STACK_ADAPTERS, "trunk": Stream.TRUNK_ADAPTERS}
LEARNS = ("a", "b")


def init_adapter(stack: Stack, adapter: StackAdapter, first_block: int | jax.Array, key: jax.Array) -> Params:
    """A new adapter: `a` normal with standard deviation 1 / sqrt(in), `b` zero, all in the stack's param_dtype.

    Args:
        first_block: index within the rack of the stack's first block; may be traced. The values of a block depend on
            its index and the key only, however the blocks are grouped.
        key: the run's root key; another one begins the adapter anew (ReLoRA).
    """
    key = stream_key(key, STREAMS[adapter.name])
    keys_L = jax.vmap(lambda i: jax.random.fold_in(key, i))(first_block + jnp.arange(len(stack.blocks)))
    if stack.block_alike:
        return {"blocks": _init_alike(stack.blocks[0], adapter.name, adapter.spec, keys_L)}
    return {
        block_name(i): _init_block(block, adapter.name, adapter.spec, keys_L[i]) for i, block in enumerate(stack.blocks)
    }


def _adapt_block(block: Block, name: str, spec: AdapterSpec, key: jax.Array) -> Params:
    dtype = dtype_of(block.param_dtype)
    tree: Params = {}
    for i, (matrix, (n_in, n_out)) in enumerate(block.matrices.items()):
        if matrix not in spec.targets:
            continue
        normal_IR = jax.random.normal(jax.random.fold_in(key, i), (n_in, spec.rank), jnp.float32)
        leaves = {
            "a": (normal_IR * n_in**-0.5).astype(dtype),
            "b": jnp.zeros((spec.rank, n_out), dtype),
            "scale": jnp.asarray(spec.alpha / spec.rank, dtype),
        }
        if spec.dropout > 0:
            leaves["dropout"] = jnp.asarray(spec.dropout, dtype)
        tree.setdefault(MATRICES[matrix], {})[matrix] = {"adapters": {name: leaves}}
    return tree


_init_block = jax.jit(_adapt_block, static_argnums=(0, 1, 2))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _init_alike(block: Block, name: str, spec: AdapterSpec, keys_L: jax.Array) -> Params:
    # One block at a time: each is computed by the same program and so to the same bits, whatever L is.
    return jax.lax.map(functools.partial(_adapt_block, block, name, spec), keys_L)


def adapter_count(blocks: Sequence[Block], spec: AdapterSpec) -> int:
    """Numbers of an adapter on these blocks that learn: the entries of a and b."""
    shapes = [shape for block in blocks for name, shape in block.matrices.items() if name in spec.targets]
    return spec.rank * sum(n_in + n_out for n_in, n_out in shapes)


def check_targets(blocks: Sequence[Block], spec: AdapterSpec) -> None:
    """Refuse targets that were chosen and that none of these blocks has; "all" is every name there is.

    Raises:
        UsageError: such a target; the sentence names those that there are.
    """
    there = [*dict.fromkeys(name for block in blocks for name in block.matrices)]
    missing = [name for name in spec.targets if name not in there]
    chosen = set(spec.targets) != set(MATRICES)
    if missing and (chosen or len(missing) == len(spec.targets)):
        raise UsageError(
            f"adapters.targets names {', '.join(missing)} and model.attention_type {blocks[0].attention_type} has no "
            f"such matrix; write any of {', '.join(there)}"
        )


def split_adapters(tree: Params) -> tuple[Params, Params]:
    """(learnable, fixed) of an adapter tree, or of any tree of its shape (shardings, say); absent branches dropped.

    Learnable are `a` and `b`. `model.combine` puts the two together again.
    """
    return split_names(tree, LEARNS)


def detach_adapters(tree: Params) -> tuple[Params, Params]:
    """(weights, adapters) of a stack's full tree: two trees that `model.combine` puts together again."""
    adapters, weights = split_names(tree, ("adapters",))
    return weights, adapters


def one_adapter(tree: Params, adapter: str) -> Params:
    """Of a stack's adapters those of one name."""
    picked = {}
    for name, branch in tree.items():
        if name == "adapters":
            if adapter in branch:
                picked[name] = {adapter: branch[adapter]}
        elif isinstance(branch, dict) and (inner := one_adapter(branch, adapter)):
            picked[name] = inner
    return picked


def merge_adapters(stack_params: Params, adapter_tree: Params) -> Params:
    """The weights of a stack with its adapters in them: kernel + scale * a @ b in float32, cast back.

    Every kernel that has an adapter changes, a fixed up-projection too; branches without are passed on as they are. A
    quantized kernel is quantized again, and so loses what of the adapter is finer than its format.
    With model.spectral_norm the merged kernel is bounded as a whole, before that it was without the adapter.

    Raises:
        UsageError: the adapters are not made for these weights.
    """
    merged: dict[str, Any] = dict(stack_params)
    for name, branch in adapter_tree.items():
        if name == "adapters":
            for adapter in branch.values():
                merged["kernel"] = _merge_kernel(merged.get("kernel"), adapter)
        else:
            merged[name] = merge_adapters(merged.get(name, {}), branch)
    return merged


def _merge_kernel(kernel_IO: Any, adapter: Params) -> jax.Array | QuantizedTensor:
    a_IR, b_RO, scale = (jnp.asarray(adapter[name], jnp.float32) for name in ("a", "b", "scale"))
    update_IO = jnp.matmul(a_IR, b_RO, precision="highest") * scale[..., None, None]
    found = getattr(kernel_IO, "shape", None)
    if found != update_IO.shape:
        raise UsageError(
            f"an adapter of a matrix of shape {update_IO.shape} meets one of shape {found}; merge it into a stack like "
            "the one that it was made for"
        )
    if isinstance(kernel_IO, QuantizedTensor):
        return quantize(dequantize(kernel_IO, jnp.float32) + update_IO, kernel_IO.fmt)
    return (jnp.asarray(kernel_IO, jnp.float32) + update_IO).astype(kernel_IO.dtype)
