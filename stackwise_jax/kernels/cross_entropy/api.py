"""Head matmul and cross entropy as one operation, so that the logits of a large vocabulary need never exist at once.

Legend: B batch, T sequence length, D d_model, V vocabulary (padded), k positions kept.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from stackwise_jax.kernels.cross_entropy.chunked import cross_entropy_chunked, default_chunk
from stackwise_jax.kernels.cross_entropy.reference import cross_entropy_reference

Implementation = Literal["reference", "chunked"]


def linear_cross_entropy(
    x_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    n_valid: int | None = None,
    chunk: int | None = None,
    train_kernel: bool = True,
    batch_shards: int = 1,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """sum over positions of weight * -log softmax(x @ kernel)[target], in nats, and how often the best guess was right.

    The product is computed in x's dtype (the kernel is cast to it) and accumulated in float32, in which everything that
    follows is done. Gradients come in the dtypes of x and of the kernel, that of the kernel being summed in float32.
    Positions of weight 0 reach neither value nor gradient, whatever they hold. Deterministic for one chunk size.

    Args:
        x_BTD: floating; what the head sees, already normalised.
        kernel_DV: floating.
        targets_BT: int, 0..n_valid-1 where the weight is not 0.
        weights_BT: float32, constants: no gradient flows to them.
        n_valid: vocabulary columns from here on are padding, of probability 0. None: all are valid. Static.
        chunk: positions per chunk, and sequence; None: by the sizes. Any T is possible. Static.
        train_kernel: False: the kernel is a constant, and its gradient is neither computed nor given memory. Static.
        batch_shards: over how many devices the batch axis is spread; divides B. Right with any value, but with 1 on
            several devices they add up the gradient of the kernel after every chunk instead of once. Static.
        implementation: "reference" holds all logits; None and "chunked" hold those of one chunk. Static.

    Returns:
        The sum, a float32 scalar, and {"correct": float32 number of positions of weight > 0 whose largest logit is that
        of the target}.

    Raises:
        ValueError: batch_shards does not divide B.
    """
    B, T, D = x_BTD.shape
    if B % batch_shards:
        raise ValueError(f"a batch of {B} sequences does not spread over {batch_shards} devices")
    if not train_kernel:
        kernel_DV = jax.lax.stop_gradient(kernel_DV)
    weights_BT = jax.lax.stop_gradient(weights_BT)
    n_valid = kernel_DV.shape[1] if n_valid is None else n_valid
    if implementation == "reference":
        total, hits = cross_entropy_reference(x_BTD, kernel_DV, targets_BT, weights_BT, n_valid=n_valid)
    else:
        chunk = default_chunk(B, T, D, kernel_DV.shape[1], batch_shards) if chunk is None else min(chunk, T)
        total, hits = cross_entropy_chunked(
            x_BTD, kernel_DV, targets_BT, weights_BT, n_valid, chunk, train_kernel, batch_shards
        )
    return total, {"correct": jax.lax.stop_gradient(hits)}


def gather_targets(
    x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keep k positions per sequence, those with weight first and in order: x_BkD, targets_Bk, weights_Bk.

    k (static) must be at least the number of positions with weight, else predictions are lost:
    `objectives.max_targets` gives it. With k >= T the arguments come back as they are.
    """
    if k >= x_BTD.shape[1]:
        return x_BTD, targets_BT, weights_BT
    rows_Bk = jnp.argsort(weights_BT == 0, axis=1, stable=True)[:, :k]

    def keep_row(x_T, rows_k):
        return x_T.at[rows_k].get(mode="promise_in_bounds", unique_indices=True)

    keep = jax.vmap(keep_row)
    return keep(x_BTD, rows_Bk), keep(targets_BT, rows_Bk), keep(weights_BT, rows_Bk)
