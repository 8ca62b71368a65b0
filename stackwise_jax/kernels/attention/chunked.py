"""Attention over chunks of query rows, for sequences whose scores should not be held all at once.

Legend: B batch, T query rows, S key/value rows, H query heads, K key/value heads, d head size, n chunks,
c rows per chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stackwise_jax.kernels.attention.reference import attention_reference

MAX_SCORES = 2**19  # scores per head and sequence that are held at once, c * S: 2 MiB in float32


def attention_chunked(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    *,
    causal: bool,
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

    # The backward scan sums the gradients of k and v over the chunks in the dtype in which they enter it.
    k_f32, v_f32 = k_BSKd.astype(jnp.float32), v_BSKd.astype(jnp.float32)

    @jax.checkpoint
    def rows(k_f32, v_f32, q_BcHd, q_segment_ids_Bc, q_positions_Bc):
        return attention_reference(
            q_BcHd,
            k_f32.astype(k_BSKd.dtype),
            v_f32.astype(v_BSKd.dtype),
            causal=causal,
            q_segment_ids_BT=q_segment_ids_Bc,
            kv_segment_ids_BS=kv_segment_ids_BS,
            q_positions_BT=q_positions_Bc,
            kv_positions_BS=kv_positions_BS,
        )

    xs = (chunks(q_BTHd), chunks(q_segment_ids_BT), chunks(q_positions_BT))
    _, o_nBcHd = jax.lax.scan(lambda _, x: (None, rows(k_f32, v_f32, *x)), None, xs)
    o_BTHd = jnp.moveaxis(o_nBcHd, 0, 1).reshape(q_BTHd.shape[0], n * c, *q_BTHd.shape[2:])
    return o_BTHd[:, :T]
