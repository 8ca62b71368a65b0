"""Entropies of n-gram models as floors: what counting reaches on the same text.

Legend: S tokens of a stream, U different n-grams, H different contexts.
"""

from __future__ import annotations

import numpy as np

from stackwise_jax.config import StackWiseConfig
from stackwise_jax.data import Dataset, load_datasets, load_tokenizer, training_texts


def stream(dataset: Dataset, token_bytes_V: np.ndarray, rows: int | None = None) -> np.ndarray:
    """The tokens of the text in the first `rows` sequences (None: in all), without special ones: int64 (S)."""
    tokens_NT = dataset.tokens_NT[:rows]
    return tokens_NT[(dataset.segment_ids_NT[:rows] > 0) & (token_bytes_V[tokens_NT] > 0)].astype(np.int64)


def witten_bell(train_S: np.ndarray, valid_S: np.ndarray, vocab_size: int, order: int) -> list[float]:
    """Mean bits per token of `valid_S` under interpolated n-gram models counted on `train_S`, for n = 1..order.

    p_n(w | h) = (c(h w) + t(h) p_{n-1}(w | h')) / (c(h) + t(h)), where t(h) is how many different tokens followed the
    context h, h' is h without its first token and p_0 is uniform (Witten and Bell 1991).

    Args:
        train_S, valid_S: int64, 0..vocab_size-1. Before the first token stand zeros.
        order: vocab_size**order must stay below 2**63.
    """
    p_S, bits = np.full(len(valid_S), 1.0 / vocab_size), []
    for n in range(1, order + 1):
        grams_U, counts_U = np.unique(_grams(train_S, vocab_size, n), return_counts=True)
        contexts_H, first_H = np.unique(grams_U // vocab_size, return_index=True)
        totals_H, types_H = np.add.reduceat(counts_U, first_H), np.diff(first_H, append=len(grams_U))
        grams_S = _grams(valid_S, vocab_size, n)
        count_S = _look_up(grams_U, counts_U, grams_S)
        total_S = _look_up(contexts_H, totals_H, grams_S // vocab_size)
        types_S = _look_up(contexts_H, types_H, grams_S // vocab_size)
        known_S = total_S > 0
        p_S = np.where(known_S, (count_S + types_S * p_S) / np.where(known_S, total_S + types_S, 1), p_S)
        bits.append(float(-np.log2(p_S).mean()))
    return bits


def _grams(tokens_S: np.ndarray, base: int, n: int) -> np.ndarray:
    """The n-gram that ends at each token as one number; its last token is the lowest digit."""
    padded = np.concatenate([np.zeros(n - 1, np.int64), tokens_S])
    codes_S = np.zeros(len(tokens_S), np.int64)
    for k in range(n):
        codes_S = codes_S * base + padded[k : k + len(tokens_S)]
    return codes_S


def _look_up(keys: np.ndarray, values: np.ndarray, wanted_S: np.ndarray) -> np.ndarray:
    """The value of each wanted key; 0 where there is no such key. `keys` are sorted."""
    places_S = np.minimum(np.searchsorted(keys, wanted_S), len(keys) - 1)
    return np.where(keys[places_S] == wanted_S, values[places_S], 0)


def ngram_floors(config: StackWiseConfig, tokenizer_dir, eval_batches: int = 0, order: int = 6) -> list[float]:
    """Bits per byte of the held-out text for n = 1..order, counted on the whole training text; where documents end is
    not predicted.

    Args:
        eval_batches: of the held-out text only so many batches, those that the models are measured on; 0: all.
    """
    seed = config.run.seed
    tokenizer = load_tokenizer(config.tokenizer, lambda: training_texts(config.data, seed), tokenizer_dir)
    train, valid = load_datasets(config.data, tokenizer, seed)
    rows = eval_batches * config.data.batch_size or len(valid)
    train_S, valid_S = stream(train, tokenizer.token_bytes), stream(valid, tokenizer.token_bytes, rows)
    tokens_per_byte = len(valid_S) / int(tokenizer.token_bytes[valid_S].sum())
    while tokenizer.vocab_size**order >= 2**63:
        order -= 1
    return [bits * tokens_per_byte for bits in witten_bell(train_S, valid_S, tokenizer.vocab_size, order)]
