"""Head matmul and cross entropy: `api` chooses between `reference` (all logits at once) and `chunked`."""

from stackwise_jax.kernels.cross_entropy.api import gather_targets, linear_cross_entropy

__all__ = ["gather_targets", "linear_cross_entropy"]
