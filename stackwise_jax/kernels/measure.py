"""What the benchmarks of all operations share: a call compiled, to be run again and again, and what it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Compiled:
    """A compiled call on arguments of its own.

    Attributes:
        run: does it n times, one after the other, and waits until it is done.
        temp_bytes: temporaries, by the compiler's own account.
        flops: of its products, by formula; None: nobody has counted.
    """

    run: Callable[[int], None]
    temp_bytes: int
    flops: int | None


def compiled(
    f: Callable[..., jax.Array], args: Mapping[str, jax.Array], *, backward: bool, flops: int | None = None
) -> Compiled:
    """f(**args), or with backward the gradients of its sum of squares to all of its arguments that are floating."""

    def gradients(learning: dict[str, Any], rest: dict[str, Any]) -> Any:
        return jax.grad(lambda learning: jnp.sum(jnp.square(f(**learning, **rest).astype(jnp.float32))))(learning)

    def forward(learning: dict[str, Any], rest: dict[str, Any]) -> Any:
        return f(**learning, **rest)

    learning = {name: x for name, x in args.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    rest = {name: x for name, x in args.items() if name not in learning}
    program = jax.jit(gradients if backward else forward).lower(learning, rest).compile()
    memory: Any = program.memory_analysis()

    def run(n: int = 1) -> None:
        result = None
        for _ in range(n):
            result = program(learning, rest)
        jax.block_until_ready(result)

    return Compiled(run, memory.temp_size_in_bytes, flops)
