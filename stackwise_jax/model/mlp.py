"""SwiGLU feed-forward (Shazeer 2020): down(silu(gate(x)) * up(x)), no biases.

Legend: B batch, T sequence, D d_model, F d_ff.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from stackwise_jax.model.linear import RESIDUAL_GAIN, init_kernel, project
from stackwise_jax.model.spec import Params, dtype_of

if TYPE_CHECKING:
    from stackwise_jax.model.block import Block


def mlp_shapes(block: Block) -> dict[str, tuple[int, int]]:
    """(in, out) of the matrices: gate and up (D, F), down (F, D)."""
    wide, narrow = (block.d_model, block.d_ff), (block.d_ff, block.d_model)
    return {"gate": wide, "up": wide, "down": narrow}


def init_mlp(block: Block, key: jax.Array) -> Params:
    """{"gate", "up", "down"}, each {"kernel": (in, out)}. With freeze_up_proj `up` stays as it is made here."""
    dtype = dtype_of(block.param_dtype)
    params = {}
    for i, (name, (n_in, n_out)) in enumerate(mlp_shapes(block).items()):
        gain = RESIDUAL_GAIN if name == "down" else 1.0
        params[name] = {"kernel": init_kernel(jax.random.fold_in(key, i), n_in, n_out, dtype, gain)}
    return params


def mlp(block: Block, params: Params, x_BTD: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    """down(silu(gate(x)) * up(x)) in the compute dtype; dropout_key is for the adapters' own dropout, see linear."""
    gate_BTF = project(block, params, "gate", x_BTD, dropout_key)
    up_BTF = project(block, params, "up", x_BTD, dropout_key)
    return project(block, params, "down", jax.nn.silu(gate_BTF) * up_BTF, dropout_key)
