"""What quantized weights cost: their error, and the time of a product with them.

    python experiments/bench_quantized.py [--tokens N] [--inputs I] [--outputs O] [--dtype NAME] [--rounds R]
                                          [--smoke] [--json]

One normal matrix, in every format. Errors are relative, in the Frobenius norm: of the weights, and of x @ w with the
native product against the dequantized one, for normal x. Times are medians of x @ w and of x @ w with its gradient
to x; ratios are to the dense product in the same run, which keeps its weights in `--dtype`: above 1 is slower.

Legend: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from common import finish, in_turns, print_table

from stackwise_jax.memory.quantized import DENSE, QUANTIZED, bits_per_weight, dequantize, matmul, quantize

WAYS = [(fmt, "dequantize") for fmt in QUANTIZED] + [("int8", "native"), ("fp8", "native")]
SMOKE = {"tokens": 8, "inputs": 64, "outputs": 32, "rounds": 1}


def relative(found: jax.Array, exact: jax.Array) -> float:
    """|found - exact| / |exact| in the Frobenius norm."""
    found, exact = found.astype(jnp.float32), exact.astype(jnp.float32)
    return float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))


def errors(x_NI: jax.Array, w_IO: jax.Array) -> list[dict[str, Any]]:
    """One row per format."""
    rows = []
    for fmt in QUANTIZED:
        q = jax.jit(quantize, static_argnums=1)(w_IO, fmt)
        dequantized, native = (matmul(x_NI, q, jnp.float32, how) for how in ("dequantize", "native"))
        row = {
            "format": fmt,
            "bits": bits_per_weight(fmt),
            "stored bits": 8 * q.nbytes / w_IO.size,
            "weights %": 100 * relative(dequantize(q, jnp.float32), w_IO),
            "weights as bf16 %": 100 * relative(dequantize(q, jnp.bfloat16), w_IO),
            "native product %": 100 * relative(native, dequantized) if (fmt, "native") in WAYS else None,
        }
        rows.append(row)
    return rows


def product(how: str | None, dtype: Any, backward: bool) -> Callable:
    """Compiled x @ w, or its gradient to x beside it; how None: w is dense."""

    def forward(x_NI, w):
        return x_NI @ w if how is None else matmul(x_NI, w, dtype, how)  # type: ignore[arg-type]

    def both(x_NI, w):
        y_NO, pull = jax.vjp(lambda x_NI: forward(x_NI, w), x_NI)
        return y_NO, *pull(y_NO)

    return jax.jit(both if backward else forward)


def times(x_NI: jax.Array, w_IO: jax.Array, dtype: Any, rounds: int) -> list[dict[str, Any]]:
    """One row per way to multiply."""
    x_NI, weights = x_NI.astype(dtype), {(None, None): w_IO.astype(dtype)}
    weights |= {way: jax.jit(quantize, static_argnums=1)(w_IO, way[0]) for way in WAYS}
    calls = {
        (way, backward): functools.partial(product(way[1], dtype, backward), x_NI, w)
        for way, w in weights.items()
        for backward in (False, True)
    }
    found = in_turns({name: lambda call=call: jax.block_until_ready(call()) for name, call in calls.items()}, rounds)
    rows = []
    for way in weights:
        fwd, bwd = found[way, False].wall, found[way, True].wall
        dense_fwd, dense_bwd = found[(None, None), False].wall, found[(None, None), True].wall
        row = {"format": way[0] or "dense", "product": way[1] or "", "forward ms": 1e3 * fwd, "ratio": fwd / dense_fwd}
        rows.append(row | {"with gradient ms": 1e3 * bwd, "ratio with gradient": bwd / dense_bwd})
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Errors of quantized weights and the time of products with them.")
    parser.add_argument("--tokens", type=int, default=2048, help="rows of x")
    parser.add_argument("--inputs", type=int, default=2048, help="rows of w")
    parser.add_argument("--outputs", type=int, default=2048, help="columns of w")
    parser.add_argument("--dtype", choices=[*DENSE], default="bf16", help="of x, of the product and of dense weights")
    parser.add_argument("--rounds", type=int, default=7, help="each is timed so often")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes: shows in seconds that it works")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.set_defaults(set=[])
    args = parser.parse_args(argv)
    vars(args).update(SMOKE if args.smoke else {})
    sizes = {name: getattr(args, name) for name in ("tokens", "inputs", "outputs", "dtype")}
    x_NI = jax.random.normal(jax.random.key(0), (args.tokens, args.inputs))
    w_IO = jax.random.normal(jax.random.key(1), (args.inputs, args.outputs)) * args.inputs**-0.5
    table = errors(x_NI, w_IO)
    print_table("Relative errors", [{k: "" if v is None else v for k, v in row.items()} for row in table])
    timed = times(x_NI, w_IO, DENSE[args.dtype], args.rounds)
    print_table(f"x @ w, {args.tokens} x {args.inputs} x {args.outputs} in {args.dtype}", timed)
    return finish(args, sizes | {"errors": table, "times": timed})


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
