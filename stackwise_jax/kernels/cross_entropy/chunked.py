"""Head and cross entropy over chunks of the sequence: the logits of one chunk are all that ever exists.

The gradients are taken while the logits are there, in the forward scan, so the backward pass only scales them and
nothing is computed twice (the idea of Hsu et al. 2024, Liger Kernel). Chunks cut the sequence axis: the batch axis,
and with it the sharding over devices, stays whole. What is summed over the batch is summed per shard within the scan
and over the shards after it, so that the devices need not talk to each other once per chunk.

Legend: B batch, T sequence length, D d_model, V vocabulary (padded), G shards of the batch, n chunks, c positions per
chunk, N positions of a shard.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stackwise_jax.kernels.cross_entropy.reference import head_logits

MIN_LOGITS = 2**23  # logits of a chunk on one device: 32 MiB in float32


def default_chunk(batch: int, seq_len: int, d_model: int, vocab: int, batch_shards: int) -> int:
    """Positions per chunk and sequence.

    The logits of a chunk take as much as the float32 gradient of the kernel, which is there anyway and is read and
    written once per chunk, or 32 MiB per device if that is more; at least one position of each sequence.
    """
    tokens = max(d_model, MIN_LOGITS // vocab) * batch_shards
    n = -(-seq_len // max(1, tokens // batch))
    return -(-seq_len // n)


def _value(
    x_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    n_valid: int,
    chunk: int,
    train_kernel: bool,
    batch_shards: int,
) -> tuple[jax.Array, jax.Array]:
    """See `linear_cross_entropy`: (sum of weighted nll, hits), both float32 scalars."""
    return _scan(x_BTD, kernel_DV, targets_BT, weights_BT, n_valid, chunk, batch_shards, needed=())[0]


cross_entropy_chunked = jax.custom_vjp(_value, nondiff_argnums=(4, 5, 6, 7))


def _forward(x_BTD, kernel_DV, targets_BT, weights_BT, n_valid, chunk, train_kernel, batch_shards):
    needed = ("x", "kernel") if train_kernel else ("x",)
    return _scan(x_BTD, kernel_DV, targets_BT, weights_BT, n_valid, chunk, batch_shards, needed)


def _backward(n_valid, chunk, train_kernel, batch_shards, gradients, cotangents):
    scale = cotangents[0]  # the number of hits is constant almost everywhere
    dx_BTD, dkernel_DV = jax.tree.map(lambda g: (g.astype(jnp.float32) * scale).astype(g.dtype), gradients)
    return dx_BTD, dkernel_DV, None, None  # None: zero


cross_entropy_chunked.defvjp(_forward, _backward)


def _scan(x_BTD, kernel_DV, targets_BT, weights_BT, n_valid, chunk, batch_shards, needed):
    """((sum, hits), (dx, dkernel)); a gradient that is not in `needed`, of "x" and "kernel", is None."""
    (B, T, D), V = x_BTD.shape, kernel_DV.shape[1]
    n = -(-T // chunk)

    def chunks(x_BT):
        """(B, T, ...) -> (n, B, c, ...); the positions added at the end have weight 0."""
        x_BT = jnp.pad(x_BT, ((0, 0), (0, n * chunk - T)) + ((0, 0),) * (x_BT.ndim - 2))
        return jnp.moveaxis(x_BT.reshape(B, n, chunk, *x_BT.shape[2:]), 1, 0)

    cast_DV = kernel_DV.astype(x_BTD.dtype)

    def body(sums, chunk_of):
        x_BcD, targets_Bc, weights_Bc = chunk_of
        more, dx_BcD = _one_chunk(x_BcD, targets_Bc, weights_Bc, cast_DV, n_valid, batch_shards, needed)
        return jax.tree.map(jnp.add, sums, more), dx_BcD

    zeros_B = jnp.zeros(B, jnp.float32)
    start = (zeros_B, zeros_B, jnp.zeros((batch_shards, D, V), jnp.float32) if "kernel" in needed else None)
    xs = (chunks(x_BTD), chunks(targets_BT), chunks(weights_BT))
    (total_B, hits_B, dkernel_GDV), dx_nBcD = jax.lax.scan(body, start, xs)
    dx_BTD = None if dx_nBcD is None else jnp.moveaxis(dx_nBcD, 0, 1).reshape(B, n * chunk, D)[:, :T]
    dkernel_DV = None if dkernel_GDV is None else dkernel_GDV.sum(0).astype(kernel_DV.dtype)
    return (total_B.sum(), hits_B.sum()), (dx_BTD, dkernel_DV)


def _one_chunk(x_BcD, targets_Bc, weights_Bc, kernel_DV, n_valid, batch_shards, needed):
    """((sum_B, hits_B, dkernel_GDV in float32 or None), dx in x's dtype or None) of one chunk."""
    counts_Bc = weights_Bc != 0
    x_BcD = jnp.where(counts_Bc[..., None], x_BcD, 0)
    targets_Bc1 = jnp.where(counts_Bc, targets_Bc, 0)[..., None]
    logits_BcV = head_logits(x_BcD, kernel_DV, n_valid)
    lse_Bc1 = jax.nn.logsumexp(logits_BcV, axis=-1, keepdims=True)
    nll_Bc = (lse_Bc1 - jnp.take_along_axis(logits_BcV, targets_Bc1, axis=-1))[..., 0]
    hits_Bc = (jnp.argmax(logits_BcV, axis=-1, keepdims=True) == targets_Bc1)[..., 0] & (weights_Bc > 0)
    dx_BcD = dkernel_GDV = None
    if needed:
        probs_BcV = jnp.exp(logits_BcV - lse_Bc1)
        errors_BcV = jnp.where(jnp.arange(logits_BcV.shape[-1]) == targets_Bc1, probs_BcV - 1.0, probs_BcV)
        dlogits_BcV = (weights_Bc[..., None] * errors_BcV).astype(x_BcD.dtype)
    if "x" in needed:
        dx_BcD = jnp.einsum("BcV,DV->BcD", dlogits_BcV, kernel_DV, preferred_element_type=jnp.float32)
        dx_BcD = dx_BcD.astype(x_BcD.dtype)
    if "kernel" in needed:
        x_GND, dlogits_GNV = (a.reshape(batch_shards, -1, a.shape[-1]) for a in (x_BcD, dlogits_BcV))
        dkernel_GDV = jnp.einsum("GND,GNV->GDV", x_GND, dlogits_GNV, preferred_element_type=jnp.float32)
    total_B, hits_B = jnp.sum(weights_Bc * nll_Bc, axis=1), jnp.sum(hits_Bc, axis=1, dtype=jnp.float32)
    return (total_B, hits_B, dkernel_GDV), dx_BcD
