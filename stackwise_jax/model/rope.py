"""Rotary position embedding (Su et al. 2021) on queries and keys, per head.

Legend: B batch (or 1), T sequence, H heads, d head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rope(x_BTHd: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotate feature i and feature i + d/2 of every head by positions * theta^(-2i/d).

    The pairing is that of GPT-NeoX and LLaMA as published by Hugging Face. Angles and the rotation are float32; the
    result has the dtype of x. Scores of rotated queries and keys depend on differences of positions only.
    """
    half = x_BTHd.shape[-1] // 2
    frequencies_d = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles_BT1d = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies_d
    cos_BT1d, sin_BT1d = jnp.cos(angles_BT1d), jnp.sin(angles_BT1d)
    first, second = jnp.split(x_BTHd.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos_BT1d - second * sin_BT1d, second * cos_BT1d + first * sin_BT1d]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTHd.dtype)
