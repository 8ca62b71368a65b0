"""RMSNorm (Zhang and Sennrich 2019). Legend: N anything, D features."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def init_norm(d_model: int, dtype: Any) -> dict[str, jax.Array]:
    """The norm's parameters: {"scale": (D,)} of ones."""
    return {"scale": jnp.ones((d_model,), dtype)}


def rms_norm(x_ND: jax.Array, params: dict[str, jax.Array], eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in float32, returned in the dtype of x."""
    x_f32_ND = x_ND.astype(jnp.float32)
    inverse_N1 = jax.lax.rsqrt(jnp.mean(jnp.square(x_f32_ND), axis=-1, keepdims=True) + eps)
    return (x_f32_ND * inverse_N1 * params["scale"].astype(jnp.float32)).astype(x_ND.dtype)
