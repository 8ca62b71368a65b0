"""The resident executor: the window of a phase lives on the device and is trained by one compiled step.

The order of operations in `run_phase` is a contract:
  1. the old state is evaluated and saved where that is due,
  2. step k is dispatched,
  3. the metrics of step k-1 are read (the only wait in the loop, for something that is already done),
  4. only then the data iterator advances.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stackwise_jax.config.schema import OptimizerConfig
from stackwise_jax.curriculum.phase import Phase
from stackwise_jax.data import Loader
from stackwise_jax.engine.optimizer import learning_rates, make_optimizer
from stackwise_jax.engine.prefix import FIXED_VISIT, Prefix, PrefixCache, put_examples
from stackwise_jax.engine.step import StepData, StepSpec, TaskSpec, TrainState
from stackwise_jax.engine.weights import EMBED, HEAD, Window, stack_item
from stackwise_jax.memory import Placement
from stackwise_jax.objectives import Examples

Tree = Any


def step_spec(task: TaskSpec, phase: Phase, window: Window) -> StepSpec:
    """What the step of a phase compiles to. Learning rate and length are arguments of the step, not part of it."""
    optimizer = dataclasses.replace(
        phase.optimizer, lr=1.0, schedule="constant", warmup=0.0, decay=0.0, final_lr=0.0, microbatches=1
    )
    return StepSpec(
        task=task,
        groups=tuple(window.groups),
        learns=tuple(window.learns),
        from_tokens=not phase.prefix,
        train_embed=phase.train_embed,
        train_head=phase.train_head,
        dropout=any(block.dropout > 0 for group in window.groups for block in group.blocks),
        microbatches=phase.optimizer.microbatches,
        optimizer=optimizer,
    )


def split_phase(spec: StepSpec, window: Window, embed: Tree, head: Tree, stacks: dict[int, Tree]) -> tuple[Tree, Tree]:
    """(learning, frozen): the trees that the step takes, from the full trees of the window."""
    free, fixed = window.split(window.merge(stacks))
    learning: dict[str, Any] = {"stacks": free}
    frozen: dict[str, Any] = {"stacks": fixed}
    (learning if spec.train_head else frozen)["head"] = head
    if spec.train_embed:
        learning["embed"] = embed
    elif spec.from_tokens or spec.task.rack.tie_embeddings:
        frozen["embed"] = embed
    return learning, frozen


def initial_state(spec: StepSpec, placement: Placement, learning: Tree) -> TrainState:
    """A fresh state: step 0, optimizer state for what learns."""
    opt = _initial_optimizer(spec.optimizer, placement, learning)
    opt = placement.put(opt, placement.params(opt))
    zero, bad = placement.put((np.int32(0), np.int32(0)), placement.replicated)
    return TrainState(zero, bad, learning, opt)


@functools.partial(jax.jit, static_argnames=("cfg", "placement"))
def _initial_optimizer(cfg: OptimizerConfig, placement: Placement, learning: Tree) -> Tree:
    """One compilation for all phases that learn trees of equal shape."""
    opt = make_optimizer(cfg).init(learning)
    return jax.lax.with_sharding_constraint(opt, placement.params(opt))


class Feed:
    """The data of a phase, step by step, on the device."""

    def __init__(
        self,
        phase: Phase,
        loader: Loader,
        prefix: Prefix,
        cache: PrefixCache | None,
        placement: Placement,
        offset: int,
        start: int,
    ):
        """cache None: the prefix (if any) is recomputed. offset: where in the stream the phase's step 0 stands."""
        self._phase, self._prefix, self._placement = phase, prefix, placement
        self.rates = learning_rates(phase.optimizer, phase.steps)
        self._start, self._offset = start, offset
        self._stream = loader.iterate(offset + start)
        self._hidden: Iterator[jax.Array] | None = None
        if cache is not None:
            self._hidden = cache.read([loader.batch_id(offset + i) for i in range(start, phase.steps)])
        self._fixed = phase.corruption == "fixed"

    def __iter__(self) -> Iterator[StepData]:
        put, whole = self._placement.put, self._placement.replicated
        for step in range(self._start, self._phase.steps):
            _, host_examples = next(self._stream)
            examples: Examples = put_examples(self._placement, host_examples)
            # Fresh corruption differs each time an example is met: the stream position is its number.
            visit = FIXED_VISIT if self._fixed else 1 + self._offset + step
            lr, visit = put((self.rates[step], np.int32(visit)), whole)
            hidden_BTD = None
            if self._hidden is not None:
                hidden_BTD = next(self._hidden)
            elif self._phase.prefix:
                hidden_BTD = self._prefix(examples, visit)
            yield StepData(examples, hidden_BTD, lr, visit)

    def close(self) -> None:
        """End the threads that read ahead."""
        self._stream.close()


def run_phase(
    compiled: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    frozen: Tree,
    constants: Tree,
    feed: Iterator[StepData],
    steps: range,
    *,
    before_step: Callable[[int, TrainState, Callable[[], None]], None],
    on_metrics: Callable[[int, dict[str, float], float], None],
) -> TrainState:
    """The loop of a phase; see the contract at the top of this file.

    Args:
        before_step: called with (step, the state before it, flush) to evaluate, save or stop; flush() delivers the
            metrics of all steps done so far.
        on_metrics: called once a step, in order, with (step, metrics as floats, seconds since those of the step before).
    """
    pending: list[tuple[int, dict[str, jax.Array]]] = []
    clock = time.perf_counter()

    def flush() -> None:
        nonlocal clock
        while pending:
            step, metrics = pending.pop(0)
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            now = time.perf_counter()
            seconds, clock = now - clock, now
            on_metrics(step, values, seconds)

    data = next(feed, None)
    for step in steps:
        before_step(step, state, flush)
        assert data is not None
        # Whatever crosses between host and device in here is written down as a transfer, or it is an error.
        with jax.transfer_guard("disallow"):
            state, metrics = compiled(state, frozen, data, constants)
            flush()
            pending.append((step, metrics))
            data = next(feed, None)
    flush()
    return state


def learned_trees(rack, spec: StepSpec, window: Window, state: TrainState, frozen: Tree) -> dict[str, Tree]:
    """The full trees of the items that learn, by item name."""
    stacks = window.unmerge(rack, state.learning["stacks"], frozen["stacks"])
    trees = {stack_item(i): tree for i, tree in stacks.items()}
    if spec.train_embed:
        trees[EMBED] = state.learning["embed"]
    if spec.train_head:
        trees[HEAD] = state.learning["head"]
    return trees


def constants_of(placement: Placement, seed: int, phase_index: int, token_bytes_V: np.ndarray) -> dict[str, jax.Array]:
    """The keys and tables that the step takes beside its state, replicated."""
    root = jax.random.key(seed)
    return placement.put(
        {
            "corruption_key": jax.random.fold_in(root, 1),
            "dropout_key": jax.random.fold_in(jax.random.fold_in(root, 2), phase_index),
            "token_bytes_V": jnp.asarray(token_bytes_V, jnp.float32),
        },
        placement.replicated,
    )


def resume_state(placement: Placement, state: TrainState, opt: Tree, step: int, bad_steps: int) -> TrainState:
    """A state as it was saved: fresh but for its optimizer state, step and count of bad steps."""
    step_array, bad = placement.put((np.int32(step), np.int32(bad_steps)), placement.replicated)
    return TrainState(step_array, bad, state.learning, opt)
