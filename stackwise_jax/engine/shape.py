"""A rack as plans see it."""

from __future__ import annotations

from stackwise_jax.config.schema import DataConfig
from stackwise_jax.curriculum import RackShape
from stackwise_jax.engine.account import step_flops_of
from stackwise_jax.model import Rack


def rack_shape(rack: Rack, data: DataConfig) -> RackShape:
    """The rack as plans see it, with what a step on this data costs."""
    counts = tuple(len(stack.blocks) for stack in rack.stacks)
    frozen = frozenset(i for i, stack in enumerate(rack.stacks) if stack.freeze_blocks)
    return RackShape(counts, frozen, rack.tie_embeddings, step_flops_of(rack, data))
