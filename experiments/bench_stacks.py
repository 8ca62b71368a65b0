"""Stack by stack with the activation cache against end to end: time per step, bytes and compilations over depth.

    python experiments/bench_stacks.py [step] [memory] [compile] [--set KEY=VALUE] [--smoke] [--json]

The model is the quick start's, with stacks of two blocks. Without names, all three parts run:

- step: seconds per step of the engine's loop with twelve blocks: end to end, and stack by stack with the cache in host
  memory in its first phase (which trains the embedding too), its second and its last;
- memory: bytes of the compiled step by XLA's memory analysis (arguments, outputs that reuse no argument, temporaries),
  and among them those of the learning state (what learns and its optimizer state), for 12, 24 and 48 blocks;
- compile: how often XLA compiles a training step and in how many seconds, for all phases of 12, 24 and 48 blocks; and
  all compilations of a whole run, from an empty directory to its end, at the smallest sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from common import PhaseLoop, arguments, configure, counting_compilations, finish, in_turns, print_table

from stackwise_jax.config import StackWiseConfig
from stackwise_jax.engine import Run, prepare
from stackwise_jax.engine.dryrun import abstract_step, device_bytes
from stackwise_jax.engine.programs import StepPrograms, compiled_bytes
from stackwise_jax.engine.resident import step_spec
from stackwise_jax.engine.weights import Weights
from stackwise_jax.engine.window import Window

BLOCKS_PER_STACK = 2
DEPTHS = (12, 24, 48)  # blocks
SMOKE_DEPTHS = (4, 8)
PARTS = ("step", "memory", "compile")


def configuration(plan: str, blocks: int, args: argparse.Namespace, **changes: Any) -> StackWiseConfig:
    """The quick start with so many blocks in stacks of two."""
    depth = {"model.architecture.n_stacks": blocks // BLOCKS_PER_STACK, "curriculum.plan": plan, "run.save_every": 0}
    depth["model.architecture.blocks_per_stack"] = BLOCKS_PER_STACK
    return configure("quickstart.yaml", depth | changes, args)


def measure_steps(blocks: int, rounds: int, n: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds per step, in turns: end to end, and the first, second and last phase with the cache."""
    changes = {"curriculum.steps": (rounds + 1) * n + 1, "cache.kind": "host"}
    last = blocks // BLOCKS_PER_STACK - 1
    with contextlib.ExitStack() as stack:
        loops = {"end to end": stack.enter_context(PhaseLoop(configuration("rackwise", blocks, args, **changes)))}
        for index, name in {0: "first stack", 1: "second stack", last: "last stack"}.items():
            loop = PhaseLoop(configuration("stackwise", blocks, args, **changes), index)
            loops[name] = stack.enter_context(loop)
        work = {name: (lambda loop=loop: loop.loop(n)) for name, loop in loops.items()}
        seconds = in_turns(work, rounds)
        rows = []
        for name, loop in loops.items():
            (wall, cpu), first = seconds[name], seconds["first stack"]
            row = {"": name, "ms per step": 1e3 * wall / n, "to first": wall / first.wall}
            row |= {"CPU ms per step": 1e3 * cpu / n, "CPU to first": cpu / first.cpu}
            rows.append(row | {"MiB": loop.executor.step_bytes / 2**20})
    return rows


def compile_phases(config: StackWiseConfig) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Compile the step of every phase from shapes alone: (bytes of each phase, what compiling took)."""
    with tempfile.TemporaryDirectory() as folder:
        setup = prepare(config, Path(folder))
    weights = Weights(setup.rack, setup.placement, None, jax.random.key(0))
    programs, phases = StepPrograms(setup.placement), []
    jax.clear_caches()
    start = time.perf_counter()
    with counting_compilations() as compilations:
        for phase in setup.plan.phases:
            window = Window(setup.rack, phase)
            spec = step_spec(setup.task(phase), phase, window)
            state, *rest = abstract_step(setup, weights, spec, phase, window)
            compiled = compiled_bytes(programs.get(spec, state, *rest))
            phases.append({"phase": phase.name, "learning state": device_bytes((state.learning, state.opt))} | compiled)
    took = {"compiled steps": programs.compilations, "XLA s": sum(compilations)}
    return phases, took | {"all s": time.perf_counter() - start}


def measure_depths(depths: Sequence[int], args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """(rows on memory, rows on compiling) of both plans at each depth."""
    memory, compiling = [], []
    for plan in ("rackwise", "stackwise"):
        for blocks in depths:
            phases, took = compile_phases(configuration(plan, blocks, args))
            compiling.append({"plan": plan, "blocks": blocks, "phases": len(phases)} | took)
            for index in sorted({0, 1, len(phases) - 1} & set(range(len(phases)))):
                memory.append({"plan": plan, "blocks": blocks} | phases[index])
    return memory, compiling


def count_compilations(depths: Sequence[int]) -> list[dict[str, Any]]:
    """All compilations of whole runs, held-out evaluation and checkpoints included."""
    rows, smallest = [], argparse.Namespace(smoke=True, set=[])
    for plan in ("rackwise", "stackwise"):
        for blocks in depths:
            changes = {"curriculum.steps": 1, "run.eval_batches": 1, "cache.kind": "host"}
            jax.clear_caches()
            with tempfile.TemporaryDirectory() as folder, counting_compilations() as seconds:
                start = time.perf_counter()
                Run(prepare(configuration(plan, blocks, smallest, **changes), Path(folder) / "run")).train()
                total = time.perf_counter() - start
            row = {"plan": plan, "blocks": blocks, "compilations": len(seconds), "XLA s": sum(seconds), "run s": total}
            rows.append(row)
    return rows


def in_mib(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows with bytes in MiB."""
    texts = ("plan", "blocks", "phase")
    return [{name: v if name in texts else v / 2**20 for name, v in row.items()} for row in rows]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none: all")
    parser.add_argument("--rounds", type=int, default=11, help="how often each step is timed")
    parser.add_argument("--steps", type=int, default=4, help="steps each time")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {unknown.pop()}; write some of {', '.join(PARTS)}")
    parts, depths = args.parts or PARTS, SMOKE_DEPTHS if args.smoke else DEPTHS
    result: dict[str, Any] = {}
    if "step" in parts:
        rounds, n = (2, 2) if args.smoke else (args.rounds, args.steps)
        result["step"] = measure_steps(depths[0], rounds, n, args)
        print_table(
            f"{depths[0]} blocks, the engine's loop (target: last stack at most 1.1 of the first)", result["step"]
        )
    if "memory" in parts or "compile" in parts:
        memory, compiling = measure_depths(depths, args)
        if "memory" in parts:
            result["memory"] = memory
            print_table("Device bytes of the compiled step, in MiB", in_mib(memory))
        if "compile" in parts:
            result["compile"] = compiling
            print_table("Compiling the steps of all phases", compiling)
            # The second phase fills the cache and the third pushes it on: from three stacks on nothing new is met.
            result["runs"] = count_compilations((8, 16) if args.smoke else depths)
            print_table("Compilations of a whole run, smallest sizes", result["runs"])
    return finish(args, result)


if __name__ == "__main__":
    main(sys.argv[1:])
