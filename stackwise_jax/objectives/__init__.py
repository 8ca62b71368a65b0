"""What is predicted from what: the Batch contract and the corruption that fills it."""

from stackwise_jax.objectives.batch import Batch, Examples, Vocab
from stackwise_jax.objectives.corruption import example_keys, make_batch, max_targets

__all__ = ["Batch", "Examples", "Vocab", "example_keys", "make_batch", "max_targets"]
