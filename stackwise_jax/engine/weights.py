"""The weights of a rack, item by item: grown, loaded, stored in the format and place that a phase wants.

An item is what is saved and versioned alone: `embed`, `head`, `stacks/007`, or an adapter on a stack such as
`adapters/007/trunk`. The full-precision copy of what does not learn is not kept in memory: it is the item's last
version in the store, and is read back when a later phase lets it learn. An item that no later phase needs in full
precision may be saved in its frozen format instead; the `format` in its meta says in which it lies there.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
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
from stackwise_jax.memory.hashing import is_whole_here
from stackwise_jax.memory.offload import Place, Scratch, rest
from stackwise_jax.memory.placement import HOST_MEMORY
from stackwise_jax.memory.quantized import QUANTIZED, QuantizedTensor, dense_format, to_format
from stackwise_jax.model import (
    Rack,
    Stack,
    combine,
    init_embed,
    init_head,
    init_stack,
    init_stack_blocks,
    zero_outputs,
)
from stackwise_jax.random_streams import Stream, root_key, stream_key

Tree = Any
EMBED, HEAD = "embed", "head"


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


def frozen_format(phase: Phase, item: str) -> str:
    """The format in which embedding, head or a stack of the path takes part in a phase in which it does not learn."""
    kind, *index = item.split("/")
    return phase.format_of(int(index[0])) if kind == "stacks" else dense_format(phase.frozen)


def item_format(phase: Phase, item: str, master: str) -> str:
    """The format in which an item of the path takes part in a phase: the master's for what learns and for adapters."""
    if item.startswith("adapters/") or item in learning_items(phase):
        return master
    return frozen_format(phase, item)


def final_format(phases: Sequence[Phase], index: int, item: str, master: str) -> str:
    """The format in which an item of the path can be kept for good when phases[index] ends.

    The master's for adapters and where a later phase trains the item or merges adapters into it. Else that of the next
    phase with the item on its path; where there is none, the frozen format of the phase itself.
    """
    later = phases[index + 1 :]
    merged = lambda phase: phase.merge_adapters and item in {stack_item(a.stack) for a in phase.adapters}
    if item.startswith("adapters/") or any(item in learning_items(p) or merged(p) for p in later):
        return master
    return frozen_format(next((p for p in later if item in path_items(p)), phases[index]), item)


def nearest_stack(path: Sequence[int], existing: Sequence[int], index: int) -> int | None:
    """Of the existing stacks of a path the one that lies nearest to a stack of it, the earlier of two; None: none."""
    place = path.index
    return min(existing, key=lambda other: (abs(place(other) - place(index)), place(other)), default=None)


def make_item(rack: Rack, item: str, key: jax.Array, adapters: Mapping[str, StackAdapter]) -> Tree:
    """The first values of an item in full precision, from the run's root key.

    adapters: by item; those that the rack may have.
    """
    if item == EMBED:
        return init_embed(rack, key)
    if item == HEAD:
        return init_head(rack, key)
    index = int(item.split("/")[1])
    if item in adapters:
        first_block = sum(len(stack.blocks) for stack in rack.stacks[:index])
        return init_adapter(bare(rack.stacks[index]), adapters[item], first_block, key)
    return init_stack(rack, index, key)


def item_shapes(rack: Rack, item: str, fmt: str, adapters: Mapping[str, StackAdapter]) -> Tree:
    """ShapeDtypeStructs of an item stored in a format, without allocating it. adapters: see `make_item`."""
    make = lambda key: to_format(make_item(rack, item, key, adapters), fmt)
    return jax.eval_shape(make, jax.eval_shape(lambda: root_key(0)))


def count_values(tree: Tree) -> int:
    """The numbers that a tree stands for: a quantized matrix counts as the dense one."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, QuantizedTensor))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def in_format(tree: Tree, master: str, fmt: str) -> Tree:
    """An item's tree of any format in another, by way of full precision, on the device.

    Matrix by matrix, each waited for: beside tree and result there is only what one of them takes to convert.
    """
    if isinstance(tree, dict) and "kernel" not in tree:
        return {name: in_format(branch, master, fmt) for name, branch in tree.items()}
    return jax.block_until_ready(_in_format(tree, master, fmt))


@functools.partial(jax.jit, static_argnames=("master", "fmt"))
def _in_format(tree: Tree, master: str, fmt: str) -> Tree:
    return to_format(to_format(tree, master), fmt)


class Weights:
    """The current trees of the items, each in its place: on the device, in host memory or in a scratch file on disk.

    scratch: where items go that rest on disk; set by who asks for that place.
    """

    def __init__(self, rack: Rack, placement: Placement, store: Store | None, root_key: jax.Array):
        self.rack, self.placement, self._store, self._root_key = rack, placement, store, root_key
        self._first_block = [0, *itertools.accumulate(len(stack.blocks) for stack in rack.stacks)]
        self.trees: dict[str, Tree] = {}
        self.formats: dict[str, str] = {}  # the format an item was last used in
        self.places: dict[str, Place] = {}  # where an item was last asked to rest
        self.versions: dict[str, int] = {}  # the version of an item in the store, in full precision or final format
        self.adapters: dict[str, StackAdapter] = {}  # by item: those that the phases up to now have
        self.scratch: Scratch | None = None
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

    def shapes(self, item: str, fmt: str, place: Place = "device") -> Tree:
        """ShapeDtypeStructs of an item stored in a format, without allocating it; with shardings but on disk."""
        shapes = item_shapes(self.rack, item, fmt, self.adapters)
        if place == "disk":
            return shapes
        shardings = self.placement.params(shapes)
        if place == "host":
            shardings = jax.tree.map(lambda sharding: sharding.with_memory_kind(HOST_MEMORY), shardings)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    def full_shapes(self, index: int, fmt: str) -> Tree:
        """Shapes of a stack's tree with its adapters, the weights stored in a format."""
        trees = [self.shapes(item, self.master) for item in self.adapter_items(index)]
        return functools.reduce(combine, trees, self.shapes(stack_item(index), fmt))

    def _make(self, item: str, key: jax.Array) -> Tree:
        return make_item(self.rack, item, key, self.adapters)

    def grow(self, item: str, init: StackInit = "random", source: str | None = None, again: int = 0) -> None:
        """Initialise an item from the run's seed.

        Args:
            init: of a stack: at random, a copy of the item `source`, or at random with zeroed outputs.
            again: of adapters that are made anew after a merge, a number of their own; 0: the first time.
        """
        if init == "copy" and source is not None:
            return self.set(item, self._master_copy(source), self.master)
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
                    key = jax.random.fold_in(stream_key(key, Stream.RENEWED_ADAPTERS), again)
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

    def ensure(self, item: str, fmt: str, place: Place = "device") -> None:
        """Have the item in memory in a format and place: as it is, converted, read back from the store, or grown.

        Conversion happens on the device; on return nothing is left there but the result, if that is its place.

        Raises:
            RunError: it has another format here and is in no checkpoint, or that cannot be read, or the disk is full.
        """
        if item not in self.trees and item not in self.versions:
            self.grow(item)
        if item not in self.trees or self.formats[item] != fmt:
            if item in self.trees and self.formats[item] == self.master:
                self.set(item, in_format(self.on_device(item), self.master, fmt), fmt)
            elif item in self.versions and self._store is not None:
                self.set(item, self._read(item, fmt, place), fmt)
            else:
                raise RunError(f"the full-precision copy of {item} is in no checkpoint; it cannot be used as {fmt}")
        self.trees[item] = rest(self.placement, self.trees[item], place, self.scratch)
        self.places[item] = place

    def saved_format(self, item: str) -> str | None:
        """The format of the item's last version in the store; None: it has none."""
        if item not in self.versions or self._store is None:
            return None
        return self._store.item_meta(item, self.versions[item]).get("format", self.master)

    def _read(self, item: str, fmt: str, place: Place) -> Tree:
        """The item from the store in a format. What lies there in another one is converted on the device, unless a
        cast while reading does it."""
        assert self._store is not None
        saved = self.saved_format(item) or self.master
        direct = saved == fmt or not {saved, fmt} & set(QUANTIZED)
        like = self.shapes(item, fmt, place) if direct else self.shapes(item, saved)
        tree = self._store.load_item(item, self.versions[item], like)
        if direct:
            return tree
        tree = in_format(tree, self.master, fmt)
        return self.placement.put(tree, self.placement.params(tree))

    def _master_copy(self, item: str) -> Tree:
        """The item in full precision, as a tree of its own on the device; what is in memory stays as it is."""
        if item in self.trees and self.formats[item] == self.master:
            return jax.tree.map(jnp.copy, self.on_device(item))
        return self._read(item, self.master, "device")

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
            whole = all(map(is_whole_here, jax.tree.leaves(self.trees[item])))
            self._hashes[item] = tree_hash(self.trees[item]) if whole else f"version {self.versions[item]}"
        return self._hashes[item]


_init_adapter = jax.jit(init_adapter, static_argnames=("stack", "adapter"))


@functools.partial(jax.jit, static_argnames=("stack", "placement"))
def _init_blocks(stack: Stack, placement: Placement, first_block: jax.Array, key: jax.Array) -> Tree:
    tree = init_stack_blocks(stack, first_block, key)
    return jax.lax.with_sharding_constraint(tree, placement.params(tree))
