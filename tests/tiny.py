"""Runs small enough for tests, and the parts of a training step.

Legend: B batch, T sequence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stackwise_jax.checkpoint import Store
from stackwise_jax.config import StackWiseConfig, load_config
from stackwise_jax.engine import Run, prepare
from stackwise_jax.engine.prefix import put_examples
from stackwise_jax.engine.programs import StepPrograms
from stackwise_jax.engine.resident import constants_of, initial_state, split_phase, step_spec
from stackwise_jax.engine.step import StepData
from stackwise_jax.engine.weights import EMBED, HEAD, Weights, path_items
from stackwise_jax.engine.window import Window

TINY = [
    "run.log_every=1",
    "run.eval_batches=2",
    "run.keep=100",
    "run.tensorboard=false",
    "data.source=synthetic",
    "data.synthetic_tokens=20000",
    "data.seq_len=16",
    "data.batch_size=4",
    "model.d_model=32",
    "model.n_heads=2",
    "model.d_ff=48",
    "model.architecture.n_stacks=2",
    "model.architecture.blocks_per_stack=1",
    "curriculum.steps=3",
    "optimizer.lr=5e-3",
]


def tiny(*changes: str) -> StackWiseConfig:
    """The tiny configuration with changes such as "model.dropout=0.5"."""
    return load_config(None, [f"--{change}" for change in (*TINY, *changes)])


def train(config: StackWiseConfig, run_dir: Path, *, rack=None, reporter=None, stop=None) -> Run:
    """A run trained to its end."""
    run = Run(prepare(config, run_dir, rack), reporter, stop)
    run.train()
    return run


def stop_inside(config: StackWiseConfig, run_dir: Path) -> None:
    """A run that is broken off in its second phase."""

    class Stops(Run):
        def _on_metrics(self, work, step, metrics, seconds):
            super()._on_metrics(work, step, metrics, seconds)
            if work.index == 1 and step == 1:
                raise InterruptedError

    run = Stops(prepare(config, run_dir))
    with contextlib.suppress(InterruptedError):
        run.train()
    run.recorder.close()


def metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    """The training loss of each step."""
    return [row["loss"] for row in metrics(run_dir) if "loss" in row]


def summary(run_dir: Path) -> dict:
    """summary.json."""
    return json.loads((run_dir / "summary.json").read_text())


def saved(run_dir: Path, versions: dict[str, int] | None = None) -> dict[str, Any]:
    """The trees of the items as numpy arrays: those of the newest progress record, or of the given versions."""
    store = Store(run_dir / "checkpoints", keep=100)
    try:
        return {item: store.load_item(item, v) for item, v in (versions or store.latest().versions).items()}
    finally:
        store.close()


def leaves(tree: Any) -> dict[str, np.ndarray]:
    """Path of each leaf -> its value on the host."""
    flat = jax.tree_util.tree_flatten_with_path(jax.device_get(tree))[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees hold the same leaves, bit by bit."""
    a, b = leaves(a), leaves(b)
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a
    )


def step_parts(config: StackWiseConfig, index: int = 0, examples=None, *, rack=None) -> SimpleNamespace:
    """What the training step of a phase takes, from fresh weights; corruption is fixed.

    Attributes: setup, phase, window, spec, placement, weights, learning, frozen, data, constants; state() makes a new
    state and compiled() the step.
    """
    setup = prepare(config, Path("no run"), rack)
    phase = dataclasses.replace(setup.plan.phases[index], corruption="fixed")
    placement, rack = setup.placement, setup.rack
    put = lambda x: placement.put(x, placement.replicated)
    weights = Weights(rack, placement, None, put(jax.random.key(config.run.seed)))
    weights.declare(phase)
    window = Window(rack, phase)
    spec = step_spec(setup.task(phase), phase, window)
    for item in path_items(phase):
        weights.ensure(item, weights.master)
    stacks = {i: weights.full(i) for i in phase.window}
    embed = weights.trees[EMBED]
    learning, frozen = split_phase(spec, window, embed, weights.trees[HEAD], stacks, jax.tree.map(jnp.copy, embed))
    examples = put_examples(placement, setup.loader(fixed=True).examples(0) if examples is None else examples)
    lr, visit = put((np.float32(config.optimizer.lr), np.int32(0)))
    data = StepData(examples, None, lr, visit)
    constants = constants_of(placement, phase.seed, index, setup.tokenizer.token_bytes)
    parts = SimpleNamespace(
        setup=setup, phase=phase, window=window, spec=spec, placement=placement, weights=weights,
        learning=learning, frozen=frozen, data=data, constants=constants,
    )  # fmt: skip
    parts.state = lambda: initial_state(spec, placement, jax.tree.map(lambda x: x.copy(), learning))
    parts.compiled = lambda: StepPrograms(placement).get(spec, parts.state(), frozen, data, constants)
    parts.batch = lambda: spec.task.batch(examples, constants["corruption_key"], data.visit)
    return parts
