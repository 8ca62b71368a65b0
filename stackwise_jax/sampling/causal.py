"""Left-to-right decoding with a cache per stack: one compiled program from the prompt to the last token.

Legend: P prompt, S prompt with padding, V vocabulary (padded), N new tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stackwise_jax.errors import UsageError
from stackwise_jax.model import Rack, functional
from stackwise_jax.objectives.batch import Vocab
from stackwise_jax.sampling.filters import NO_ID, Filters, allowed_ids, check_ids, sample_ids
from stackwise_jax.sampling.prompt import padded_row


def generate_causal(
    rack: Rack,
    params: Mapping[str, Any],
    prompt_ids: Sequence[int] | np.ndarray,
    *,
    max_tokens: int,
    key: jax.Array,
    vocab: Vocab,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: tuple[int, ...] = (),
) -> np.ndarray:
    """Continue a prompt token by token.

    Attention is causal whatever the blocks' own mode. Special tokens and the padding of the vocabulary never come out,
    except `stop_ids`, which end the text. Prompts whose padded length is equal (see `padded_row`) share a compilation.

    Args:
        rack: the spec of the model.
        params: the tree of `rack.apply`.
        prompt_ids: token ids (P,), BOS included; at least one.
        max_tokens: new tokens at most.
        key: jax.random key; the same key gives the same text.
        vocab: the tokenizer's ids.
        temperature, top_k, top_p: see `Filters`.
        stop_ids: tokens that end the text (EOS); the one that came is the last id returned.

    Returns:
        int32 (P + n,): the prompt and the n <= max_tokens new ids.

    Raises:
        UsageError: an empty prompt or an argument out of its range.
        RunError: the model's logits are not numbers.
    """
    filters = Filters(temperature, top_k, top_p)
    if max_tokens < 0:
        raise UsageError(f"max_tokens is {max_tokens}; write 0 or more")
    prompt_S, n_prompt = padded_row(prompt_ids, room=0, fill=vocab.pad_id)
    if max_tokens == 0:
        return prompt_S[:n_prompt]
    allowed_V = allowed_ids(vocab, rack.vocab_size, also=stop_ids)
    stops_V = np.isin(np.arange(rack.vocab_size), stop_ids)
    arrays = (prompt_S[None], n_prompt, key, allowed_V, stops_V)
    new_N, n_new = _decode(rack, params, *arrays, max_tokens=max_tokens, filters=filters)
    return np.concatenate([prompt_S[:n_prompt], check_ids(np.asarray(new_N)[: int(n_new)])])


@partial(jax.jit, static_argnames=("rack", "max_tokens", "filters"))
def _decode(rack, params, prompt_1S, n_prompt, key, allowed_V, stops_V, *, max_tokens, filters):
    """New ids (max_tokens,), and how many of them were made before a stop."""

    def unfinished(state):
        n, _, stopped, _, _ = state
        return (n < max_tokens) & ~stopped

    def step(state):
        n, token, _, new_N, caches = state
        logits_11V, caches = functional.decode(rack, params, token[None, None], (n_prompt + n - 1)[None, None], caches)
        token = sample_ids(jax.random.fold_in(key, n), logits_11V[0, 0], allowed_V, filters)
        return n + 1, token, stops_V[token] | (token == NO_ID), new_N.at[n].set(token), caches

    # The prompt fills the caches; its last token runs again as the first step, so that logits are needed of single
    # tokens only. What it and the padding behind it leave in the caches is not looked at before a new token overwrites
    # it; states of constant size do not take it up.
    room = prompt_1S.shape[1]
    positions_1S = jnp.arange(room, dtype=jnp.int32)[None]
    caches = functional.init_cache(rack, 1, room + max_tokens)
    valid_1S = positions_1S < n_prompt - 1
    _, caches = functional.decode(rack, params, prompt_1S, positions_1S, caches, valid_BS=valid_1S)
    state = (jnp.int32(0), prompt_1S[0, n_prompt - 1], jnp.array(False), jnp.zeros(max_tokens, jnp.int32), caches)
    n_new, _, _, new_N, _ = jax.lax.while_loop(unfinished, step, state)
    return new_N, n_new
