"""From gradients to new weights: clipping, the optimizer's update, and the rounding of weights that are kept in bf16.

Both executors go through here: the resident one with all that learns at once, the streamed one item by item.

Legend: L blocks of a stacked tree.
"""

from __future__ import annotations

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
) -> tuple[Tree, Tree, jax.Array]:
    """One update by gradients that are clipped already.

    Args:
        adapter_rate: the learning rate of adapters as a multiple of `lr`.
        learning: {"embed"?, "stacks"?: one tree per group, "head"?}; opt and grads belong to it.
        lr: float32, the rate of this step.
        rounding_key: of this step and these trees, under cfg.rounding stochastic; else it is not looked at.

    Returns:
        (learning, opt, finite). finite: whether the update is finite, which a finite gradient does not promise (a
        second moment may underflow). Where it is not, the caller keeps what was (`keep`).
    """
    updates, opt = make_optimizer(cfg).update(grads, opt, learning)
    finite = jnp.isfinite(norm(updates))
    rates = learning_rate_factors(updates, adapter_rate)
    if cfg.rounding == "nearest":
        learning = jax.tree.map(lambda p, u, r: p + (lr * r * u).astype(p.dtype), learning, updates, rates)
        return learning, opt, finite
    assert rounding_key is not None, "stochastic rounding takes a key"
    leaves, structure = jax.tree.flatten(learning)
    keys = structure.unflatten(list(jax.random.split(rounding_key, max(len(leaves), 1)))[: len(leaves)])
    moved = lambda p, u, r, key: round_stochastically(p.astype(jnp.float32) + lr * r * u, p.dtype, key)
    return jax.tree.map(moved, learning, updates, rates, keys), opt, finite


def keep(finite: jax.Array, new: Tree, old: Tree) -> Tree:
    """`new` where the step was finite, else `old`."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def round_stochastically(x: jax.Array, dtype: Any, key: jax.Array) -> jax.Array:
    """float32 values in `dtype`; bfloat16 is rounded up or down at random so that the mean is the value itself.

    A bfloat16 is the upper half of a float32: random bits are added to the lower half, which is then cut off. Updates
    too small for the nearest bfloat16 to change are thereby made now and then instead of never (Zamirai et al. 2020).
    """
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def learning_rate_factors(tree: Tree, adapter_rate: float) -> Tree:
    """Per leaf of what learns, the factor on the phase's learning rate: adapter_rate in adapters, else 1."""

    def factor(path, _) -> float:
        return adapter_rate if any(getattr(entry, "key", None) == "adapters" for entry in path) else 1.0

    return jax.tree_util.tree_map_with_path(factor, tree)
