"""Attention presets by name: which way a block looks, how it makes queries, keys and values, and how they weigh."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from stackwise_jax.model.block import ATTENTION_TYPES, check_mode
from stackwise_jax.model.features import KernelSpec
from stackwise_jax.model.mla import MLASpec
from stackwise_jax.model.spec import refuse_unknown, require


class Preset(NamedTuple):
    """What a preset says; attention_mode None: nothing, it has to be given."""

    attention_mode: str | None
    attention_type: str = "mha"
    grouped: bool = False  # a quarter as many key/value heads as heads
    kernel: str | None = None  # the type of its kernel


PRESETS = {
    "bert_style": Preset("bidirectional"),
    "gpt_style": Preset("causal"),
    "efficient_gqa": Preset("bidirectional", "gqa", grouped=True),
    "mla_attention": Preset("bidirectional", "mla"),
    "kernel_attention": Preset("bidirectional", kernel="gaussian"),
    "mlgka": Preset("bidirectional", "mla", grouped=True, kernel="laplacian"),
    "custom": Preset(None),
}


def grouped_heads(n_heads: int) -> int:
    """Key/value heads of grouped-query attention: the largest divisor of n_heads up to a quarter of it, at least 1."""
    return next(n for n in range(max(1, n_heads // 4), 0, -1) if n_heads % n == 0)


def resolve_attention(
    preset: str, n_heads: int, n_kv_heads: int | None = None, attention_mode: str | None = None
) -> tuple[str, int]:
    """(attention_mode, n_kv_heads) of a preset, where given values win over the preset's.

    Raises:
        UsageError: unknown preset or mode, or custom without a mode.
    """
    found = find_preset(preset)
    mode = attention_mode or found.attention_mode
    require(mode is not None, "model.attention_preset custom needs model.attention_mode; write bidirectional or causal")
    if n_kv_heads is None:
        n_kv_heads = grouped_heads(n_heads) if found.grouped and n_heads >= 1 else n_heads
    return check_mode(str(mode)), n_kv_heads


def find_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        UsageError: there is none.
    """
    require(
        name in PRESETS, f"attention preset '{name}' is unknown (model.attention_preset); write one of {[*PRESETS]}"
    )
    return PRESETS[name]


def attention_fields(
    preset: str,
    d_model: int,
    n_heads: int,
    n_kv_heads: int | None,
    attention_type: str | None,
    attention_mode: str | None,
    mla: MLASpec | Mapping[str, int | None] | None,
    kernel: KernelSpec | Mapping[str, Any] | str | None,
    use_rope: bool,
) -> dict[str, Any]:
    """The fields of a Block that say what attention it has; arguments as in build.create_block_spec.

    Raises:
        UsageError: a value is impossible, or means nothing beside the others.
    """
    found = find_preset(preset)
    if attention_type is not None:
        n_kv_heads = _shared_heads(attention_type, n_heads, n_kv_heads)
    attention_mode, n_kv_heads = resolve_attention(preset, n_heads, n_kv_heads, attention_mode)
    attention_type, spec = attention_type or found.attention_type, _kernel_spec(kernel, found.kernel)
    return {
        "n_kv_heads": n_kv_heads,
        "attention_type": attention_type,
        "mla": _mla_spec(attention_type, mla, d_model, n_heads, rotates=use_rope and spec is None),
        "kernel": spec,
        "attention_mode": attention_mode,
    }


def _shared_heads(attention_type: str, n_heads: int, n_kv_heads: int | None) -> int | None:
    """How many key/value heads a type has that is asked for by name; None: the preset says it.

    Raises:
        UsageError: there is no such type, or mha is to share key/value heads.
    """
    require(
        attention_type in ATTENTION_TYPES,
        f"attention_type '{attention_type}' is unknown (model.attention_type); write one of {[*ATTENTION_TYPES]}",
    )
    require(
        attention_type != "mha" or n_kv_heads in (None, n_heads),
        f"model.attention_type mha has as many key/value heads as heads, and model.n_kv_heads is {n_kv_heads}; "
        "leave it out or write model.attention_type gqa",
    )
    if n_kv_heads is None and n_heads >= 1:
        return {"mha": n_heads, "gqa": grouped_heads(n_heads)}.get(attention_type)
    return n_kv_heads


def _mla_spec(
    attention_type: str,
    given: MLASpec | Mapping[str, int | None] | None,
    d_model: int,
    n_heads: int,
    rotates: bool,
) -> MLASpec | None:
    """The sizes of the attention type, None if it has none.

    Raises:
        UsageError: a size is impossible, or is given and means nothing to the type.
    """
    if isinstance(given, MLASpec) or n_heads < 1:
        return given if isinstance(given, MLASpec) else None
    sizes = {name: size for name, size in (given or {}).items() if size is not None}
    names = [f.name for f in dataclasses.fields(MLASpec)]
    refuse_unknown(sizes, names, "key in mla:")
    uses = {"mla": names, "low_rank": ["rq", "rkv"]}.get(attention_type, [])
    for name, size in sizes.items():
        require(
            name in uses,
            f"model.mla.{name} is {size} and does nothing under model.attention_type {attention_type}; leave it out"
            + ("" if uses else ", or write model.attention_type mla"),
        )
        require(
            name != "rope_dim" or rotates,
            f"model.mla.rope_dim is {size} and does nothing with model.kernel, whose features know the positions, nor "
            "without model.use_rope; leave it out",
        )
    return MLASpec.of(d_model, n_heads, **sizes) if uses else None


def _kernel_spec(given: KernelSpec | Mapping[str, Any] | str | None, preset_type: str | None) -> KernelSpec | None:
    """The kernel, None if there is none.

    Raises:
        UsageError: a field is impossible, or is given and there is no kernel.
    """
    if isinstance(given, KernelSpec):
        return given
    fields: dict[str, Any] = {"type": given} if isinstance(given, str) else dict(given or {})
    usual = {f.name: f.default for f in dataclasses.fields(KernelSpec)} | {"bandwidth": 1.0}
    refuse_unknown(fields, [*usual], "key in kernel:")
    fields = {name: value for name, value in fields.items() if value is not None}
    kind = fields.pop("type", None) or preset_type
    if kind is not None:
        return KernelSpec(kind, **fields)
    for name, value in fields.items():
        require(
            value == usual[name],
            f"model.kernel.{name} is {value} and does nothing without a kernel; write model.kernel.type, or leave it "
            "out",
        )
    return None
