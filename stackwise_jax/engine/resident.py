"""The resident executor: the window of a phase lives on the device and is trained by one compiled step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stackwise_jax.adapters import detach_adapters, one_adapter
from stackwise_jax.config.schema import OptimizerConfig
from stackwise_jax.curriculum.phase import Phase
from stackwise_jax.engine.carry import State, item_state, join_state
from stackwise_jax.engine.optimizer import make_optimizer
from stackwise_jax.engine.programs import StepPrograms, compiled_bytes
from stackwise_jax.engine.step import StepData, StepSpec, TaskSpec, TrainState
from stackwise_jax.engine.weights import EMBED, HEAD, Weights, adapter_item, learning_items, stack_item
from stackwise_jax.engine.window import Window
from stackwise_jax.memory import Placement
from stackwise_jax.model import Rack, Stack, combine
from stackwise_jax.random_streams import Stream, root_key, stream_key

Tree = Any


def step_spec(task: TaskSpec, phase: Phase, window: Window) -> StepSpec:
    """What the step of a phase compiles to. Learning rate and length are arguments of the step, not part of it; how
    much faster adapters learn is."""
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
        dropout=any(block.dropout > 0 for group in window.groups for block in group.blocks)
        or any(adapter.spec.dropout > 0 for adapter in phase.adapters),
        microbatches=phase.optimizer.microbatches,
        optimizer=optimizer,
        stack_sizes=tuple(sizes for _, sizes in window.layout) if optimizer.clip == "stack" else None,
        adapter_rate=1.0 if phase.adapter_lr is None else phase.adapter_lr / phase.optimizer.lr,
        consistency=phase.consistency,
    )


def split_phase(
    spec: StepSpec, window: Window, embed: Tree, head: Tree, stacks: dict[int, Tree], reference: Tree | None = None
) -> tuple[Tree, Tree]:
    """(learning, frozen): the trees that the step takes, from the full trees of the window's stacks.

    reference: the embedding that the suffix was trained on, where consistency with it is asked for.
    """
    free, fixed = window.split(stacks)
    learning: dict[str, Any] = {"stacks": free}
    frozen: dict[str, Any] = {"stacks": fixed}
    (learning if spec.train_head else frozen)["head"] = head
    if spec.consistency is not None:
        frozen["reference"] = reference
    if spec.train_embed:
        learning["embed"] = embed
    elif spec.from_tokens or spec.task.rack.tie_embeddings:
        frozen["embed"] = embed
    return learning, frozen


def initial_state(spec: StepSpec, placement: Placement, learning: Tree) -> TrainState:
    """A fresh state: step 0, optimizer state for what learns."""
    opt = initial_optimizer(spec.optimizer, placement, learning)
    zero, bad = placement.put((np.int32(0), np.int32(0)), placement.replicated)
    return TrainState(zero, bad, learning, opt)


def initial_optimizer(cfg: OptimizerConfig, placement: Placement, learning: Tree) -> Tree:
    """A fresh optimizer state; one compilation for all phases that learn trees of equal shape."""
    opt = _initial_optimizer(cfg, placement, learning)
    return placement.put(opt, placement.params(opt))


@functools.partial(jax.jit, static_argnames=("cfg", "placement"))
def _initial_optimizer(cfg: OptimizerConfig, placement: Placement, learning: Tree) -> Tree:
    opt = make_optimizer(cfg).init(learning)
    return jax.lax.with_sharding_constraint(opt, placement.params(opt))


join_states = jax.jit(join_state, static_argnames="layout", donate_argnames="opt")


def learned_items(window: Window, phase: Phase, learning: Tree, frozen: tuple[Tree, ...]) -> dict[str, Tree]:
    """The full trees of the items that learn, by item name; frozen: per group what does not learn in it."""
    trees: dict[str, Tree] = {}
    for i, tree in window.unsplit(learning["stacks"], frozen).items():
        base, adapters = detach_adapters(tree)
        if i in phase.train:
            trees[stack_item(i)] = base
        else:
            on_stack = [adapter for adapter in phase.adapters if adapter.stack == i]
            trees |= {adapter_item(adapter): one_adapter(adapters, adapter.name) for adapter in on_stack}
    return trees | {item: learning[item] for item in (EMBED, HEAD) if item in learning}


class Resident:
    """Trains the window of a phase on the device.

    What a run asks of an executor is here and nowhere else: `compile`, `step`, what learned, what is saved beside it,
    and the path as it is evaluated. An executor that keeps its weights elsewhere has the same methods.
    """

    def __init__(
        self,
        rack: Rack,
        phase: Phase,
        task: TaskSpec,
        weights: Weights,
        programs: StepPrograms,
        constants: Tree,
        reference: Tree | None = None,
    ):
        """Takes what it trains out of `weights`; a fresh optimizer state. reference: see `split_phase`."""
        self._rack, self._phase, self._weights, self._programs = rack, phase, weights, programs
        self._constants = constants
        self.window = Window(rack, phase)
        self.spec = step_spec(task, phase, self.window)
        stacks = {i: weights.full_on_device(i) for i in phase.window}
        ends = weights.trees[EMBED], weights.on_device(HEAD)
        learning, self.frozen = split_phase(self.spec, self.window, *ends, stacks, reference)
        if EMBED in self.frozen:
            self.frozen[EMBED] = weights.on_device(EMBED)
        self.state = initial_state(self.spec, weights.placement, learning)
        merged = [item for ids in self.window.ids if len(ids) > 1 for i in ids for item in weights.stack_items(i)]
        for item in {*learning_items(phase), *merged}:
            weights.drop(item)  # it lives in the trees of the step now; what learns is donated
        self.step_bytes = 0

    def resume(self, load: Callable[[str, Tree], Tree], step: int, bad_steps: int) -> None:
        """Go on in the middle of the phase, at a step. load: an entry of `opt` as it was saved, by its name and like
        what there is now."""
        opt = load("", self.state.opt)
        placement = self._weights.placement
        at, bad = placement.put((np.int32(step), np.int32(bad_steps)), placement.replicated)
        self.state = TrainState(at, bad, self.state.learning, opt)

    def compile(self, data: StepData) -> None:
        """Compile the step for data of these shapes, unless an equal one was compiled before."""
        self._compiled = self._programs.get(self.spec, self.state, self.frozen, data, self._constants)
        self.step_bytes = compiled_bytes(self._compiled)["total"]

    def step(self, data: StepData) -> dict[str, jax.Array]:
        """Dispatch one update; see step.train_step for the scalars."""
        self.state, metrics = self._compiled(self.state, self.frozen, data, self._constants)
        return metrics

    def carried(self, item: str) -> State:
        """The optimizer state of an item that learns."""
        return item_state(self.state.opt, self.window.layout, item)

    def carry(self, items: Iterable[tuple[str, State]]) -> None:
        """Begin with the optimizer state that these items have from an earlier phase."""
        opt = join_states(self.state.opt, self.window.layout, dict(items))
        placement = self._weights.placement
        self.state = self.state._replace(opt=placement.put(opt, placement.params(opt)))

    @property
    def opt(self) -> dict[str, Tree]:
        """The optimizer state, which is saved in the middle of a phase."""
        return {"": self.state.opt}

    @property
    def bad_steps(self) -> int:
        """Steps in a row that were not finite."""
        return int(jax.device_get(self.state.bad_steps))

    def learned(self) -> dict[str, Tree]:
        """The full trees of the items that learn, by item name."""
        return learned_items(self.window, self._phase, self.state.learning, self.frozen["stacks"])

    def evaluated(self) -> tuple[list[tuple[Stack, Tree]], Tree, Tree]:
        """(stacks with their trees from input to head, embed, head) as they are now, without copies."""
        weights, learning = self._weights, self.state.learning
        stacks = [(self._rack.stacks[i], weights.full(i)) for i in self._phase.prefix]
        trees = zip(learning["stacks"], self.frozen["stacks"], strict=True)
        # The window's groups as they stand in the step: nothing is copied.
        stacks += [(g, combine(a, b)) for g, (a, b) in zip(self.window.groups, trees, strict=True)]
        embed = learning["embed"] if self.spec.train_embed else weights.on_device(EMBED)
        head = learning["head"] if self.spec.train_head else weights.on_device(HEAD)
        return stacks, embed, head


def constants_of(placement: Placement, seed: int, phase_index: int, token_bytes_V: np.ndarray) -> dict[str, jax.Array]:
    """The keys and tables that the step takes beside its state, replicated."""
    root = root_key(seed)
    return placement.put(
        {
            "corruption_key": stream_key(root, Stream.CORRUPTION),
            "dropout_key": jax.random.fold_in(stream_key(root, Stream.DROPOUT), phase_index),
            "rounding_key": jax.random.fold_in(stream_key(root, Stream.ROUNDING), phase_index),
            "token_bytes_V": jnp.asarray(token_bytes_V, jnp.float32),
        },
        placement.replicated,
    )
