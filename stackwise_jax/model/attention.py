"""Self-attention of a block, over whole sequences and a few positions at a time with a cache.

The one place that chooses. `attention_type` says how queries, keys and values come about (heads.py, low_rank.py,
mla.py), `kernel` how they weigh each other: a softmax over their products, or the features of a kernel
(kernel_attention.py). A block knows of attention what this file defines.

Legend: B batch, T sequence, S new positions while decoding, M positions that the cache holds, D d_model, H heads,
K key/value heads, d size of queries and keys, e of values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from stackwise_jax.kernels.attention.api import attention
from stackwise_jax.kernels.linear_attention.api import init_linear_state
from stackwise_jax.model.features import init_features, score_scale
from stackwise_jax.model.heads import Heads, full_heads, full_shapes
from stackwise_jax.model.kernel_attention import (
    kernel_attention,
    keys_as_features,
    linear_decode,
    queries_as_features,
)
from stackwise_jax.model.linear import RESIDUAL_GAIN, init_kernel, project
from stackwise_jax.model.low_rank import low_rank_heads, low_rank_shapes
from stackwise_jax.model.mla import (
    absorbed_attention,
    keys_and_values,
    latent_heads,
    latent_norms,
    latent_queries,
    latent_shapes,
    latents,
)
from stackwise_jax.model.norm import init_norm
from stackwise_jax.model.spec import Params, dtype_of

if TYPE_CHECKING:
    from stackwise_jax.model.block import Block

SHAPES = {"mha": full_shapes, "gqa": full_shapes, "low_rank": low_rank_shapes, "mla": latent_shapes}
HEADS = {"mha": full_heads, "gqa": full_heads, "low_rank": low_rank_heads, "mla": latent_heads}


def attention_shapes(block: Block) -> dict[str, tuple[int, int]]:
    """(in, out) of the matrices, by name."""
    return SHAPES[block.attention_type](block)


def init_attention(block: Block, key: jax.Array) -> Params:
    """Each matrix {"kernel": (in, out)}; with latents {"q_norm", "kv_norm"}, with a kernel {"features"}."""
    dtype, shapes = dtype_of(block.param_dtype), attention_shapes(block)
    params = {}
    for i, (name, (n_in, n_out)) in enumerate(shapes.items()):
        gain = RESIDUAL_GAIN if name == "o" else 1.0
        params[name] = {"kernel": init_kernel(jax.random.fold_in(key, i), n_in, n_out, dtype, gain)}
    if block.latent is not None:
        params |= {name: init_norm(size, dtype) for name, size in latent_norms(block).items()}
    if block.kernel is not None:
        params["features"] = init_features(block.kernel, block.qk_dim, jax.random.fold_in(key, len(shapes)), dtype)
    return params


def make_heads(
    block: Block, params: Params, x_BTD: jax.Array, positions_BT: jax.Array, dropout_key: jax.Array | None = None
) -> Heads:
    """Queries, keys and values of the normed input; dropout_key is for the adapters' own dropout, see linear."""
    return HEADS[block.attention_type](block, params, x_BTD, positions_BT, dropout_key)


def attend(
    block: Block,
    params: Params,
    heads: Heads,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    causal: bool,
) -> jax.Array:
    """The values as every query weighs them, o_BTHe."""
    if block.kernel is not None:
        return kernel_attention(block, params, heads, positions_BT, segment_ids_BT, causal)
    return attention(
        heads.q_BTHd,
        heads.k_BTKd,
        heads.v_BTKe,
        causal=causal,
        q_shared_BTHr=heads.q_shared_BTHr,
        k_shared_BSr=heads.k_shared_BTr,
        q_segment_ids_BT=segment_ids_BT,
        kv_segment_ids_BS=segment_ids_BT,
        implementation=block.attention_implementation,
    )


def self_attention(
    block: Block,
    params: Params,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    causal: bool,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Every position looks at its own segment; with `causal` only at rows of the sequence up to its own."""
    heads = make_heads(block, params, x_BTD, positions_BT, dropout_key)
    o_BTHe = attend(block, params, heads, positions_BT, segment_ids_BT, causal)
    return _output(block, params, o_BTHe, dropout_key)


def init_attention_cache(block: Block, batch: int, max_len: int, dtype: Any) -> Any:
    """What decoding keeps of positions, empty.

    {"k": (B, M, K, d or, with a kernel, its features), "v": (B, M, K, e)}; of latent attention {"latent": (B, M, rkv)
    [, "rope": (B, M, r)]}; in linear mode a LinearState in float32, whose size does not depend on max_len.
    """
    if block.kernel is not None and block.kernel.mode == "linear":
        return init_linear_state(batch, block.kv_heads, block.kernel.features, block.v_dim)
    empty = lambda *shape: jnp.zeros((batch, max_len, *shape), dtype)
    if block.latent is not None:
        cache = {"latent": empty(block.latent.rkv)}
        return cache | ({"rope": empty(block.rotary_dim)} if block.rotates else {})
    k_dim = block.qk_dim if block.kernel is None else block.kernel.features
    return {"k": empty(block.kv_heads, k_dim), "v": empty(block.kv_heads, block.v_dim)}


def cached_attention(
    block: Block,
    params: Params,
    x_BSD: jax.Array,
    positions_BS: jax.Array,
    cache: Any,
    valid_BS: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Causal attention of S new positions over what the cache holds; positions are indices into the cache.

    The new positions are written first. Everything up to a query's own position must have been written before or now;
    what lies beyond it is not looked at. A state of linear mode takes up every position once, in order, and those where
    valid_BS is False not at all; other caches are written there too, until the position is decoded again.
    """
    if block.kernel is not None and block.kernel.mode == "linear":
        heads = make_heads(block, params, x_BSD, positions_BS)
        o_BSHe, cache = linear_decode(block, params, heads, positions_BS, cache, valid_BS)
    elif block.latent is not None:
        o_BSHe, cache = _over_latents(block, params, x_BSD, positions_BS, cache)
    else:
        o_BSHe, cache = _over_keys(block, params, x_BSD, positions_BS, cache)
    return _output(block, params, o_BSHe), cache


def _over_keys(
    block: Block, params: Params, x_BSD: jax.Array, positions_BS: jax.Array, cache: Params
) -> tuple[jax.Array, Params]:
    """Over keys, or features of keys, and values that are kept as they are."""
    q_BSHd, k_BSKd, v_BSKe, *_ = make_heads(block, params, x_BSD, positions_BS)
    if block.kernel is not None:
        q_BSHd = queries_as_features(block, params, q_BSHd, positions_BS)
        k_BSKd = keys_as_features(block, params, k_BSKd, positions_BS)
    cache = _written(cache, positions_BS, {"k": k_BSKd, "v": v_BSKe})
    k_BMKd, v_BMKe = _read(block, cache, "k"), _read(block, cache, "v")
    return _look_back(block, q_BSHd, k_BMKd, v_BMKe, positions_BS), cache


def _over_latents(
    block: Block, params: Params, x_BSD: jax.Array, positions_BS: jax.Array, cache: Params
) -> tuple[jax.Array, Params]:
    """Over latents: absorbed where attention is a softmax over products; a kernel needs the keys themselves."""
    latent_BSC, k_rope_BSr = latents(block, params, x_BSD, positions_BS)
    new = {"latent": latent_BSC} | ({} if k_rope_BSr is None else {"rope": k_rope_BSr})
    cache = _written(cache, positions_BS, new)
    latent_BMC = _read(block, cache, "latent")
    if block.kernel is None:
        k_rope_BMr = _read(block, cache, "rope") if "rope" in cache else None
        return absorbed_attention(block, params, x_BSD, positions_BS, latent_BMC, k_rope_BMr), cache
    k_BMKd, v_BMKe = keys_and_values(block, params, latent_BMC)
    q_BSHd, _ = latent_queries(block, params, x_BSD, positions_BS)
    q_BSHM = queries_as_features(block, params, q_BSHd, positions_BS)
    k_BMKM = keys_as_features(block, params, k_BMKd, jnp.arange(latent_BMC.shape[1])[None])
    return _look_back(block, q_BSHM, k_BMKM, v_BMKe, positions_BS), cache


def _look_back(
    block: Block, q_BSHd: jax.Array, k_BMKd: jax.Array, v_BMKe: jax.Array, positions_BS: jax.Array
) -> jax.Array:
    """Softmax attention over what stands up to each query's own position."""
    scale = None if block.kernel is None else score_scale(block.kernel, block.qk_dim)
    how = {"scale": scale, "q_positions_BT": positions_BS, "implementation": block.attention_implementation}
    return attention(q_BSHd, k_BMKd, v_BMKe, causal=True, **how)


def _written(cache: Params, positions_BS: jax.Array, new: Params) -> Params:
    rows_B1 = jnp.arange(positions_BS.shape[0])[:, None]
    return {name: cache[name].at[rows_B1, positions_BS].set(x.astype(cache[name].dtype)) for name, x in new.items()}


def _read(block: Block, cache: Params, name: str) -> jax.Array:
    return cache[name].astype(dtype_of(block.compute_dtype))


def _output(block: Block, params: Params, o_BTHe: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    return project(block, params, "o", o_BTHe.reshape(*o_BTHe.shape[:2], -1), dropout_key)
