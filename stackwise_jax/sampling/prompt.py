"""The prompt as the samplers take it: a row padded to one of few lengths, so that prompts share compiled programs.

Legend: P prompt, R, T row with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stackwise_jax.errors import UsageError
from stackwise_jax.objectives.batch import Vocab

MULTIPLE = 64  # rows are padded to a multiple of this many tokens


def padded_row(prompt_ids: Sequence[int] | np.ndarray, room: int, fill: int) -> tuple[np.ndarray, int]:
    """Lay a prompt at the start of a longer row.

    Args:
        prompt_ids: token ids (P,), BOS included; at least one.
        room: tokens needed behind the prompt.
        fill: id of everything behind the prompt.

    Returns:
        int32 (R,) with R the next multiple of MULTIPLE that holds P + room, and P.

    Raises:
        UsageError: the prompt has no token.
    """
    prompt_P = np.asarray(prompt_ids, np.int32).reshape(-1)
    if not len(prompt_P):
        raise UsageError("the prompt has no token to start from; put the tokenizer's BOS id before it")
    row_R = np.full(-(-(len(prompt_P) + room) // MULTIPLE) * MULTIPLE, fill, np.int32)
    row_R[: len(prompt_P)] = prompt_P
    return row_R, len(prompt_P)


class MaskedRow(NamedTuple):
    """A prompt and a block of masks behind it.

    tokens_T: int32. masked_T: bool, the block; a mask token in the prompt is not part of it. segment_ids_1T: int32, 0
    hides the padding, as in Examples. n_prompt, n_real: tokens of the prompt, and of prompt and block. n_hideable:
    those of them that corruption could have hidden, as in Batch.hidden_B: all but BOS and its like.
    """

    tokens_T: np.ndarray
    masked_T: np.ndarray
    segment_ids_1T: np.ndarray
    n_prompt: int
    n_real: int
    n_hideable: int


def masked_row(prompt_ids: Sequence[int] | np.ndarray, length: int, vocab: Vocab) -> MaskedRow:
    """The row that a sampler fills: `length` masks behind the prompt, then padding.

    Raises:
        UsageError: the prompt has no token, or length is below 0.
    """
    if length < 0:
        raise UsageError(f"max_tokens is {length}; write 0 or more")
    tokens_T, n_prompt = padded_row(prompt_ids, room=length, fill=vocab.pad_id)
    n_real = n_prompt + length
    tokens_T[n_prompt:n_real] = vocab.mask_id
    real_T = np.arange(len(tokens_T)) < n_real
    masked_T = real_T & (np.arange(len(tokens_T)) >= n_prompt)
    is_target = vocab.is_target[tokens_T[:n_prompt]]
    is_target[0] &= tokens_T[0] != vocab.eos_id  # there it is a BOS
    n_hideable = int(is_target.sum()) + length
    return MaskedRow(tokens_T, masked_T, real_T.astype(np.int32)[None], n_prompt, n_real, n_hideable)
