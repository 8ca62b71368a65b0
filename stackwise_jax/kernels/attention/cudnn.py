"""Attention by cuDNN, which knows one head size for queries, keys and values: parts are joined and sizes filled with
zeros, which changes neither scores nor outputs.

Legend: B batch, T query rows, S key/value rows, H query heads, K key/value heads, d and e sizes of a query-key and a
value head, r size of the part of the keys that all heads share.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from stackwise_jax.kernels import dispatch


def attention_cudnn(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    *,
    causal: bool,
    scale: float,
    q_shared_BTHr: jax.Array | None = None,
    k_shared_BSr: jax.Array | None = None,
) -> jax.Array:
    """See `attention`; holds no scores. Its gradient need not be the same from run to run."""
    if q_shared_BTHr is not None and k_shared_BSr is not None:
        k_shared_BSKr = jnp.broadcast_to(k_shared_BSr[:, :, None], (*k_BSKd.shape[:3], k_shared_BSr.shape[-1]))
        q_BTHd = jnp.concatenate([q_BTHd, q_shared_BTHr], axis=-1)
        k_BSKd = jnp.concatenate([k_BSKd, k_shared_BSKr], axis=-1)
    e = v_BSKe.shape[-1]
    size = -(-max(e, q_BTHd.shape[-1]) // 8) * 8
    q_BTHd, k_BSKd, v_BSKe = (
        jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, size - x.shape[-1]))) for x in (q_BTHd, k_BSKd, v_BSKe)
    )
    o_BTHe = jax.nn.dot_product_attention(q_BTHd, k_BSKd, v_BSKe, scale=scale, is_causal=causal, implementation="cudnn")
    return o_BTHe[..., :e]


def obstacle(q_BTHd, k_BSKd, v_BSKe, *, causal: bool, masked: bool, **options) -> str | None:
    """Why cuDNN cannot compute this; None: it can.

    Args:
        masked: segment ids or explicit positions are given.
        options: the other arguments of `attention_cudnn`.
    """
    capability = dispatch.cuda_capability()
    if capability is None or capability < 8:
        return "it needs an NVIDIA GPU of compute capability 8.0"
    if masked:
        return "it knows neither segment ids nor positions"
    if q_BTHd.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, not {q_BTHd.dtype}"
    if causal and q_BTHd.shape[1] != k_BSKd.shape[1]:
        return "it needs as many queries as keys where it is causal"
    try:
        jax.eval_shape(functools.partial(attention_cudnn, causal=causal, **options), q_BTHd, k_BSKd, v_BSKe)
    except (RuntimeError, NotImplementedError, ValueError) as error:  # what jax knows of cuDNN's version and its limits
        return str(error)
    return None
