"""The weights of a rack, item by item: grown, loaded, stored in the format and place that a phase wants.

An item is what is saved and versioned alone: `embed`, `head` or `stacks/007`. The full-precision copy of what does
not learn is not kept in memory: it is the item's last version in the store, and is read back when a later phase lets
it learn.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import numpy as np

from stackwise_jax.checkpoint import Store
from stackwise_jax.curriculum.phase import Phase
from stackwise_jax.engine.programs import bare
from stackwise_jax.errors import RunError
from stackwise_jax.memory import Placement, tree_hash
from stackwise_jax.memory.placement import HOST_MEMORY
from stackwise_jax.model import (
    Rack,
    Stack,
    combine,
    concat_blocks,
    dtype_of,
    init_embed,
    init_head,
    init_stack,
    init_stack_blocks,
    merge_alike,
    split_blocks,
    split_fixed,
)

Tree = Any
EMBED, HEAD = "embed", "head"


def stack_item(index: int) -> str:
    """The item name of a stack."""
    return f"stacks/{index:03d}"


def learning_items(phase: Phase) -> list[str]:
    """The items whose full weights learn in a phase."""
    ends = [EMBED] * phase.train_embed + [HEAD] * phase.train_head
    return [stack_item(i) for i in sorted(phase.train)] + ends


def path_items(phase: Phase) -> list[str]:
    """The items of a phase's path."""
    return [EMBED, HEAD, *(stack_item(i) for i in phase.path)]


def _host(shardings: Tree) -> Tree:
    """The same shardings in pinned host memory."""
    return jax.tree.map(lambda sharding: sharding.with_memory_kind(HOST_MEMORY), shardings)


@functools.partial(jax.jit, static_argnames=("dtype",))
def _cast(tree: Tree, dtype) -> Tree:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


class Weights:
    """The current trees of the items, on the device or in host memory."""

    def __init__(self, rack: Rack, placement: Placement, store: Store | None, root_key: jax.Array):
        self.rack, self.placement, self._store, self._root_key = rack, placement, store, root_key
        self._first_block = [0, *itertools.accumulate(len(stack.blocks) for stack in rack.stacks)]
        self.trees: dict[str, Tree] = {}
        self.formats: dict[str, str] = {}  # the format an item was last used in
        self.versions: dict[str, int] = {}  # the version of an item's full-precision copy in the store
        self._hashes: dict[str, str] = {}

    @property
    def master(self) -> str:
        """The format of what learns."""
        return self.rack.param_dtype

    def shapes(self, item: str, fmt: str, *, on_host: bool = False) -> Tree:
        """ShapeDtypeStructs with sharding of an item stored in a format, without allocating it."""
        shapes = jax.eval_shape(functools.partial(self._make, item), self._root_key)
        shardings = self.placement.params(shapes)
        shardings = _host(shardings) if on_host else shardings
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype_of(fmt), sharding=s), shapes, shardings)

    def _make(self, item: str, key: jax.Array) -> Tree:
        if item == EMBED:
            return init_embed(self.rack, key)
        if item == HEAD:
            return init_head(self.rack, key)
        return init_stack(self.rack, int(item.split("/")[1]), key)

    def grow(self, item: str) -> None:
        """Initialise an item from the run's seed."""
        shardings = jax.tree.map(lambda x: x.sharding, self.shapes(item, self.master))
        if item in (EMBED, HEAD):
            tree = jax.jit(functools.partial(self._make, item), out_shardings=shardings)(self._root_key)
        else:
            # One compilation for all stacks of equal shape: the index of the first block is an argument.
            index = int(item.split("/")[1])
            first = self.placement.put(np.int32(self._first_block[index]), self.placement.replicated)
            tree = _init_blocks(bare(self.rack.stacks[index]), self.placement, first, self._root_key)
        self.set(item, self.placement.put(tree, shardings), self.master)

    def set(self, item: str, tree: Tree, fmt: str) -> None:
        """Replace an item's tree."""
        self.trees[item], self.formats[item] = tree, fmt
        self._hashes.pop(item, None)

    def drop(self, item: str) -> None:
        """Release an item's memory; its last version stays in the store."""
        self.trees.pop(item, None)
        self._hashes.pop(item, None)

    def ensure(self, item: str, fmt: str, *, on_host: bool = False) -> None:
        """Have the item in memory in a format: as it is, cast, read back from the store, or grown.

        on_host: it rests in host memory, where it takes no room on the device.
        """
        if item not in self.trees and item not in self.versions:
            self.grow(item)
        if item not in self.trees or self.formats[item] != fmt:
            if item in self.trees and self.formats[item] == self.master:
                self.set(item, _cast(self.on_device(item), dtype_of(fmt)), fmt)
            elif item in self.versions and self._store is not None:
                like = self.shapes(item, fmt, on_host=on_host)
                self.set(item, self._store.load_item(item, self.versions[item], like), fmt)
            else:
                raise RunError(f"the full-precision copy of {item} is in no checkpoint; it cannot be used as {fmt}")
        shardings = self.placement.params(self.trees[item])
        self.trees[item] = self.placement.put(self.trees[item], _host(shardings) if on_host else shardings)

    def on_device(self, item: str) -> Tree:
        """The item's tree in device memory; a copy where the item rests in host memory."""
        tree = self.trees[item]
        return self.placement.put(tree, self.placement.params(tree))

    def content_hash(self, item: str) -> str:
        """A hash of the item's bytes in its current format; its version where no process holds all the bytes."""
        if item not in self._hashes:
            whole = all(x.is_fully_addressable for x in jax.tree.leaves(self.trees[item]))
            self._hashes[item] = tree_hash(self.trees[item]) if whole else f"version {self.versions[item]}"
        return self._hashes[item]


@functools.partial(jax.jit, static_argnames=("stack", "placement"))
def _init_blocks(stack: Stack, placement: Placement, first_block: jax.Array, key: jax.Array) -> Tree:
    tree = init_stack_blocks(stack, first_block, key)
    return jax.lax.with_sharding_constraint(tree, placement.params(tree))


class Window:
    """The window of a phase as the step sees it: neighbouring alike stacks merged into groups, and back.

    groups: the merged stacks; learns: per group; ids: the stack ids of each group.
    """

    def __init__(self, rack: Rack, phase: Phase):
        self.groups: list[Stack] = []
        self.learns: list[bool] = []
        self.ids: list[list[int]] = []
        for learns, run in itertools.groupby(phase.window, key=lambda index: index in phase.train):
            indices = list(run)
            groups, sizes = merge_alike([rack.stacks[i] for i in indices])
            self.groups += groups
            self.learns += [learns] * len(groups)
            rest = iter(indices)
            self.ids += [list(itertools.islice(rest, len(group_sizes))) for group_sizes in sizes]

    def split(self, trees: list[Tree]) -> tuple[tuple[Tree, ...], tuple[Tree, ...]]:
        """(what learns, what does not) per group, from the full tree of each group."""
        learning, frozen = [], []
        for stack, learns, tree in zip(self.groups, self.learns, trees, strict=True):
            free, fixed = split_fixed(stack, tree) if learns else ({}, tree)
            learning.append(free)
            frozen.append(fixed)
        return tuple(learning), tuple(frozen)

    def merge(self, trees: dict[int, Tree]) -> list[Tree]:
        """The full tree of each group, from the trees of its stacks."""
        merged = []
        for ids in self.ids:
            parts = [trees[i] for i in ids]
            merged.append(parts[0] if len(parts) == 1 else _concat(parts))
        return merged

    def unmerge(self, rack: Rack, learning: tuple[Tree, ...], frozen: tuple[Tree, ...]) -> dict[int, Tree]:
        """The full trees of the stacks that learn, by id."""
        trees = {}
        for ids, learns, free, fixed in zip(self.ids, self.learns, learning, frozen, strict=True):
            if not learns:
                continue
            full = combine(free, fixed)
            sizes = tuple(len(rack.stacks[i].blocks) for i in ids)
            trees |= dict(zip(ids, [full] if len(ids) == 1 else _split(full, sizes), strict=True))
        return trees


_concat = jax.jit(concat_blocks)
_split = jax.jit(split_blocks, static_argnames=("sizes",))
