"""Multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2, section 2.1; as in V3).

    c_q  = norm(x W_qa)                      q_nope, q_rope = split(c_q W_qb), per head, q_rope rotated
    c_kv = norm(first rkv of x W_kva)        k_nope, v = split(c_kv W_kvb), per key/value head
    k_rope = rotate(the rest of x W_kva), one for all heads
    score = (q_nope . k_nope + q_rope . k_rope) / sqrt(nope + rope)

Keys and values come from one latent c_kv, so decoding keeps only c_kv and k_rope. It does not even make keys and values
of them: W_kvb moves over to the queries and behind the weighted sum (`absorbed_attention`).

With a kernel, or without RoPE, there is no rotary part: the positions enter the features of the kernel, or nothing.

Legend: B batch, T sequence, S new positions while decoding, M positions that the cache holds, D d_model, H heads,
K key/value heads, G = H / K, d size of the part without positions (nope), r of the rotary part, e of a value, C size of
the latent (rkv).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from stackwise_jax.kernels.attention.api import attention
from stackwise_jax.model.heads import Heads
from stackwise_jax.model.linear import dense_kernel, project
from stackwise_jax.model.norm import rms_norm
from stackwise_jax.model.rope import rope
from stackwise_jax.model.spec import Params, require

if TYPE_CHECKING:
    from stackwise_jax.model.block import Block


@dataclass(frozen=True)
class MLASpec:
    """The sizes of latent attention; of low-rank attention the first two.

    Raises:
        UsageError: a size below 1 or an odd rope_dim.
    """

    rq: int | None  # of the queries' latent; None: queries are not compressed
    rkv: int  # of the latent of keys and values
    nope_dim: int  # part of a head without positions
    rope_dim: int  # rotary part of a head
    v_dim: int  # a head's value

    def __post_init__(self):
        for name, size in vars(self).items():
            require(size is None or size >= 1, f"model.mla.{name} is {size}; write at least 1")
        even = self.rope_dim % 2 == 0
        require(even, f"model.mla.rope_dim is {self.rope_dim}; write an even number, rotation needs pairs")

    @classmethod
    def of(cls, d_model: int, n_heads: int, **given: int | None) -> MLASpec:
        """The spec with these sizes; those left out (or None) have the proportions of DeepSeek-V2-Lite.

        rq: None. rkv: a quarter of d_model. nope_dim: d_model / n_heads. rope_dim: half of nope_dim, made even.
        v_dim: nope_dim.
        """
        known = {name: size for name, size in given.items() if size is not None}
        nope = known.get("nope_dim", max(1, d_model // n_heads))
        usual = {"rq": None, "rkv": max(1, d_model // 4), "rope_dim": 2 * max(1, nope // 4), "v_dim": nope}
        return cls(**{"nope_dim": nope, **usual, **known})  # pyright: ignore[reportArgumentType]


def latent_shapes(block: Block) -> dict[str, tuple[int, int]]:
    """(in, out) of the matrices: q_a (D, rq), q_b (rq, H*(d+r)), kv_a (D, C+r), kv_b (C, K*(d+e)), o (H*e, D).

    Without rq one matrix q (D, H*(d+r)).
    """
    mla, r, D = *_sizes(block), block.d_model
    q_width = block.n_heads * (mla.nope_dim + r)
    queries = {"q": (D, q_width)} if mla.rq is None else {"q_a": (D, mla.rq), "q_b": (mla.rq, q_width)}
    return queries | {
        "kv_a": (D, mla.rkv + r),
        "kv_b": (mla.rkv, block.kv_heads * (mla.nope_dim + mla.v_dim)),
        "o": (block.n_heads * mla.v_dim, D),
    }


def latent_norms(block: Block) -> dict[str, int]:
    """Sizes of the norms on the latents, by name."""
    mla, _ = _sizes(block)
    return ({} if mla.rq is None else {"q_norm": mla.rq}) | {"kv_norm": mla.rkv}


def latent_heads(
    block: Block, params: Params, x_BTD: jax.Array, positions_BT: jax.Array, dropout_key: jax.Array | None = None
) -> Heads:
    """Queries, keys and values of every head, with the rotary parts as the shared ones; what training computes with."""
    q_BTHd, q_BTHr = latent_queries(block, params, x_BTD, positions_BT, dropout_key)
    latent_BTC, k_BTr = latents(block, params, x_BTD, positions_BT, dropout_key)
    k_BTKd, v_BTKe = keys_and_values(block, params, latent_BTC, dropout_key)
    return Heads(q_BTHd, k_BTKd, v_BTKe, q_BTHr, k_BTr)


def latent_queries(
    block: Block, params: Params, x_BTD: jax.Array, positions_BT: jax.Array, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """(q_BTHd, q_rope_BTHr), None where there is no rotary part."""
    mla, r = _sizes(block)
    if mla.rq is None:
        q_BTI = project(block, params, "q", x_BTD, dropout_key)
    else:
        low_BTR = project(block, params, "q_a", x_BTD, dropout_key)
        q_BTI = project(block, params, "q_b", rms_norm(low_BTR, params["q_norm"], block.norm_eps), dropout_key)
    q_BTHI = q_BTI.reshape(*x_BTD.shape[:2], block.n_heads, mla.nope_dim + r)
    if r == 0:
        return q_BTHI, None
    return q_BTHI[..., : mla.nope_dim], rope(q_BTHI[..., mla.nope_dim :], positions_BT, block.rope_theta)


def latents(
    block: Block, params: Params, x_BTD: jax.Array, positions_BT: jax.Array, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """(latent_BTC, k_rope_BTr): all that later positions need to know of these, None where there is no rotary part."""
    mla, r = _sizes(block)
    both_BTI = project(block, params, "kv_a", x_BTD, dropout_key)
    latent_BTC = rms_norm(both_BTI[..., : mla.rkv], params["kv_norm"], block.norm_eps)
    if r == 0:
        return latent_BTC, None
    return latent_BTC, rope(both_BTI[:, :, None, mla.rkv :], positions_BT, block.rope_theta)[:, :, 0]


def keys_and_values(
    block: Block, params: Params, latent_BTC: jax.Array, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(k_BTKd, v_BTKe) that the latents stand for."""
    mla, _ = _sizes(block)
    kv_BTI = project(block, params, "kv_b", latent_BTC, dropout_key)
    kv_BTKI = kv_BTI.reshape(*latent_BTC.shape[:2], block.kv_heads, mla.nope_dim + mla.v_dim)
    return kv_BTKI[..., : mla.nope_dim], kv_BTKI[..., mla.nope_dim :]


def absorbed_attention(
    block: Block,
    params: Params,
    x_BSD: jax.Array,
    positions_BS: jax.Array,
    latent_BMC: jax.Array,
    k_rope_BMr: jax.Array | None,
) -> jax.Array:
    """Causal attention of S positions over the latents of M, without their keys and values: o_BSHe.

    q . (W_k c) = (W_k^T q) . c, and the sum of weighted W_v c is W_v times the sum of weighted c. So attention runs
    over the latents as the keys and values of one head that all queries share.
    """
    mla, r = _sizes(block)
    B, S, K = *x_BSD.shape[:2], block.kv_heads
    q_BSHd, q_BSHr = latent_queries(block, params, x_BSD, positions_BS)
    both_CKI = dense_kernel(block, params, "kv_b").reshape(mla.rkv, K, mla.nope_dim + mla.v_dim)
    k_CKd, v_CKe = both_CKI[..., : mla.nope_dim], both_CKI[..., mla.nope_dim :]
    q_BSKGd = q_BSHd.reshape(B, S, K, -1, mla.nope_dim)
    multiply = partial(jnp.einsum, precision="highest")  # a matrix with adapters is float32, and has to stay so
    q_BSHC = multiply("BSKGd,CKd->BSKGC", q_BSKGd, k_CKd).reshape(B, S, -1, mla.rkv).astype(q_BSHd.dtype)
    o_BSHC = attention(
        q_BSHC,
        latent_BMC[:, :, None],
        latent_BMC[:, :, None],
        causal=True,
        scale=(mla.nope_dim + r) ** -0.5,
        q_shared_BTHr=q_BSHr,
        k_shared_BSr=k_rope_BMr,
        q_positions_BT=positions_BS,
        implementation=block.attention_implementation,
    )
    o_BSKGe = multiply("BSKGC,CKe->BSKGe", o_BSHC.reshape(B, S, K, -1, mla.rkv), v_CKe)
    return o_BSKGe.reshape(B, S, -1, mla.v_dim).astype(o_BSHC.dtype)


def _sizes(block: Block) -> tuple[MLASpec, int]:
    """The spec, and the size of the rotary part that is in use."""
    assert block.latent is not None
    return block.latent, block.rotary_dim
