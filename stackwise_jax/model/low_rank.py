"""Low-rank attention: queries, keys and values factorised apart, q = x A_q B_q and so on, as StackWise does.

Nothing is between the factors and nothing is shared by keys and values: the ranks save parameters, not memory in
decoding. Multi-head latent attention (model/mla.py) has one latent for both and a norm on it.

Legend: B batch, T sequence, D d_model, H heads, K key/value heads, d head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from stackwise_jax.model.heads import Heads, cut_heads
from stackwise_jax.model.linear import project
from stackwise_jax.model.spec import Params

if TYPE_CHECKING:
    from stackwise_jax.model.block import Block


def low_rank_shapes(block: Block) -> dict[str, tuple[int, int]]:
    """(in, out) of the matrices: q_a (D, rq), q_b (rq, H*d), k_a and v_a (D, rkv), k_b and v_b (rkv, K*d), o (H*d, D).

    Without rq one matrix q (D, H*d).
    """
    assert block.mla is not None
    width, kv_width = block.d_model, block.kv_heads * block.head_dim
    rq, rkv = block.mla.rq, block.mla.rkv
    queries = {"q": (width, width)} if rq is None else {"q_a": (width, rq), "q_b": (rq, width)}
    keys = {"k_a": (width, rkv), "k_b": (rkv, kv_width)}
    values = {"v_a": (width, rkv), "v_b": (rkv, kv_width)}
    return queries | keys | values | {"o": (width, width)}


def low_rank_heads(
    block: Block, params: Params, x_BTD: jax.Array, positions_BT: jax.Array, dropout_key: jax.Array | None = None
) -> Heads:
    """x through the factors of q, k and v."""

    def product(name: str) -> jax.Array:
        if name in params:
            return project(block, params, name, x_BTD, dropout_key)
        low_BTR = project(block, params, f"{name}_a", x_BTD, dropout_key)
        return project(block, params, f"{name}_b", low_BTR, dropout_key)

    return cut_heads(block, positions_BT, *(product(name) for name in "qkv"))
