"""What happens between two phases: stacks and adapters come into being, adapters are merged, formats change, and
optimizer state is handed on.

What comes into being or changes here and does not learn is saved at once; it counts with the next record that is
committed. A run that is killed before does it again, to the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from stackwise_jax.adapters import merge_adapters
from stackwise_jax.config.schema import MemoryConfig
from stackwise_jax.curriculum import Phase
from stackwise_jax.engine.carry import Survival, keeps_state
from stackwise_jax.engine.executor import Executor
from stackwise_jax.engine.holdings import homes
from stackwise_jax.engine.recorder import Recorder
from stackwise_jax.engine.source import Source
from stackwise_jax.engine.weights import (
    EMBED,
    HEAD,
    Weights,
    adapter_item,
    item_format,
    learning_items,
    nearest_stack,
    path_items,
    stack_item,
)
from stackwise_jax.memory import Place

Tree = Any
REFERENCE = "reference"

_merge = jax.jit(merge_adapters)


def open_phase(
    weights: Weights,
    recorder: Recorder,
    phase: Phase,
    *,
    begins: bool,
    cached: bool,
    memory: MemoryConfig,
    adapters: Source | None,
    again: int,
) -> None:
    """Bring every item of the path into its format and place for this phase; grow those that do not exist.

    Args:
        begins: the phase is at its first step.
        cached: the output of the prefix is.
        adapters: where adapters that do not exist are taken from, where it has them.
        again: a number of the phase's own, for adapters that are made anew.
    """
    weights.declare(phase)
    existing = [i for i in phase.path if stack_item(i) in weights.versions]
    for index in phase.path:
        if index not in existing:
            _grow_stack(weights, recorder, phase, index, existing)
    missing = [adapter for adapter in phase.adapters if adapter_item(adapter) not in weights.versions]
    for item in map(adapter_item, missing):
        if adapters is not None and item in adapters.versions:
            recorder.keep(item, adapters.load(item, weights.shapes(item, weights.master)), phase.name)
    if begins and phase.merge_adapters:
        for index in phase.path:
            _merge_into_weights(weights, recorder, phase, index, again)
    for item in map(adapter_item, missing):
        if item not in weights.versions:
            _grow(weights, recorder, phase, item)
    for item in weights.trees.keys() - set(path_items(phase)):
        weights.drop(item)
    for item in path_items(phase):
        place = place_of(memory, phase, item, cached=cached, tied=weights.rack.tie_embeddings)
        weights.ensure(item, item_format(phase, item, weights.master), place)


def place_of(cfg: MemoryConfig, phase: Phase, item: str, *, cached: bool, tied: bool) -> Place:
    """Where an item of the path rests during a phase.

    What makes up a cached prefix waits off the device whatever the setting: it is needed to fill the cache and to
    evaluate only. tied: the head's matrix is the embedding.
    """
    if item in learning_items(phase):
        return homes(cfg)[0]
    if item in (EMBED, HEAD):
        return "host" if item == EMBED and cached and not tied else "device"
    if cfg.offload != "none":
        return cfg.offload_to
    return "host" if cached and int(item.split("/")[1]) in phase.prefix else "device"


def _grow_stack(weights: Weights, recorder: Recorder, phase: Phase, index: int, existing: Sequence[int]) -> None:
    """A new stack; a copy is one of the nearest stack that was there before the phase, the earlier of two."""
    nearest = nearest_stack(phase.path, existing, index)
    source = None if nearest is None or phase.init != "copy" else stack_item(nearest)
    _grow(weights, recorder, phase, stack_item(index), init=phase.init, source=source)


def _grow(weights: Weights, recorder: Recorder, phase: Phase, item: str, **how: Any) -> None:
    """A new item; what learns in the phase is saved with the rest of it."""
    if item in learning_items(phase):
        weights.grow(item, **how)
    else:
        recorder.grow(item, phase.name, **how)


def _merge_into_weights(weights: Weights, recorder: Recorder, phase: Phase, index: int, again: int) -> None:
    """Merge the adapters of one stack into its full-precision copy and make them anew.

    Not into the weights of fewer bits that the adapters met: what a later phase quantizes again would lose each merge
    that is finer than its format, and nothing would add up over the phases.
    """
    stack = stack_item(index)
    there = [adapter for adapter in phase.adapters if adapter.stack == index]
    there = [adapter for adapter in there if adapter_item(adapter) in weights.versions]
    if not there:
        return
    for item in (stack, *map(adapter_item, there)):
        weights.ensure(item, weights.master)
    tree = weights.on_device(stack)
    for adapter in there:
        tree = _merge(tree, weights.on_device(adapter_item(adapter)))
    recorder.keep(stack, tree, phase.name)
    for adapter in there:
        recorder.grow(adapter_item(adapter), phase.name, again=again)
    weights.drop(stack)


def reference_embedding(weights: Weights, recorder: Recorder, phase: Phase, *, begins: bool) -> Tree | None:
    """For consistency, the embedding as it was when the phase began: what the suffix was trained on.

    It is saved for the length of the phase, since the embedding itself may learn on.
    """
    if phase.consistency is None:
        return None
    leaves, structure = jax.tree.flatten(weights.on_device(EMBED))
    named = {str(i): jnp.copy(leaf) for i, leaf in enumerate(leaves)}
    if begins:
        recorder.save_moments(REFERENCE, named, {"phase": phase.name})
    else:
        named = recorder.load_moments(REFERENCE, named, {})
    return jax.tree.unflatten(structure, [named[str(i)] for i in range(len(leaves))])


def hand_over(executor: Executor, recorder: Recorder, phase: Phase) -> None:
    """Let what learned in an earlier phase go on with the optimizer state that it had when that phase ended."""
    kept = [item for item in learning_items(phase) if item in recorder.moments and keeps_state(phase, item)]
    about = {"optimizer": phase.optimizer.name}
    if kept:
        executor.carry((item, recorder.load_moments(item, executor.carried(item), about)) for item in kept)


def keep_moments(executor: Executor, recorder: Recorder, phases: Sequence[Phase], index: int, meta: dict) -> None:
    """Save the optimizer state of what a later phase goes on with; forget what no later phase wants."""
    about, survival = meta | {"optimizer": phases[index].optimizer.name}, Survival(phases)
    for item in learning_items(phases[index]):
        if survival.goes_on(index, item):
            recorder.save_moments(item, executor.carried(item), about)
    recorder.moments = {item: v for item, v in recorder.moments.items() if survival.goes_on(index, item)}
