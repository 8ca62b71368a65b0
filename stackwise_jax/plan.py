"""Say what a run needs before it begins: `python -m stackwise_jax.plan --config FILE [--device h200] [--advise]`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from stackwise_jax.config import (
    ConfigArgumentParser,
    StackWiseConfig,
    load_written,
    resolved_yaml,
    run_directory,
    validate,
)
from stackwise_jax.curriculum import overruled
from stackwise_jax.reporting import add_common, make_console, print_notes, run_command


def build_parser() -> ConfigArgumentParser:
    """The arguments of the command."""
    parser = ConfigArgumentParser(
        prog="python -m stackwise_jax.plan",
        description="Say what each phase of a run needs on device, host and disk, how long it takes and whether it "
        "fits, without allocating anything. Text and tokenizer need not be there.",
    )
    parser.add_config_arguments()
    parser.add_argument(
        "--device", metavar="NAME", help="h200, a100-80, rtx4090, t4, cpu or a size; default: what is here"
    )
    of = "to fit into; default: what is here, unlimited for a device that is not"
    parser.add_argument("--host", metavar="SIZE", help=f"host memory {of}")
    parser.add_argument("--disk", metavar="SIZE", help=f"disk {of}")
    parser.add_argument("--advise", action="store_true", help="compare the ways to train this model on this machine")
    add_common(parser)
    return parser


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """Run the command; returns the answer for --json.

    Raises:
        UsageError: the configuration cannot be run anywhere.
    """
    machine = [
        f"--memory.{name}={size}" for name in ("device", "host", "disk") if (size := getattr(args, name)) is not None
    ]
    config, written = load_written(args.config, [*args.overrides, *machine])

    from stackwise_jax.engine.sketch import without_text

    validate(without_text(config))
    print_notes(overruled(config, written, alone=True))
    if args.print_config:
        print(resolved_yaml(config), end="")
        return config.to_dict()
    alone = dataclasses.replace(config.mesh, num_processes=1, process_id=0, coordinator=None)
    return _answer(dataclasses.replace(config, mesh=alone), args)


def _answer(config: StackWiseConfig, args: argparse.Namespace) -> dict[str, Any]:
    from stackwise_jax.engine.plan_changes import advise, what_helps
    from stackwise_jax.engine.planner import plan_run
    from stackwise_jax.engine.sketch import sketch
    from stackwise_jax.memory.devices import machine_of
    from stackwise_jax.reporting.plan_text import print_changes, print_run_plan, print_ways

    console, run_dir, memory = make_console(), run_directory(config, args.config), config.memory
    machine = machine_of(memory.device, memory.host, memory.disk, run_dir, another=True)
    setup = sketch(config, run_dir)
    found = plan_run(setup, machine, compiled=machine.here)
    print_run_plan(found, console)
    answer = found.to_dict()
    if not found.fits:
        # Changes are planned by formula, which is quicker; where the formula does not see what is wrong, compiled too.
        rough = plan_run(setup, machine)
        compiled = machine.here and rough.fits
        changes, fitting = what_helps(setup, machine, found if compiled else rough, compiled=compiled)
        print_changes(changes, fitting, console)
        answer["changes"] = [change.to_dict() for change in changes]
        answer["fits_with"] = None if fitting is None else fitting.to_dict()
    if args.advise:
        ways = advise(setup, machine)
        print_ways(ways, console)
        answer["ways"] = [way.to_dict() for way in ways]
    return answer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(plan, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
