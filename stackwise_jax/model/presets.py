"""Attention presets by name: which way a block looks and how many key/value heads it has."""

from __future__ import annotations

from stackwise_jax.model.block import check_mode
from stackwise_jax.model.spec import require

PRESETS = ("bert_style", "gpt_style", "efficient_gqa", "custom")
PRESET_MODES = {"bert_style": "bidirectional", "gpt_style": "causal", "efficient_gqa": "bidirectional"}


def grouped_heads(n_heads: int) -> int:
    """Key/value heads of grouped-query attention: the largest divisor of n_heads up to a quarter of it, at least 1."""
    return next(n for n in range(max(1, n_heads // 4), 0, -1) if n_heads % n == 0)


def resolve_attention(
    preset: str, n_heads: int, n_kv_heads: int | None = None, attention_mode: str | None = None
) -> tuple[str, int]:
    """(attention_mode, n_kv_heads) of a preset, where given values win over the preset's.

    bert_style: bidirectional, as many key/value heads as heads. gpt_style: the same, causal. efficient_gqa:
    bidirectional, a quarter of the heads. custom: the mode has to be given; key/value heads default to the heads.

    Raises:
        UsageError: unknown preset or mode, or custom without a mode.
    """
    require(
        preset in PRESETS, f"attention preset '{preset}' is unknown (model.attention_preset); write one of {[*PRESETS]}"
    )
    mode = attention_mode or PRESET_MODES.get(preset)
    require(mode is not None, "model.attention_preset custom needs model.attention_mode; write bidirectional or causal")
    if n_kv_heads is None:
        n_kv_heads = grouped_heads(n_heads) if preset == "efficient_gqa" and n_heads >= 1 else n_heads
    return check_mode(str(mode)), n_kv_heads
