"""Attention: `api` chooses between `reference` (all scores at once), `chunked` (query rows in chunks), `cudnn`, and the
flash attention of `kernels/pallas`."""

from stackwise_jax.kernels.attention.api import attention

__all__ = ["attention"]
