"""Shapes that linear attention has in models, by name, for tests.

Legend: B batch, T rows, H query heads, K key/value heads, N size of queries and keys, e value size.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class ArgSpec:
    """The arguments of one call; queries and keys are the same rows.

    Attributes:
        size, value_size: of a query-key head before the feature map, and of a value head.
        features: of a head.
    """

    batch: int
    rows: int
    heads: int
    kv_heads: int
    size: int
    value_size: int
    features: int
    causal: bool = True
    dtype: str = "float32"


ARG_SPECS = {
    "quickstart": ArgSpec(16, 256, 4, 4, 32, 32, features=64),
    "gpt2-1k": ArgSpec(8, 1024, 12, 12, 64, 64, features=128),
    "gqa-4k": ArgSpec(1, 4096, 8, 2, 64, 64, features=128),
    "encoder-512": ArgSpec(32, 512, 8, 8, 64, 64, features=128, causal=False),
}


def make_args(spec: ArgSpec, width: int, key: jax.Array) -> dict[str, jax.Array]:
    """{q_BTHN, k_BTKN, v_BTKe}: queries and keys have this width and are not negative, as features are."""
    shapes = {
        "q_BTHN": (spec.batch, spec.rows, spec.heads, width),
        "k_BTKN": (spec.batch, spec.rows, spec.kv_heads, width),
        "v_BTKe": (spec.batch, spec.rows, spec.kv_heads, spec.value_size),
    }
    keys = jax.random.split(key, len(shapes))
    args = {n: jax.random.normal(k, shape, spec.dtype) for k, (n, shape) in zip(keys, shapes.items(), strict=True)}
    return args | {name: jnp.abs(args[name]) for name in ("q_BTHN", "k_BTKN")}
