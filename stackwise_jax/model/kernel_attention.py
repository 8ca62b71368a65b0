"""Attention by the random features of a kernel (model/features.py), on the heads of any attention type.

Mode softmax: a softmax over inner products of features. Mode linear: the inner products of positive features are the
weights, so keys and values can be summed up as they come, and decoding needs a state of constant size.

Legend: B batch, T sequence, S new positions while decoding, H heads, K key/value heads, d head size, e of values,
M features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax

from stackwise_jax.kernels.attention.api import attention
from stackwise_jax.kernels.feature_attention.api import feature_attention
from stackwise_jax.kernels.linear_attention.api import LinearState, linear_attention, linear_step
from stackwise_jax.model.features import (
    KernelSpec,
    frequencies,
    key_features,
    query_features,
    rotary_angles,
    score_scale,
)
from stackwise_jax.model.heads import Heads
from stackwise_jax.model.spec import Params

if TYPE_CHECKING:
    from stackwise_jax.model.block import Block


def kernel_attention(
    block: Block,
    params: Params,
    heads: Heads,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    causal: bool,
) -> jax.Array:
    """o_BTHe of whole sequences; arguments as in attention.self_attention."""
    spec, q_BTHd, k_BTKd, v_BTKe = _spec(block), *heads[:3]
    segments = {"q_segment_ids_BT": segment_ids_BT, "kv_segment_ids_BS": segment_ids_BT}
    scale = score_scale(spec, q_BTHd.shape[-1])
    if spec.mode == "linear":
        return linear_attention(
            queries_as_features(block, params, q_BTHd, positions_BT),
            keys_as_features(block, params, k_BTKd, positions_BT),
            v_BTKe,
            causal=causal,
            segment_ids_BT=segment_ids_BT,
            implementation=block.attention_implementation,
        )
    how = {"causal": causal, "scale": scale, "implementation": block.attention_implementation, **segments}
    # cuDNN makes no features, and may compute attention over those that are there.
    if not spec.trigonometric or block.attention_implementation == "cudnn":
        q_BTHM = queries_as_features(block, params, q_BTHd, positions_BT)
        return attention(q_BTHM, keys_as_features(block, params, k_BTKd, positions_BT), v_BTKe, **how)
    if block.use_rope:
        how |= {"angles_F": rotary_angles(spec, block.rope_theta)}
        how |= {"q_rotary_BT": positions_BT, "kv_rotary_BS": positions_BT}
    return feature_attention(q_BTHd, k_BTKd, v_BTKe, frequencies(spec, params["features"]), **how)


def queries_as_features(block: Block, params: Params, q_BTHd: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """(B, T, H, M): the features of queries at these positions."""
    return _features(query_features, block, params, q_BTHd, positions_BT)


def keys_as_features(block: Block, params: Params, k_BTKd: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """(B, T, K, M): the features of keys at these positions."""
    return _features(key_features, block, params, k_BTKd, positions_BT)


def _features(make: Callable, block: Block, params: Params, x_BTHd: jax.Array, positions_BT: jax.Array) -> jax.Array:
    spec, rotary_BT = _spec(block), positions_BT if block.use_rope else None
    return make(spec, params["features"], x_BTHd, rotary_BT, block.rope_theta)


def linear_decode(
    block: Block,
    params: Params,
    heads: Heads,
    positions_BS: jax.Array,
    state: LinearState,
    valid_BS: jax.Array | None,
) -> tuple[jax.Array, LinearState]:
    """o_BSHe of S new positions behind those in the state, and the state with the valid ones of them."""
    q_BSHM = queries_as_features(block, params, heads.q_BTHd, positions_BS)
    k_BSKM = keys_as_features(block, params, heads.k_BTKd, positions_BS)
    state, o_BSHe = linear_step(state, q_BSHM, k_BSKM, heads.v_BTKe, valid_BS)
    return o_BSHe, state


def _spec(block: Block) -> KernelSpec:
    assert block.kernel is not None
    return block.kernel
