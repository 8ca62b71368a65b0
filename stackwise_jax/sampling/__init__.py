"""Text from a trained rack: causal decoding with a cache, and iterative unmasking."""

from stackwise_jax.sampling.causal import generate_causal
from stackwise_jax.sampling.filters import Filters, filter_logits, sample_ids
from stackwise_jax.sampling.text import Sample, sample, sample_text
from stackwise_jax.sampling.unmask import generate_unmask, unmask_counts

__all__ = [
    "Filters",
    "Sample",
    "filter_logits",
    "generate_causal",
    "generate_unmask",
    "sample",
    "sample_ids",
    "sample_text",
    "unmask_counts",
]
