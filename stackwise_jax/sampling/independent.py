"""Racks that were trained apart, each on its own interval of noise, fill masks together: the noisiest begins.

Legend: P prompt, T row (prompt, block, padding), S forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import numpy as np

from stackwise_jax.curriculum.phase import AttentionMode
from stackwise_jax.engine.programs import bare
from stackwise_jax.errors import UsageError
from stackwise_jax.model import Rack
from stackwise_jax.objectives.batch import Vocab
from stackwise_jax.sampling.filters import Filters, allowed_ids, check_ids
from stackwise_jax.sampling.prompt import masked_row
from stackwise_jax.sampling.settle import Order, check_order
from stackwise_jax.sampling.unmask import fill, spread_steps


class Expert(NamedTuple):
    """A rack with its own embedding and head, trained where a share between `low` and `high` is hidden."""

    low: float
    high: float
    rack: Rack
    params: Mapping[str, Any]


def intervals_fall(intervals: Sequence[tuple[float, float]]) -> bool:
    """Whether each interval (low, high) of noise lies lower than the one before it. They may overlap or leave a gap."""
    return all(b != a and b[0] <= a[0] and b[1] <= a[1] for a, b in pairwise(intervals))


def expert_spans(length: int, n_hideable: int, intervals: Sequence[tuple[float, float]]) -> list[tuple[int, int]]:
    """Which experts have something to do, and how many tokens each settles.

    An expert works while the share of n_hideable tokens that is masked lies in its interval (low, high]. Where two
    intervals overlap or leave a gap the border is half way; the first expert takes all above it, the last all below.
    So a long prompt, which leaves little hidden, begins with a later expert.

    Args:
        length: masked tokens.
        n_hideable: tokens of prompt and block that corruption could have hidden.
        intervals: (low, high) of each expert, falling.

    Returns:
        (index of the expert, tokens that it settles, at least one); the tokens add up to `length`.
    """
    borders = [(low + high) / 2 for (low, _), (_, high) in pairwise(intervals)]
    spans, left = [], length
    for i, border in enumerate([*borders, 0.0]):
        # A share of 1/3 of 12 tokens is 4 tokens, though it may be a little less as a float.
        after = min(left, math.floor(border * n_hideable + 1e-6))
        if after < left:
            spans.append((i, left - after))
        left = after
    return spans


def generate_independent(
    experts: Sequence[tuple[float, float, Rack, Mapping[str, Any]]],
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
    attention_mode: AttentionMode | None = "bidirectional",
) -> np.ndarray:
    """Fill a block of masks behind a prompt with racks that were trained apart (Shing et al. 2025, DiffusionBlocks).

    Each forward pass is made by the expert in whose interval the hidden share lies, see `expert_spans`; the hidden
    states of one expert are never seen by another. An expert settles its tokens in equal parts.

    Args:
        experts: (low, high, rack, params) as in `Expert`, highest noise first.
        prompt_ids: token ids (P,), BOS included; at least one.
        length: new tokens.
        steps: forward passes in all, spread over the experts by the tokens they settle; None: one per expert.
        order: which drawn tokens are kept first, see `sureness`.
        key: jax.random key; the same key gives the same text.
        vocab: the tokenizer's ids.
        temperature, top_k, top_p: see `Filters`; how sure a token is, is read before them.
        attention_mode: as the racks were trained; None: each block's own.

    Returns:
        int32 (P + length,): the prompt and the new ids; what follows the first EOS is no part of the text.

    Raises:
        UsageError: no experts, an interval that is none, an order other than falling noise, an empty prompt, or an
            argument out of its range.
        RunError: the model's logits are not numbers.
    """
    filters = Filters(temperature, top_k, top_p)
    check_order(order)
    intervals = [(low, high) for low, high, _, _ in experts]
    if not experts or not intervals_fall(intervals) or any(not 0.0 <= low <= high <= 1.0 for low, high in intervals):
        raise UsageError(
            f"experts have the intervals of noise {intervals}; give at least one, within 0 to 1 and the highest first"
        )
    row = masked_row(prompt_ids, length, vocab)
    spans = expert_spans(length, row.n_hideable, intervals)
    steps = len(spans) if steps is None else steps
    passes = spread_steps(steps, [size for _, size in spans], "racks that each settle some of the tokens")
    state = (row.tokens_T, row.masked_T)
    for (i, size), n in zip(spans, passes, strict=True):
        rack, params = experts[i][2:]
        counts_S = np.diff(np.arange(n + 1) * size // n).astype(np.int32)
        ends_S = np.full(n, row.n_real, np.int32)
        keys_S = jax.random.split(jax.random.fold_in(key, i), n)
        allowed_V = allowed_ids(vocab, rack.vocab_size, also=(vocab.eos_id,))
        arrays = (*state, row.segment_ids_1T, row.n_hideable, counts_S, ends_S, keys_S, allowed_V)
        how = {"filters": filters, "order": order, "attention_mode": attention_mode}
        state = fill(_bare_rack(rack), params, *arrays, **how)
    return check_ids(np.asarray(state[0])[: row.n_real])


def _bare_rack(rack: Rack) -> Rack:
    """The rack without what does not change its computation, so that experts of equal shape share a program."""
    return rack.clone(stacks=tuple(bare(stack) for stack in rack.stacks), parent=None)
