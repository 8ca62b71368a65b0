"""Attention: one call for every model, the implementation chosen by what fits.

Legend: B batch, T query rows, S key/value rows, H query heads, K key/value heads (H is a multiple of K), d and e sizes
of a query-key and a value head, r size of the part of the keys that all heads share.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax

from stackwise_jax.kernels import dispatch
from stackwise_jax.kernels.attention import cudnn
from stackwise_jax.kernels.attention.chunked import attention_chunked
from stackwise_jax.kernels.attention.cudnn import attention_cudnn
from stackwise_jax.kernels.attention.reference import attention_reference
from stackwise_jax.kernels.pallas import attention_pallas, obstacle, refusal

Implementation = Literal["auto", "reference", "chunked", "cudnn", "pallas"]
IMPLEMENTATIONS = {
    "reference": attention_reference,
    "chunked": attention_chunked,
    "cudnn": attention_cudnn,
    "pallas": attention_pallas,
}
MAX_REFERENCE_SCORES = 2**20  # scores per head and sequence, T * S, up to which all of them are held at once


def attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    *,
    causal: bool,
    scale: float | None = None,
    q_shared_BTHr: jax.Array | None = None,
    k_shared_BSr: jax.Array | None = None,
    q_segment_ids_BT: jax.Array | None = None,
    kv_segment_ids_BS: jax.Array | None = None,
    q_positions_BT: jax.Array | None = None,
    kv_positions_BS: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """softmax(scale * (q k^T + q_shared k_shared^T)) v; query head h uses key/value head h // (H / K).

    The shared part is one more piece of every query head, and one piece of key that all heads share: the decoupled
    rotary key of multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2, section 2.1.3). Keys, values and the
    shared key are not repeated in memory, except for cuDNN the shared key.

    A query sees a key if both lie in the same segment (where segment ids are given; id 0 is padding and is seen by
    none) and, when causal, the key's position is not above the query's. A position is the absolute row index unless
    positions are given: in decoding with a cache, the unwritten rows of the cache lie above the query and stay hidden.
    A query that sees nothing gives 0, with gradient 0.

    Args:
        q_BTHd, k_BSKd, v_BSKe: any floating dtype; scores and softmax are float32, products accumulate in float32.
        causal: static.
        scale: of the scores, static. None: (d + r)^-0.5.
        q_shared_BTHr, k_shared_BSr: both or neither.
        q_segment_ids_BT, kv_segment_ids_BS: int32, both or neither; if T = S the queries' also serve for the keys.
        q_positions_BT, kv_positions_BS: int32, (B or 1, rows); used only when causal. Each replaces the row index.
        implementation: "auto" picks cuDNN or the Pallas kernel on an NVIDIA GPU where they can, else by T and S alone;
            never by B, so that the numbers do not depend on the batch size. One that is asked for by name and cannot
            do the case gives way to the best that can, and says so once in the log. Static.

    Returns:
        o_BTHe in q's dtype.

    Raises:
        ValueError: shapes that do not fit, one half of a pair alone, or an implementation that does not exist.
    """
    check_heads(q_BTHd, k_BSKd, v_BSKe)
    _check_shared(q_BTHd, k_BSKd, q_shared_BTHr, k_shared_BSr)
    ids = both_segment_ids(q_BTHd.shape[1], k_BSKd.shape[1], q_segment_ids_BT, kv_segment_ids_BS)
    given = {
        "q_shared_BTHr": q_shared_BTHr,
        "k_shared_BSr": k_shared_BSr,
        "q_segment_ids_BT": ids[0],
        "kv_segment_ids_BS": ids[1],
        "q_positions_BT": q_positions_BT if causal else None,
        "kv_positions_BS": kv_positions_BS if causal else None,
    }
    r = 0 if q_shared_BTHr is None else q_shared_BTHr.shape[3]
    options = {"causal": causal, "scale": (q_BTHd.shape[3] + r) ** -0.5 if scale is None else scale}
    options |= {name: x for name, x in given.items() if x is not None}
    chosen = choose_implementation(implementation, q_BTHd, k_BSKd, v_BSKe, **options)
    return IMPLEMENTATIONS[chosen](q_BTHd, k_BSKd, v_BSKe, **options)


def in_pieces(n_queries: int, n_keys: int) -> str:
    """The best implementation of those that can do everything: by T and S alone."""
    return "reference" if n_queries * n_keys <= MAX_REFERENCE_SCORES else "chunked"


def check_heads(q_BTHd: jax.Array, k_BSKd: jax.Array, v_BSKe: jax.Array) -> None:
    """Raise ValueError where the shapes are not those of one attention."""
    (B, _, H, d), (S, K) = q_BTHd.shape, k_BSKd.shape[1:3]
    if H % K or k_BSKd.shape != (B, S, K, d) or v_BSKe.shape[:3] != (B, S, K):
        raise ValueError(f"attention shapes do not fit: q {q_BTHd.shape}, k {k_BSKd.shape}, v {v_BSKe.shape}")


def both_segment_ids(T: int, S: int, q_segment_ids_BT: jax.Array | None, kv_segment_ids_BS: jax.Array | None):
    """Segment ids of queries and keys, or None for both."""
    if q_segment_ids_BT is not None and kv_segment_ids_BS is None and T == S:
        kv_segment_ids_BS = q_segment_ids_BT
    if (q_segment_ids_BT is None) != (kv_segment_ids_BS is None):
        raise ValueError("attention needs segment ids for the queries and for the keys, or for neither")
    return q_segment_ids_BT, kv_segment_ids_BS


def _check_shared(q_BTHd, k_BSKd, q_shared_BTHr, k_shared_BSr) -> None:
    if (q_shared_BTHr is None) != (k_shared_BSr is None):
        raise ValueError("attention needs the shared part of the queries and of the keys, or neither")
    if q_shared_BTHr is None:
        return
    shared = q_shared_BTHr.shape, k_shared_BSr.shape
    if shared != (q_BTHd.shape[:3] + shared[0][3:], k_BSKd.shape[:2] + shared[0][3:]):
        raise ValueError(
            f"attention shapes do not fit: q {q_BTHd.shape}, k {k_BSKd.shape}, shared parts {shared[0]} and {shared[1]}"
        )


def choose_implementation(asked: str, q_BTHd: jax.Array, k_BSKd: jax.Array, v_BSKe: jax.Array, **options: Any) -> str:
    """The implementation that `attention` uses where `asked` is asked for; options: its others that are not None."""
    positions = "q_positions_BT" in options or "kv_positions_BS" in options
    masks = {name for name in options if "segment_ids" in name or "positions" in name}
    plain = {name: option for name, option in options.items() if name not in masks}
    arrays = [q_BTHd, k_BSKd, v_BSKe, *(x for name, x in plain.items() if "shared" in name)]

    def against_pallas() -> str | None:
        found = obstacle(*arrays, sizes=[x.shape[-1] for x in arrays], positions=positions)
        if found is not None:
            return found
        given = {name: option for name, option in options.items() if name not in ("causal", "scale")}
        named = {"q_BTHd": q_BTHd, "k_BSKd": k_BSKd, "v_BSKe": v_BSKe} | given
        return refusal("flash_attention", named, causal=options["causal"], scale=options["scale"])

    special = {
        "cudnn": partial(cudnn.obstacle, q_BTHd, k_BSKd, v_BSKe, masked=bool(masks), **plain),
        "pallas": against_pallas,
    }
    return dispatch.choose(
        "attention",
        asked,
        special=special,
        general=("reference", "chunked"),
        otherwise=in_pieces(q_BTHd.shape[1], k_BSKd.shape[1]),
        # Neither is faster than plain products in float32.
        fast=dispatch.cuda_capability() is not None and q_BTHd.dtype.itemsize == 2,
    )
