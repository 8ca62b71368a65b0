"""Queries, keys and values of multi-head and grouped-query attention: one matrix each.

Grouped-query attention (Ainslie et al. 2023) has fewer key/value heads than query heads; with as many it is multi-head
attention (Vaswani et al. 2017).

Legend: B batch, T sequence, D d_model, H heads, K key/value heads, d head size of queries and keys, e of values,
r size of a part of the key that all heads share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax

from stackwise_jax.model.linear import project
from stackwise_jax.model.rope import rope
from stackwise_jax.model.spec import Params

if TYPE_CHECKING:
    from stackwise_jax.model.block import Block


class Heads(NamedTuple):
    """What a block makes of its input for attention.

    Rotated where attention is a softmax over their products; with a kernel the positions enter the features instead.
    """

    q_BTHd: jax.Array
    k_BTKd: jax.Array
    v_BTKe: jax.Array
    q_shared_BTHr: jax.Array | None = None
    k_shared_BTr: jax.Array | None = None


def full_shapes(block: Block) -> dict[str, tuple[int, int]]:
    """(in, out) of the matrices: q (D, H*d), k and v (D, K*d), o (H*d, D)."""
    width, kv_width = block.d_model, block.kv_heads * block.head_dim
    return {"q": (width, width), "k": (width, kv_width), "v": (width, kv_width), "o": (width, width)}


def full_heads(
    block: Block, params: Params, x_BTD: jax.Array, positions_BT: jax.Array, dropout_key: jax.Array | None = None
) -> Heads:
    """x through q, k and v."""
    return cut_heads(block, positions_BT, *(project(block, params, name, x_BTD, dropout_key) for name in "qkv"))


def cut_heads(block: Block, positions_BT: jax.Array, q_BTI: jax.Array, k_BTI: jax.Array, v_BTI: jax.Array) -> Heads:
    """The three products cut into heads of head_dim, queries and keys rotated."""
    B, T, _ = q_BTI.shape
    q_BTHd = q_BTI.reshape(B, T, block.n_heads, block.head_dim)
    k_BTKd, v_BTKd = (x_BTI.reshape(B, T, block.kv_heads, block.head_dim) for x_BTI in (k_BTI, v_BTI))
    if block.rotates:
        q_BTHd = rope(q_BTHd, positions_BT, block.rope_theta)
        k_BTKd = rope(k_BTKd, positions_BT, block.rope_theta)
    return Heads(q_BTHd, k_BTKd, v_BTKd)
