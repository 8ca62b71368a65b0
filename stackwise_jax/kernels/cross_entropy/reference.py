"""Head and cross entropy with all logits at once, differentiated by JAX: what other implementations are held against.

Legend: B batch, T sequence length, D d_model, V vocabulary (padded).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def head_logits(x_BTD: jax.Array, kernel_DV: jax.Array, n_valid: int) -> jax.Array:
    """x @ kernel in x's dtype, accumulated and returned in float32, with columns from n_valid on at -inf."""
    logits_BTV = jnp.einsum("BTD,DV->BTV", x_BTD, kernel_DV.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
    if n_valid == kernel_DV.shape[1]:
        return logits_BTV
    return jnp.where(jnp.arange(kernel_DV.shape[1]) < n_valid, logits_BTV, -jnp.inf)


def cross_entropy_reference(
    x_BTD: jax.Array, kernel_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, n_valid: int
) -> tuple[jax.Array, jax.Array]:
    """See `linear_cross_entropy`: (sum of weighted nll, hits), both float32 scalars."""
    counts_BT = weights_BT != 0
    # A position without weight may hold anything: it must not reach the sum or a gradient, not even as 0 * NaN.
    x_BTD = jnp.where(counts_BT[..., None], x_BTD, 0)
    targets_BT = jnp.where(counts_BT, targets_BT, 0)
    logits_BTV = head_logits(x_BTD, kernel_DV, n_valid)
    target_logits_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    nll_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - target_logits_BT
    hits_BT = (jnp.argmax(logits_BTV, axis=-1) == targets_BT) & (weights_BT > 0)
    return jnp.sum(weights_BT * nll_BT), jnp.sum(hits_BT, dtype=jnp.float32)
