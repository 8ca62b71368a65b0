"""Iterative unmasking: a block of mask tokens behind the prompt becomes text in a few forward passes.

Legend: P prompt, T row (prompt, block, padding), V vocabulary (padded), S forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from stackwise_jax.errors import UsageError
from stackwise_jax.model import Rack
from stackwise_jax.objectives.batch import Vocab
from stackwise_jax.sampling.filters import Filters, allowed_ids, sample_ids
from stackwise_jax.sampling.prompt import padded_row

Order = Literal["confidence", "random"]


def unmask_counts(length: int, steps: int) -> np.ndarray:
    """How many tokens each forward pass unmasks, on the cosine grid of MaskGIT (Chang et al. 2022).

    After pass s of S about length * cos(pi/2 * s/S) tokens are still masked: few are settled while little is known,
    many at the end. Each pass unmasks at least one token, and the last one leaves none.

    Args:
        length: masked tokens.
        steps: forward passes; more than `length` have nothing to do and are left out.

    Returns:
        int32 (min(steps, length),), the sum is `length`.

    Raises:
        UsageError: length below 0 or steps below 1.
    """
    if length < 0:
        raise UsageError(f"max_tokens is {length}; write 0 or more")
    if steps < 1:
        raise UsageError(f"steps is {steps}; write at least 1")
    steps = min(steps, length)
    masked = [length]
    for step in range(1, steps + 1):
        on_grid = round(length * math.cos(math.pi / 2 * step / steps))
        masked.append(max(min(on_grid, masked[-1] - 1), steps - step))
    return -np.diff(masked).astype(np.int32)


def generate_unmask(
    rack: Rack,
    params: Mapping[str, Any],
    prompt_ids: Sequence[int] | np.ndarray,
    *,
    length: int,
    steps: int | None = None,
    order: Order = "confidence",
    key: jax.Array,
    vocab: Vocab,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    attention_mode: Literal["bidirectional", "causal"] | None = "bidirectional",
) -> np.ndarray:
    """Fill a block of masks behind a prompt with a masked or mask-diffusion model.

    Each pass draws a token for every masked position and keeps as many as `unmask_counts` says: those that the model
    holds likeliest (confidence, as in MaskGIT and LLaDA) or any (random, which follows the order-agnostic model that
    the diffusion bound describes). What is unmasked stays. The prompt is never changed, special tokens never come out.

    Args:
        rack: the spec of the model.
        params: the tree of `rack.apply`.
        prompt_ids: token ids (P,), BOS included; at least one.
        length: new tokens.
        steps: forward passes; None: one per token, the slowest and best.
        order: which drawn tokens are kept first.
        key: jax.random key; the same key gives the same text.
        vocab: the tokenizer's ids.
        temperature, top_k, top_p: see `Filters`; confidence is read before them.
        attention_mode: as the model was trained; None: each block's own.

    Returns:
        int32 (P + length,): the prompt and the new ids.

    Raises:
        UsageError: an empty prompt or an argument out of its range.
    """
    filters = Filters(temperature, top_k, top_p)
    if order not in ("confidence", "random"):
        raise UsageError(f"order is '{order}'; write confidence or random")
    counts_S = unmask_counts(length, max(length, 1) if steps is None else steps)
    row_T, n_prompt = padded_row(prompt_ids, room=length, fill=vocab.pad_id)
    masked_T = (np.arange(len(row_T)) >= n_prompt) & (np.arange(len(row_T)) < n_prompt + length)
    row_T[masked_T] = vocab.mask_id
    segment_ids_1T = (np.arange(len(row_T)) < n_prompt + length).astype(np.int32)[None]  # 0 hides the padding
    if length:
        allowed_V = allowed_ids(vocab, rack.vocab_size)
        arrays = (row_T, masked_T, segment_ids_1T, counts_S, key, allowed_V)
        row_T = np.asarray(_unmask(rack, params, *arrays, filters=filters, order=order, attention_mode=attention_mode))
    return row_T[: n_prompt + length]


@partial(jax.jit, static_argnames=("rack", "filters", "order", "attention_mode"))
def _unmask(rack, params, row_T, masked_T, segment_ids_1T, counts_S, key, allowed_V, *, filters, order, attention_mode):
    """The row after as many passes as there are counts."""

    def step(state, count_and_key):
        row_T, masked_T = state
        count, step_key = count_and_key
        token_key, order_key = jax.random.split(step_key)
        logits_1TV = rack.apply(
            {"params": params}, row_T[None], segment_ids_BT=segment_ids_1T, attention_mode=attention_mode
        )
        drawn_T = sample_ids(token_key, logits_1TV[0], allowed_V, filters)
        if order == "confidence":
            log_probs_TV = jax.nn.log_softmax(jnp.where(allowed_V, logits_1TV[0], -jnp.inf))
            score_T = jnp.take_along_axis(log_probs_TV, drawn_T[:, None], axis=1)[:, 0]
        else:
            score_T = jax.random.uniform(order_key, row_T.shape)
        rank_T = jnp.argsort(jnp.argsort(jnp.where(masked_T, score_T, -jnp.inf), descending=True))
        kept_T = masked_T & (rank_T < count)
        return (jnp.where(kept_T, drawn_T, row_T), masked_T & ~kept_T), None

    (row_T, _), _ = jax.lax.scan(step, (row_T, masked_T), (counts_S, jax.random.split(key, counts_S.shape[0])))
    return row_T
