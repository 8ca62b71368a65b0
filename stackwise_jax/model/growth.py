"""How a new stack begins, other than at random: as the identity, or as a copy of another."""

from __future__ import annotations

import jax.numpy as jnp

from stackwise_jax.model.spec import Params, unbound
from stackwise_jax.model.stack import Stack, block_name


def zero_outputs(stack: Stack, params: Params) -> Params:
    """A stack's tree with the matrices that write into the residual stream (`o` and `down`) at zero.

    The stack is then the identity, bitwise, whatever its other parameters are, and learns all the same: first the two
    matrices, then, as they move, the rest. The last layer of each residual branch at zero is from Fixup (Zhang et al.
    2019), growth that keeps the function from Net2Net (Chen et al. 2016).
    """
    names = ["blocks"] if stack.block_alike else [block_name(i) for i in range(len(stack.blocks))]
    return {name: _silent(params[name]) for name in names}


def can_copy(source: Stack, target: Stack) -> bool:
    """Whether the parameters of `source` can be those of `target`: as many blocks, each with the same spec."""
    return unbound(source).blocks == unbound(target).blocks


def _silent(block_params: Params) -> Params:
    """The tree of a block, or of several on a leading axis, that adds nothing to its input."""
    silenced = dict(block_params)
    for branch, name in (("attn", "o"), ("mlp", "down")):
        linear = block_params[branch][name]
        silenced[branch] = {**block_params[branch], name: {**linear, "kernel": jnp.zeros_like(linear["kernel"])}}
    return silenced
