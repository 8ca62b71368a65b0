"""The time embedding: how much of a sequence is hidden, as a vector that is added to its embedding at every position.

Time is the share of the sequence's tokens that is hidden, 0 to 1. It becomes F fixed features, which a learned (F, D)
matrix turns into the vector:

- sinusoidal: sines and cosines of 1000 * share at the frequencies 10000 ** (-i / 32), i = 0..31 (Vaswani et al. 2017;
  a noise level counted in thousandths as in Ho et al. 2020). The matrix is a leaf "kernel" and decays like one.
- learned: the rows of a table belong to the shares 0, 1/64, .. 1, and between two of them the vector is interpolated
  linearly. The table is a leaf "table" and does not decay.

Both start at zero: at first the rack computes what it would without. They draw no random numbers.

Legend: B batch, D d_model, F features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from stackwise_jax.errors import UsageError
from stackwise_jax.model.spec import Params, dtype_of, require

if TYPE_CHECKING:
    from stackwise_jax.model.rack import Rack

TIME_EMBEDDINGS = ("none", "sinusoidal", "learned")
STEPS, LONGEST, WAVES = 1000.0, 10_000.0, 32  # sinusoidal: units of time, ratio of the frequencies, their number
INTERVALS = 64  # learned: between the rows of the table


def time_features(kind: str, hidden_B: jax.Array) -> jax.Array:
    """The fixed features of a share, float32: (B,) -> (B, F); F is 64 for sinusoidal and 65 for learned."""
    hidden_B1 = hidden_B.astype(jnp.float32)[:, None]
    if kind == "learned":
        # The weights of linear interpolation: at most two of them are not zero.
        return jnp.maximum(1.0 - jnp.abs(INTERVALS * hidden_B1 - jnp.arange(INTERVALS + 1)), 0.0)
    angles_BW = STEPS * hidden_B1 * LONGEST ** (-jnp.arange(WAVES) / WAVES)
    return jnp.concatenate([jnp.sin(angles_BW), jnp.cos(angles_BW)], axis=1)


def init_time(rack: Rack) -> Params:
    """{"kernel": (F, D)} for sinusoidal or {"table": (F, D)} for learned, zeros in the dtype of the parameters."""
    name, n_features = ("table", INTERVALS + 1) if rack.time_embedding == "learned" else ("kernel", 2 * WAVES)
    return {name: jnp.zeros((n_features, rack.d_model), dtype_of(rack.param_dtype))}


def embed_time(rack: Rack, time_params: Params, hidden_B: jax.Array) -> jax.Array:
    """(B,) -> (B, D) in the compute dtype; the product is computed in float32."""
    matrix_FD = time_params["table" if rack.time_embedding == "learned" else "kernel"]
    time_BD = time_features(rack.time_embedding, hidden_B) @ matrix_FD.astype(jnp.float32)
    return time_BD.astype(dtype_of(rack.compute_dtype))


def check_time(rack: Rack, hidden_B: jax.Array | None, batch: int) -> None:
    """Whether the hidden share is there exactly where the rack takes it.

    Raises:
        UsageError: it is missing, it is given to a rack without time embedding, or it is not one number per sequence.
    """
    if rack.time_embedding == "none":
        require(
            hidden_B is None,
            "hidden_B is given to a rack without time embedding; leave it out, or build the rack with time_embedding "
            "(objective.time input)",
        )
        return
    if hidden_B is None:
        raise UsageError(
            f"the rack has a {rack.time_embedding} time embedding and hidden_B is missing; give the share of each "
            "sequence's tokens that is hidden, 0 where none is"
        )
    shape = jnp.shape(hidden_B)
    require(shape == (batch,), f"hidden_B has the shape {shape} for {batch} sequences; give one share for each")
