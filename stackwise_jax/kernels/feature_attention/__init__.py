"""Softmax attention over random features of queries and keys; `api` chooses between plain attention over the features
and the kernel of `kernels/pallas`, which makes those of the queries itself."""

from stackwise_jax.kernels.feature_attention.api import feature_attention
from stackwise_jax.kernels.feature_attention.features import trig_features

__all__ = ["feature_attention", "trig_features"]
