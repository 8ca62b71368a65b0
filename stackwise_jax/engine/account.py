"""What a phase costs, before or after it: parameters and FLOPs by formula."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from operator import attrgetter

from stackwise_jax.adapters import adapter_count
from stackwise_jax.config.schema import DataConfig
from stackwise_jax.curriculum import Phase
from stackwise_jax.kernels.linear_attention.chunked import CHUNK
from stackwise_jax.memory import AttentionDims, BlockDims, StackDims, StepDims, phase_flops, step_flops
from stackwise_jax.model import Block, Rack, Stack, init_embed, init_head, regroup
from stackwise_jax.model.linear import MATRICES
from stackwise_jax.model.spec import count
from stackwise_jax.objectives import max_targets

# What the cost of a step depends on, of a phase.
_COSTS = attrgetter("path", "train", "adapt", "train_embed", "train_head", "adapters", "objective", "noise")


def trainable_and_frozen(rack: Rack, phase: Phase) -> tuple[int, int]:
    """Numbers on the phase's path that learn, and that do not; of adapters the entries of a and b.

    Nothing is allocated.
    """
    embed, head = count(lambda key: init_embed(rack, key)), count(lambda key: init_head(rack, key))
    total, learning = embed + head, embed * phase.train_embed + head * phase.train_head
    for index in phase.path:
        stack, adapters = rack.stacks[index], _adapter_entries(rack.stacks[index].blocks, phase, index)
        total += stack.parameter_count() + adapters
        if index in phase.train:
            learning += stack.parameter_count(trainable_only=True)
        elif index in phase.adapt:
            learning += adapters
    return learning, total - learning


def phase_flops_of(
    rack: Rack,
    phase: Phase,
    data: DataConfig,
    *,
    cached_batches: int | None,
    advanced_stacks: int | None = None,
    streamed: bool = False,
) -> int:
    """FLOPs of a phase by formula; see memory.phase_flops. streamed: each stack is computed again on the way back."""
    step = step_dims(rack, phase, data)
    step = dataclasses.replace(step, remat=step.remat or streamed)
    return phase_flops(step, phase.steps, cached_batches=cached_batches, advanced_stacks=advanced_stacks)["total"]


def step_flops_of(rack: Rack, data: DataConfig) -> Callable[[tuple[int, ...], Phase], int]:
    """A function from (blocks per stack, phase) to the FLOPs of one step of the phase on the rack regrouped to that.

    The step computes its prefix itself. Answers are remembered: a plan that fits a budget asks thousands of times for
    phases that differ in their length only.
    """

    @functools.cache
    def regrouped(sizes: tuple[int, ...]) -> Rack:
        return regroup(rack, sizes)

    known: dict[tuple, int] = {}

    def flops(sizes: tuple[int, ...], phase: Phase) -> int:
        key = (sizes, *_COSTS(phase))
        if key not in known:
            known[key] = step_flops(step_dims(regrouped(sizes), phase, data))["total"]
        return known[key]

    return flops


def step_dims(rack: Rack, phase: Phase, data: DataConfig) -> StepDims:
    """What a step of the phase costs depends on this."""
    return StepDims(
        tuple(_stack_dims(rack.stacks[i], phase, i) for i in phase.path),
        batch_size=data.batch_size,
        seq_len=data.seq_len,
        d_model=rack.d_model,
        vocab_size=rack.vocab_size,
        predicted=max_targets(phase.objective, phase.noise, data.seq_len),
        train_embed=phase.train_embed,
        train_head=phase.train_head,
        tie_embeddings=rack.tie_embeddings,
        remat=rack.stacks[0].remat,
    )


def _stack_dims(stack: Stack, phase: Phase, index: int) -> StackDims:
    blocks = []
    for b in stack.blocks:
        entries = _adapter_entries([b], phase, index)
        attention = _attention_dims(b, phase.attention_mode or b.attention_mode)
        blocks.append(BlockDims(b.d_model, b.d_ff, b.n_heads, b.kv_heads, b.freeze_up_proj, entries, attention))
    return StackDims(tuple(blocks), learns=index in phase.train, adapters_learn=index in phase.adapt)


def _attention_dims(block: Block, mode: str) -> AttentionDims:
    heads, kv_heads, kernel = block.n_heads, block.kv_heads, block.kernel
    shapes = [shape for name, shape in block.matrices.items() if MATRICES[name] == "attn"]
    weights = sum(n_in * n_out for n_in, n_out in shapes)
    if kernel is None:
        return AttentionDims(weights, scored=heads * (block.qk_dim + block.rotary_dim + block.v_dim))
    features = AttentionDims(
        weights,
        scored=heads * (kernel.features + block.v_dim),
        projected=(heads + kv_heads) * block.qk_dim * kernel.columns,
        projection_learns=kernel.learn,
    )
    if kernel.mode == "softmax" or block.attention_implementation == "reference":
        return features
    state, scans = (heads + kv_heads) * kernel.features * block.v_dim, 1 if mode == "causal" else 2
    return dataclasses.replace(features, state=state, chunk=CHUNK, scans=scans)


def _adapter_entries(blocks: Sequence[Block], phase: Phase, index: int) -> int:
    """Numbers of all adapters on these blocks of stack `index`."""
    return sum(adapter_count(blocks, adapter.spec) for adapter in phase.adapters if adapter.stack == index)
