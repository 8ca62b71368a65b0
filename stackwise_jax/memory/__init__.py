"""Where arrays live: placement on devices, the activation cache, and what a phase costs."""

from stackwise_jax.memory.cache import ActivationCache, cache_key
from stackwise_jax.memory.choice import CacheChoice, choose_cache
from stackwise_jax.memory.flops import (
    AttentionDims,
    BlockDims,
    StackDims,
    StepDims,
    block_forward_flops,
    head_forward_flops,
    phase_flops,
    step_flops,
)
from stackwise_jax.memory.hashing import tree_hash
from stackwise_jax.memory.offload import Conveyor, Place, Scratch, rest
from stackwise_jax.memory.placement import (
    Placement,
    format_bytes,
    make_mesh,
    peak_device_bytes,
    peak_host_bytes,
)

__all__ = [
    "ActivationCache",
    "AttentionDims",
    "BlockDims",
    "CacheChoice",
    "Conveyor",
    "Place",
    "Placement",
    "Scratch",
    "StackDims",
    "StepDims",
    "block_forward_flops",
    "cache_key",
    "choose_cache",
    "format_bytes",
    "head_forward_flops",
    "make_mesh",
    "peak_device_bytes",
    "peak_host_bytes",
    "phase_flops",
    "rest",
    "step_flops",
    "tree_hash",
]
