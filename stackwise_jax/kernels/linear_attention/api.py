"""Linear attention: a row's weights are inner products of positive features, so sums over keys can be kept and reused.

Katharopoulos et al. 2020, "Transformers are RNNs"; the chunked form as in Hua et al. 2022 (FLASH).

Legend: B batch, T query rows, S key/value rows (or new rows while decoding), H query heads, K key/value heads (H is a
multiple of K), M features, e value size.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from stackwise_jax.kernels.dispatch import choose
from stackwise_jax.kernels.linear_attention.chunked import (
    LinearState,
    Passed,
    init_linear_state,
    linear_attention_chunked,
    scan_chunks,
)
from stackwise_jax.kernels.linear_attention.reference import linear_attention_reference, normalise

__all__ = ["LinearState", "init_linear_state", "linear_attention", "linear_step"]

Implementation = Literal["auto", "reference", "chunked", "cudnn", "pallas"]
IMPLEMENTATIONS = {"reference": linear_attention_reference, "chunked": linear_attention_chunked}
OBSTACLES = {"cudnn": lambda: "cuDNN computes a softmax", "pallas": lambda: "there is no kernel of it"}


def linear_attention(
    q_BTHM: jax.Array,
    k_BSKM: jax.Array,
    v_BSKe: jax.Array,
    *,
    causal: bool,
    segment_ids_BT: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """sum_s w v_s / sum_s w with w = q . k_s >= 0 over the rows s that are seen; query head h uses key head h // (H/K).

    A query sees a key if, when causal, the key's row is not below its own, and if both lie in the same segment, where
    segment ids are given; id 0 is padding and is seen by none. Rows of a segment stand together, as packing puts them,
    with or without padding among them: the chunked form forgets a segment where another begins. A query that sees
    nothing, or nothing of weight above 0, gives 0 with gradient 0.

    Args:
        q_BTHM, k_BSKM: any floating dtype; features that are not negative.
        v_BSKe: any floating dtype; sums are float32.
        causal: static. Needs T = S.
        segment_ids_BT: int32, of queries and keys alike. Needs T = S.
        implementation: "reference" holds all T * S weights, "chunked" and "auto" take time and memory linear in T. The
            other ways to compute attention give way to "chunked" and say so once in the log.

    Returns:
        o_BTHe in v's dtype.

    Raises:
        ValueError: shapes that do not fit, or an implementation that does not exist.
    """
    _check(q_BTHM, k_BSKM, v_BSKe, same_rows=causal or segment_ids_BT is not None)
    how = {"special": OBSTACLES, "general": (*IMPLEMENTATIONS,), "otherwise": "chunked", "fast": False}
    chosen = choose("linear attention", implementation, **how)
    return IMPLEMENTATIONS[chosen](q_BTHM, k_BSKM, v_BSKe, causal=causal, segment_ids_BT=segment_ids_BT)


def linear_step(
    state: LinearState,
    q_BSHM: jax.Array,
    k_BSKM: jax.Array,
    v_BSKe: jax.Array,
    valid_BS: jax.Array | None = None,
) -> tuple[LinearState, jax.Array]:
    """S new rows after those in the state, causally: (the state after them, o_BSHe in v's dtype).

    Rows where valid_BS (bool) is False leave the state as it is and are seen by none; what they themselves give is of
    no use. In steps of any sizes the same as `linear_attention` with causal over all rows at once.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(q_BSHM, k_BSKM, v_BSKe, same_rows=True)
    if valid_BS is not None:
        k_BSKM = jnp.where(valid_BS[:, :, None, None], k_BSKM, jnp.zeros((), k_BSKM.dtype))
    passed, sums_BSHe, norms_BSH = scan_chunks(Passed(state, None), q_BSHM, k_BSKM, v_BSKe, None)
    return passed.state, normalise(sums_BSHe, norms_BSH).astype(v_BSKe.dtype)


def _check(q_BTHM: jax.Array, k_BSKM: jax.Array, v_BSKe: jax.Array, same_rows: bool) -> None:
    fits = q_BTHM.shape[::3] == k_BSKM.shape[::3] and k_BSKM.shape[:3] == v_BSKe.shape[:3]
    fits = fits and q_BTHM.shape[2] % k_BSKM.shape[2] == 0
    if not fits or (same_rows and q_BTHM.shape[1] != k_BSKM.shape[1]):
        raise ValueError(
            f"linear attention shapes do not fit: q {q_BTHM.shape}, k {k_BSKM.shape}, v {v_BSKe.shape}"
            + (" (causal or with segment ids, queries and keys are the same rows)" if same_rows else "")
        )
