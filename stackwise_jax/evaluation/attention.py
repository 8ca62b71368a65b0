"""What a block looks at: its attention weights, for people to see. No part of training or sampling.

Legend: B batch, T sequence, D d_model, H heads, K key/value heads.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from stackwise_jax.errors import UsageError
from stackwise_jax.model import Params, Rack, embed_tokens, run_stacks, stack_name
from stackwise_jax.model.attention import attend, make_heads
from stackwise_jax.model.block import Block, check_mode
from stackwise_jax.model.norm import rms_norm
from stackwise_jax.model.regroup import stack_blocks, unstack_blocks
from stackwise_jax.model.stack import Stack


def attention_weights(
    rack: Rack,
    params: Params,
    tokens_BT: jax.Array,
    *,
    stack: int,
    block: int = 0,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    attention_mode: str | None = None,
    hidden_B: jax.Array | None = None,
) -> jax.Array:
    """The weight that each position of a sequence gives to each other one in one block of the rack.

    Whatever the block's attention is: a softmax over products or over features, or the normalised weights of linear
    attention. All of them are held at once, so this is for sequences that people look at.

    Args:
        rack, params, tokens_BT, positions_BT, segment_ids_BT, attention_mode, hidden_B: as in `rack.apply`.
        stack, block: which block, counted from 0 at the input; the block within its stack.

    Returns:
        (B, H, T, T) float32: of a head the query, then the key. A row sums to 1, or is 0 where the position is padding.

    Raises:
        UsageError: there is no such stack or block, or the attention mode is none.
    """
    blocks = len(rack.stacks[stack].blocks) if 0 <= stack < len(rack.stacks) else 0
    if not 0 <= block < blocks:
        sizes = [len(stack.blocks) for stack in rack.stacks]
        raise UsageError(f"there is no block {block} in a stack {stack}; the stacks of the rack have {sizes} blocks")
    if positions_BT is None:
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    stacks, trees = [*rack.stacks[:stack]], [params["stacks"][stack_name(i)] for i in range(stack)]
    spec, own = (
        rack.stacks[stack].blocks[block],
        unstack_blocks(rack.stacks[stack], params["stacks"][stack_name(stack)]),
    )
    if block > 0:
        stacks.append(Stack(blocks=rack.stacks[stack].blocks[:block], parent=None))
        trees.append(stack_blocks(stacks[-1], own[:block]))
    where = {"positions_BT": positions_BT, "segment_ids_BT": segment_ids_BT}
    x_BTD = embed_tokens(rack, params["embed"], tokens_BT, hidden_B)
    x_BTD = run_stacks(stacks, trees, x_BTD, attention_mode=attention_mode, **where)
    causal = check_mode(attention_mode or spec.attention_mode) == "causal"
    return _weights(spec, own[block], x_BTD, causal=causal, **where)


@partial(jax.jit, static_argnames=("spec", "causal"))
def _weights(
    spec: Block,
    params: Params,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    causal: bool,
) -> jax.Array:
    """What comes out of attention when the value of each position is a unit vector of its own: the weights."""
    heads = make_heads(spec, params["attn"], rms_norm(x_BTD, params["attn_norm"], spec.norm_eps), positions_BT)
    heads = jax.tree.map(lambda x: x.astype(jnp.float32), heads)
    B, T, K = heads.v_BTKe.shape[:3]
    units_BTKT = jnp.broadcast_to(jnp.eye(T)[None, :, None], (B, T, K, T))
    plain = spec.clone(attention_implementation="reference", parent=None)
    weights_BTHT = attend(
        plain, params["attn"], heads._replace(v_BTKe=units_BTKT), positions_BT, segment_ids_BT, causal
    )
    return jnp.moveaxis(weights_BTHT, 2, 1)
