"""Attention: `api` chooses between `reference` (all scores at once) and `chunked` (query rows in chunks)."""

from stackwise_jax.kernels.attention.api import attention

__all__ = ["attention"]
