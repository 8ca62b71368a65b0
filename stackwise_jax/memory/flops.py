"""Floating-point operations of a phase by formula: a multiply and an add count two.

Counted are the matrix products of weights and of attention (in full, not halved for causal masks). Not counted are
norms, softmax, activations, the optimizer, and evaluation. The backward pass costs one forward for the gradients of
the inputs (two for attention, both of whose operands are activations) and one for those of the weights that learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockDims:
    """The sizes of a block that its cost depends on."""

    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    freeze_up_proj: bool = False

    @property
    def attention_weights(self) -> int:
        """Entries of the matrices q, k, v and o."""
        d_kv = self.d_model // self.n_heads * self.n_kv_heads
        return 2 * self.d_model * (self.d_model + d_kv)

    @property
    def ff_matrix(self) -> int:
        """Entries of each of the three matrices gate, up and down."""
        return self.d_model * self.d_ff

    def forward(self, seq_len: int) -> int:
        """Forward FLOPs per token."""
        return 2 * (self.attention_weights + 3 * self.ff_matrix) + self._attention(seq_len)

    def backward_inputs(self, seq_len: int) -> int:
        """FLOPs per token of the gradients of all activations."""
        return 2 * (self.attention_weights + 3 * self.ff_matrix) + 2 * self._attention(seq_len)

    def backward_weights(self) -> int:
        """FLOPs per token of the gradients of the weights that learn."""
        return 2 * (self.attention_weights + (2 if self.freeze_up_proj else 3) * self.ff_matrix)

    def recompute(self, seq_len: int) -> int:
        """FLOPs per token that rematerialisation adds: the forward pass without the last matrix, whose output the
        backward pass does not need."""
        return self.forward(seq_len) - 2 * self.ff_matrix

    def _attention(self, seq_len: int) -> int:
        return 4 * seq_len * self.d_model  # scores and weighted sum, over all heads


def block_forward_flops(d_model: int, d_ff: int, n_heads: int, n_kv_heads: int, seq_len: int) -> int:
    """Forward FLOPs per token of one block that attends to `seq_len` positions."""
    return BlockDims(d_model, d_ff, n_heads, n_kv_heads).forward(seq_len)


def head_forward_flops(d_model: int, vocab_size: int) -> int:
    """Forward FLOPs of the head per predicted position; `vocab_size` with its padding."""
    return 2 * d_model * vocab_size


@dataclass(frozen=True)
class StackDims:
    """The blocks of a stack, and whether they learn in the phase."""

    blocks: tuple[BlockDims, ...]
    learns: bool = False


def phase_flops(
    path: Sequence[StackDims],
    *,
    steps: int,
    batch_size: int,
    seq_len: int,
    d_model: int,
    vocab_size: int,
    predicted: int | None = None,
    train_embed: bool = False,
    train_head: bool = False,
    tie_embeddings: bool = False,
    remat: bool = False,
    cached_batches: int | None = None,
    advanced_stacks: int | None = None,
) -> dict[str, int]:
    """FLOPs of a phase of `steps` steps, in parts and in `total`.

    Args:
        path: the stacks from input to head.
        batch_size: sequences per step over all devices.
        seq_len: positions per sequence, padding included.
        vocab_size: with its padding.
        predicted: positions per sequence that go through the head; None: all.
        tie_embeddings: the head's matrix is the embedding, so it gets a gradient too where the embedding learns.
        remat: blocks are computed again in the backward pass.
        cached_batches: batches whose prefix is computed once and cached; None: it is computed at every step.
        advanced_stacks: with a cache, how many stacks of the prefix the chunks are pushed through (what an earlier
            phase left is advanced); None: the whole prefix.

    Returns:
        prefix_forward, cache_fill, window_forward, recompute, backward_inputs, backward_weights, head, total.
    """
    first = 0 if train_embed else next((i for i, stack in enumerate(path) if stack.learns), len(path))
    prefix, window = path[:first], [block for stack in path[first:] for block in stack.blocks]
    learning = [block for stack in path[first:] if stack.learns for block in stack.blocks]
    tokens = steps * batch_size * seq_len
    pushed = prefix if advanced_stacks is None else prefix[len(prefix) - advanced_stacks :]
    cached = cached_batches is not None

    def forward(stacks: Sequence[StackDims]) -> int:
        return sum(block.forward(seq_len) for stack in stacks for block in stack.blocks)

    head_passes = 2 + int(train_head or (tie_embeddings and train_embed))  # forward, inputs, and the matrix itself
    predictions = steps * batch_size * (seq_len if predicted is None else predicted)
    parts = {
        "prefix_forward": 0 if cached else tokens * forward(prefix),
        "cache_fill": cached_batches * batch_size * seq_len * forward(pushed) if cached_batches is not None else 0,
        "window_forward": tokens * sum(block.forward(seq_len) for block in window),
        "recompute": tokens * sum(block.recompute(seq_len) for block in window) if remat else 0,
        "backward_inputs": tokens * sum(block.backward_inputs(seq_len) for block in window),
        "backward_weights": tokens * sum(block.backward_weights() for block in learning),
        "head": head_passes * predictions * head_forward_flops(d_model, vocab_size),
    }
    return parts | {"total": sum(parts.values())}
