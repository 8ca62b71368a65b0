"""A stack: a few blocks, the unit of parameters, of training and of compilation.

Blocks that are alike are stacked on a leading axis and scanned, so that compile time does not grow with their number;
unlike blocks are unrolled.

Legend: B batch, T sequence, S new positions while decoding, D d_model, L blocks in the stack.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stackwise_jax.model.block import Block
from stackwise_jax.model.spec import Params, call, module_params, require, unbound


def block_name(index: int) -> str:
    """The name of a block in the parameter tree of a stack of unlike blocks."""
    return f"block_{index:03d}"


@partial(jax.jit, static_argnums=0)
def _init_block(block: Block, key: jax.Array) -> Params:
    return block.init_params(key)


@partial(jax.jit, static_argnums=0)
def _init_alike(block: Block, keys_L: jax.Array) -> Params:
    # One block at a time: each is computed by the same program and so to the same bits, whatever L is.
    return jax.lax.map(block.init_params, keys_L)


class Stack(nn.Module):
    """Blocks one after another.

    Parameters: {"blocks": the tree of a block, every leaf with a leading axis of L} where the blocks are alike, else
    {"block_000": the tree of the first block, ...}.

    Raises:
        UsageError: no blocks, or blocks of different width.
    """

    blocks: tuple[Block, ...]
    stack_id: int = 0
    freeze_blocks: bool = False  # no plan lets this stack learn
    remat: bool = False  # recompute each block in the backward pass

    def __post_init__(self):
        object.__setattr__(self, "blocks", tuple(self.blocks))
        require(len(self.blocks) >= 1, "a stack has no blocks; write model.architecture.blocks_per_stack >= 1")
        widths = sorted({block.d_model for block in self.blocks})
        require(len(widths) == 1, f"the blocks of a stack have the widths {widths}; give them one model.d_model")
        super().__post_init__()

    @property
    def block_alike(self) -> bool:
        """Whether all blocks have the same spec, so that one scan runs them."""
        blocks = unbound(self).blocks
        return all(block == blocks[0] for block in blocks)

    @nn.nowrap
    def init_params(self, key: jax.Array, first_block: int | jax.Array = 0) -> Params:
        """Initial parameters; block i is made from fold_in(key, first_block + i), however the blocks are grouped."""
        blocks = unbound(self).blocks
        keys_L = jax.vmap(lambda i: jax.random.fold_in(key, i))(first_block + jnp.arange(len(blocks)))
        if self.block_alike:
            return {"blocks": _init_alike(blocks[0], keys_L)}
        return {block_name(i): _init_block(block, keys_L[i]) for i, block in enumerate(blocks)}

    @nn.nowrap
    def init_cache(self, batch: int, max_len: int, dtype: Any = jnp.float32) -> Any:
        """An empty cache for `decode`, grouped like the parameters.

        Alike blocks: the cache of a block, every leaf with a leading axis of L (multi-head attention: {"k", "v": (L, B,
        max_len, n_kv_heads, head_dim)}); unlike: {"block_000": the cache of the first block, ...}.
        """
        caches = [block.init_cache(batch, max_len, dtype) for block in self.blocks]
        if self.block_alike:
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
        return {block_name(i): cache for i, cache in enumerate(caches)}

    @nn.nowrap
    def parameter_count(self, trainable_only: bool = False) -> int:
        """Numbers in the stack; trainable_only: without frozen up-projections, 0 if freeze_blocks."""
        if trainable_only and self.freeze_blocks:
            return 0
        return sum(block.parameter_count(trainable_only) for block in self.blocks)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        attention_mode: str | None = None,
        dropout_key: jax.Array | None = None,
        first_block: int | jax.Array = 0,
    ) -> jax.Array:
        """(B, T, D) -> (B, T, D) through all blocks; arguments as in Block.

        Block i drops with fold_in(dropout_key, first_block + i); dropout_key None: no dropout.
        """
        params, blocks, alike = module_params(self, self.init_params), unbound(self).blocks, self.block_alike

        def run(block: Block, block_params: Params, x_BTD: jax.Array, index) -> jax.Array:
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            return call(block, block_params, x_BTD, positions_BT, segment_ids_BT, attention_mode, key)

        if self.remat:
            # Inside a scan nothing can be merged across blocks, so the barrier against it would only cost.
            run = jax.checkpoint(run, static_argnums=0, prevent_cse=not alike)
        indices_L = first_block + jnp.arange(len(blocks))
        x_BTD = x_BTD.astype(blocks[0].activation_dtype)
        if alike:

            def step(x_BTD, of_block):
                block_params, index = of_block
                return run(blocks[0], block_params, x_BTD, index), None

            return jax.lax.scan(step, x_BTD, (params["blocks"], indices_L))[0]
        for i, block in enumerate(blocks):
            x_BTD = run(block, params[block_name(i)], x_BTD, indices_L[i])
        return x_BTD

    def decode(
        self, x_BSD: jax.Array, positions_BS: jax.Array, cache: Any, valid_BS: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """S new positions through all blocks, causally, over what the cache holds: (y_BSD, cache).

        positions_BS are indices into the cache; everything before them must have been decoded before or in this call.
        valid_BS: False where a position is padding or will be decoded again; None: nowhere.
        """
        params, blocks = module_params(self, self.init_params), unbound(self).blocks
        x_BSD = x_BSD.astype(blocks[0].activation_dtype)
        if self.block_alike:

            def step(x_BSD, of_block):
                return call(blocks[0], of_block[0], x_BSD, positions_BS, of_block[1], valid_BS, method="decode")

            return jax.lax.scan(step, x_BSD, (params["blocks"], cache))
        caches = {}
        for i, block in enumerate(blocks):
            name = block_name(i)
            given = x_BSD, positions_BS, cache[name], valid_BS
            x_BSD, caches[name] = call(block, params[name], *given, method="decode")
        return x_BSD, caches
