"""From logits to a token: which ids may come out at all, temperature, top-k, top-p.

Legend: N anything flattened, V vocabulary (padded).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from stackwise_jax.errors import UsageError
from stackwise_jax.objectives.batch import Vocab


@dataclass(frozen=True)
class Filters:
    """How random a choice is. Applied in this order; hashable, so that it can be a static argument of a jit.

    temperature: divides the logits; 0 always takes the likeliest token.
    top_k: only the k likeliest tokens (and those as likely as the k-th); 0 keeps all.
    top_p: only the fewest likeliest tokens that together have at least this probability (nucleus sampling, Holtzman et
        al. 2020), and those as likely as the last of them; 1 keeps all.

    Raises:
        UsageError: a value out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0.0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}; write 0 (the likeliest token) or a number above it")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}; write 0 (all tokens) or how many of the likeliest to keep")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"top_p is {self.top_p}; write a share above 0 and up to 1 (all tokens)")


def allowed_ids(vocab: Vocab, n_columns: int, also: tuple[int, ...] = ()) -> np.ndarray:
    """Which columns of the logits may be sampled: text, no special token, no padding of the vocabulary.

    Args:
        vocab: the tokenizer's ids.
        n_columns: width of the logits; at least vocab.size.
        also: special tokens that may be sampled all the same (EOS, which ends a text).

    Returns:
        bool (n_columns,).
    """
    allowed_V = np.zeros(n_columns, bool)
    allowed_V[vocab.ordinary_ids] = True
    allowed_V[list(also)] = True
    return allowed_V


def filter_logits(logits_NV: jax.Array, allowed_V: jax.Array | np.ndarray, filters: Filters) -> jax.Array:
    """Logits of the distribution that is sampled: float32, -inf for every id that cannot come out.

    At temperature 0 the likeliest id is left with logit 0 (the first of them when several are equal).
    """
    logits_NV = jnp.where(allowed_V, logits_NV.astype(jnp.float32), -jnp.inf)
    if filters.temperature == 0.0:
        best_N = jnp.argmax(logits_NV, axis=-1)
        return jnp.where(jax.nn.one_hot(best_N, logits_NV.shape[-1], dtype=bool), 0.0, -jnp.inf)
    logits_NV = logits_NV / filters.temperature
    if 0 < filters.top_k < logits_NV.shape[-1]:
        kth_N1 = jax.lax.top_k(logits_NV, filters.top_k)[0][..., -1:]
        logits_NV = jnp.where(logits_NV >= kth_N1, logits_NV, -jnp.inf)
    if filters.top_p < 1.0:
        sorted_NV = jnp.sort(logits_NV, axis=-1, descending=True)
        probs_NV = jax.nn.softmax(sorted_NV, axis=-1)
        # A token stays while those before it have not reached top_p, so the likeliest always does.
        kept_NV = jnp.cumsum(probs_NV, axis=-1) - probs_NV < filters.top_p
        least_N1 = jnp.min(jnp.where(kept_NV, sorted_NV, jnp.inf), axis=-1, keepdims=True)
        logits_NV = jnp.where(logits_NV >= least_N1, logits_NV, -jnp.inf)
    return logits_NV


def sample_ids(key: jax.Array, logits_NV: jax.Array, allowed_V: jax.Array | np.ndarray, filters: Filters) -> jax.Array:
    """One id per row: int32 (N,). `key` is not used at temperature 0."""
    logits_NV = filter_logits(logits_NV, allowed_V, filters)
    if filters.temperature == 0.0:
        return jnp.argmax(logits_NV, axis=-1).astype(jnp.int32)
    # "high": with float32 noise of low range rare tokens come out too seldom, which acts as a lower temperature.
    return jax.random.categorical(key, logits_NV, axis=-1, mode="high").astype(jnp.int32)
