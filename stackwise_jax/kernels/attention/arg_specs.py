"""Shapes that attention has in real models, by name, for benchmarks and tests."""

from __future__ import annotations

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class ArgSpec:
    """The arguments of one call; queries and keys are the same rows.

    Attributes:
        size, value_size, shared_size: of a query-key head, of a value head, of the part that all heads share.
    """

    batch: int
    rows: int
    heads: int
    kv_heads: int
    size: int
    value_size: int
    shared_size: int = 0
    causal: bool = True
    dtype: str = "bfloat16"

    def flops(self, *, backward: bool) -> int:
        """Of the products over the scores that are seen, a multiply and an add counting two.

        The backward pass is counted as usual for flash attention, with the scores computed again (Dao 2023): five
        products beside the forward pass's two.
        """
        seen = self.rows * (self.rows + 1) // 2 if self.causal else self.rows**2
        of_scores, of_values = self.size + self.shared_size, self.value_size
        width = 4 * of_scores + 3 * of_values if backward else of_scores + of_values
        return 2 * self.batch * self.heads * seen * width


ARG_SPECS = {
    "quickstart": ArgSpec(16, 256, 4, 4, 32, 32, dtype="float32"),
    "bert-base-512": ArgSpec(32, 512, 12, 12, 64, 64, causal=False),
    "gpt2-1k": ArgSpec(8, 1024, 12, 12, 64, 64),
    # LLaMA-3 8B: Grattafiori et al. 2024.
    "gqa-4k": ArgSpec(4, 4096, 32, 8, 128, 128),
    "gqa-16k": ArgSpec(1, 16384, 32, 8, 128, 128),
    # DeepSeek-V2 and V3, 128 without position + 64 rotary: DeepSeek-AI 2024.
    "mla-4k": ArgSpec(1, 4096, 128, 128, 128, 128, shared_size=64),
    "mla-16k": ArgSpec(1, 16384, 128, 128, 128, 128, shared_size=64),
}


def make_args(spec: ArgSpec, key: jax.Array) -> dict[str, jax.Array]:
    """The arrays, by the names of the arguments of `attention`."""
    rows = spec.batch, spec.rows
    shapes: dict[str, tuple[int, ...]] = {
        "q_BTHd": (*rows, spec.heads, spec.size),
        "k_BSKd": (*rows, spec.kv_heads, spec.size),
        "v_BSKe": (*rows, spec.kv_heads, spec.value_size),
    }
    if spec.shared_size:
        shapes["q_shared_BTHr"] = (*rows, spec.heads, spec.shared_size)
        shapes["k_shared_BSr"] = (*rows, spec.shared_size)
    keys = jax.random.split(key, len(shapes))
    return {n: jax.random.normal(k, shape, spec.dtype) for k, (n, shape) in zip(keys, shapes.items(), strict=True)}
