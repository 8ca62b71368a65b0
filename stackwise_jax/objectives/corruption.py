"""From uncorrupted examples to a batch: what is hidden, what is predicted, what each prediction weighs.

Everything is a pure function of (objective, noise, example, key of the example): the result for an example does not
depend on what else is in the batch, on microbatching or on sharding. With the same key a higher level of noise hides a
superset of the tokens that a lower one hides.

Legend: B batch (sequences), T sequence length (tokens).
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

from stackwise_jax.curriculum.phase import Noise, Objective
from stackwise_jax.objectives.batch import Array, Batch, Examples, Vocab
from stackwise_jax.objectives.schedules import SCHEDULES

MASK_SHARE, RANDOM_SHARE = 0.8, 0.1  # of the chosen tokens (Devlin et al. 2019, BERT); the rest stays as it is


def example_keys(seed_key: jax.Array, example_ids_B: Array, visit: int | jax.Array) -> jax.Array:
    """One typed PRNG key per example, (B,).

    seed_key: the phase's typed key. visit: 0 for fixed corruption, so that an example looks the same whenever and in
    whichever batch it comes; the global step for fresh corruption.
    """

    def key(example_id):
        return jax.random.fold_in(jax.random.fold_in(seed_key, example_id), visit)

    return jax.vmap(key)(jnp.asarray(example_ids_B))


def max_targets(objective: Objective, noise: Noise, seq_len: int) -> int:
    """The most positions with weight that a sequence of `seq_len` tokens can have; seq_len for clm."""
    if objective.kind == "clm":
        return seq_len
    share = noise.low if noise.kind == "fixed" else noise.high
    return min(seq_len, max(1, math.ceil(share * seq_len)))


def make_batch(objective: Objective, noise: Noise, examples: Examples, keys_B: jax.Array, vocab: Vocab) -> Batch:
    """Corrupt `examples`; pure, and jittable with objective, noise and vocab static.

    What is predicted is text and the token eos at the end of each document; other special tokens (bos, padding) are
    never hidden, never targets and never counted. clm: the input is the text, the target the next token of the same
    document. mlm and diffusion: `noise` says how many of a row's tokens are chosen (at least one), which are drawn
    without replacement, the documents of a packed row taken as one sequence; mlm hides 80 % of them, replaces 10 % by a
    random ordinary token and keeps 10 %; diffusion hides all. A row of nothing but padding has no targets, and under
    noise elbo neither has a row so short that no number of its tokens lies within the interval.

    keys_B: from `example_keys`; not used by clm.
    """
    tokens_BT, segment_ids_BT = jnp.asarray(examples.tokens_BT), jnp.asarray(examples.segment_ids_BT)
    positions_BT = jnp.asarray(examples.positions_BT)
    # A tokenizer may begin documents with the token that ends them; at the beginning it is no target.
    begins_BT = (tokens_BT == vocab.eos_id) & (positions_BT == 0)
    real_BT = (segment_ids_BT != 0) & jnp.asarray(vocab.is_target)[tokens_BT] & ~begins_BT
    if objective.kind == "clm":
        inputs_BT = tokens_BT
        targets_BT, weights_BT = _next_tokens(tokens_BT, segment_ids_BT, real_BT, vocab)
        counts_BT = weights_BT
        hidden_B = jnp.zeros(tokens_BT.shape[0], jnp.float32)
    else:
        inputs_BT, weights_BT, hidden_B = jax.vmap(partial(_corrupt, objective, noise, vocab))(
            keys_B, tokens_BT, real_BT
        )
        targets_BT = tokens_BT
        counts_BT = real_BT.astype(jnp.float32) if noise.kind == "elbo" else weights_BT
    return Batch(inputs_BT, targets_BT, weights_BT, counts_BT, positions_BT, segment_ids_BT, hidden_B)


def hidden_count(noise: Noise, u: jax.Array, n_real: jax.Array) -> jax.Array:
    """How many of n_real tokens are chosen when u was drawn from U(0, 1): int32.

    In 1..n_real, or for an interval of the bound in low * n_real < n <= high * n_real, where n follows the schedule's
    probabilities given that it lies there. 0 where there is no such number.
    """
    total, first, last = n_real.astype(jnp.float32), jnp.zeros_like(n_real), n_real
    if noise.kind == "fixed":
        n = jnp.round(noise.low * total)
    elif noise.kind == "range":
        n = jnp.round((noise.low + (noise.high - noise.low) * SCHEDULES[noise.schedule].share(u)) * total)
    elif noise.kind == "elbo":
        if not _is_whole(noise):
            first, last = _counts_within(noise, n_real)
            u = _mass(noise, jnp.zeros_like(first), first, n_real) + _mass(noise, first, last, n_real) * u
        n = jnp.ceil(SCHEDULES[noise.schedule].share(u) * total)
    else:
        raise ValueError(f"noise {noise.kind} hides nothing")
    return jnp.where(first < last, jnp.minimum(jnp.maximum(n.astype(jnp.int32), first + 1), last), 0)


def hidden_weight(noise: Noise, n: jax.Array, n_real: jax.Array) -> jax.Array:
    """Weight of each of n chosen tokens, float32: 1, or for the bound (elbo) 1 / (n P(n)).

    For an order-agnostic model E[sum over hidden of nll / (n P(n))], over n ~ P and a uniform choice of n tokens, is
    the mean over all orders of sum_i nll(x_i | those before it), which bounds -log p(x) from above, whatever P is, as
    long as it is positive on 1..n_real (Uria et al. 2014; Ou et al. 2024). Linear schedule: n_real / n, the 1/t weight.

    Over an interval of shares P is the schedule's given that n lies in it. The expectation is then the part of that sum
    that the counts of the interval contribute, so intervals that cover (0, 1] add up to the bound exactly.
    """
    if noise.kind != "elbo":
        return jnp.ones_like(n, dtype=jnp.float32)
    n = jnp.maximum(n, 1)  # where nothing is chosen the weight only has to be finite
    p_interval = 1.0 if _is_whole(noise) else _mass(noise, *_counts_within(noise, n_real), n_real)
    return p_interval / (n.astype(jnp.float32) * _mass(noise, n - 1, n, n_real))


def _is_whole(noise: Noise) -> bool:
    return (noise.low, noise.high) == (0.0, 1.0)


def _counts_within(noise: Noise, n_real: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(first, last), int32: the counts n of an interval of the bound are first < n <= last, maybe none.

    One expression for both ends: where intervals touch, rounding moves the border of both alike.
    """
    total = n_real.astype(jnp.float32)
    first, last = (jnp.floor(share * total).astype(jnp.int32) for share in (noise.low, noise.high))
    return first, last


def _mass(noise: Noise, first: jax.Array, last: jax.Array, n_real: jax.Array) -> jax.Array:
    """P(first < n <= last) under the schedule; a row of nothing but padding counts as one token."""
    numbers = (x.astype(jnp.float32) for x in (first, last, jnp.maximum(n_real, 1)))
    return SCHEDULES[noise.schedule].mass(*numbers)


def _next_tokens(
    tokens_BT: jax.Array, segment_ids_BT: jax.Array, real_BT: jax.Array, vocab: Vocab
) -> tuple[jax.Array, jax.Array]:
    """Targets and weights of clm: no document predicts the start of the next one, and nothing predicts padding."""
    left = lambda x_BT, last: jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)), constant_values=last)
    same_BT = left(segment_ids_BT, 0) == segment_ids_BT
    return left(tokens_BT, vocab.pad_id), (same_BT & left(real_BT, False)).astype(jnp.float32)


def _corrupt(
    objective: Objective, noise: Noise, vocab: Vocab, key: jax.Array, tokens_T: jax.Array, real_T: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Corrupted tokens, weights and chosen share of one row, for the objectives that hide tokens.

    real_T: which tokens can be hidden.
    """
    level_key, choice_key, replace_key = jax.random.split(key, 3)
    n_real = real_T.sum(dtype=jnp.int32)
    n = hidden_count(noise, jax.random.uniform(level_key), n_real)
    # The n real tokens with the lowest of T independent draws: a uniform choice without replacement.
    draws_T = jnp.where(real_T, jax.random.uniform(choice_key, tokens_T.shape), 2.0)
    ranks_T = jnp.argsort(jnp.argsort(draws_T))
    chosen_T = real_T & (ranks_T < n)
    weights_T = jnp.where(chosen_T, hidden_weight(noise, n, n_real), 0.0)
    shown_T = jnp.full_like(tokens_T, vocab.mask_id)
    if objective.kind == "mlm":
        shown_T = _bert_replacement(replace_key, tokens_T, vocab)
    share = n.astype(jnp.float32) / jnp.maximum(n_real, 1).astype(jnp.float32)
    return jnp.where(chosen_T, shown_T, tokens_T), weights_T, share


def _bert_replacement(key: jax.Array, tokens_T: jax.Array, vocab: Vocab) -> jax.Array:
    """What a chosen token is replaced by: the mask token, a random ordinary token, or itself."""
    kind_key, token_key = jax.random.split(key)
    kind_T = jax.random.uniform(kind_key, tokens_T.shape)
    ordinary = vocab.ordinary_ids
    random_T = jnp.asarray(ordinary)[jax.random.randint(token_key, tokens_T.shape, 0, len(ordinary))]
    kept_or_random_T = jnp.where(kind_T < MASK_SHARE + RANDOM_SHARE, random_T, tokens_T)
    return jnp.where(kind_T < MASK_SHARE, vocab.mask_id, kept_or_random_T)
