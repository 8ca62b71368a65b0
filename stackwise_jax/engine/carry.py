"""Optimizer state, item by item: what lets it outlive its phase when the next one learns other items beside.

The state of a phase mirrors the trees that learn, whatever the optimizer. Each leaf is found by its path: the part
before the learning tree says which quantity it is (a moment, say), the part behind says whose. What mirrors nothing
(a count of steps) is shared: every item takes a copy, and where items meet again the largest counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from stackwise_jax.engine.weights import EMBED, HEAD, stack_item
from stackwise_jax.engine.window import Window

Tree = Any
State = dict[str, jax.Array]  # of one item: its leaves by name
SHARED = "shared"


def split_state(opt: Tree, window: Window) -> dict[str, State]:
    """The optimizer state of each learning item."""
    items: dict[str, State] = {}
    shared: State = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(opt)[0]:
        for item, name, part in _owners(path, leaf, window):
            (shared if item == SHARED else items.setdefault(item, {}))[name] = part
    return {item: state | shared for item, state in items.items()}


def join_state(opt: Tree, window: Window, items: Mapping[str, State]) -> Tree:
    """`opt` with the state of these items put in; what no item has, or has in another shape, stays as it is."""

    def joined(path, leaf: jax.Array) -> jax.Array:
        owners = _owners(path, leaf, window)
        if owners and owners[0][0] == SHARED:
            name = owners[0][1]
            found = [state[name] for state in items.values() if name in state and state[name].shape == leaf.shape]
            return _latest(leaf, found)
        parts = []
        for item, name, part in owners:
            kept = items.get(item, {}).get(name)
            parts.append(part if kept is None or kept.shape != part.shape else kept)
        if len(parts) == 1:
            return parts[0]
        return jnp.concatenate(parts) if parts else leaf

    return jax.tree_util.tree_map_with_path(joined, opt)


def _latest(leaf: jax.Array, found: list[jax.Array]) -> jax.Array:
    for other in found:
        leaf = jnp.maximum(leaf, other)
    return leaf


def _owners(path: tuple, leaf: Any, window: Window) -> list[tuple[str, str, Any]]:
    """(item, name, part of the leaf) for each item that a leaf of the optimizer state belongs to."""
    keys: list[Any] = [getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", None))) for entry in path]
    start = next((i for i, key in enumerate(keys) if key in (EMBED, HEAD, "stacks")), None)
    if start is None:
        return [(SHARED, "/".join(map(str, keys)), leaf)]
    if keys[start] != "stacks":
        return [(keys[start], "/".join(map(str, keys)), leaf)]
    group, rest = keys[start + 1], keys[start + 2 :]
    name = "/".join(map(str, keys[:start] + rest))
    item_of = lambda index: stack_item(index)
    if "adapters" in rest:
        adapter = rest[rest.index("adapters") + 1]
        item_of = lambda index: f"adapters/{index:03d}/{adapter}"
    ids, sizes = window.ids[group], window.sizes(group)
    if len(ids) == 1:
        return [(item_of(ids[0]), name, leaf)]
    if not leaf.shape or leaf.shape[0] != sum(sizes):
        return []  # a summary over blocks, which cannot be told apart
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [(item_of(index), name, leaf[end - size : end]) for index, size, end in zip(ids, sizes, ends, strict=True)]
