"""Floating-point operations of a phase by formula: a multiply and an add count two.

Counted are the matrix products of weights, of adapters, of random features and of attention (in full, not halved for
causal masks). Not counted are norms, softmax, activations, the embedding, the distance of a consistency loss, the power
iteration of spectral norms, scores of a softmax that are computed again (chunks, flash kernels), the optimizer, and
evaluation. The backward pass costs one forward for the gradients of the inputs (two for attention, both of whose
operands are activations) and one for those of the weights and adapters that learn. Linear attention computes each chunk
again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionDims:
    """What attention multiplies, in entries; a product of two counts two FLOPs."""

    weights: int  # of its matrices
    scored: int  # per token and position that it meets: sizes of keys and values as they are multiplied, over all heads
    projected: int = 0  # per token, with random matrices
    projection_learns: bool = False
    state: int = 0  # per token, into and out of a state of linear attention
    chunk: int | None = None  # linear attention meets the positions of a chunk of at most so many; None: it meets all
    scans: int = 1  # of linear attention: two where it looks both ways

    def products(self, seq_len: int) -> int:
        """Products of activations with each other, per token."""
        met = seq_len if self.chunk is None else -(-seq_len // -(-seq_len // self.chunk))
        return self.scans * (met * self.scored + self.state)


@dataclass(frozen=True)
class BlockDims:
    """The sizes of a block that its cost depends on."""

    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    freeze_up_proj: bool = False
    adapter_entries: int = 0  # of the matrices a and b of all its adapters
    other_attention: AttentionDims | None = None  # None: multi-head attention, grouped by n_kv_heads

    @property
    def attention(self) -> AttentionDims:
        """What its attention multiplies."""
        if self.other_attention is not None:
            return self.other_attention
        d_kv = self.d_model // self.n_heads * self.n_kv_heads
        return AttentionDims(weights=2 * self.d_model * (self.d_model + d_kv), scored=2 * self.d_model)

    @property
    def ff_matrix(self) -> int:
        """Entries of each of the three matrices gate, up and down."""
        return self.d_model * self.d_ff

    def forward(self, seq_len: int) -> int:
        """Forward FLOPs per token."""
        return self._products() + 2 * self.attention.products(seq_len)

    def backward_inputs(self, seq_len: int) -> int:
        """FLOPs per token of the gradients of all activations."""
        passes = 2 if self.attention.chunk is None else 3
        return self._products() + passes * 2 * self.attention.products(seq_len)

    def backward_weights(self) -> int:
        """FLOPs per token of the gradients of the weights, where they learn."""
        attention = self.attention.weights + (self.attention.projected if self.attention.projection_learns else 0)
        return 2 * (attention + (2 if self.freeze_up_proj else 3) * self.ff_matrix)

    def backward_adapters(self) -> int:
        """FLOPs per token of the gradients of the adapters, where they learn."""
        return 2 * self.adapter_entries

    def recompute(self, seq_len: int) -> int:
        """FLOPs per token that rematerialisation adds: the forward pass without the last matrix, whose output the
        backward pass does not need."""
        return self.forward(seq_len) - 2 * self.ff_matrix

    def _products(self) -> int:
        weights = self.attention.weights + self.attention.projected
        return 2 * (weights + 3 * self.ff_matrix + self.adapter_entries)


def block_forward_flops(d_model: int, d_ff: int, n_heads: int, n_kv_heads: int, seq_len: int) -> int:
    """Forward FLOPs per token of one block that attends to `seq_len` positions."""
    return BlockDims(d_model, d_ff, n_heads, n_kv_heads).forward(seq_len)


def head_forward_flops(d_model: int, vocab_size: int) -> int:
    """Forward FLOPs of the head per predicted position; `vocab_size` with its padding."""
    return 2 * d_model * vocab_size


@dataclass(frozen=True)
class StackDims:
    """The blocks of a stack, and what of them learns in the phase."""

    blocks: tuple[BlockDims, ...]
    learns: bool = False  # the weights
    adapters_learn: bool = False

    def forward(self, seq_len: int) -> int:
        """Forward FLOPs per token."""
        return sum(block.forward(seq_len) for block in self.blocks)


@dataclass(frozen=True)
class StepDims:
    """What the cost of a training step depends on."""

    path: tuple[StackDims, ...]  # from input to head
    batch_size: int  # sequences per step over all devices
    seq_len: int  # positions per sequence, padding included
    d_model: int
    vocab_size: int  # with its padding
    predicted: int | None = None  # positions per sequence that go through the head; None: all
    train_embed: bool = False
    train_head: bool = False
    tie_embeddings: bool = False  # the head's matrix is the embedding, so it gets a gradient where the embedding learns
    remat: bool = False  # blocks are computed again in the backward pass

    @property
    def first_learning(self) -> int:
        """Index into path of the first part that learns."""
        learns = (i for i, stack in enumerate(self.path) if stack.learns or stack.adapters_learn)
        return 0 if self.train_embed else next(learns, len(self.path))


def step_flops(step: StepDims) -> dict[str, int]:
    """FLOPs of one step that computes its prefix itself, in parts and in `total`.

    Returns:
        prefix_forward, window_forward, recompute, backward_inputs, backward_weights (of adapters too), head, total.
    """
    T, window = step.seq_len, step.path[step.first_learning :]
    tokens = step.batch_size * T
    blocks = [block for stack in window for block in stack.blocks]
    learning = [block for stack in window if stack.learns for block in stack.blocks]
    adapted = [block for stack in window if stack.adapters_learn for block in stack.blocks]
    weights = sum(b.backward_weights() for b in learning) + sum(b.backward_adapters() for b in adapted)
    # Forward, inputs, and the matrix itself.
    head_passes = 2 + int(step.train_head or (step.tie_embeddings and step.train_embed))
    predictions = step.batch_size * (T if step.predicted is None else step.predicted)
    parts = {
        "prefix_forward": tokens * sum(stack.forward(T) for stack in step.path[: step.first_learning]),
        "window_forward": tokens * sum(stack.forward(T) for stack in window),
        "recompute": tokens * sum(block.recompute(T) for block in blocks) if step.remat else 0,
        "backward_inputs": tokens * sum(block.backward_inputs(T) for block in blocks),
        "backward_weights": tokens * weights,
        "head": head_passes * predictions * head_forward_flops(step.d_model, step.vocab_size),
    }
    return parts | {"total": sum(parts.values())}


def phase_flops(
    step: StepDims, steps: int, *, cached_batches: int | None = None, advanced_stacks: int | None = None
) -> dict[str, int]:
    """FLOPs of a phase of `steps` such steps, in parts and in `total`.

    Args:
        cached_batches: batches whose prefix is computed once and cached; None: it is computed at every step.
        advanced_stacks: with a cache, how many stacks of the prefix the chunks are pushed through (what an earlier
            phase left is advanced); None: the whole prefix.

    Returns:
        The parts of step_flops, cache_fill, and total.
    """
    parts = {name: steps * flops for name, flops in step_flops(step).items() if name != "total"}
    parts["cache_fill"] = 0
    if cached_batches is not None:
        prefix = step.path[: step.first_learning]
        pushed = prefix if advanced_stacks is None else prefix[len(prefix) - advanced_stacks :]
        tokens = cached_batches * step.batch_size * step.seq_len
        parts |= {"prefix_forward": 0, "cache_fill": tokens * sum(stack.forward(step.seq_len) for stack in pushed)}
    return parts | {"total": sum(parts.values())}
