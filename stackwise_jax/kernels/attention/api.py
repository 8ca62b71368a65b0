"""Attention: one call for every model, the implementation chosen by what fits.

Legend: B batch, T query rows, S key/value rows, H query heads, K key/value heads (H is a multiple of K), d head size.
"""

from __future__ import annotations

from typing import Literal

import jax

from stackwise_jax.kernels.attention.chunked import attention_chunked
from stackwise_jax.kernels.attention.reference import attention_reference

Implementation = Literal["reference", "chunked"]
IMPLEMENTATIONS = {"reference": attention_reference, "chunked": attention_chunked}
MAX_REFERENCE_SCORES = 2**20  # scores per head and sequence, T * S, up to which all of them are held at once


def attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    *,
    causal: bool,
    q_segment_ids_BT: jax.Array | None = None,
    kv_segment_ids_BS: jax.Array | None = None,
    q_positions_BT: jax.Array | None = None,
    kv_positions_BS: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v; query head h uses key/value head h // (H / K), and keys and values are not repeated.

    A query sees a key if both lie in the same segment (where segment ids are given; id 0 is padding and is seen by
    none) and, when causal, the key's position is not above the query's. A position is the absolute row index unless
    positions are given: in decoding with a cache, the unwritten rows of the cache lie above the query and stay hidden.
    A query that sees nothing gives 0, with gradient 0.

    Args:
        q_BTHd, k_BSKd, v_BSKd: any floating dtype; scores and softmax are float32, products accumulate in float32.
        causal: static.
        q_segment_ids_BT, kv_segment_ids_BS: int32, both or neither; if T = S the queries' also serve for the keys.
        q_positions_BT, kv_positions_BS: int32, (B or 1, rows); used only when causal. Each replaces the row index.
        implementation: None picks by T and S alone, so that the numbers do not depend on the batch size.

    Returns:
        o_BTHd in q's dtype.

    Raises:
        ValueError: shapes that do not fit, or segment ids for one side only.
    """
    T, S, H, K = q_BTHd.shape[1], k_BSKd.shape[1], q_BTHd.shape[2], k_BSKd.shape[2]
    if H % K or k_BSKd.shape != v_BSKd.shape or q_BTHd.shape[::3] != k_BSKd.shape[::3]:
        raise ValueError(f"attention shapes do not fit: q {q_BTHd.shape}, k {k_BSKd.shape}, v {v_BSKd.shape}")
    if q_segment_ids_BT is not None and kv_segment_ids_BS is None and T == S:
        kv_segment_ids_BS = q_segment_ids_BT
    if (q_segment_ids_BT is None) != (kv_segment_ids_BS is None):
        raise ValueError("attention needs segment ids for the queries and for the keys, or for neither")
    if implementation is None:
        implementation = "reference" if T * S <= MAX_REFERENCE_SCORES else "chunked"
    return IMPLEMENTATIONS[implementation](
        q_BTHd,
        k_BSKd,
        v_BSKd,
        causal=causal,
        q_segment_ids_BT=q_segment_ids_BT,
        kv_segment_ids_BS=kv_segment_ids_BS,
        q_positions_BT=q_positions_BT,
        kv_positions_BS=kv_positions_BS,
    )
