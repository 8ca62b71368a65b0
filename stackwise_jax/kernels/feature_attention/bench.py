"""An implementation of feature attention compiled for a shape, to be timed."""

from __future__ import annotations

from functools import partial

from stackwise_jax.kernels.feature_attention.api import Implementation, choose_implementation, feature_attention
from stackwise_jax.kernels.feature_attention.arg_specs import ArgSpec, make_args
from stackwise_jax.kernels.measure import Compiled, compiled
from stackwise_jax.random_streams import root_key


def compile_feature_attention(spec: ArgSpec, implementation: Implementation, *, backward: bool) -> Compiled | None:
    """The call, or its gradients to all arrays; None: the implementation cannot do it here."""
    args = make_args(spec, root_key(0))
    how = {"causal": spec.causal, "scale": (2 * spec.frequencies) ** 0.5}
    if choose_implementation(implementation, **args, **how, ordered=False) != implementation:
        return None
    f = partial(feature_attention, implementation=implementation, **how)
    return compiled(f, args, backward=backward, flops=spec.flops(backward=backward))
