"""Linear attention compiled for a shape, to be timed."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stackwise_jax.kernels.linear_attention.api import Implementation, linear_attention
from stackwise_jax.kernels.linear_attention.arg_specs import ArgSpec, make_args
from stackwise_jax.kernels.measure import Compiled, compiled
from stackwise_jax.random_streams import root_key


def compile_linear_attention(spec: ArgSpec, implementation: Implementation, *, maps: bool, backward: bool) -> Compiled:
    """The call, or its gradients to all arrays.

    maps: it makes the features itself, exp(w . x - |x|^2) of queries and keys; else it is given them.
    """
    args = make_args(spec, spec.size if maps else spec.features, root_key(0))
    matrix_NM = jax.random.normal(root_key(1), (spec.size, spec.features))

    def features(x_BTHN: jax.Array) -> jax.Array:
        if not maps:
            return x_BTHN
        x_BTHN = x_BTHN.astype(jnp.float32) * spec.size**-0.5
        return jnp.exp(x_BTHN @ matrix_NM - jnp.sum(x_BTHN**2, axis=-1, keepdims=True))

    def call(q_BTHN: jax.Array, k_BTKN: jax.Array, v_BTKe: jax.Array) -> jax.Array:
        how = {"causal": spec.causal, "implementation": implementation}
        return linear_attention(features(q_BTHN), features(k_BTKN), v_BTKe, **how)

    return compiled(call, args, backward=backward)
