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


def init_mlp(block: Block, key: jax.Array) -> Params:
    """{"gate", "up": (D, F), "down": (F, D)}. With freeze_up_proj `up` stays as it is made here."""
    dtype = dtype_of(block.param_dtype)
    gate_key, up_key, down_key = (jax.random.fold_in(key, i) for i in range(3))
    return {
        "gate": {"kernel": init_kernel(gate_key, block.d_model, block.d_ff, dtype)},
        "up": {"kernel": init_kernel(up_key, block.d_model, block.d_ff, dtype)},
        "down": {"kernel": init_kernel(down_key, block.d_ff, block.d_model, dtype, RESIDUAL_GAIN)},
    }


def mlp(block: Block, params: Params, x_BTD: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    """down(silu(gate(x)) * up(x)) in the compute dtype; dropout_key is for the adapters' own dropout, see linear."""
    gate_BTF = project(block, params, "gate", x_BTD, dropout_key)
    up_BTF = project(block, params, "up", x_BTD, dropout_key)
    return project(block, params, "down", jax.nn.silu(gate_BTF) * up_BTF, dropout_key)
