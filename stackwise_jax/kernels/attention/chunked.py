"""Attention over chunks of query rows, for sequences whose scores should not be held all at once.

Legend: B batch, T query rows, S key/value rows, H query heads, K key/value heads, d and e sizes of a query-key and a
value head, r size of the part of the keys that all heads share, n chunks, c rows per chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stackwise_jax.kernels.attention.reference import attention_reference

MAX_SCORES = 2**19  # scores per head and sequence that are held at once, c * S: 2 MiB in float32


def attention_chunked(
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
    max_scores: int | None = None,
) -> jax.Array:
    """See `attention`; holds at most B * H * max(S, max_scores) scores, forwards and backwards."""
    T, S = q_BTHd.shape[1], k_BSKd.shape[1]
    n = -(-T // max(1, (max_scores or MAX_SCORES) // S))
    c = -(-T // n)
    if q_positions_BT is None:
        q_positions_BT = jnp.arange(T)[None]

    def chunks(x_BT):
        """(B, T, ...) -> (n, B, c, ...); the rows added at the end are cut off again below."""
        if x_BT is None:
            return None
        x_BT = jnp.pad(x_BT, ((0, 0), (0, n * c - T)) + ((0, 0),) * (x_BT.ndim - 2))
        return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], n, c, *x_BT.shape[2:]), 1, 0)

    # The backward scan sums the gradients of keys and values over the chunks in the dtype in which they enter it.
    of_keys = k_BSKd, v_BSKe, k_shared_BSr
    of_keys_f32 = jax.tree.map(lambda x: x.astype(jnp.float32), of_keys)

    @jax.checkpoint
    def rows(of_keys_f32, q_BcHd, q_shared_BcHr, q_segment_ids_Bc, q_positions_Bc):
        k_BSKd, v_BSKe, k_shared_BSr = jax.tree.map(lambda x_f32, x: x_f32.astype(x.dtype), of_keys_f32, of_keys)
        return attention_reference(
            q_BcHd,
            k_BSKd,
            v_BSKe,
            causal=causal,
            scale=scale,
            q_shared_BTHr=q_shared_BcHr,
            k_shared_BSr=k_shared_BSr,
            q_segment_ids_BT=q_segment_ids_Bc,
            kv_segment_ids_BS=kv_segment_ids_BS,
            q_positions_BT=q_positions_Bc,
            kv_positions_BS=kv_positions_BS,
        )

    xs = (chunks(q_BTHd), chunks(q_shared_BTHr), chunks(q_segment_ids_BT), chunks(q_positions_BT))
    _, o_nBcHe = jax.lax.scan(lambda _, x: (None, rows(of_keys_f32, *x)), None, xs)
    o_BTHe = jnp.moveaxis(o_nBcHe, 0, 1).reshape(q_BTHd.shape[0], n * c, *o_nBcHe.shape[3:])
    return o_BTHe[:, :T]
