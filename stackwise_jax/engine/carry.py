"""Optimizer state, item by item: what lets it outlive its phase when the next one learns other items beside.

The state of a phase mirrors the trees that learn, whatever the optimizer. Each leaf is found by its path: the part
before the learning tree says which quantity it is (a moment, say), the part behind says whose. What mirrors nothing
(a count of steps) is shared: every item takes a copy, and where items meet again the largest counts.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from stackwise_jax.curriculum import Phase
from stackwise_jax.engine.weights import EMBED, HEAD, learning_items, stack_item
from stackwise_jax.engine.window import Layout

Tree = Any
State = dict[str, jax.Array]  # of one item: its leaves by name
SHARED = "shared"


def keeps_state(phase: Phase, item: str) -> bool:
    """Whether an item that learns in a phase begins with the optimizer state it has; adapters do not after a merge."""
    return phase.keep_optimizer and not (phase.merge_adapters and item.startswith("adapters/"))


class Survival:
    """Which optimizer state outlives the phase that it was made in."""

    def __init__(self, phases: Sequence[Phase]):
        self._phases = phases
        self._trained: dict[str, list[int]] = {}  # item -> the phases that train it, in order
        for i, phase in enumerate(phases):
            for item in learning_items(phase):
                self._trained.setdefault(item, []).append(i)

    def goes_on(self, index: int, item: str) -> bool:
        """Whether the next phase after phases[index] that trains an item keeps the item's optimizer state."""
        trained = self._trained.get(item, [])
        place = bisect.bisect_right(trained, index)
        return place < len(trained) and keeps_state(self._phases[trained[place]], item)


def item_state(opt: Tree, layout: Layout, item: str) -> State:
    """The optimizer state of one item that learns."""
    state: State = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(opt)[0]:
        for owner, name, start, size in _owners(path, leaf, layout):
            if owner in (item, SHARED):
                state[name] = leaf if size is None else leaf[start : start + size]
    return state


def shared_state(opt: Tree, layout: Layout) -> State:
    """What of the optimizer state belongs to all items."""
    state: State = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(opt)[0]:
        state |= {name: leaf for owner, name, _, _ in _owners(path, leaf, layout) if owner == SHARED}
    return state


def join_state(opt: Tree, layout: Layout, items: Mapping[str, State]) -> Tree:
    """`opt` with the state of these items put in; what no item has, or has in another shape, stays as it is."""

    def joined(path, leaf: jax.Array) -> jax.Array:
        for owner, name, start, size in _owners(path, leaf, layout):
            if owner == SHARED:
                found = [state[name] for state in items.values() if name in state and state[name].shape == leaf.shape]
                for other in found:
                    leaf = jnp.maximum(leaf, other)
                continue
            kept = items.get(owner, {}).get(name)
            if kept is None or kept.shape != (leaf.shape if size is None else (size, *leaf.shape[1:])):
                continue
            leaf = kept if size is None else leaf.at[start : start + size].set(kept)
        return leaf

    return jax.tree_util.tree_map_with_path(joined, opt)


def _owners(path: tuple, leaf: Any, layout: Layout) -> list[tuple[str, str, int, int | None]]:
    """(item, name, first row, rows) of each item that a leaf of the optimizer state belongs to; rows None: all."""
    keys: list[Any] = [getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", None))) for entry in path]
    start = next((i for i, key in enumerate(keys) if key in (EMBED, HEAD, "stacks")), None)
    if start is None:
        return [(SHARED, "/".join(map(str, keys)), 0, None)]
    if keys[start] != "stacks":
        return [(keys[start], "/".join(map(str, keys)), 0, None)]
    (ids, sizes), rest = layout[keys[start + 1]], keys[start + 2 :]
    name = "/".join(map(str, keys[:start] + rest))
    item_of = stack_item
    if "adapters" in rest:
        adapter = rest[rest.index("adapters") + 1]
        item_of = lambda index: f"adapters/{index:03d}/{adapter}"
    if len(ids) == 1:
        return [(item_of(ids[0]), name, 0, None)]
    if not leaf.shape or leaf.shape[0] != sum(sizes):
        return []  # a summary over blocks, which cannot be told apart
    return [(item_of(index), name, sum(sizes[:i]), sizes[i]) for i, index in enumerate(ids)]
