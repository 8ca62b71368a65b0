"""From logits to a token: which ids may come out at all, temperature, top-k, top-p.

Legend: N anything flattened, V vocabulary (padded).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from stackwise_jax.errors import RunError, UsageError
from stackwise_jax.objectives.batch import Vocab

# The temperatures of which float32 holds the value and its inverse as normal numbers: compilers divide by either.
COLDEST, HOTTEST = 2.0**-126, 2.0**126
NO_ID = -1  # comes out where there is nothing to choose from


@dataclass(frozen=True)
class Filters:
    """How random a choice is. Applied in this order; hashable, so that it can be a static argument of a jit.

    temperature: divides the logits; 0 always takes the likeliest token, and so does what is below COLDEST. From HOTTEST
        on it makes no difference.
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
    """Logits of the distribution that is sampled: float32, 0 for the likeliest, -inf for every id that cannot come out.

    At temperature 0 only the likeliest id is left (the first of them when several are equal). A row whose allowed
    logits hold a NaN, or nothing above -inf, is -inf throughout. Where some are inf, these are equally likely.
    """
    logits_NV = jnp.where(allowed_V, logits_NV.astype(jnp.float32), -jnp.inf)
    best_N1 = jnp.max(logits_NV, axis=-1, keepdims=True)
    # A maximum may pass over a NaN.
    possible_NV = allowed_V & (best_N1 > -jnp.inf) & ~jnp.isnan(logits_NV).any(axis=-1, keepdims=True)
    if filters.temperature < COLDEST:
        first_N = jnp.argmax(logits_NV, axis=-1)
        possible_NV &= jax.nn.one_hot(first_N, logits_NV.shape[-1], dtype=bool)
        return jnp.where(possible_NV, 0.0, -jnp.inf)
    # Differences first: logits divided by a low temperature would overflow, and inf - inf is no number.
    below_NV = jnp.where(logits_NV == best_N1, 0.0, logits_NV - best_N1)
    logits_NV = jnp.where(possible_NV, below_NV / min(filters.temperature, HOTTEST), -jnp.inf)
    if 0 < filters.top_k < logits_NV.shape[-1]:
        kth_N1 = jax.lax.top_k(logits_NV, filters.top_k)[0][..., -1:]
        logits_NV = jnp.where(logits_NV >= kth_N1, logits_NV, -jnp.inf)
    if filters.top_p < 1.0:
        sorted_NV = jnp.sort(logits_NV, axis=-1, descending=True)
        probs_NV = jax.nn.softmax(sorted_NV, axis=-1)
        # A token stays while those before it have not reached top_p, so the likeliest always does.
        kept_NV = (jnp.cumsum(probs_NV, axis=-1) - probs_NV < filters.top_p).at[..., 0].set(True)
        least_N1 = jnp.min(jnp.where(kept_NV, sorted_NV, jnp.inf), axis=-1, keepdims=True)
        logits_NV = jnp.where(logits_NV >= least_N1, logits_NV, -jnp.inf)
    return logits_NV


def sample_ids(key: jax.Array, logits_NV: jax.Array, allowed_V: jax.Array | np.ndarray, filters: Filters) -> jax.Array:
    """One id per row: int32 (N,), NO_ID where no id is possible (see `filter_logits`), which `check_ids` refuses.

    `key` is not used at temperature 0.
    """
    logits_NV = filter_logits(logits_NV, allowed_V, filters)
    if filters.temperature < COLDEST:
        ids_N = jnp.argmax(logits_NV, axis=-1)
    else:
        # "high": with float32 noise of low range rare tokens come out too seldom, which acts as a lower temperature.
        ids_N = jax.random.categorical(key, logits_NV, axis=-1, mode="high")
    return jnp.where(jnp.max(logits_NV, axis=-1) == -jnp.inf, NO_ID, ids_N).astype(jnp.int32)


def check_ids(ids_N: np.ndarray) -> np.ndarray:
    """The ids, if all are ids.

    Raises:
        RunError: the model gave logits of which none can be chosen.
    """
    if (ids_N == NO_ID).any():
        raise RunError(
            "the model's logits are not numbers (NaN), so no token can be chosen: its weights are damaged or too large "
            "for model.compute_dtype; use another depth (--depth) or train again"
        )
    return ids_N
