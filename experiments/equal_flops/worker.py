"""One run of one recipe: trains it, or continues it, measures it and writes what was found as JSON.

    python worker.py --result FILE [--eval_batches N] [--draws N] [--cores 0,1] -- --run.dir DIR --section.key=value ..

An interrupted run saves its state and exits with code 130; the same command continues it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import stackwise_jax
from stackwise_jax.config import load_config, validate
from stackwise_jax.reporting import ConsoleReporter, Reporters, add_common, run_command
from stackwise_jax.train import stop_on_signal


def peak_bytes(setup) -> dict[str, int]:
    """The largest over the phases, in bytes.

    learning_state: weights that learn, their gradients, and optimizer state. resident: that, and all weights that the
    step passes, frozen ones and those of a recomputed prefix included; no activations.
    """
    import jax

    from stackwise_jax.engine.dryrun import abstract_step, device_bytes
    from stackwise_jax.engine.resident import step_spec
    from stackwise_jax.engine.weights import EMBED, Weights
    from stackwise_jax.engine.window import Window

    key = setup.placement.put(jax.random.key(setup.config.run.seed), setup.placement.replicated)
    weights, peak = Weights(setup.rack, setup.placement, None, key), {"learning_state": 0, "resident": 0}
    for phase in setup.plan.phases:
        weights.declare(phase)
        window = Window(setup.rack, phase)
        state, frozen, _, _ = abstract_step(setup, weights, step_spec(setup.task(phase), phase, window), phase, window)
        learning = 2 * device_bytes(state.learning) + device_bytes(state.opt)
        prefix = [weights.full_shapes(i, phase.format_of(i)) for i in phase.prefix]
        passed = [frozen, *prefix, *([weights.shapes(EMBED, phase.frozen)] if prefix else [])]
        found = {"learning_state": learning, "resident": learning + sum(map(device_bytes, passed))}
        peak = {name: max(peak[name], found[name]) for name in peak}
    return peak


def train_and_measure(overrides: list[str], eval_batches: int, draws: int) -> dict[str, Any]:
    """Train to the end and measure on the held-out text.

    Raises:
        KeyboardInterrupt: a signal came; the state is saved.
    """
    from stackwise_jax.engine import Interrupted, Run, load_experts, prepare
    from stackwise_jax.evaluation import evaluate_experts, evaluate_run, held_out_text

    config = load_config(None, overrides)
    validate(config)
    run_dir = Path(config.run.dir or "")
    setup = prepare(config, run_dir)
    reporter = Reporters([ConsoleReporter()])
    try:
        with stop_on_signal() as stop:
            summary = Run(setup, reporter, stop).train()
    except Interrupted as stopped:
        raise KeyboardInterrupt(str(stopped)) from None
    finally:
        reporter.close()
    experts = load_experts(run_dir)
    dataset = held_out_text(experts[-1])
    if len(experts) > 1:
        quality = evaluate_experts(experts, dataset, limit=eval_batches, draws=draws)
    else:
        quality = evaluate_run(experts[0], dataset, limit=eval_batches, draws=draws)
    return {
        "bits_per_byte": quality["bits_per_byte"],
        "standard_error": quality["standard_error"],
        "held_out_tokens": quality["tokens"],
        "flops": summary["flops"],
        "steps": sum(phase.steps for phase in setup.plan.phases),
        "tokens": summary["tokens"],
        "phases": len(setup.plan.phases),
        "seconds": summary["seconds"],
        "params": setup.rack.parameter_count(),
        **peak_bytes(setup),
    }


def build_parser() -> argparse.ArgumentParser:
    """The arguments of the worker."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--result", type=Path, required=True, metavar="FILE")
    parser.add_argument("--eval_batches", type=int, default=0, help="held-out batches; 0: all")
    parser.add_argument("--draws", type=int, default=1, help="mask diffusion: corruptions to average over")
    parser.add_argument("--cores", help="the CPU cores to use, such as 0,1")
    parser.add_argument("overrides", nargs="*", help="--section.key=value, after --")
    add_common(parser)
    return parser


def work(args: argparse.Namespace) -> dict[str, Any]:
    """Train, measure and write the result, which is there whole or not at all."""
    if args.cores and hasattr(os, "sched_setaffinity"):  # before JAX counts them
        os.sched_setaffinity(0, {int(core) for core in args.cores.split(",")})
    found = train_and_measure(args.overrides, args.eval_batches, args.draws)
    found |= {"overrides": args.overrides, "eval_batches": args.eval_batches, "draws": args.draws}
    found |= {"date": time.strftime("%Y-%m-%d"), "version": stackwise_jax.__version__}
    part = args.result.with_suffix(".part")
    part.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    os.replace(part, args.result)
    return found


if __name__ == "__main__":
    sys.exit(run_command(work, build_parser(), sys.argv[1:]))
