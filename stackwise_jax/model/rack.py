"""A rack: embedding, stacks, final norm, head. The whole model.

Legend: B batch, T sequence, D d_model, V vocabulary (padded).
"""

from __future__ import annotations

import flax.linen as nn
import jax

from stackwise_jax.model import functional
from stackwise_jax.model.spec import Params, count, dtype_of, module_params, require, unbound
from stackwise_jax.model.stack import Stack
from stackwise_jax.model.time import TIME_EMBEDDINGS

MAX_BLOCKS = 10_000  # of a rack: what is done per block then still takes seconds


class Rack(nn.Module):
    """The model. A stack's id within the rack is its place, from 0 at the input.

    Parameters: {"embed": {"embedding": (V, D)}, "stacks": {"000": tree of the first stack, ...}, "head": {"norm":
    {"scale": (D,)}, "kernel": (D, V)}}; no "kernel" when tied. With a time embedding "embed" also holds "time", see
    model/time.py.

    Raises:
        UsageError: no stacks, too many blocks, a stack of another width, an empty vocabulary, or an unknown dtype or
            time embedding.
    """

    stacks: tuple[Stack, ...]
    vocab_size: int  # rows of the embedding and columns of the head, padding included
    d_model: int
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    init_std: float = 0.02  # of the head; the embedding follows it, see functional.init_embed
    param_dtype: str = "fp32"
    compute_dtype: str = "fp32"
    time_embedding: str = "none"  # or sinusoidal or learned: how the hidden share of a sequence enters at the input

    def __post_init__(self):
        object.__setattr__(self, "stacks", tuple(self.stacks))
        require(len(self.stacks) >= 1, "the rack has no stacks; write model.architecture.n_stacks >= 1")
        n_blocks = sum(len(stack.blocks) for stack in self.stacks)
        require(
            n_blocks <= MAX_BLOCKS, f"the rack has {n_blocks} blocks; write model.architecture for {MAX_BLOCKS} at most"
        )
        require(self.vocab_size >= 1, f"model.vocab_size is {self.vocab_size}; write at least 1")
        for i, stack in enumerate(self.stacks):
            width = stack.blocks[0].d_model
            require(
                width == self.d_model, f"stack {i} has d_model {width} in a rack of {self.d_model}; make them equal"
            )
        for dtype in (self.param_dtype, self.compute_dtype):
            dtype_of(dtype)
        require(
            self.time_embedding in TIME_EMBEDDINGS,
            f"time embedding '{self.time_embedding}' is unknown (model.time_embedding); write one of "
            f"{[*TIME_EMBEDDINGS]}",
        )
        super().__post_init__()

    @nn.nowrap
    def init_params(self, key: jax.Array) -> Params:
        """All initial parameters from the run's root key."""
        return functional.init_rack(unbound(self), key)

    @nn.nowrap
    def parameter_count(self, trainable_only: bool = False) -> int:
        """Numbers in the rack, a tied matrix counted once; with `trainable_only` without what is frozen by the spec.

        Nothing is allocated.
        """
        ends = count(lambda key: {"embed": functional.init_embed(self, key), "head": functional.init_head(self, key)})
        return ends + sum(stack.parameter_count(trainable_only) for stack in self.stacks)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        attention_mode: str | None = None,
        depth: int | None = None,
        dropout_key: jax.Array | None = None,
        hidden_B: jax.Array | None = None,
    ) -> jax.Array:
        """Logits (B, T, V) float32 after the first `depth` stacks (None: all); other arguments as in Block.

        hidden_B: what a rack with a time embedding needs, and no other takes; see functional.embed_tokens.

        Raises:
            UsageError: the rack has fewer stacks than `depth`, or hidden_B is missing or not wanted.
        """
        params, rack = module_params(self, self.init_params), unbound(self)
        stacks = functional.path(rack, depth)
        x_BTD = functional.run_stacks(
            stacks,
            [params["stacks"][functional.stack_name(i)] for i in range(len(stacks))],
            functional.embed_tokens(rack, params["embed"], tokens_BT, hidden_B),
            positions_BT=positions_BT,
            segment_ids_BT=segment_ids_BT,
            attention_mode=attention_mode,
            dropout_key=dropout_key,
        )
        return functional.logits(rack, params["head"], params["embed"], x_BTD)
