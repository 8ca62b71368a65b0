"""What a phase costs, before or after it: parameters, FLOPs by formula, bytes."""

from __future__ import annotations

from stackwise_jax.config.schema import DataConfig
from stackwise_jax.curriculum import Phase
from stackwise_jax.memory import BlockDims, StackDims, phase_flops
from stackwise_jax.model import Rack, init_embed, init_head
from stackwise_jax.model.spec import count
from stackwise_jax.objectives import max_targets


def trainable_and_frozen(rack: Rack, phase: Phase) -> tuple[int, int]:
    """Numbers on the phase's path that learn, and that do not. Nothing is allocated."""
    embed, head = count(lambda key: init_embed(rack, key)), count(lambda key: init_head(rack, key))
    total, learning = embed + head, embed * phase.train_embed + head * phase.train_head
    for index in phase.path:
        stack = rack.stacks[index]
        total += stack.parameter_count()
        learning += stack.parameter_count(trainable_only=True) if index in phase.train else 0
    return learning, total - learning


def phase_flops_of(
    rack: Rack, phase: Phase, data: DataConfig, *, cached_batches: int | None, advanced_stacks: int | None = None
) -> int:
    """FLOPs of a phase by formula; see memory.phase_flops."""
    path = [
        StackDims(
            tuple(BlockDims(b.d_model, b.d_ff, b.n_heads, b.kv_heads, b.freeze_up_proj) for b in rack.stacks[i].blocks),
            learns=i in phase.train,
        )
        for i in phase.path
    ]
    return phase_flops(
        path,
        steps=phase.steps,
        batch_size=data.batch_size,
        seq_len=data.seq_len,
        d_model=rack.d_model,
        vocab_size=rack.vocab_size,
        predicted=max_targets(phase.objective, phase.noise, data.seq_len),
        train_embed=phase.train_embed,
        train_head=phase.train_head,
        tie_embeddings=rack.tie_embeddings,
        remat=rack.stacks[0].remat,
        cached_batches=cached_batches,
        advanced_stacks=advanced_stacks,
    )["total"]
