"""Held-out loss of a run: `python -m stackwise_jax.evaluate RUN [--data.path FILE] [--depth K]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, get_args

from stackwise_jax.config import CommandParser, path, whole_number
from stackwise_jax.config.bounds import COUNTER
from stackwise_jax.config.schema import ObjectiveKind
from stackwise_jax.curriculum.phase import AttentionMode
from stackwise_jax.errors import UsageError
from stackwise_jax.reporting import add_common, print_notes, run_command
from stackwise_jax.reporting.terminal import say

DRAWS = 4
MOST_DRAWS = 10_000  # their mean is a hundred times as exact as one of them
_MEASURES = {
    "none": "next token",
    "fixed": "masked tokens",
    "elbo": "bound on the negative log-likelihood (mask diffusion)",
}


def build_parser() -> CommandParser:
    """The arguments of the command."""
    parser = CommandParser(
        prog="python -m stackwise_jax.evaluate",
        description="Loss, perplexity and bits per byte of a run on held-out text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", type=path, help="a run directory")
    parser.add_argument(
        "--data.path", dest="path", metavar="FILE", type=path, help="a text, .jsonl or folder of your own"
    )
    parser.add_argument(
        "--depth", type=whole_number(-COUNTER, COUNTER), help="the first K stacks; not given: all that were trained"
    )
    parser.add_argument(
        "--batches", type=whole_number(0, COUNTER), default=0, help="at most so many batches; 0: the whole text"
    )
    draws = f"mlm, diffusion: corruptions of the text to average over; not given: {DRAWS}"
    parser.add_argument("--draws", type=whole_number(1, MOST_DRAWS), help=draws)
    kinds, modes = get_args(ObjectiveKind), get_args(AttentionMode)
    parser.add_argument("--objective", choices=kinds, help="another one than the last phase was trained on")
    parser.add_argument("--attention_mode", choices=modes, help="another one; not given: what goes with the objective")
    add_common(parser)
    return parser


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Run the command; returns the answer for --json."""
    from stackwise_jax.engine import load_experts, load_rack
    from stackwise_jax.evaluation import evaluate_experts, evaluate_run, held_out_text, task_of

    # Batches pass one stack after the other, and only that one has to be on the device.
    experts = load_experts(args.run, "host") if args.depth is None else [load_rack(args.run, args.depth, "host")]
    loaded, measure = experts[-1], {"limit": args.batches, "draws": args.draws or DRAWS}
    dataset = held_out_text(loaded, args.path)
    if len(experts) == 1:
        task = task_of(loaded, args.objective, args.attention_mode)
        if args.draws is not None and task.objective.kind == "clm":
            print_notes(["--draws has no effect under objective clm, which hides nothing"])
        result = evaluate_run(loaded, dataset, task=task, **measure)
    elif args.objective or args.attention_mode:
        raise UsageError(
            f"{args.run} holds {len(experts)} denoisers, one for each interval of noise; leave --objective and "
            "--attention_mode out"
        )
    else:
        result = evaluate_experts(experts, dataset, **measure)
    depth = sum(len(expert.rack.stacks) for expert in experts)
    error = f" ± {result['standard_error']:.4f}" if result["standard_error"] else ""
    measured = f"{_MEASURES[result['noise']]}, depth {depth}, {result['tokens']:.0f} tokens"
    say(f"{measured} of {args.path or 'the held-out text'}")
    say(
        f"loss {result['loss']:.4f} nats per token · perplexity {result['perplexity']:.2f} · "
        f"{result['bits_per_byte']:.4f}{error} bits per byte · accuracy {result['accuracy']:.3f}"
    )
    return {"run": args.run, "depth": depth} | result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(evaluate, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
