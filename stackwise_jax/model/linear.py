"""Matrix multiplication with a weight that is stored in one precision and used in another.

Legend: N anything, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

RESIDUAL_GAIN = 0.2  # of the matrices that write into the residual stream; see Block


def init_kernel(key: jax.Array, n_in: int, n_out: int, dtype: Any, gain: float = 1.0) -> jax.Array:
    """A normal (n_in, n_out) matrix with standard deviation gain / sqrt(n_in): outputs have the scale of the inputs."""
    return (jax.random.normal(key, (n_in, n_out), jnp.float32) * (gain * n_in**-0.5)).astype(dtype)


def linear(x_NI: jax.Array, kernel_IO: jax.Array, dtype: Any) -> jax.Array:
    """x @ kernel in `dtype`; both are cast at use. (..., I) -> (..., O)."""
    return jnp.matmul(x_NI.astype(dtype), kernel_IO.astype(dtype))
