"""Iterative unmasking: a block of mask tokens behind the prompt becomes text in a few forward passes.

Legend: P prompt, T row (prompt, block, padding), V vocabulary (padded), S forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stackwise_jax.curriculum.phase import AttentionMode
from stackwise_jax.errors import UsageError
from stackwise_jax.model import Rack
from stackwise_jax.objectives.batch import Vocab
from stackwise_jax.sampling.filters import Filters, allowed_ids, check_ids
from stackwise_jax.sampling.prompt import masked_row
from stackwise_jax.sampling.settle import Order, check_order, settle


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


def spread_steps(steps: int, sizes: Sequence[int], parts: str) -> list[int]:
    """Forward passes for each part of the work: in proportion to its tokens, at least one, at most one per token.

    Args:
        steps: forward passes in all; more than there are tokens have nothing to do and are left out.
        sizes: tokens that each part settles, at least one.
        parts: what the parts are, for the error.

    Returns:
        as many numbers as sizes, the sum is min(steps, sum(sizes)).

    Raises:
        UsageError: fewer steps than parts.
    """
    if steps < len(sizes):
        raise UsageError(f"steps is {steps} and there are {len(sizes)} {parts}; write at least {len(sizes)}")
    passes, tokens = [], sum(sizes)
    steps = min(steps, tokens)
    for i, size in enumerate(sizes):
        share = max(1, min(round(steps * size / tokens), steps - (len(sizes) - i - 1)))
        passes.append(share)
        steps, tokens = steps - share, tokens - size
    return passes


def block_counts(length: int, steps: int, block_size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """How many tokens each pass unmasks, and among the first how many tokens of the block it may choose.

    Blocks of `block_size` tokens are finished one after the other, from the left, each on a cosine grid of its own; the
    last may be shorter. None: all in one.

    Returns:
        counts and ends, int32 (min(steps, length),): pass s unmasks counts[s] of the first ends[s] tokens.

    Raises:
        UsageError: length below 0, steps below 1 or below the number of blocks, or block_size below 1.
    """
    if block_size is not None and block_size < 1:
        raise UsageError(f"block_size is {block_size}; write at least 1")
    counts_S = unmask_counts(length, steps)
    if block_size is None or not length:
        return counts_S, np.full_like(counts_S, length)
    starts = range(0, length, block_size)
    sizes = [min(block_size, length - start) for start in starts]
    passes = spread_steps(steps, sizes, f"blocks of {block_size} tokens (block_size)")
    counts = [unmask_counts(size, n) for size, n in zip(sizes, passes, strict=True)]
    ends = [np.full(n, start + size, np.int32) for start, size, n in zip(starts, sizes, passes, strict=True)]
    return np.concatenate(counts), np.concatenate(ends)


def generate_unmask(
    rack: Rack,
    params: Mapping[str, Any],
    prompt_ids: Sequence[int] | np.ndarray,
    *,
    length: int,
    steps: int | None = None,
    order: Order = "confidence",
    block_size: int | None = None,
    key: jax.Array,
    vocab: Vocab,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    attention_mode: AttentionMode | None = "bidirectional",
) -> np.ndarray:
    """Fill a block of masks behind a prompt with a masked or mask-diffusion model.

    Each pass draws a token for every masked position and keeps as many as `block_counts` says: those that the model is
    surest of, or any (random, which follows the order-agnostic model that the diffusion bound describes). What is
    unmasked stays. The prompt is never changed, and of the special tokens only EOS comes out. With `block_size` the
    text is made block-wise from left to right (semi-autoregressive: Nie et al. 2025, LLaDA); the masks of later blocks
    stay in view.

    A rack with a time embedding is told the share of prompt and block that is still masked, as in training.

    Args:
        rack: the spec of the model.
        params: the tree of `rack.apply`.
        prompt_ids: token ids (P,), BOS included; at least one.
        length: new tokens.
        steps: forward passes, over all blocks; None: one per token, the slowest and best.
        order: which drawn tokens are kept first, see `sureness`.
        block_size: tokens that are finished before later ones are begun; None: no such order.
        key: jax.random key; the same key gives the same text.
        vocab: the tokenizer's ids.
        temperature, top_k, top_p: see `Filters`; how sure a token is, is read before them.
        attention_mode: as the model was trained; None: each block's own.

    Returns:
        int32 (P + length,): the prompt and the new ids; what follows the first EOS is no part of the text.

    Raises:
        UsageError: an empty prompt or an argument out of its range.
        RunError: the model's logits are not numbers.
    """
    filters = Filters(temperature, top_k, top_p)
    check_order(order)
    counts_S, ends_S = block_counts(length, max(length, 1) if steps is None else steps, block_size)
    row = masked_row(prompt_ids, length, vocab)
    tokens_T = row.tokens_T
    if length:
        passes = (counts_S, row.n_prompt + ends_S, jax.random.split(key, len(counts_S)))
        allowed_V = allowed_ids(vocab, rack.vocab_size, also=(vocab.eos_id,))
        arrays = (tokens_T, row.masked_T, row.segment_ids_1T, row.n_hideable, *passes, allowed_V)
        tokens_T, _ = fill(rack, params, *arrays, filters=filters, order=order, attention_mode=attention_mode)
    return check_ids(np.asarray(tokens_T)[: row.n_real])


@partial(jax.jit, static_argnames=("rack", "filters", "order", "attention_mode"))
def fill(
    rack, params, tokens_T, masked_T, segment_ids_1T, n_hideable, counts_S, ends_S, keys_S, allowed_V,
    *, filters, order, attention_mode,
):  # fmt: skip
    """The tokens and what is still masked after as many passes as there are counts.

    Pass s settles counts_S[s] of the masked tokens before position ends_S[s].
    """
    places_T = jnp.arange(tokens_T.shape[0])

    def step(state, of_pass):
        tokens_T, masked_T = state
        count, end, key = of_pass
        logits_TV = masked_logits(rack, params, tokens_T, masked_T, segment_ids_1T, n_hideable, attention_mode)
        open_T = masked_T & (places_T < end)
        tokens_T, settled_T = settle(logits_TV, tokens_T, open_T, count, key, allowed_V, filters, order)
        return (tokens_T, masked_T & ~settled_T), None

    return jax.lax.scan(step, (tokens_T, masked_T), (counts_S, ends_S, keys_S))[0]


def masked_logits(
    rack: Rack,
    params: Mapping[str, Any],
    tokens_T: jax.Array,
    masked_T: jax.Array,
    segment_ids_1T: jax.Array,
    n_hideable: int | jax.Array,
    attention_mode: AttentionMode | None,
) -> jax.Array:
    """Logits (T, V) float32 of a row; a rack with a time embedding gets the share of n_hideable that is masked."""
    hidden_1 = None
    if rack.time_embedding != "none":
        hidden_1 = masked_T.sum(dtype=jnp.float32)[None] / n_hideable
    how = {"segment_ids_BT": segment_ids_1T, "attention_mode": attention_mode, "hidden_B": hidden_1}
    return rack.apply({"params": params}, tokens_T[None], **how)[0]
