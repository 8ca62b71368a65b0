"""The weights of a rack, item by item: grown, loaded, stored in the format and place that a phase wants.

An item is what is saved and versioned alone: `embed`, `head`, `stacks/007`, or an adapter on a stack such as
`adapters/007/trunk`. The full-precision copy of what does not learn is not kept in memory: it is the item's last
version in the store, and is read back when a later phase lets it learn.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stackwise_jax.adapters import init_adapter
from stackwise_jax.checkpoint import Store
from stackwise_jax.config.schema import StackInit
from stackwise_jax.curriculum.phase import Phase, StackAdapter
from stackwise_jax.engine.programs import bare
from stackwise_jax.errors import RunError
from stackwise_jax.memory import Placement, tree_hash
from stackwise_jax.memory.placement import HOST_MEMORY
from stackwise_jax.model import (
    Rack,
    Stack,
    combine,
    dtype_of,
    init_embed,
    init_head,
    init_stack,
    init_stack_blocks,
    zero_outputs,
)

Tree = Any
EMBED, HEAD = "embed", "head"
ANEW = 5  # stream of the run's root key for adapters that are made anew; others take 0 to 4, 16 and 17


def stack_item(index: int) -> str:
    """The item name of a stack."""
    return f"stacks/{index:03d}"


def adapter_item(adapter: StackAdapter) -> str:
    """The item name of an adapter."""
    return f"adapters/{adapter.stack:03d}/{adapter.name}"


def learning_items(phase: Phase) -> list[str]:
    """The items that learn in a phase."""
    ends = [EMBED] * phase.train_embed + [HEAD] * phase.train_head
    adapters = [adapter_item(a) for a in phase.adapters if a.stack in phase.adapt]
    return [stack_item(i) for i in sorted(phase.train)] + adapters + ends


def path_items(phase: Phase) -> list[str]:
    """The items of a phase's path."""
    return [EMBED, HEAD, *(stack_item(i) for i in phase.path), *(adapter_item(a) for a in phase.adapters)]


def item_format(phase: Phase, item: str, master: str) -> str:
    """The format in which an item of the path takes part in a phase: the master's for what learns and for adapters."""
    kind, *rest = item.split("/")
    if kind == "adapters" or item in learning_items(phase):
        return master
    return phase.format_of(int(rest[0])) if kind == "stacks" else phase.frozen


def nearest_stack(path: Sequence[int], existing: Sequence[int], index: int) -> int | None:
    """Of the existing stacks of a path the one that lies nearest to a stack of it, the earlier of two; None: none."""
    place = path.index
    return min(existing, key=lambda other: (abs(place(other) - place(index)), place(other)), default=None)


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
        self.adapters: dict[str, StackAdapter] = {}  # by item: those that the phases up to now have
        self._hashes: dict[str, str] = {}

    @property
    def master(self) -> str:
        """The format of what learns."""
        return self.rack.param_dtype

    def declare(self, phase: Phase) -> None:
        """Get to know the adapters of a phase."""
        self.adapters |= {adapter_item(adapter): adapter for adapter in phase.adapters}

    def adapter_items(self, index: int) -> list[str]:
        """The items of the adapters on a stack."""
        return [item for item, adapter in self.adapters.items() if adapter.stack == index]

    def stack_items(self, index: int) -> list[str]:
        """The items that a stack consists of."""
        return [stack_item(index), *self.adapter_items(index)]

    def shapes(self, item: str, fmt: str, *, on_host: bool = False) -> Tree:
        """ShapeDtypeStructs with sharding of an item stored in a format, without allocating it."""
        shapes = jax.eval_shape(functools.partial(self._make, item), self._root_key)
        shardings = self.placement.params(shapes)
        shardings = _host(shardings) if on_host else shardings
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype_of(fmt), sharding=s), shapes, shardings)

    def full_shapes(self, index: int, fmt: str) -> Tree:
        """Shapes of a stack's tree with its adapters, the weights stored in a format."""
        trees = [self.shapes(item, self.master) for item in self.adapter_items(index)]
        return functools.reduce(combine, trees, self.shapes(stack_item(index), fmt))

    def _make(self, item: str, key: jax.Array) -> Tree:
        if item == EMBED:
            return init_embed(self.rack, key)
        if item == HEAD:
            return init_head(self.rack, key)
        index = int(item.split("/")[1])
        if item in self.adapters:
            adapter = self.adapters[item]
            return init_adapter(bare(self.rack.stacks[index]), adapter, self._first_block[index], key)
        return init_stack(self.rack, index, key)

    def grow(self, item: str, init: StackInit = "random", source: str | None = None, again: int = 0) -> None:
        """Initialise an item from the run's seed.

        Args:
            init: of a stack: at random, a copy of the item `source`, or at random with zeroed outputs.
            again: of adapters that are made anew after a merge, a number of their own; 0: the first time.
        """
        if init == "copy" and source is not None:
            self.ensure(source, self.master)
            return self.set(item, jax.tree.map(jnp.copy, self.on_device(source)), self.master)
        shardings = jax.tree.map(lambda x: x.sharding, self.shapes(item, self.master))
        if item in (EMBED, HEAD):
            tree = jax.jit(functools.partial(self._make, item), out_shardings=shardings)(self._root_key)
        else:
            # One compilation for all stacks of equal shape: the index of the first block is an argument.
            index = int(item.split("/")[1])
            stack = bare(self.rack.stacks[index])
            first = self.placement.put(np.int32(self._first_block[index]), self.placement.replicated)
            if item in self.adapters:
                key = self._root_key
                if again:
                    key = jax.random.fold_in(jax.random.fold_in(key, ANEW), again)
                tree = _init_adapter(stack, dataclasses.replace(self.adapters[item], stack=0), first, key)
            else:
                tree = _init_blocks(stack, self.placement, first, self._root_key)
                if init == "zero":
                    tree = zero_outputs(stack, tree)
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

    def full(self, index: int) -> Tree:
        """A stack's tree with its adapters, wherever they rest."""
        return functools.reduce(combine, map(self.trees.__getitem__, self.stack_items(index)))

    def full_on_device(self, index: int) -> Tree:
        """The same in device memory."""
        return functools.reduce(
            combine, map(self.on_device, self.adapter_items(index)), self.on_device(stack_item(index))
        )

    def content_hash(self, item: str) -> str:
        """A hash of the item's bytes in its current format; its version where no process holds all the bytes."""
        if item not in self._hashes:
            whole = all(x.is_fully_addressable for x in jax.tree.leaves(self.trees[item]))
            self._hashes[item] = tree_hash(self.trees[item]) if whole else f"version {self.versions[item]}"
        return self._hashes[item]


_init_adapter = jax.jit(init_adapter, static_argnames=("stack", "adapter"))


@functools.partial(jax.jit, static_argnames=("stack", "placement"))
def _init_blocks(stack: Stack, placement: Placement, first_block: jax.Array, key: jax.Array) -> Tree:
    tree = init_stack_blocks(stack, first_block, key)
    return jax.lax.with_sharding_constraint(tree, placement.params(tree))
