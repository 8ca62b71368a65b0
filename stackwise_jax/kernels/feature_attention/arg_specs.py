"""Shapes of feature attention, by name, for benchmarks and tests."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class ArgSpec:
    """The arguments of one call; queries and keys are the same rows, and positions enter the phases.

    Attributes:
        size, value_size: of a query-key head and of a value head.
        frequencies: half of the features.
    """

    batch: int
    rows: int
    heads: int
    kv_heads: int
    size: int
    value_size: int
    frequencies: int
    causal: bool = True
    dtype: str = "bfloat16"

    def flops(self, *, backward: bool) -> int:
        """Of the products over the scores that are seen, as those of `attention`, and of those that make the phases."""
        seen = self.rows * (self.rows + 1) // 2 if self.causal else self.rows**2
        features, values = 2 * self.frequencies, self.value_size
        over_scores = self.heads * seen * (4 * features + 3 * values if backward else features + values)
        over_rows = (self.heads + self.kv_heads) * self.rows * self.size * self.frequencies * (4 if backward else 1)
        return 2 * self.batch * (over_scores + over_rows)


ARG_SPECS = {
    "quickstart": ArgSpec(16, 256, 4, 4, 32, 32, frequencies=32, dtype="float32"),
    "gpt2-1k": ArgSpec(8, 1024, 12, 12, 64, 64, frequencies=64),
    "features-4k": ArgSpec(1, 4096, 16, 16, 64, 64, frequencies=64),
    "wide-4k": ArgSpec(1, 4096, 16, 4, 128, 128, frequencies=128),
    "wide-16k": ArgSpec(1, 16384, 16, 4, 128, 128, frequencies=128),
}


def make_args(spec: ArgSpec, key: jax.Array) -> dict[str, jax.Array]:
    """The arrays, by the names of the arguments of `feature_attention`."""
    shapes = {
        "q_BTHd": (spec.batch, spec.rows, spec.heads, spec.size),
        "k_BSKd": (spec.batch, spec.rows, spec.kv_heads, spec.size),
        "v_BSKe": (spec.batch, spec.rows, spec.kv_heads, spec.value_size),
    }
    keys = jax.random.split(key, len(shapes) + 1)
    args = {n: jax.random.normal(k, shape, spec.dtype) for k, (n, shape) in zip(keys, shapes.items(), strict=False)}
    args["frequencies_dF"] = jax.random.normal(keys[-1], (spec.size, spec.frequencies)) * spec.size**-0.5
    args["angles_F"] = 10_000.0 ** -jnp.linspace(0, 1, spec.frequencies)
    return args
