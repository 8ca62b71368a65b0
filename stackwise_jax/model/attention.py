"""Multi-head and grouped-query self-attention, over whole sequences and one step at a time with a cache.

Another kind of attention is another file with these five functions; Block chooses between them in one place.

Legend: B batch, T sequence, S new positions while decoding, M positions that the cache holds, D d_model, H heads,
K key/value heads, d head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from stackwise_jax.kernels.attention.api import attention
from stackwise_jax.model.linear import RESIDUAL_GAIN, init_kernel, project
from stackwise_jax.model.rope import rope
from stackwise_jax.model.spec import Params, dtype_of

if TYPE_CHECKING:
    from stackwise_jax.model.block import Block


def attention_shapes(block: Block) -> dict[str, tuple[int, int]]:
    """(in, out) of the matrices: q (D, H*d), k and v (D, K*d), o (H*d, D)."""
    width, kv_width = block.d_model, block.kv_heads * block.head_dim
    return {"q": (width, width), "k": (width, kv_width), "v": (width, kv_width), "o": (width, width)}


def init_attention(block: Block, key: jax.Array) -> Params:
    """{"q", "k", "v", "o"}, each {"kernel": (in, out)}."""
    dtype = dtype_of(block.param_dtype)
    params = {}
    for i, (name, (n_in, n_out)) in enumerate(attention_shapes(block).items()):
        gain = RESIDUAL_GAIN if name == "o" else 1.0
        params[name] = {"kernel": init_kernel(jax.random.fold_in(key, i), n_in, n_out, dtype, gain)}
    return params


def self_attention(
    block: Block,
    params: Params,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    causal: bool,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Every position looks at its own segment; with `causal` only at rows of the sequence up to its own.

    dropout_key is for the adapters' own dropout; see linear.
    """
    q_BTHd, k_BTKd, v_BTKd = _heads(block, params, x_BTD, positions_BT, dropout_key)
    o_BTHd = attention(
        q_BTHd, k_BTKd, v_BTKd, causal=causal, q_segment_ids_BT=segment_ids_BT, kv_segment_ids_BS=segment_ids_BT
    )
    return _merge_heads(block, params, o_BTHd, dropout_key)


def init_attention_cache(block: Block, batch: int, max_len: int, dtype: Any) -> Params:
    """{"k", "v": (B, M, K, d)} of zeros."""
    shape = (batch, max_len, block.kv_heads, block.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def cached_attention(
    block: Block, params: Params, x_BSD: jax.Array, positions_BS: jax.Array, cache: Params
) -> tuple[jax.Array, Params]:
    """Causal attention of S new positions over what the cache holds; positions are indices into the cache.

    Keys and values of the new positions are written first. Everything up to a query's own position must have been
    written before or now; what lies beyond it is not looked at.
    """
    q_BSHd, k_BSKd, v_BSKd = _heads(block, params, x_BSD, positions_BS)
    rows_B1 = jnp.arange(x_BSD.shape[0])[:, None]
    cache = {
        "k": cache["k"].at[rows_B1, positions_BS].set(k_BSKd.astype(cache["k"].dtype)),
        "v": cache["v"].at[rows_B1, positions_BS].set(v_BSKd.astype(cache["v"].dtype)),
    }
    dtype = dtype_of(block.compute_dtype)
    o_BSHd = attention(
        q_BSHd, cache["k"].astype(dtype), cache["v"].astype(dtype), causal=True, q_positions_BT=positions_BS
    )
    return _merge_heads(block, params, o_BSHd), cache


def _heads(
    block: Block, params: Params, x_BTD: jax.Array, positions_BT: jax.Array, dropout_key: jax.Array | None = None
):
    B, T, _ = x_BTD.shape
    q_BTHd = project(block, params, "q", x_BTD, dropout_key).reshape(B, T, block.n_heads, block.head_dim)
    k_BTKd = project(block, params, "k", x_BTD, dropout_key).reshape(B, T, block.kv_heads, block.head_dim)
    v_BTKd = project(block, params, "v", x_BTD, dropout_key).reshape(B, T, block.kv_heads, block.head_dim)
    if block.use_rope:
        q_BTHd = rope(q_BTHd, positions_BT, block.rope_theta)
        k_BTKd = rope(k_BTKd, positions_BT, block.rope_theta)
    return q_BTHd, k_BTKd, v_BTKd


def _merge_heads(block: Block, params: Params, o_BTHd: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    B, T = o_BTHd.shape[:2]
    return project(block, params, "o", o_BTHd.reshape(B, T, block.d_model), dropout_key)
