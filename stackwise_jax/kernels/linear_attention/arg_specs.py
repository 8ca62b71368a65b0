"""Shapes that models have, by name, for the tests and the benchmark.

Legend: B batch, T rows, H query heads, K key/value heads, N size of queries and keys, e value size.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """A call but for its sequence length: sizes of the arrays (head_dim: before features), and which way rows look."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    features: int
    value_dim: int
    causal: bool


ARG_SPECS = {
    "quickstart": ArgSpec(batch=1, heads=4, kv_heads=4, head_dim=32, features=64, value_dim=32, causal=True),
    "gpt2": ArgSpec(batch=1, heads=12, kv_heads=12, head_dim=64, features=128, value_dim=64, causal=True),
    "gqa": ArgSpec(batch=1, heads=8, kv_heads=2, head_dim=64, features=128, value_dim=64, causal=True),
    "encoder": ArgSpec(batch=1, heads=8, kv_heads=8, head_dim=64, features=128, value_dim=64, causal=False),
}


def make_args(spec: ArgSpec, rows: int, width: int, key: jax.Array) -> list[jax.Array]:
    """[q_BTHN, k_BTKN, v_BTKe] float32; queries and keys have this width and are not negative, as features are."""
    shapes = ((spec.heads, width), (spec.kv_heads, width), (spec.kv_heads, spec.value_dim))
    keys = jax.random.split(key, 3)
    q, k, v = (jax.random.normal(key, (spec.batch, rows, *shape)) for key, shape in zip(keys, shapes, strict=True))
    return [jnp.abs(q), jnp.abs(k), v]
