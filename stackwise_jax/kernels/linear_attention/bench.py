"""Linear attention against softmax attention over sequence length: time, and temporaries of the compiled program.

    python3 -m stackwise_jax.kernels.linear_attention.bench gpt2 512 1024 2048 4096

Names of arg_specs come first, lengths after them. "linear" makes its features itself, exp(w . x - |x|^2) of queries and
keys as long as those of "softmax"; "given" gets features. The three run in turns, so that what else the machine does
meets them alike; a time is the median over rounds, "softmax/linear" the median of each round's ratio.

Legend: B batch, T rows, H query heads, d head size, M features.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from stackwise_jax.kernels.attention.api import attention
from stackwise_jax.kernels.linear_attention.api import linear_attention
from stackwise_jax.kernels.linear_attention.arg_specs import ARG_SPECS, ArgSpec, make_args

ROUNDS = 9
LENGTHS = (512, 1024, 2048, 4096)


def ways(spec: ArgSpec) -> dict[str, tuple[Callable[..., jax.Array], int]]:
    """By name: attention as a function of queries, keys and values, and how long its queries and keys are."""
    w_dM = jax.random.normal(jax.random.key(1), (spec.head_dim, spec.features))

    def features(x_BTHd):
        x_BTHd = x_BTHd * spec.head_dim**-0.5
        return jnp.exp(x_BTHd @ w_dM - jnp.sum(x_BTHd**2, axis=-1, keepdims=True))

    return {
        "softmax": (partial(attention, causal=spec.causal), spec.head_dim),
        "linear": (lambda q, k, v: linear_attention(features(q), features(k), v, causal=spec.causal), spec.head_dim),
        "given": (partial(linear_attention, causal=spec.causal), spec.features),
    }


def measure(spec: ArgSpec, rows: int, rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """{"forward", "forward + backward"}: milliseconds and MiB of temporaries by name of the way, and the ratio."""
    programs: dict[str, dict[str, Any]] = {"forward": {}, "forward + backward": {}}
    for name, (f, width) in ways(spec).items():
        args = make_args(spec, rows, width, jax.random.key(0))
        gradient = jax.value_and_grad(lambda *args, f=f: jnp.sum(f(*args) ** 2), argnums=(0, 1, 2))
        for kind, g in (("forward", f), ("forward + backward", gradient)):
            programs[kind][name] = partial(jax.jit(g).lower(*args).compile(), *args)
    return {kind: _in_turns(by_name, rounds) for kind, by_name in programs.items()}


def _in_turns(programs: dict[str, Any], rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    row = {f"{name} ms": 1e3 * statistics.median(taken) for name, taken in seconds.items()}
    pairs = zip(seconds["softmax"], seconds["linear"], strict=True)
    row["softmax/linear"] = statistics.median(softmax / linear for softmax, linear in pairs)
    for name, program in programs.items():
        row[f"{name} MiB"] = program.func.memory_analysis().temp_size_in_bytes / 2**20
    return row


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", nargs="*", help=f"names out of {[*ARG_SPECS]} (default: all), and lengths")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line per shape, direction and length."""
    args = build_parser().parse_args(argv)
    lengths = [int(word) for word in args.what if word.isdigit()] or [*LENGTHS]
    names = [word for word in args.what if not word.isdigit()] or [*ARG_SPECS]
    for name in names:
        for rows in lengths:
            for kind, row in measure(ARG_SPECS[name], rows).items():
                if args.json:
                    print(json.dumps({"shape": name, "kind": kind, "T": rows} | row))
                else:
                    print(
                        f"{name} {kind}, T = {rows}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items())
                    )


if __name__ == "__main__":
    main()
