"""Every kind of attention that a block can have, in a size for tests."""

from __future__ import annotations

import itertools
from typing import Any

from stackwise_jax.model import Block, KernelSpec, MLASpec
from stackwise_jax.model.features import MODES, TYPES

D, H, FEATURES = 16, 4, 32
SIZED = {
    "mla": MLASpec(rq=None, rkv=10, nope_dim=6, rope_dim=4, v_dim=5),
    "low_rank": MLASpec.of(D, H, rq=9, rkv=7),
}
WEIGHING = {
    "products": None,
    "softmax": KernelSpec("laplacian", "softmax", features=FEATURES, bandwidth=1.0),
    "linear": KernelSpec("gaussian", "linear", features=FEATURES),
}


def block(kind: str = "mha", kernel: KernelSpec | None = None, n_kv_heads: int = H, **changes: Any) -> Block:
    """A block of an attention type; its output matrix is large, so that attention matters."""
    given = {"d_model": D, "d_ff": 24, "n_heads": H, "n_kv_heads": n_kv_heads, "kernel": kernel}
    return Block(**given | {"attention_type": kind, "mla": SIZED.get(kind)} | changes)


def grid() -> dict[str, Block]:
    """Types, ways to weigh and groups of key/value heads, each with each; and every kernel once in each mode."""
    found = {}
    for kind, (way, kernel), groups in itertools.product(("mha", *SIZED), WEIGHING.items(), (1, 2)):
        found[f"{kind}, {way}, {groups} to a group"] = block(kind, kernel, H // groups)
    for kind, mode in itertools.product(TYPES, MODES):
        found[f"{kind}, {mode}"] = block("mha", KernelSpec(kind, mode, features=FEATURES, bandwidth=1.0), 1)
    compressed = MLASpec(rq=8, rkv=10, nope_dim=6, rope_dim=4, v_dim=5)
    return found | {"mla, compressed queries, one key head": block("mla", n_kv_heads=1, mla=compressed)}


BLOCKS = grid()
