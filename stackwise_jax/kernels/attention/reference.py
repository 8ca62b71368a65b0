"""Attention in plain jnp, all scores at once: what every other implementation is held against.

Legend: B batch, T query rows, S key/value rows, H query heads, K key/value heads, G = H / K, d and e sizes of a
query-key and a value head, r size of the part of the keys that all heads share.
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
    v_BSKe: jax.Array,
    *,
    causal: bool,
    scale: float,
    q_shared_BTHr: jax.Array | None = None,
    k_shared_BSr: jax.Array | None = None,
    q_segment_ids_BT: jax.Array | None = None,
    kv_segment_ids_BS: jax.Array | None = None,
    q_positions_BT: jax.Array | None = None,
    kv_positions_BS: jax.Array | None = None,
) -> jax.Array:
    """See `attention`; holds all B * H * T * S scores in float32."""
    B, T, H = q_BTHd.shape[:3]
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

    def scores(x_BTHd, against, k_BS):
        """float32; the groups of query heads stand where a product leaves them, or all scores would be transposed."""
        x_BTKGd = x_BTHd.reshape(B, T, K, H // K, x_BTHd.shape[-1])
        return jnp.einsum(f"BTKGd,{against}->BKTGS", x_BTKGd, k_BS, preferred_element_type=jnp.float32)

    scores_BKTGS = scores(q_BTHd, "BSKd", k_BSKd)
    if q_shared_BTHr is not None:
        scores_BKTGS += scores(q_shared_BTHr, "BSd", k_shared_BSr)
    scores_BKTGS *= scale
    if mask is None:
        probs_BKTGS = jax.nn.softmax(scores_BKTGS, axis=-1)
    else:
        mask_B1T1S = mask[:, None, :, None]
        # A large finite number, not -inf: the softmax of a row that sees nothing stays finite, forwards and backwards.
        hidden = -0.5 * float(jnp.finfo(jnp.float32).max)
        probs_BKTGS = jax.nn.softmax(jnp.where(mask_B1T1S, scores_BKTGS, hidden), axis=-1)
        if any(x is not None for x in (q_segment_ids_BT, q_positions_BT, kv_positions_BS)):  # else all see row 0
            probs_BKTGS = jnp.where(mask_B1T1S, probs_BKTGS, 0.0)
    o_BTKGe = jnp.einsum(
        "BKTGS,BSKe->BTKGe", probs_BKTGS.astype(v_BSKe.dtype), v_BSKe, preferred_element_type=jnp.float32
    )
    return o_BTKGe.reshape(B, T, H, v_BSKe.shape[-1]).astype(q_BTHd.dtype)
