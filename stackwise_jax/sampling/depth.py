"""Depth as time: masks become text in one pass through a rack that was trained right to left.

Legend: P prompt, T row (prompt, block, padding), D d_model, V vocabulary (padded), K stacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stackwise_jax.curriculum.phase import AttentionMode
from stackwise_jax.engine.programs import bare
from stackwise_jax.errors import UsageError
from stackwise_jax.model import Rack, embed_tokens, logits, run_stacks, stack_name
from stackwise_jax.objectives.batch import Vocab
from stackwise_jax.sampling.filters import Filters, allowed_ids, check_ids
from stackwise_jax.sampling.prompt import MaskedRow, masked_row
from stackwise_jax.sampling.settle import Order, check_order, settle


def levels_fall(levels: Sequence[float]) -> bool:
    """Whether no stack works at a higher level than the one before it."""
    return all(later <= earlier for earlier, later in pairwise(levels))


def depth_counts(length: int, levels: Sequence[float]) -> np.ndarray:
    """How many tokens are settled after each stack.

    When stack k runs, round(levels[k] * length) tokens may still be masked; the first stack sees all of them masked
    whatever its level, and after the last none is left. The share is taken of the block, so that a long prompt does not
    leave all tokens to the last stack; what a stack sees is then never noisier than what it was trained on.

    Args:
        length: masked tokens.
        levels: the share hidden at each stack, from the input, falling or equal.

    Returns:
        int32, one per stack up to the last that settles anything; the sum is `length`.

    Raises:
        UsageError: a level outside 0..1, or one above the level before it.
    """
    if any(not 0.0 <= level <= 1.0 for level in levels):
        raise UsageError(f"levels {list(levels)} are no shares; write numbers from 0 to 1")
    if not levels_fall(levels):
        raise UsageError(
            f"levels {list(levels)} rise with depth; one pass needs the highest at the input, so write them falling"
        )
    left = [length, *(round(level * length) for level in levels[1:]), 0]
    return np.trim_zeros(-np.diff(left), "b").astype(np.int32)


def generate_depth(
    rack: Rack,
    params: Mapping[str, Any],
    prompt_ids: Sequence[int] | np.ndarray,
    *,
    length: int,
    levels: Sequence[float],
    order: Order = "confidence",
    key: jax.Array,
    vocab: Vocab,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    attention_mode: AttentionMode | None = "bidirectional",
) -> np.ndarray:
    """Fill a block of masks behind a prompt while the hidden states travel from the input to the head once.

    Behind stack k the logits are read through the stacks that remain, final norm and head. The tokens that the model is
    surest of are settled, as many as the level of the next stack demands (`depth_counts`), and their hidden states
    become the embeddings of the tokens: that is what the next stack was trained on, as the first of its rack. All other
    positions, masked or not, go on as the output of stack k: the frozen suffix got exactly that while stack k was
    trained in front of it, and it holds what stack k found out. Where nothing is masked any more the pass ends.

    Cost, with K stacks: each runs once for the stream, and the read behind stack k runs the K - 1 - k that remain and
    the head; at most K (K + 1) / 2 runs of a stack, as much as (K + 1) / 2 passes of `generate_unmask`. A stack behind
    which nothing is settled is not read.

    Args:
        rack: the spec of the model.
        params: the tree of `rack.apply`.
        prompt_ids: token ids (P,), BOS included; at least one.
        length: new tokens.
        levels: the share of the tokens that was hidden when each stack was trained, one per stack, from the input.
        order: which tokens are sure, see `sureness`.
        key: jax.random key; the same key gives the same text.
        vocab: the tokenizer's ids.
        temperature, top_k, top_p: see `Filters`; how sure a token is, is read before them.
        attention_mode: as the model was trained; None: each block's own.

    Returns:
        int32 (P + length,): the prompt and the new ids; what follows the first EOS is no part of the text.

    Raises:
        UsageError: an empty prompt, an argument out of its range, levels that do not fit the rack, or a rack that takes
            the hidden share as an input.
        RunError: the model's logits are not numbers.
    """
    filters = Filters(temperature, top_k, top_p)
    check_order(order)
    _check_fits(rack, levels)
    row = masked_row(prompt_ids, length, vocab)
    counts_K = depth_counts(length, levels)
    allowed_V = allowed_ids(vocab, rack.vocab_size, also=(vocab.eos_id,))
    how = {"rack": rack, "filters": filters, "order": order, "allowed_V": allowed_V}
    return check_ids(np.asarray(_descend(rack, params, row, counts_K, key, attention_mode, how))[: row.n_real])


def _check_fits(rack: Rack, levels: Sequence[float]) -> None:
    if len(levels) != len(rack.stacks):
        raise UsageError(
            f"levels has {len(levels)} entries for {len(rack.stacks)} stacks; write one for each, from the input"
        )
    if rack.time_embedding != "none":
        raise UsageError(
            "the rack takes the hidden share as an input (objective.time input), levels are for objective.time depth; "
            "leave levels out"
        )


def _descend(
    rack: Rack,
    params: Mapping[str, Any],
    row: MaskedRow,
    counts_K: np.ndarray,
    key: jax.Array,
    attention_mode: AttentionMode | None,
    how: Mapping[str, Any],
) -> Any:
    """The tokens after the pass. A loop on the host over programs that stacks of equal shape share."""
    ends = {"embed": params["embed"], "head": params["head"]}
    stacks = [bare(stack) for stack in rack.stacks]

    def run(k, x_1TD):
        return _run_stack(stacks[k], params["stacks"][stack_name(k)], x_1TD, row.segment_ids_1T, attention_mode)

    tokens_T, masked_T = row.tokens_T, row.masked_T
    x_1TD = _embed(rack, ends["embed"], tokens_T)
    for k, count in enumerate(counts_K):
        x_1TD = run(k, x_1TD)
        if count == 0:
            continue
        read_1TD = x_1TD
        for behind in range(k + 1, len(stacks)):
            read_1TD = run(behind, read_1TD)
        state = (tokens_T, masked_T, x_1TD)
        tokens_T, masked_T, x_1TD = _settle(ends, state, read_1TD, count, jax.random.fold_in(key, k), **how)
    return tokens_T


@partial(jax.jit, static_argnames="rack")
def _embed(rack, embed, tokens_T):
    return embed_tokens(rack, embed, tokens_T[None])


@partial(jax.jit, static_argnames=("stack", "attention_mode"))
def _run_stack(stack, params, x_1TD, segment_ids_1T, attention_mode):
    return run_stacks([stack], [params], x_1TD, segment_ids_BT=segment_ids_1T, attention_mode=attention_mode)


@partial(jax.jit, static_argnames=("rack", "filters", "order"))
def _settle(ends, state, read_1TD, count, key, *, rack, filters, order, allowed_V):
    """Settle `count` tokens by the logits of read_1TD; in the stream they become embeddings."""
    tokens_T, masked_T, x_1TD = state
    logits_TV = logits(rack, ends["head"], ends["embed"], read_1TD)[0]
    tokens_T, settled_T = settle(logits_TV, tokens_T, masked_T, count, key, allowed_V, filters, order)
    embedded_1TD = embed_tokens(rack, ends["embed"], tokens_T[None]).astype(x_1TD.dtype)
    x_1TD = jnp.where(settled_T[None, :, None], embedded_1TD, x_1TD)
    return tokens_T, masked_T & ~settled_T, x_1TD
