"""Show what a run, a stack or a checkpoint holds: `python -m stackwise_jax.inspect PATH`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from stackwise_jax.config import CommandParser, path, whole_number
from stackwise_jax.config.bounds import COUNTER
from stackwise_jax.errors import RunError
from stackwise_jax.reporting.command import add_common, run_command


def build_parser() -> CommandParser:
    """The arguments of the command."""
    parser = CommandParser(
        prog="python -m stackwise_jax.inspect",
        description="Show what a run, a stack or a checkpoint holds: where the run stands, trees with shapes, dtypes "
        "and bytes, versions, which phase wrote them, the loss of each stack. Arrays are read only for --norms.",
    )
    parser.add_argument(
        "path", metavar="PATH", type=path, help="a run directory, its checkpoints/, an item or one version of it"
    )
    parser.add_argument("--stack", type=whole_number(-COUNTER, COUNTER), metavar="K", help="only stack K of a run")
    parser.add_argument("--norms", action="store_true", help="read the newest arrays and show the 2-norm of each")
    add_common(parser)
    return parser


def inspect(args: argparse.Namespace) -> dict[str, Any]:
    """Print the report and return it for --json.

    Raises:
        UsageError: there is nothing to look into at the path, or no such stack.
        RunError: something there is damaged; what can be read was printed before.
    """
    import jax

    from stackwise_jax.reporting.inspection import inspect_path
    from stackwise_jax.reporting.inspection_text import print_inspection

    jax.config.update("jax_platforms", "cpu")  # looking must not take memory on a device that a run is using
    report = inspect_path(args.path, args.stack, args.norms)
    print_inspection(report)
    if report["damage"]:
        raise RunError(report["damage"][0])
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(inspect, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
