"""Cosines and sines of random phases (Rahimi & Recht 2007, Random features for large-scale kernel machines).

Legend: B batch, T rows, H heads, d head size, F frequencies.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def trig_features(
    x_BTHd: jax.Array, frequencies_dF: jax.Array, angles_F: jax.Array | None, rotary_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of the phases x . w + position * angle: (B, T, H, F) each, in x's dtype.

    Phases are float32; x and the frequencies enter their product in x's dtype. Adding to a phase is turning the pair
    (cos, sin), so products of features of two rows depend on positions only by their difference.

    Args:
        angles_F, rotary_BT: radians per position, and positions (B or 1, T); None for either: no positions.
    """
    frequencies_dF = frequencies_dF.astype(x_BTHd.dtype)
    phases_BTHF = jnp.einsum(
        "BTHd,dF->BTHF",
        x_BTHd,
        frequencies_dF,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    if angles_F is not None and rotary_BT is not None:
        phases_BTHF += (rotary_BT.astype(jnp.float32)[..., None] * angles_F.astype(jnp.float32))[:, :, None]
    return jnp.cos(phases_BTHF).astype(x_BTHd.dtype), jnp.sin(phases_BTHF).astype(x_BTHd.dtype)
