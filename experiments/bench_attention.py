"""Implementations of attention: their time and temporaries over the length of the sequence, and for real shapes.

    python experiments/bench_attention.py [lengths] [specs] [tiles] [--lengths T ..] [--specs NAME ..] [--only WAY ..]
                                          [--rounds R] [--peak_tflops P] [--smoke] [--json]

- lengths: every way on the same heads, forward and with the gradients to all arguments, at each length. Ratios are of
  times to those of the reference, of jax.nn.dot_product_attention, and of the fastest softmax over products, in the
  same rounds: below 1 is faster. The exponent is the slope of log time over log length: 2 is quadratic, 1 linear. CPU
  time is that of all threads. "linear" makes the features of queries and keys itself, two for each entry of a head;
  "linear, given" is linear attention alone.
- specs: the shapes of kernels/attention/arg_specs.py, causal and looking both ways, in TFLOP/s and, with --peak_tflops,
  as a share of the peak. FLOPs are those of the scores that are seen.
- tiles: the flash kernels with other tiles, for a GPU: what `default_tiling` should say.

Ways that a device or a shape does not allow are left out, and those whose scores take more than --max_scores.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from common import Seconds, arguments, finish, in_turns, print_table

from stackwise_jax.config import parse_bytes
from stackwise_jax.kernels.attention.arg_specs import ARG_SPECS, ArgSpec, make_args
from stackwise_jax.kernels.attention.bench import compile_attention
from stackwise_jax.kernels.feature_attention import arg_specs as of_features
from stackwise_jax.kernels.feature_attention.bench import compile_feature_attention
from stackwise_jax.kernels.linear_attention import arg_specs as of_linear
from stackwise_jax.kernels.linear_attention.bench import compile_linear_attention
from stackwise_jax.kernels.measure import Compiled, compiled

Compile = Callable[..., Compiled | None]
PARTS = ("lengths", "specs", "tiles")


def sizes(spec: ArgSpec) -> dict[str, Any]:
    """What a shape has in common with those of the other operations."""
    return {name: value for name, value in vars(spec).items() if name != "shared_size"}


def on_features(implementation: str) -> Compile:
    """Feature attention on the same heads, with as many frequencies as a head has entries."""

    def compile_spec(spec: ArgSpec, *, backward: bool) -> Compiled | None:
        if spec.shared_size:
            return None
        spec_of_features = of_features.ArgSpec(**sizes(spec), frequencies=spec.size)
        return compile_feature_attention(spec_of_features, implementation, backward=backward)  # type: ignore[arg-type]

    return compile_spec


def linear(*, maps: bool) -> Compile:
    """Linear attention on the same heads, with two features for each entry of a head."""

    def compile_spec(spec: ArgSpec, *, backward: bool) -> Compiled | None:
        if spec.shared_size:
            return None
        spec_of_linear = of_linear.ArgSpec(**sizes(spec), features=2 * spec.size)
        return compile_linear_attention(spec_of_linear, "auto", maps=maps, backward=backward)

    return compile_spec


def plain(f: Callable[..., jax.Array]) -> Compile:
    """f(q, k, v, causal), for shapes of equal sizes without a shared part."""

    def compile_spec(spec: ArgSpec, *, backward: bool) -> Compiled | None:
        if spec.shared_size or spec.size != spec.value_size:
            return None
        args = make_args(spec, jax.random.key(0))
        call = lambda q_BTHd, k_BSKd, v_BSKe: f(q_BTHd, k_BSKd, v_BSKe, spec.causal)
        return compiled(call, args, backward=backward, flops=spec.flops(backward=backward))

    return compile_spec


# What is compared: each compiles a shape, or says None where it cannot.
WAYS: dict[str, Compile] = {
    "reference": partial(compile_attention, implementation="reference"),
    "jax.nn": plain(lambda q, k, v, causal: jax.nn.dot_product_attention(q, k, v, is_causal=causal)),
    "chunked": partial(compile_attention, implementation="chunked"),
    "cudnn": partial(compile_attention, implementation="cudnn"),
    "pallas": partial(compile_attention, implementation="pallas"),
    "features, reference": on_features("reference"),
    "features, chunked": on_features("chunked"),
    "features, pallas": on_features("pallas"),
    "linear": linear(maps=True),
    "linear, given": linear(maps=False),
}
HOLD_SCORES = ("reference", "jax.nn", "features, reference")
DIRECTIONS = {False: "forward", True: "with gradient"}
OF_SPECS = SOFTMAX = ("reference", "jax.nn", "chunked", "cudnn", "pallas")


def attempt(label: str, f: Callable[[], Any]) -> Any:
    """What f returns; None where the device has not enough of something, which is told."""
    try:
        return f()
    except jax.errors.JaxRuntimeError as error:
        print(f"{label} is left out: {str(error).splitlines()[0]}", flush=True, file=sys.stderr)
        return None


def compile_ways(names: Sequence[str], spec: ArgSpec, backward: bool, max_scores: int) -> dict[str, Compiled]:
    """The ways that can, by name."""
    scores = 4 * spec.batch * spec.heads * spec.rows**2
    fitting = [name for name in names if name not in HOLD_SCORES or scores <= max_scores]
    found = {name: attempt(name, partial(WAYS[name], spec, backward=backward)) for name in fitting}
    return {name: call for name, call in found.items() if call is not None}


def times(calls: Mapping[str, Compiled], rounds: int) -> dict[str, Seconds]:
    """Of one run of each that runs. A round repeats the short ones, so that each takes some milliseconds at least."""
    repeats = {}
    for name, call in calls.items():
        once = {name: partial(call.run, 1)}
        found = attempt(name, lambda once=once: in_turns(once, 1))
        if found:
            repeats[name] = max(1, min(50, round(0.02 / found[name].wall)))
    found = in_turns({name: partial(calls[name].run, n) for name, n in repeats.items()}, rounds)
    return {name: Seconds(*(x / repeats[name] for x in seconds)) for name, seconds in found.items()}


def over_lengths(base: ArgSpec, lengths: Sequence[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per way, direction and length; a ratio is missing where what it is to was left out."""
    rows = []
    for length, backward in itertools.product(lengths, DIRECTIONS):
        spec = dataclasses.replace(base, rows=length)
        calls = compile_ways(args.only or [*WAYS], spec, backward, args.max_scores)
        found = times(calls, args.rounds)
        for way, seconds in found.items():
            row: dict[str, Any] = {"way": way, "": DIRECTIONS[backward], "T": length}
            row |= {"ms": 1e3 * seconds.wall, "CPU ms": 1e3 * seconds.cpu}
            for other in ("reference", "jax.nn"):
                row[f"to {other}"] = seconds.wall / found[other].wall if other in found else None
            softmax = [found[name].wall for name in SOFTMAX if name in found]
            row["to softmax"] = seconds.wall / min(softmax) if softmax else None
            rows.append(row | {"MiB": calls[way].temp_bytes / 2**20})
            print(*row.values(), flush=True, file=sys.stderr)
    return sorted(rows, key=lambda row: ([*WAYS].index(row["way"]), row[""], row["T"]))


def exponents(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each way and direction with several lengths the slope of log time over log length, by least squares."""
    slopes = []
    for (way, direction), group in itertools.groupby(rows, lambda row: (row["way"], row[""])):
        of_way = [*group]
        if len(of_way) > 1:
            log_T, *logs = (np.log([row[key] for row in of_way]) for key in ("T", "ms", "CPU ms"))
            fits = [float(np.polyfit(log_T, log_ms, 1)[0]) for log_ms in logs]
            slopes.append({"way": way, "": direction, "exponent": fits[0], "in CPU time": fits[1]})
    return slopes


def of_specs(specs: Mapping[str, ArgSpec], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per shape, direction and way."""
    rows = []
    for name, backward, causal in itertools.product(specs, DIRECTIONS, (True, False)):
        spec = dataclasses.replace(specs[name], causal=causal)
        calls = compile_ways(args.only or OF_SPECS, spec, backward, args.max_scores)
        for way, seconds in times(calls, args.rounds).items():
            ms = 1e3 * seconds.wall
            row = {
                "shape": name,
                "looks": "back" if causal else "both ways",
                "": DIRECTIONS[backward],
                "way": way,
                "ms": ms,
            }
            flops = calls[way].flops
            row["TFLOP/s"] = None if flops is None else flops / ms / 1e9
            row["of peak"] = row["TFLOP/s"] / args.peak_tflops if flops and args.peak_tflops else None
            rows.append(row | {"MiB": calls[way].temp_bytes / 2**20})
            print(*row.values(), flush=True, file=sys.stderr)
    return rows


def of_tiles(specs: Mapping[str, ArgSpec], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per shape, kernel and tile: those of one kernel are tried while the others have their defaults."""
    from stackwise_jax.kernels.pallas.calls import Tiles
    from stackwise_jax.kernels.pallas.flash import default_tiling, flash_attention

    tiles_tried = (
        (32, 64, 4),
        (32, 128, 8),
        (64, 32, 4),
        (64, 64, 4),
        (64, 64, 8),
        (128, 32, 8),
        (128, 64, 8),
        (128, 128, 8),
    )
    tried = [Tiles(*size, stages) for size, stages in itertools.product(tiles_tried, (2, 3))]
    rows = []
    for (name, spec), kernel in itertools.product(specs.items(), ("forward", "queries", "keys")):
        arrays, backward = make_args(spec, jax.random.key(0)), kernel != "forward"
        default = default_tiling(spec.size + spec.shared_size + spec.value_size, spec.dtype)
        calls = {}
        for tiles in dict.fromkeys([getattr(default, kernel), *(tried[:1] if args.smoke else tried)]):
            tiling = dataclasses.replace(default, **{kernel: tiles})
            options = {"causal": spec.causal, "scale": 0.1, "interpret": jax.default_backend() != "gpu"}
            compile_tiles = partial(compiled, partial(flash_attention, tiling=tiling, **options), arrays)
            label = "{t} x {s}, {warps} warps, {stages} stages".format(**vars(tiles))
            calls[label] = attempt(
                label, partial(compile_tiles, backward=backward, flops=spec.flops(backward=backward))
            )
        found = times({label: call for label, call in calls.items() if call is not None}, args.rounds)
        for label, seconds in sorted(found.items(), key=lambda item: item[1]):
            ms = 1e3 * seconds.wall
            row = {"shape": name, "kernel": kernel, "tiles": label, "ms": ms}
            rows.append(row | {"TFLOP/s": calls[label].flops / ms / 1e9})
    return rows


def smaller(spec: ArgSpec) -> ArgSpec:
    """The same kind of shape at the smallest size."""
    small = {"batch": 1, "rows": 32, "heads": spec.heads // spec.kv_heads, "kv_heads": 1, "size": 16, "value_size": 16}
    return dataclasses.replace(spec, **small, shared_size=spec.shared_size // 4, dtype="float32")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = arguments((__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none: lengths, and on a GPU specs")
    parser.add_argument("--lengths", nargs="+", type=int, help="none: 512 to 4096, on a GPU to 32768")
    parser.add_argument("--specs", nargs="+", choices=ARG_SPECS, help="none: those of 4k and 16k rows")
    parser.add_argument("--only", nargs="+", choices=WAYS, metavar="WAY", help="of the table WAYS")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed")
    parser.add_argument("--peak_tflops", type=float, help="of the device in the dtype of the shapes")
    parser.add_argument("--max_scores", help="bytes of all scores in float32; none: 2GB, on a GPU 20GB")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = build_parser()
    args = parser.parse_args(argv)
    if unknown := {*args.parts} - {*PARTS}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; write any of {', '.join(PARTS)}")
    gpu = jax.default_backend() == "gpu"
    args.max_scores = parse_bytes(args.max_scores or ("20GB" if gpu else "2GB"), "--max_scores")
    args.parts = args.parts or (["lengths", "specs"] if gpu else ["lengths"])
    lengths = args.lengths or ([16, 32] if args.smoke else [2**i for i in range(9, 16 if gpu else 13)])
    names = args.specs or (["gqa-4k", "mla-4k"] if args.smoke else [n for n in ARG_SPECS if n.endswith(("4k", "16k"))])
    specs = {name: smaller(ARG_SPECS[name]) if args.smoke else ARG_SPECS[name] for name in names}
    base = ArgSpec(1, 0, 16, 4, 64, 64) if gpu else ArgSpec(1, 0, 4, 2, 64, 64, dtype="float32")
    if args.smoke:
        args.rounds, base = 1, smaller(base)
        jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time at these sizes
    result: dict[str, Any] = {"max_scores": args.max_scores, "peak_tflops": args.peak_tflops}
    if "lengths" in args.parts:
        result["lengths"] = over_lengths(base, lengths, args)
        result["exponents"] = exponents(result["lengths"])
    if "specs" in args.parts:
        result["specs"] = of_specs(specs, args)
    if "tiles" in args.parts:
        result["tiles"] = of_tiles(specs, args)
    for part, rows in result.items():
        if part in (*PARTS, "exponents") and rows:
            print_table(part, [{key: "" if x is None else x for key, x in row.items()} for row in rows])
    return finish(args, result)


if __name__ == "__main__":
    main(sys.argv[1:])
