"""LoRA adapters: trees of their own beside the weights of a stack."""

from stackwise_jax.adapters.lora import (
    adapter_count,
    check_targets,
    detach_adapters,
    init_adapter,
    merge_adapters,
    one_adapter,
    split_adapters,
)

__all__ = [
    "adapter_count",
    "check_targets",
    "detach_adapters",
    "init_adapter",
    "merge_adapters",
    "one_adapter",
    "split_adapters",
]
