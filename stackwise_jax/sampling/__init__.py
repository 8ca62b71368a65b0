"""Text from a trained rack: causal decoding with a cache, unmasking in several passes, in one, or by several racks."""

from stackwise_jax.sampling.causal import generate_causal
from stackwise_jax.sampling.depth import depth_counts, generate_depth
from stackwise_jax.sampling.filters import Filters, filter_logits, sample_ids
from stackwise_jax.sampling.independent import Expert, expert_spans, generate_independent
from stackwise_jax.sampling.settle import ORDERS, Order
from stackwise_jax.sampling.text import Sample, model_of, sample, sample_text
from stackwise_jax.sampling.unmask import block_counts, generate_unmask, unmask_counts

__all__ = [
    "ORDERS",
    "Expert",
    "Filters",
    "Order",
    "Sample",
    "block_counts",
    "depth_counts",
    "expert_spans",
    "filter_logits",
    "generate_causal",
    "generate_depth",
    "generate_independent",
    "generate_unmask",
    "model_of",
    "sample",
    "sample_ids",
    "sample_text",
    "unmask_counts",
]
