"""The one contract between data, objectives and the training step.

Legend: B batch (sequences), T sequence length (tokens).
"""

from __future__ import annotations

import functools
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
        at a share or over a range; 1 on every token that can be hidden for the diffusion bound (elbo).
    positions_BT, segment_ids_BT: int32, as in Examples.
    hidden_B: float32, the share of the tokens that can be hidden which is hidden in each sequence (mlm: chosen), 0 for
        clm: the input of a time embedding.
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
    """What objectives and samplers need to know of a tokenizer. Hashable.

    size: the tokenizer's own (unpadded) number of ids.
    special_ids: those that stand for no text, wherever they lie; mask_id, pad_id and eos_id count as such anyway.
    unk_id: stands for text that the tokenizer cannot spell: predicted like text, and never sampled.

    Raises:
        UsageError: no ordinary token is left to draw from, or an id lies outside the vocabulary.
    """

    size: int
    special_ids: tuple[int, ...]
    mask_id: int
    pad_id: int
    eos_id: int
    unk_id: int | None = None

    def __post_init__(self):
        named = [("mask", self.mask_id), ("pad", self.pad_id), ("eos", self.eos_id)]
        for name, id_ in [*named, *(("special", id_) for id_ in self.special_ids)]:
            if not 0 <= id_ < self.size:
                raise UsageError(
                    f"the {name} id {id_} lies outside the {self.size} ids of the tokenizer; use one that has it"
                )
        if not len(self.ordinary_ids):
            raise UsageError(
                f"the tokenizer's {self.size} ids are all special; use one that has ordinary tokens (tokenizer.kind)"
            )

    @functools.cached_property
    def ordinary_ids(self) -> np.ndarray:
        """The ids that stand for text that can be spelled: int32, ascending."""
        ids_V = np.ones(self.size, bool)
        ids_V[[*self.special_ids, self.mask_id, self.pad_id, self.eos_id]] = False
        if self.unk_id is not None:
            ids_V[self.unk_id] = False
        return np.flatnonzero(ids_V).astype(np.int32)

    @functools.cached_property
    def is_target(self) -> np.ndarray:
        """Which ids are hidden, predicted and counted: text and the end of a document. bool (size,)."""
        is_target_V = np.ones(self.size, bool)
        is_target_V[[*self.special_ids, self.mask_id, self.pad_id]] = False
        is_target_V[self.eos_id] = True
        return is_target_V
