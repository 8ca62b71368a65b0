"""Linear attention in plain jnp, all weights at once: what the other implementation is held against.

Legend: B batch, T query rows, S key/value rows, H query heads, K key/value heads, G = H / K, M features, e value size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stackwise_jax.kernels.attention.reference import visible


def linear_attention_reference(
    q_BTHM: jax.Array,
    k_BSKM: jax.Array,
    v_BSKe: jax.Array,
    *,
    causal: bool,
    segment_ids_BT: jax.Array | None = None,
) -> jax.Array:
    """See `linear_attention`; holds all B * H * T * S weights in float32."""
    B, T, H, M = q_BTHM.shape
    S, K, e = v_BSKe.shape[1:]
    mask = visible(
        T,
        S,
        causal=causal,
        q_segment_ids_BT=segment_ids_BT,
        kv_segment_ids_BS=segment_ids_BT,
        q_positions_BT=None,
        kv_positions_BS=None,
    )
    q_BTKGM = q_BTHM.reshape(B, T, K, H // K, M)
    weights_BKGTS = jnp.einsum("BTKGM,BSKM->BKGTS", q_BTKGM, k_BSKM, preferred_element_type=jnp.float32)
    if mask is not None:
        weights_BKGTS = jnp.where(mask[:, None, None], weights_BKGTS, 0.0)
    sums_BTKGe = jnp.einsum("BKGTS,BSKe->BTKGe", weights_BKGTS, v_BSKe.astype(jnp.float32))
    norms_BTKG = jnp.moveaxis(weights_BKGTS.sum(axis=-1), 3, 1)
    return normalise(sums_BTKGe, norms_BTKG).reshape(B, T, H, e).astype(v_BSKe.dtype)


def normalise(sums_Ne: jax.Array, norms_N: jax.Array) -> jax.Array:
    """sums / norms, and 0 with gradient 0 where the norm is 0.

    Both are first divided by the norm as a constant. The gradient of a plain division holds the square of the norm,
    and with it norms beyond 1e19 or below 1e-19, which exponential features reach, would leave the range of float32.
    """
    seen_N = norms_N > jnp.finfo(jnp.float32).tiny
    constant_N = jax.lax.stop_gradient(jnp.where(seen_N, norms_N, 1.0))
    ones_N = jnp.where(seen_N, norms_N / constant_N, 1.0)
    return jnp.where(seen_N[..., None], sums_Ne / constant_N[..., None] / ones_N[..., None], 0.0)
