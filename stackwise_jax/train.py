"""Train a rack: `python -m stackwise_jax.train --config FILE [--section.key value] [--dry-run]`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise_jax.config import (
    ConfigArgumentParser,
    StackWiseConfig,
    load_written,
    resolved_yaml,
    run_directory,
    validate,
)
from stackwise_jax.curriculum import overruled
from stackwise_jax.errors import UsageError
from stackwise_jax.reporting import (
    ConsoleReporter,
    Reporters,
    TensorBoardReporter,
    add_common,
    print_notes,
    print_plan,
    run_command,
)
from stackwise_jax.reporting.terminal import printable

if TYPE_CHECKING:
    from stackwise_jax.engine import Setup


def build_parser() -> ConfigArgumentParser:
    """The arguments of the command."""
    parser = ConfigArgumentParser(
        prog="python -m stackwise_jax.train",
        description="Train a rack by a plan of phases. The same command again continues an interrupted run.",
    )
    parser.add_config_arguments()
    parser.add_argument(
        "--dry-run", action="store_true", help="print the phases with parameters and memory; train nothing"
    )
    add_common(parser)
    return parser


@contextlib.contextmanager
def stop_on_signal():
    """A flag that the first Ctrl-C, SIGTERM or SIGHUP sets, so that the run saves and stops; the second acts as usual.

    SIGHUP (the terminal was closed) comes twice of itself, from the terminal and from the shell, so its second one
    changes nothing. Where it is ignored from the start, as under nohup, it stays so.
    """
    from stackwise_jax.engine import StopFlag

    stop = StopFlag()
    before = {}
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none

    def ask(number, frame):
        stop.set()
        if number != hangup:
            signal.signal(number, before[number])
        with contextlib.suppress(OSError):  # stderr may have gone with the terminal
            os.write(2, b"stopping after this step; once more to stop at once\n")  # safe also amid another print

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(hangup)
    for number in numbers:
        before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(args: argparse.Namespace) -> dict[str, Any] | None:
    """Run the command; returns the answer for --json: the summary, or the phases of a dry run.

    Of several processes only the first prints, writes curves and answers.
    """
    config, written = load_written(args.config, args.overrides)
    validate(config)
    first = config.mesh.process_id == 0
    if first:
        print_notes(overruled(config, written, alone=args.dry_run))
    if args.print_config:
        text = resolved_yaml(config)  # in a file it has to be read back: only a terminal gets it with escapes
        print(printable(text, keep="\n") if sys.stdout.isatty() else text, end="")
        return config.to_dict()
    run_dir = run_directory(config, args.config)
    if args.dry_run:
        return dry_run(config, run_dir)

    from stackwise_jax.engine import Interrupted, Run, prepare

    setup = prepare(config, run_dir)
    console = ConsoleReporter()
    members: list = [console] if first else []
    if first and config.run.tensorboard:
        members.append(TensorBoardReporter(run_dir / "tensorboard", every=config.run.log_every))
    reporter = Reporters(members)
    reporter.note(f"run directory: {run_dir}")
    check_fits(setup, reporter)
    try:
        with stop_on_signal() as stop:
            run = Run(setup, reporter, stop)
            summary = run.train()
        if first:
            was_finished = run.was_finished
            del run, setup  # the sample loads the model anew, from its checkpoint
            sample = None if was_finished else text_sample(config, run_dir)
            reporter.finish(summary, sample)
            summary["sample"] = sample
    except Interrupted as stopped:
        raise KeyboardInterrupt(str(stopped)) from None
    finally:
        reporter.close()
    return summary if first else None


def check_fits(setup: Setup, reporter: Reporters) -> None:
    """Look whether the run fits the machine, before anything is allocated. One that has ended needs nothing.

    Raises:
        UsageError: it cannot, and memory.check is refuse.
    """
    from stackwise_jax.engine.directory import is_finished
    from stackwise_jax.engine.plan_changes import too_large

    if setup.config.memory.check == "off" or is_finished(setup.run_dir):
        return
    sentence = too_large(setup)
    if sentence is None:
        return
    if setup.config.memory.check == "refuse":
        raise UsageError(sentence)
    reporter.note(sentence)


def dry_run(config: StackWiseConfig, run_dir: Path) -> dict[str, Any]:
    """Print what each phase does and needs; nothing is written."""
    from stackwise_jax.engine import prepare
    from stackwise_jax.engine.planner import plan_run
    from stackwise_jax.memory.devices import machine_of
    from stackwise_jax.reporting import make_console
    from stackwise_jax.reporting.plan_text import dry_run_rows
    from stackwise_jax.reporting.tables import print_line

    # What the other processes would do is not waited for: a dry run looks at the devices of this one.
    alone = dataclasses.replace(config.mesh, num_processes=1, process_id=0, coordinator=None)
    setup = prepare(dataclasses.replace(config, mesh=alone), run_dir)
    plan = plan_run(setup, machine_of(None, None, None, run_dir), compiled=True)
    rows, rack, console = dry_run_rows(plan), setup.rack, make_console()
    learns = rack.parameter_count(trainable_only=True)
    print_line(
        console,
        f"{len(rack.stacks)} stacks of {list(setup.plan.stack_sizes)} blocks, {rack.parameter_count():,} parameters "
        f"({learns:,} can learn); vocabulary {rack.vocab_size}; {len(setup.train)} training and {len(setup.valid)} "
        f"held-out sequences of {config.data.seq_len} tokens, an epoch uses all of the former in "
        f"{setup.loader().n_batches} batches; run directory {run_dir}",
    )
    print_plan(rows, console)
    return {"parameters": rack.parameter_count(), "run": str(run_dir), "phases": rows}


def text_sample(config: StackWiseConfig, run_dir: Path) -> str | None:
    """A continuation of run.sample_prompt by the trained model, read back from its checkpoint."""
    import jax

    if config.run.sample_tokens == 0 or jax.process_count() > 1:
        return None
    from stackwise_jax.engine import load_experts
    from stackwise_jax.sampling import model_of, sample_text

    how: dict[str, Any] = {"max_tokens": config.run.sample_tokens, "seed": config.run.seed}
    return sample_text(**model_of(load_experts(run_dir)), prompt=config.run.sample_prompt, **how)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(train, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
