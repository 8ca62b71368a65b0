"""Linear attention: `api` chooses between `reference` (all weights at once) and `chunked` (linear time and memory)."""

from stackwise_jax.kernels.linear_attention.api import LinearState, init_linear_state, linear_attention, linear_step

__all__ = ["LinearState", "init_linear_state", "linear_attention", "linear_step"]
