"""Which masked tokens are settled first: the step that every way of filling masks repeats.

Legend: T row (prompt, block, padding), V vocabulary (padded).
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from stackwise_jax.errors import UsageError
from stackwise_jax.sampling.filters import Filters, filter_logits, sample_ids

Order = Literal["confidence", "random", "entropy", "margin"]
ORDERS: tuple[Order, ...] = get_args(Order)


def check_order(order: str) -> None:
    """Raises UsageError when there is no such order."""
    if order not in ORDERS:
        raise UsageError(f"order is '{order}'; write {', '.join(ORDERS[:-1])} or {ORDERS[-1]}")


def sureness(
    logits_TV: jax.Array, drawn_T: jax.Array, key: jax.Array, allowed_V: jax.Array | np.ndarray, order: Order
) -> jax.Array:
    """How early each position's token is settled: float32 (T,), the highest first.

    Probabilities are the model's over the allowed ids, before temperature and filters.

    confidence: log-probability of the drawn token; those left over stay masked (low-confidence remasking: Chang et al.
        2022, MaskGIT; Nie et al. 2025, LLaDA).
    entropy: the least entropy first.
    margin: how far the likeliest id is above the second (Kim et al. 2025, Train for the Worst, Plan for the Best).
    random: uniform draws from `key`, which the other orders do not use.
    """
    if order == "random":
        return jax.random.uniform(key, drawn_T.shape)
    log_probs_TV = jax.nn.log_softmax(filter_logits(logits_TV, allowed_V, Filters()))
    if order == "confidence":
        return jnp.take_along_axis(log_probs_TV, drawn_T[:, None], axis=1)[:, 0]
    if order == "entropy":
        return jnp.where(log_probs_TV > -jnp.inf, jnp.exp(log_probs_TV) * log_probs_TV, 0.0).sum(-1)
    best_T2 = jax.lax.top_k(jnp.exp(log_probs_TV), 2)[0]
    return best_T2[:, 0] - best_T2[:, 1]


def settle(
    logits_TV: jax.Array,
    tokens_T: jax.Array,
    open_T: jax.Array,
    count: jax.Array,
    key: jax.Array,
    allowed_V: jax.Array | np.ndarray,
    filters: Filters,
    order: Order,
) -> tuple[jax.Array, jax.Array]:
    """Draw a token for every position and keep the `count` surest of those that are open.

    Returns:
        the tokens int32 (T,), and bool (T,): which were settled now; all that is open where `count` is more.
    """
    token_key, order_key = jax.random.split(key)
    drawn_T = sample_ids(token_key, logits_TV, allowed_V, filters)
    # However unsure, what is open comes before what is not.
    sure_T = jnp.nan_to_num(sureness(logits_TV, drawn_T, order_key, allowed_V, order), nan=-jnp.inf)
    sure_T = jnp.where(open_T, jnp.maximum(sure_T, jnp.finfo(jnp.float32).min), -jnp.inf)
    settled_T = open_T & (jnp.argsort(jnp.argsort(sure_T, descending=True)) < count)
    return jnp.where(settled_T, drawn_T, tokens_T), settled_T
