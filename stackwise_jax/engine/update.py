"""From gradients to new weights: clipping, the optimizer's update, and the rounding of weights that are kept in bf16.

Both executors go through here: the resident one with all that learns at once, the streamed one item by item.

Legend: L blocks of a stacked tree.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stackwise_jax.config.schema import OptimizerConfig
from stackwise_jax.engine.optimizer import make_optimizer

Tree = Any


def norm(tree: Tree) -> jax.Array:
    """The global norm, in float32: in half precision the sum of squares would overflow early."""
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))


def stack_norms(grads: Tree, stack_sizes: Sequence[Sequence[int]]) -> Tree:
    """The norm of each item that learns, as the first part of the tree of gradients, for `clip`.

    Args:
        grads: {"embed"?, "stacks": one tree per group, "head"?}.
        stack_sizes: per group, the number of blocks of each stack that it is merged of.

    Returns:
        Scalars, float32; for a group of several stacks (L,), the norm of the stack that each block belongs to.
    """
    norms: dict[str, Any] = {name: norm(tree) for name, tree in grads.items() if name != "stacks"}
    if "stacks" in grads:
        groups = zip(grads["stacks"], stack_sizes, strict=True)
        norms["stacks"] = tuple(_group_norms(tree, sizes) for tree, sizes in groups)
    return norms


def _group_norms(tree: Tree, sizes: Sequence[int]) -> jax.Array:
    leaves = jax.tree.leaves(tree)
    if len(sizes) == 1 or not leaves:
        return norm(tree)
    squares_L = jnp.stack([jnp.square(g.astype(jnp.float32)).reshape(len(g), -1).sum(axis=1) for g in leaves]).sum(0)
    ends = np.cumsum([0, *sizes]).tolist()
    return jnp.concatenate(
        [jnp.broadcast_to(jnp.sqrt(squares_L[start:end].sum()), (end - start,)) for start, end in pairwise(ends)]
    )


def clip(cfg: OptimizerConfig, grads: Tree, norms: Tree) -> Tree:
    """The gradients, scaled down to cfg.grad_clip where their norm is larger (Pascanu et al. 2013); 0: as they are.

    Args:
        norms: a tree that `grads` begins with: one scalar (`norm`) for the global norm, or those of `stack_norms`.
    """
    if cfg.grad_clip == 0:
        return grads

    def clipped(norm_: jax.Array, part: Tree) -> Tree:
        def scale(g: jax.Array) -> jax.Array:
            size = norm_.reshape(norm_.shape + (1,) * (g.ndim - norm_.ndim)) if norm_.ndim else norm_
            return jnp.where(size < cfg.grad_clip, g, (g / size.astype(g.dtype)) * cfg.grad_clip)

        return jax.tree.map(scale, part)

    return jax.tree.map(clipped, norms, grads)


def apply_update(
    cfg: OptimizerConfig,
    adapter_rate: float,
    learning: Tree,
    opt: Tree,
    grads: Tree,
    lr: jax.Array,
    rounding_key: jax.Array | None,
    fine: jax.Array,
) -> tuple[Tree, Tree, jax.Array]:
    """One update by gradients that are clipped already.

    A finite gradient can still give numbers that are not (where a second moment underflows, say): those weights stay as
    they are. Whether there are such is not waited for, since then all that is new would be kept beside all that is old.

    Args:
        adapter_rate: the learning rate of adapters as a multiple of `lr`.
        learning: {"embed"?, "stacks"?: one tree per group, "head"?}; opt and grads belong to it.
        lr: float32, the rate of this step.
        rounding_key: of this step and these trees, under cfg.rounding stochastic; else it is not looked at.
        fine: whether loss and gradient are finite; if not, everything stays as it is.

    Returns:
        (learning, opt, whether loss, gradient and update are finite).
    """
    updates, new_opt = make_optimizer(cfg).update(grads, opt, learning)
    finite = functools.reduce(jnp.logical_and, [jnp.isfinite(u).all() for u in jax.tree.leaves(updates)], fine)
    rates = learning_rate_factors(updates, adapter_rate)

    def moved(p: jax.Array, u: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
        if key is None:
            new = p + (lr * rate * u).astype(p.dtype)
        else:
            new = round_stochastically(p.astype(jnp.float32) + lr * rate * u, p.dtype, key)
        return jnp.where(fine & jnp.isfinite(u), new, p)

    leaves, structure = jax.tree.flatten(learning)
    keys: list[Any] = [None] * len(leaves)
    if cfg.rounding == "stochastic":
        assert rounding_key is not None, "stochastic rounding takes a key"
        keys = list(jax.random.split(rounding_key, max(len(leaves), 1)))[: len(leaves)]
    rest = structure.flatten_up_to(updates), structure.flatten_up_to(rates), keys
    learning = structure.unflatten(list(map(moved, leaves, *rest)))
    return learning, jax.tree.map(lambda n, o: jnp.where(fine, n, o), new_opt, opt), finite


def round_stochastically(x: jax.Array, dtype: Any, key: jax.Array) -> jax.Array:
    """float32 values in `dtype`; bfloat16 is rounded up or down at random so that the mean is the value itself.

    A bfloat16 is the upper half of a float32: random bits are added to the lower half, which is then cut off. Updates
    too small for the nearest bfloat16 to change are thereby made now and then instead of never (Zamirai et al. 2020).
    """
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isnan(x), jnp.bfloat16(jnp.nan), rounded)  # the sum of some NaN and random bits is a number


def learning_rate_factors(tree: Tree, adapter_rate: float) -> Tree:
    """Per leaf of what learns, the factor on the phase's learning rate: adapter_rate in adapters, else 1."""

    def factor(path, _) -> float:
        return adapter_rate if any(getattr(entry, "key", None) == "adapters" for entry in path) else 1.0

    return jax.tree_util.tree_map_with_path(factor, tree)
