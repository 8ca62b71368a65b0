"""Feature attention: softmax over products of random features, the implementation chosen by what fits.

Legend: B batch, T query rows, S key/value rows, H query heads, K key/value heads (H is a multiple of K), d and e sizes
of a query-key and a value head, F frequencies.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from stackwise_jax.kernels import dispatch
from stackwise_jax.kernels.attention.api import attention, both_segment_ids, check_heads, in_pieces
from stackwise_jax.kernels.feature_attention.features import trig_features
from stackwise_jax.kernels.pallas import feature_attention_pallas, obstacle, refusal

Implementation = Literal["auto", "reference", "chunked", "pallas"]


def feature_attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    frequencies_dF: jax.Array,
    *,
    scale: float,
    causal: bool,
    angles_F: jax.Array | None = None,
    q_rotary_BT: jax.Array | None = None,
    kv_rotary_BS: jax.Array | None = None,
    q_positions_BT: jax.Array | None = None,
    kv_positions_BS: jax.Array | None = None,
    q_segment_ids_BT: jax.Array | None = None,
    kv_segment_ids_BS: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """softmax(scale * phi(q) . phi(k)) v with phi(x) = [cos(p), sin(p)] / sqrt(F), p = x . w + position * angle.

    phi(q) . phi(k) is an unbiased estimate of the shift-invariant kernel whose spectral distribution the frequencies
    were drawn from (Rahimi & Recht 2007). Turning a pair (cos, sin) by an angle per position is exactly relative.

    Args:
        q_BTHd, k_BSKd, v_BSKe: as for `attention`; features are in q's and k's dtype, phases in float32.
        frequencies_dF: w, shared by the heads.
        scale: static. causal: static.
        angles_F: radians per position; None: positions do not enter the phases.
        q_rotary_BT, kv_rotary_BS: int32, (B or 1, rows), the positions that enter the phases; None: the row index.
        q_positions_BT, kv_positions_BS: the order where causal, as for `attention`. They are apart from those in the
            phases, which begin anew with every packed segment.
        q_segment_ids_BT, kv_segment_ids_BS: as for `attention`.
        implementation: "reference" and "chunked" are those of `attention` over features that are held for all rows;
            "pallas" holds those of the keys only. "auto" as for `attention`. Static.

    Returns:
        o_BTHe in q's dtype. Gradients reach q, k, v, frequencies and angles.

    Raises:
        ValueError: shapes that do not fit, one half of a pair alone, or an implementation that does not exist.
    """
    _check(q_BTHd, k_BSKd, v_BSKe, frequencies_dF, angles_F)
    T, S, F = q_BTHd.shape[1], k_BSKd.shape[1], frequencies_dF.shape[1]
    if angles_F is not None:
        q_rotary_BT = jnp.arange(T)[None] if q_rotary_BT is None else q_rotary_BT
        kv_rotary_BS = jnp.arange(S)[None] if kv_rotary_BS is None else kv_rotary_BS
    ids = both_segment_ids(T, S, q_segment_ids_BT, kv_segment_ids_BS)
    segments = {"q_segment_ids_BT": ids[0], "kv_segment_ids_BS": ids[1]}
    order = {"q_positions_BT": q_positions_BT, "kv_positions_BS": kv_positions_BS}
    ordered = causal and any(x is not None for x in order.values())
    maps = {"angles_F": angles_F, "q_rotary_BT": q_rotary_BT, "kv_rotary_BS": kv_rotary_BS} | segments
    heads = q_BTHd, k_BSKd, v_BSKe, frequencies_dF
    chosen: Any = choose_implementation(implementation, *heads, ordered=ordered, causal=causal, scale=scale, **maps)
    if chosen == "pallas":
        return feature_attention_pallas(*heads, causal=causal, scale=scale, **maps)
    q_BTHM, k_BSKM = (
        jnp.concatenate(trig_features(x, frequencies_dF, angles_F, rotary), axis=-1)
        for x, rotary in ((q_BTHd, q_rotary_BT), (k_BSKd, kv_rotary_BS))
    )
    masks = order | segments
    return attention(q_BTHM, k_BSKM, v_BSKe, causal=causal, scale=scale / F, implementation=chosen, **masks)


def _check(q_BTHd, k_BSKd, v_BSKe, frequencies_dF, angles_F) -> None:
    check_heads(q_BTHd, k_BSKd, v_BSKe)
    d, F = frequencies_dF.shape
    if d != q_BTHd.shape[3] or (angles_F is not None and angles_F.shape != (F,)):
        angles = "" if angles_F is None else f", angles {angles_F.shape}"
        raise ValueError(
            f"feature_attention shapes do not fit: q {q_BTHd.shape}, frequencies {frequencies_dF.shape}{angles}"
        )


def choose_implementation(
    asked: str,
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    frequencies_dF: jax.Array,
    *,
    ordered: bool,
    causal: bool,
    scale: float,
    **maps: jax.Array | None,
) -> str:
    """The implementation that `feature_attention` uses where `asked` is asked for.

    ordered: it is causal by explicit positions. maps: the other arrays that the kernel takes.
    """
    F = frequencies_dF.shape[1]

    def against_pallas() -> str | None:
        sizes = q_BTHd.shape[3], F, F, v_BSKe.shape[3]
        found = obstacle(q_BTHd, k_BSKd, v_BSKe, sizes=sizes, positions=ordered)
        if found is not None:
            return found
        heads = {"q_BTHd": q_BTHd, "k_BSKd": k_BSKd, "v_BSKe": v_BSKe, "frequencies_dF": frequencies_dF}
        return refusal("feature_flash_attention", heads | maps, causal=causal, scale=scale)

    return dispatch.choose(
        "feature_attention",
        asked,
        special={"pallas": against_pallas},
        general=("reference", "chunked"),
        otherwise=in_pieces(q_BTHd.shape[1], k_BSKd.shape[1]),
        fast=dispatch.cuda_capability() is not None and q_BTHd.dtype.itemsize == 2,
    )
