"""The prompt as the samplers take it: a row padded to one of few lengths, so that prompts share compiled programs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stackwise_jax.errors import UsageError

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
