"""Attention in plain jnp, all scores at once: what every other implementation is held against.

Legend: B batch, T query rows, S key/value rows, H query heads, K key/value heads, G = H / K, d head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def visible(
    n_queries: int,
    n_keys: int,
    *,
    causal: bool,
    q_segment_ids_BT: jax.Array | None,
    kv_segment_ids_BS: jax.Array | None,
    q_positions_BT: jax.Array | None,
    kv_positions_BS: jax.Array | None,
) -> jax.Array | None:
    """Which keys each query may look at: bool (B or 1, T, S), or None where all may look at all."""
    mask = None
    if causal:
        q_rows = jnp.arange(n_queries)[None] if q_positions_BT is None else q_positions_BT
        kv_rows = jnp.arange(n_keys)[None] if kv_positions_BS is None else kv_positions_BS
        mask = q_rows[:, :, None] >= kv_rows[:, None, :]
    if q_segment_ids_BT is not None and kv_segment_ids_BS is not None:
        same = (q_segment_ids_BT[:, :, None] == kv_segment_ids_BS[:, None, :]) & (kv_segment_ids_BS[:, None, :] != 0)
        mask = same if mask is None else mask & same
    return mask


def attention_reference(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    *,
    causal: bool,
    q_segment_ids_BT: jax.Array | None = None,
    kv_segment_ids_BS: jax.Array | None = None,
    q_positions_BT: jax.Array | None = None,
    kv_positions_BS: jax.Array | None = None,
) -> jax.Array:
    """See `attention`; holds all B * H * T * S scores in float32."""
    B, T, H, d = q_BTHd.shape
    S, K = k_BSKd.shape[1:3]
    mask = visible(
        T,
        S,
        causal=causal,
        q_segment_ids_BT=q_segment_ids_BT,
        kv_segment_ids_BS=kv_segment_ids_BS,
        q_positions_BT=q_positions_BT,
        kv_positions_BS=kv_positions_BS,
    )
    q_BTKGd = q_BTHd.reshape(B, T, K, H // K, d)
    scores_BKGTS = jnp.einsum("BTKGd,BSKd->BKGTS", q_BTKGd, k_BSKd, preferred_element_type=jnp.float32) * d**-0.5
    if mask is None:
        probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    else:
        mask_B11TS = mask[:, None, None]
        # A large finite number, not -inf: the softmax of a row that sees nothing stays finite, forwards and backwards.
        hidden = -0.5 * float(jnp.finfo(jnp.float32).max)
        probs_BKGTS = jax.nn.softmax(jnp.where(mask_B11TS, scores_BKGTS, hidden), axis=-1)
        probs_BKGTS = jnp.where(mask_B11TS, probs_BKGTS, 0.0)
    o_BTKGd = jnp.einsum(
        "BKGTS,BSKd->BTKGd", probs_BKGTS.astype(v_BSKd.dtype), v_BSKd, preferred_element_type=jnp.float32
    )
    return o_BTKGd.reshape(B, T, H, d).astype(q_BTHd.dtype)
