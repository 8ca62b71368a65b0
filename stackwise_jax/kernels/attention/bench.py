"""An implementation of attention compiled for a shape, to be timed."""

from __future__ import annotations

from functools import partial

from stackwise_jax.kernels.attention.api import Implementation, attention, choose_implementation
from stackwise_jax.kernels.attention.arg_specs import ArgSpec, make_args
from stackwise_jax.kernels.measure import Compiled, compiled
from stackwise_jax.random_streams import root_key


def compile_attention(spec: ArgSpec, implementation: Implementation, *, backward: bool) -> Compiled | None:
    """The call, or its gradients to all arrays; None: the implementation cannot do it here."""
    args = make_args(spec, root_key(0))
    if choose_implementation(implementation, **args, causal=spec.causal, scale=1.0) != implementation:
        return None
    f = partial(attention, causal=spec.causal, implementation=implementation)
    return compiled(f, args, backward=backward, flops=spec.flops(backward=backward))
