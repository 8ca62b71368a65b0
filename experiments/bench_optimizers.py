"""Optimizers by the memory of what they keep, by what they reach in a tiny run, and by their time.

    python experiments/bench_optimizers.py [--steps N] [--rounds N] [--only WAY ...] [--set KEY=VALUE]

- bytes: per parameter of one block of LLaMA-7B's shape, from shapes alone: weights, gradient, and optimizer
  state. There is no other copy: float32 weights are their own master, bf16 weights have none.
- loss: one stack of two blocks (d_model 128) learns the next byte of the Python documentation, on fresh text at every
  step, with the default schedule. Each way is run with three learning rates at seed 0 and with the best of them at
  seeds 1 and 2; the loss is the mean over the last fifth of the steps, in nats per byte.
- time: of one step, as a ratio to adamw's, measured in turns. At this size most of a step is forward and backward pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from common import arguments, configure, finish, in_turns, print_table

from stackwise_jax.config.schema import OptimizerConfig
from stackwise_jax.engine import prepare
from stackwise_jax.engine.optimizer import learning_rate, make_optimizer
from stackwise_jax.engine.prefix import put_examples
from stackwise_jax.engine.programs import StepPrograms
from stackwise_jax.engine.resident import Resident, constants_of
from stackwise_jax.engine.setup import Setup
from stackwise_jax.engine.step import StepData
from stackwise_jax.engine.weights import Weights, path_items
from stackwise_jax.model import create_simple_rack, split_fixed

SEEDS = (0, 1, 2)
ADAM_RATES = (1e-3, 3e-3, 1e-2)


class Way(NamedTuple):
    """One way to update weights."""

    optimizer: dict[str, Any]
    weights: str  # model.param_dtype
    rates: tuple[float, float, float]


STOCHASTIC = {"rounding": "stochastic"}
BF16_MOMENTUM = {"state_dtype": "bf16"}
WAYS = {
    "adamw": Way({"name": "adamw"}, "fp32", ADAM_RATES),
    "adamw, bf16 momentum": Way({"name": "adamw"} | BF16_MOMENTUM, "fp32", ADAM_RATES),
    "adamw, bf16 weights, nearest": Way({"name": "adamw"}, "bf16", ADAM_RATES),
    "adamw, bf16 weights, stochastic": Way({"name": "adamw"} | STOCHASTIC, "bf16", ADAM_RATES),
    "adamw8bit": Way({"name": "adamw8bit"}, "fp32", ADAM_RATES),
    "adamw8bit, bf16 weights, stochastic": Way({"name": "adamw8bit"} | STOCHASTIC, "bf16", ADAM_RATES),
    "lion": Way({"name": "lion"}, "fp32", (3e-4, 1e-3, 3e-3)),
    "lion, bf16 momentum": Way({"name": "lion"} | BF16_MOMENTUM, "fp32", (3e-4, 1e-3, 3e-3)),
    "muon": Way({"name": "muon"}, "fp32", (3e-3, 1e-2, 3e-2)),
    "muon, bf16 momentum": Way({"name": "muon"} | BF16_MOMENTUM, "fp32", (3e-3, 1e-2, 3e-2)),
    "adafactor": Way({"name": "adafactor"}, "fp32", (1e-2, 3e-2, 1e-1)),
    "sgd": Way({"name": "sgd"}, "fp32", (0.03, 0.1, 0.3)),
}
SMOKE_WAYS = ("adamw", "adamw8bit, bf16 weights, stochastic")


def bytes_per_parameter(way: Way) -> dict[str, float]:
    """Weights, gradient and optimizer state of one block of LLaMA-7B's shape that learns whole, nothing allocated."""
    rack = create_simple_rack(
        n_stacks=1, blocks_per_stack=1, d_model=4096, n_heads=32, d_ff=11008, vocab_size=256,
        freeze_up_proj=False, param_dtype=way.weights,
    )  # fmt: skip
    stack = rack.stacks[0]
    tree = jax.eval_shape(lambda: split_fixed(stack, stack.init_params(jax.random.key(0)))[0])
    learning = {"stacks": (tree,)}
    opt = jax.eval_shape(make_optimizer(OptimizerConfig(**way.optimizer)).init, learning)
    n = sum(leaf.size for leaf in jax.tree.leaves(learning))
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / n
    parts = {"weights": size(learning), "gradient": size(learning), "state": size(opt)}
    return parts | {"bytes": sum(parts.values())}


class Trainer:
    """The step of one way, compiled once, and runs of it from fresh weights."""

    def __init__(self, setup: Setup, way: Way, n_steps: int):
        self.setup, self.n_steps, self._loader = setup, n_steps, setup.loader()
        phase = setup.plan.phases[0]
        optimizer = dataclasses.replace(phase.optimizer, **way.optimizer)
        self.phase = dataclasses.replace(phase, optimizer=optimizer, corruption="fresh", steps=n_steps)
        self._programs = StepPrograms(setup.placement)
        self.executor, self.data = self._fresh(0), self._data(0, 1e-4)

    def run(self, rate: float, seed: int) -> float:
        """The mean loss over the last fifth of the steps."""
        executor, losses = self._fresh(seed), []
        cfg = dataclasses.replace(self.phase.optimizer, lr=rate)
        for step in range(self.n_steps):
            now = float(learning_rate(cfg, self.n_steps, step))
            losses.append(executor.step(self._data(seed * self.n_steps + step, now))["loss"])
        return float(np.mean(jax.device_get(losses[-max(self.n_steps // 5, 1) :])))

    def steps(self, n: int) -> None:
        """The compiled step alone, n times on the same data."""
        for _ in range(n):
            self.executor.step(self.data)
        jax.block_until_ready(self.executor.opt)

    def _fresh(self, seed: int) -> Resident:
        setup, placement = self.setup, self.setup.placement
        weights = Weights(setup.rack, placement, None, placement.put(jax.random.key(seed), placement.replicated))
        weights.declare(self.phase)
        for item in path_items(self.phase):
            weights.ensure(item, weights.master)
        constants = constants_of(placement, seed, 0, setup.tokenizer.token_bytes)
        task = setup.task(self.phase)
        executor = Resident(setup.rack, self.phase, task, weights, self._programs, constants)
        executor.compile(self._data(0, 1e-4))
        return executor

    def _data(self, batch: int, rate: float) -> StepData:
        placement = self.setup.placement
        lr, visit = placement.put((np.float32(rate), np.int32(0)), placement.replicated)
        return StepData(put_examples(placement, self._loader.batch(batch)), None, lr, visit)


def losses_of(trainer: Trainer, way: Way) -> dict[str, Any]:
    """The best of three learning rates, and the loss with it over the seeds."""
    tuned = {rate: trainer.run(rate, SEEDS[0]) for rate in way.rates}
    best = min(tuned, key=lambda rate: (np.isnan(tuned[rate]), tuned[rate]))
    seeds = [tuned[best], *(trainer.run(best, seed) for seed in SEEDS[1:])]
    edge = " (edge)" if best != way.rates[1] else ""
    return {"lr": f"{best:g}{edge}", "loss": statistics.mean(seeds), "spread": max(seeds) - min(seeds)}


def configuration(dtype: str, args: argparse.Namespace) -> Any:
    """Two blocks of the quick start in one stack, end to end."""
    sizes = {"model.architecture.n_stacks": 1, "model.architecture.blocks_per_stack": 2, "model.d_model": 128}
    sizes |= {"model.d_ff": 256, "model.n_heads": 4, "model.param_dtype": dtype, "model.freeze_up_proj": False}
    sizes |= {"data.seq_len": 64, "data.batch_size": 4, "curriculum.plan": "rackwise", "run.save_every": 0}
    return configure("quickstart.yaml", sizes, args)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments((__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="of each run")
    parser.add_argument("--rounds", type=int, default=5, help="how often each step is timed")
    parser.add_argument("--only", nargs="+", choices=WAYS, metavar="WAY", help="of the table; times are to the first")
    args = parser.parse_args(argv)
    n_steps, rounds, n_timed = (3, 1, 1) if args.smoke else (args.steps, args.rounds, 10)
    ways = {name: WAYS[name] for name in args.only or (SMOKE_WAYS if args.smoke else WAYS)}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        setups = {dtype: prepare(configuration(dtype, args), Path(folder)) for dtype in ("fp32", "bf16")}
        trainers = {name: Trainer(setups[way.weights], way, n_steps) for name, way in ways.items()}
        for name, way in ways.items():
            rows.append({"": name} | bytes_per_parameter(way) | losses_of(trainers[name], way))
            print(f"{name}: {rows[-1]['loss']:.3f} at {rows[-1]['lr']}", flush=True, file=sys.stderr)
        seconds = in_turns({name: lambda t=trainer: t.steps(n_timed) for name, trainer in trainers.items()}, rounds)
    for row in rows:
        row["time"] = seconds[row[""]].wall / seconds[rows[0][""]].wall
        row["CPU time"] = seconds[row[""]].cpu / seconds[rows[0][""]].cpu
    print_table(f"Bytes per parameter; loss after {n_steps} steps; time of a step to the first's", rows)
    tuned = {name: way.rates for name, way in ways.items()}
    return finish(args, {"steps": n_steps, "seeds": SEEDS, "rates": tuned, "rows": rows})


if __name__ == "__main__":
    main()
