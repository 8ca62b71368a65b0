"""Helpers that build stacks and racks from keywords, from specifications and from a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from stackwise_jax.config.loading import config_from_dict
from stackwise_jax.config.schema import StackWiseConfig
from stackwise_jax.errors import UsageError
from stackwise_jax.kernels.attention.api import Implementation as AttentionImplementation
from stackwise_jax.memory.quantized import Implementation
from stackwise_jax.model.block import Block
from stackwise_jax.model.features import KernelSpec
from stackwise_jax.model.mla import MLASpec
from stackwise_jax.model.presets import attention_fields
from stackwise_jax.model.rack import Rack
from stackwise_jax.model.spec import refuse_unknown, require
from stackwise_jax.model.stack import Stack

STACK_KEYS = ("stack_id", "n_blocks", "block_spec", "freeze_blocks", "remat")


def create_block_spec(
    d_model: int,
    d_ff: int | None = None,
    n_heads: int = 8,
    n_kv_heads: int | None = None,
    *,
    attention_preset: str = "bert_style",
    attention_type: str | None = None,
    attention_mode: str | None = None,
    mla: MLASpec | Mapping[str, int | None] | None = None,
    kernel: KernelSpec | Mapping[str, Any] | str | None = None,
    attention_implementation: AttentionImplementation = "auto",
    dropout: float = 0.0,
    freeze_up_proj: bool = True,
    use_rope: bool = True,
    rope_theta: float = 10_000.0,
    norm_eps: float = 1e-6,
    residual_gain: float = 1.0,
    spectral_norm: float = 0.0,
    param_dtype: str = "fp32",
    compute_dtype: str = "fp32",
    quantized_matmul: Implementation = "dequantize",
) -> dict[str, Any]:
    """The keyword arguments of a Block, with the attention preset resolved and everything checked.

    d_ff None: 4 * d_model. attention_mode, attention_type and kernel None: what the preset says. attention_type "mha"
    or "gqa" says how keys and values are shared where n_kv_heads does not: "gqa" alone takes a quarter of the heads.

    mla: sizes of "mla" and "low_rank" (rq, rkv, nope_dim, rope_dim, v_dim); those left out are MLASpec.of's. kernel:
    the fields of a KernelSpec, or only its type; a type that is left out is the preset's.

    Raises:
        UsageError: a value is impossible; the sentence names its key.
    """
    sizes, given = (d_model, n_heads, n_kv_heads), (attention_type, attention_mode, mla, kernel)
    spec = {
        "d_model": d_model,
        "d_ff": 4 * d_model if d_ff is None else d_ff,
        "n_heads": n_heads,
        **attention_fields(attention_preset, *sizes, *given, use_rope),
        "attention_implementation": attention_implementation,
        "dropout": dropout,
        "freeze_up_proj": freeze_up_proj,
        "use_rope": use_rope,
        "rope_theta": rope_theta,
        "norm_eps": norm_eps,
        "residual_gain": residual_gain,
        "spectral_norm": spectral_norm,
        "param_dtype": param_dtype,
        "compute_dtype": compute_dtype,
        "quantized_matmul": quantized_matmul,
    }
    Block(**spec, parent=None)
    return spec


def create_stack_from_spec(
    stack_id: int,
    n_blocks: int,
    block_spec: Mapping[str, Any] | Block,
    freeze_blocks: bool = False,
    remat: bool = False,
) -> Stack:
    """A stack of n_blocks equal blocks. `block_spec` comes from create_block_spec, or is a Block.

    Raises:
        UsageError: n_blocks below 1, or a block that cannot be built.
    """
    require(n_blocks >= 1, f"n_blocks is {n_blocks} (model.architecture.blocks_per_stack); write at least 1")
    block = block_spec if isinstance(block_spec, Block) else _block(block_spec)
    return Stack(blocks=(block,) * n_blocks, stack_id=stack_id, freeze_blocks=freeze_blocks, remat=remat, parent=None)


def create_simple_rack(
    n_stacks: int,
    blocks_per_stack: int,
    d_model: int,
    d_ff: int,
    n_heads: int,
    vocab_size: int,
    n_kv_heads: int | None = None,
    *,
    tie_embeddings: bool = True,
    init_std: float = 0.02,
    time_embedding: str = "none",
    remat: bool = False,
    **block: Any,
) -> Rack:
    """A rack of n_stacks equal stacks; further keywords are those of create_block_spec (attention_preset, dropout).

    Raises:
        UsageError: a value is impossible; the sentence names its key.
    """
    require(n_stacks >= 1, f"model.architecture.n_stacks is {n_stacks}; write at least 1")
    require(blocks_per_stack >= 1, f"model.architecture.blocks_per_stack is {blocks_per_stack}; write at least 1")
    refuse_unknown(
        block, [f.name for f in dataclasses.fields(Block)] + ["attention_preset", "attention_type"], "keyword"
    )
    spec = create_block_spec(d_model, d_ff, n_heads, n_kv_heads, **block)
    stacks = tuple(create_stack_from_spec(i, blocks_per_stack, spec, remat=remat) for i in range(n_stacks))
    return _rack(stacks, vocab_size, tie_embeddings, init_std, time_embedding)


def create_rack_from_specs(
    vocab_size: int,
    d_model: int,
    stack_specs: Sequence[Mapping[str, Any]],
    tie_embeddings: bool = True,
    init_std: float = 0.02,
    time_embedding: str = "none",
) -> Rack:
    """A rack of stacks that may differ: each spec holds the arguments of create_stack_from_spec.

    The stacks must share d_model, norm_eps and dtypes; `stack_id` may be left out, ids count from 0 at the input.

    Raises:
        UsageError: a spec is incomplete, holds an unknown key or an id out of order, or does not fit the others.
    """
    stacks = []
    for i, spec in enumerate(stack_specs):
        refuse_unknown(spec, STACK_KEYS, f"key in stack_specs[{i}]:")
        missing = sorted({"n_blocks", "block_spec"} - set(spec))
        require(not missing, f"stack_specs[{i}] lacks {' and '.join(missing)}; add it")
        stack_id = spec.get("stack_id", i)
        require(
            stack_id == i, f"stack_specs[{i}] has the stack_id {stack_id}; write {i}, ids count from 0 at the input"
        )
        stacks.append(create_stack_from_spec(**{**spec, "stack_id": i}))
    require(len(stacks) >= 1, "stack_specs is empty; describe at least one stack")
    require(
        stacks[0].blocks[0].d_model == d_model,
        f"stack 0 has d_model {stacks[0].blocks[0].d_model} in a rack of {d_model}; make them equal",
    )
    return _rack(tuple(stacks), vocab_size, tie_embeddings, init_std, time_embedding)


def create_rack_from_config(config: StackWiseConfig | Mapping[str, Any], vocab_size: int | None = None) -> Rack:
    """The rack that a configuration (or its dict form, all sections or only `model`) describes.

    `vocab_size` is the tokenizer's own. Where model.vocab_size is not given, the rack's is the tokenizer's, padded up
    to a multiple of model.vocab_multiple. model.time_embedding counts under objective.time input; otherwise the rack
    has none.

    Raises:
        UsageError: an unknown key or impossible value, no vocabulary size at all, or one smaller than the tokenizer's.
    """
    if not isinstance(config, StackWiseConfig):
        config = config_from_dict(config)
    model = config.model
    spec = create_block_spec(
        model.d_model,
        model.d_ff,
        model.n_heads,
        model.n_kv_heads,
        attention_preset=model.attention_preset,
        attention_type=model.attention_type,
        attention_mode=model.attention_mode,
        mla=dataclasses.asdict(model.mla),
        kernel=dataclasses.asdict(model.kernel),
        attention_implementation=model.attention_implementation,
        dropout=model.dropout,
        freeze_up_proj=model.freeze_up_proj,
        use_rope=model.use_rope,
        rope_theta=model.rope_theta,
        norm_eps=model.norm_eps,
        residual_gain=model.residual_gain,
        spectral_norm=model.spectral_norm,
        param_dtype=model.param_dtype,
        compute_dtype=model.compute_dtype,
        quantized_matmul=model.quantized_matmul,
    )
    depth = model.architecture
    require(depth.n_stacks >= 1, f"model.architecture.n_stacks is {depth.n_stacks}; write at least 1")
    stacks = tuple(
        create_stack_from_spec(i, depth.blocks_per_stack, spec, remat=model.remat) for i in range(depth.n_stacks)
    )
    rack_vocab = padded_vocab(model.vocab_size, vocab_size, model.vocab_multiple)
    time_embedding = model.time_embedding if config.objective.time == "input" else "none"
    return _rack(stacks, rack_vocab, model.tie_embeddings, model.init_std, time_embedding)


def padded_vocab(given: int | None, tokenizer_size: int | None, multiple: int) -> int:
    """Rows of the embedding: `given` as it stands, else the tokenizer's size padded up to the multiple.

    Raises:
        UsageError: neither is given, `given` is smaller than the tokenizer's, or the multiple is below 1.
    """
    require(multiple >= 1, f"model.vocab_multiple is {multiple}; write at least 1")
    if given is None:
        if tokenizer_size is None:
            raise UsageError("model.vocab_size is not set and there is no tokenizer to take it from; write it")
        return -(-tokenizer_size // multiple) * multiple
    require(
        tokenizer_size is None or given >= tokenizer_size,
        f"model.vocab_size {given} is smaller than the tokenizer's {tokenizer_size}; write at least {tokenizer_size}, "
        "or leave it out",
    )
    return given


def _block(spec: Mapping[str, Any]) -> Block:
    refuse_unknown(spec, [f.name for f in dataclasses.fields(Block)], "key in block_spec:")
    missing = [name for name in ("d_model", "d_ff", "n_heads") if name not in spec]
    require(not missing, f"block_spec lacks {' and '.join(missing)}; make it with create_block_spec")
    return Block(**spec, parent=None)


def _rack(
    stacks: tuple[Stack, ...], vocab_size: int, tie_embeddings: bool, init_std: float, time_embedding: str
) -> Rack:
    """A rack whose final norm and ends work as the first block does."""
    block = stacks[0].blocks[0]
    return Rack(
        stacks=stacks,
        vocab_size=vocab_size,
        d_model=block.d_model,
        tie_embeddings=tie_embeddings,
        norm_eps=block.norm_eps,
        init_std=init_std,
        param_dtype=block.param_dtype,
        compute_dtype=block.compute_dtype,
        time_embedding=time_embedding,
        parent=None,
    )
