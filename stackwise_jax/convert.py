"""A run's rack in another shape or format: `python -m stackwise_jax.convert RUN OUT [--sizes 2,2] [--format nf4]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, get_args

from stackwise_jax.config import CommandParser, path, whole_number, whole_numbers
from stackwise_jax.config.bounds import BLOCKS, COUNTER, SEED
from stackwise_jax.config.schema import Format, StackInit
from stackwise_jax.errors import UsageError
from stackwise_jax.reporting.command import add_common, run_command
from stackwise_jax.reporting.terminal import say


def build_parser() -> CommandParser:
    """The arguments of the command."""
    parser = CommandParser(
        prog="python -m stackwise_jax.convert",
        description="Write the rack of a run as a new run directory: adapters merged, stacks removed, inserted, merged "
        "or split, stored in another format. One stack at a time is in memory. RUN stays as it is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", type=path, help="a run directory")
    parser.add_argument("out", metavar="OUT", type=path, help="the directory to write; must not exist")
    parser.add_argument(
        "--depth", type=whole_number(-COUNTER, COUNTER), help="the first K stacks; not given: all that were trained"
    )
    parser.add_argument("--merge_adapters", action="store_true", help="put the adapters into the weights")
    parser.add_argument(
        "--merge_base",
        choices=("trained", "master"),
        help="into which: trained, as the adapters met them (dequantized where they were kept in few bits), or master, "
        "their full-precision copy, where the run kept one; not given: trained",
    )
    parser.add_argument("--adapters", metavar="RUN", type=path, help="take the adapters of this run instead")
    parser.add_argument(
        "--remove", type=whole_numbers(0, BLOCKS), metavar="K,K", default=(), help="leave these stacks out"
    )
    parser.add_argument(
        "--insert", type=whole_numbers(0, BLOCKS), metavar="P,P", default=(), help="new stacks before these places"
    )
    inits = get_args(StackInit)
    parser.add_argument("--init", choices=inits, help="how inserted stacks begin; not given: zero, the identity")
    parser.add_argument("--seed", type=whole_number(0, SEED), help="of inserted stacks; not given: 0")
    parser.add_argument(
        "--sizes", type=whole_numbers(1, BLOCKS), metavar="N,N", default=(), help="blocks per stack in the end"
    )
    parser.add_argument(
        "--format",
        choices=get_args(Format),
        help="of the stacks; not given: as they are stored, after merging in full precision",
    )
    add_common(parser)
    return parser


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Run the command; returns the answer for --json."""
    changed = args.merge_adapters or args.adapters or args.remove or args.insert or args.sizes or args.format
    if not changed and args.depth is None:
        raise UsageError(
            "nothing to do; add --merge_adapters, --adapters, --depth, --remove, --insert, --sizes or --format"
        )
    if not args.insert and (args.init is not None or args.seed is not None):
        raise UsageError("--init and --seed are for new stacks; add --insert, or leave them out")
    if args.merge_base and not args.merge_adapters:
        raise UsageError("--merge_base is for adapters that are merged; add --merge_adapters, or leave it out")
    from stackwise_jax.engine.convert import Changes, convert_run
    from stackwise_jax.engine.source import Source

    changes = Changes(
        remove=args.remove,
        insert=args.insert,
        init=args.init or "zero",
        sizes=args.sizes,
        merge=args.merge_adapters,
        base=args.merge_base or "trained",
        fmt=args.format,
    )
    adapters = Source(args.adapters) if args.adapters else None
    answer = convert_run(Source(args.run, depth=args.depth), args.out, changes, adapters, args.seed or 0)
    blocks = " + ".join(map(str, answer["stacks"]))
    kinds, adapters = ", ".join(answer["formats"]), len(answer["adapters"])
    say(f"{answer['run']}: {len(answer['stacks'])} stacks of {blocks} blocks in {kinds}, {adapters} adapters")
    if answer["merged_into"]:
        base = "as the adapters met them" if changes.base == "trained" else "of full precision"
        into, sums = ", ".join(answer["merged_into"]), ", ".join(answer["sums"])
        rounded = ", rounded to it" if answer["rounded"] else ""
        say(f"adapters were merged into the weights {base}, in {into}; the sums are stored in {sums}{rounded}")
    return answer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(convert, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
