"""The one contract between data, objectives and the training step.

Legend: B batch (sequences), T sequence length (tokens).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from stackwise_jax.errors import UsageError

Array = jax.Array | np.ndarray


class Examples(NamedTuple):
    """Uncorrupted token sequences, as the data pipeline delivers them.

    tokens_BT: int32, 0..vocab-1; padding holds the pad id.
    segment_ids_BT: int32, 0 is padding, documents count from 1 within a row.
    positions_BT: int32, position within the document.
    example_ids_B: int32, index of the example in the dataset: seeds fixed corruption.
    """

    tokens_BT: Array
    segment_ids_BT: Array
    positions_BT: Array
    example_ids_B: Array


class Batch(NamedTuple):
    """What every objective hands to the training step; loss = sum(weights * nll) / sum(counts), in nats per token.

    inputs_BT, targets_BT: int32 token ids.
    weights_BT: float32, the weight of each position's negative log-likelihood; 0: the position is not predicted.
    counts_BT: float32, the tokens that the mean is taken over. Equal to the weights (0 or 1) for clm, mlm and diffusion
        at a share or over a range; 1 on every real token for the diffusion bound (elbo).
    positions_BT, segment_ids_BT: int32, as in Examples.
    hidden_B: float32, the share of each sequence's real tokens that is hidden (mlm: chosen), 0 for clm: the input of a
        time embedding.
    """

    inputs_BT: jax.Array
    targets_BT: jax.Array
    weights_BT: jax.Array
    counts_BT: jax.Array
    positions_BT: jax.Array
    segment_ids_BT: jax.Array
    hidden_B: jax.Array


@dataclass(frozen=True)
class Vocab:
    """What corruption needs to know of a tokenizer.

    size: the tokenizer's own (unpadded) number of ids; ids 0..n_special-1 are special tokens, of which mask_id and
    pad_id are usually two. Random replacement draws from n_special..size-1, and never mask_id or pad_id.

    Raises:
        UsageError: no ordinary token is left to draw from, or mask_id or pad_id is not an id of the vocabulary.
    """

    size: int
    mask_id: int
    pad_id: int
    n_special: int

    def __post_init__(self):
        if not (0 <= self.mask_id < self.size and 0 <= self.pad_id < self.size):
            raise UsageError(
                f"mask id {self.mask_id} or pad id {self.pad_id} lies outside the {self.size} ids of the tokenizer; "
                "use a tokenizer that has both"
            )
        if not self.ordinary:
            raise UsageError(
                f"the tokenizer's {self.size} ids are all special; use one that has ordinary tokens (tokenizer.kind)"
            )

    @property
    def reserved(self) -> tuple[int, ...]:
        """The mask and pad ids that lie among the ordinary ids (a tokenizer that got its mask token as an extra id)."""
        return tuple(sorted({i for i in (self.mask_id, self.pad_id) if i >= self.n_special}))

    @property
    def ordinary(self) -> int:
        """Number of ids that stand for text."""
        return max(0, self.size - self.n_special - len(self.reserved))
