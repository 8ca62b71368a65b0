"""Block, Stack and Rack: frozen specs whose parameters are plain dicts, and the plain functions that use them."""

from stackwise_jax.model.block import Block
from stackwise_jax.model.build import (
    create_block_spec,
    create_rack_from_config,
    create_rack_from_specs,
    create_simple_rack,
    create_stack_from_spec,
    padded_vocab,
)
from stackwise_jax.model.description import rack_from_dict, rack_to_dict
from stackwise_jax.model.editing import (
    Edited,
    append_stack,
    insert_stack,
    merge_stacks,
    prepend_stack,
    remove_stack,
    split_stack,
)
from stackwise_jax.model.features import KernelSpec
from stackwise_jax.model.functional import (
    decode,
    embed_tokens,
    final_hidden,
    head_kernel,
    init_cache,
    init_embed,
    init_head,
    init_rack,
    init_stack,
    init_stack_blocks,
    logits,
    path,
    run_stacks,
    stack_name,
)
from stackwise_jax.model.growth import can_copy, zero_outputs
from stackwise_jax.model.mla import MLASpec
from stackwise_jax.model.partition import combine, split_fixed
from stackwise_jax.model.presets import PRESETS, resolve_attention
from stackwise_jax.model.rack import Rack
from stackwise_jax.model.regroup import (
    concat_blocks,
    merge_alike,
    merge_params,
    regroup,
    regroup_params,
    split_blocks,
    split_params,
)
from stackwise_jax.model.spec import Params, dtype_of, size_of
from stackwise_jax.model.stack import Stack

__all__ = [
    "PRESETS",
    "Block",
    "Edited",
    "KernelSpec",
    "MLASpec",
    "Params",
    "Rack",
    "Stack",
    "append_stack",
    "can_copy",
    "combine",
    "concat_blocks",
    "create_block_spec",
    "create_rack_from_config",
    "create_rack_from_specs",
    "create_simple_rack",
    "create_stack_from_spec",
    "decode",
    "dtype_of",
    "embed_tokens",
    "final_hidden",
    "head_kernel",
    "init_cache",
    "init_embed",
    "init_head",
    "init_rack",
    "init_stack",
    "init_stack_blocks",
    "insert_stack",
    "logits",
    "merge_alike",
    "merge_params",
    "merge_stacks",
    "padded_vocab",
    "path",
    "prepend_stack",
    "rack_from_dict",
    "rack_to_dict",
    "regroup",
    "regroup_params",
    "remove_stack",
    "resolve_attention",
    "run_stacks",
    "size_of",
    "split_blocks",
    "split_fixed",
    "split_params",
    "split_stack",
    "stack_name",
    "zero_outputs",
]
