"""Stacks come and go on a live rack: insert, remove, merge, split. Pure functions; what stays keeps its bits.

All take and return a rack, its parameters (see Rack) and its adapters, a dict from the name of a stack ("000") to the
tree of all adapters on it (see linear.linear). Stack ids stay 0 .. n-1: what lies behind the change is renumbered.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import jax

from stackwise_jax.model.functional import init_stack_blocks, stack_name
from stackwise_jax.model.growth import can_copy, zero_outputs
from stackwise_jax.model.rack import Rack
from stackwise_jax.model.regroup import regroup, stack_blocks, unstack_blocks
from stackwise_jax.model.spec import Params, require
from stackwise_jax.model.stack import Stack


class Edited(NamedTuple):
    """A rack after a change, with its parameters and adapters; the inputs are as they were."""

    rack: Rack
    params: Params
    adapters: dict[str, Params]


def append_stack(
    rack: Rack,
    params: Params,
    adapters: Mapping[str, Params] | None = None,
    *,
    key: jax.Array,
    stack: Stack | None = None,
    init: Literal["random", "copy", "zero"] = "random",
) -> Edited:
    """A new stack at the head; see insert_stack."""
    return insert_stack(rack, params, len(rack.stacks), adapters, key=key, stack=stack, init=init)


def prepend_stack(
    rack: Rack,
    params: Params,
    adapters: Mapping[str, Params] | None = None,
    *,
    key: jax.Array,
    stack: Stack | None = None,
    init: Literal["random", "copy", "zero"] = "random",
) -> Edited:
    """A new stack at the input; see insert_stack."""
    return insert_stack(rack, params, 0, adapters, key=key, stack=stack, init=init)


def insert_stack(
    rack: Rack,
    params: Params,
    at: int,
    adapters: Mapping[str, Params] | None = None,
    *,
    key: jax.Array,
    stack: Stack | None = None,
    init: Literal["random", "copy", "zero"] = "random",
) -> Edited:
    """A new stack that becomes stack `at`, without adapters.

    Args:
        at: 0 (at the input) to the number of stacks (at the head).
        key: as the root key of init_rack. Appending with the rack's own key gives what init_rack gives for the longer
            rack; a stack between others wants another key, or it begins as the stack began that was there.
        stack: its spec; None: that of its neighbour, the earlier one where there are two.
        init: random; copy: the weights of that neighbour; zero: random, but with zeroed outputs, so that the rack
            computes what it did.

    Raises:
        UsageError: `at` or the width is wrong, or a copy of a neighbour that is unlike.
    """
    n_stacks = len(rack.stacks)
    require(0 <= at <= n_stacks, f"there is no place {at} for a stack in a rack of {n_stacks}; write 0 to {n_stacks}")
    require(init in ("random", "copy", "zero"), f"init '{init}' is unknown; write random, copy or zero")
    neighbour = max(at - 1, 0)
    stack = rack.stacks[neighbour] if stack is None else stack
    if init == "copy":
        require(
            can_copy(rack.stacks[neighbour], stack),
            f"a new stack at {at} cannot be a copy of stack {neighbour}, which has other blocks; write init random",
        )
        tree = jax.tree.map(lambda leaf: leaf.copy(), params["stacks"][stack_name(neighbour)])
    else:
        tree = init_stack_blocks(stack, sum(len(other.blocks) for other in rack.stacks[:at]), key)
        tree = zero_outputs(stack, tree) if init == "zero" else tree
    stacks = (*rack.stacks[:at], stack, *rack.stacks[at:])
    return _replaced(_with_stacks(rack, stacks), params, adapters, at, 0, [tree], [None])


def remove_stack(rack: Rack, params: Params, at: int, adapters: Mapping[str, Params] | None = None) -> Edited:
    """The rack without stack `at` and its adapters.

    Raises:
        UsageError: there is no such stack, or no other.
    """
    _require_stack(rack, at)
    require(len(rack.stacks) > 1, "stack 0 is the only one of the rack; a rack keeps at least one stack")
    shorter = _with_stacks(rack, rack.stacks[:at] + rack.stacks[at + 1 :])
    return _replaced(shorter, params, adapters, at, 1, [], [])


def merge_stacks(rack: Rack, params: Params, at: int, adapters: Mapping[str, Params] | None = None) -> Edited:
    """The stacks `at` and `at + 1` as one; the same model.

    Raises:
        UsageError: there are no such stacks, one of them is frozen by its spec (freeze_blocks) and the other not, or
            their adapters differ in name, rank, targets or dropout.
    """
    require(
        0 <= at < len(rack.stacks) - 1,
        f"there are no stacks {at} and {at + 1} in a rack of {len(rack.stacks)}; write 0 to {len(rack.stacks) - 2}",
    )
    pair, names = rack.stacks[at : at + 2], [stack_name(at), stack_name(at + 1)]
    sizes = [len(stack.blocks) for stack in rack.stacks]
    merged = regroup(rack, [*sizes[:at], sum(sizes[at : at + 2]), *sizes[at + 2 :]])

    def join(trees: Sequence[Params]) -> Params:
        blocks = [block for stack, tree in zip(pair, trees, strict=True) for block in unstack_blocks(stack, tree)]
        return stack_blocks(merged.stacks[at], blocks)

    on_them = [(adapters or {}).get(name, {}) for name in names]
    require(
        _kind(on_them[0]) == _kind(on_them[1]),
        f"stacks {at} and {at + 1} have different adapters and cannot become one; merge the adapters into the weights "
        "first (merge_adapters)",
    )
    tree = join([params["stacks"][name] for name in names])
    return _replaced(merged, params, adapters, at, 2, [tree], [join(on_them) if on_them[0] else None])


def split_stack(
    rack: Rack, params: Params, at: int, sizes: Sequence[int], adapters: Mapping[str, Params] | None = None
) -> Edited:
    """Stack `at` as consecutive stacks of these sizes, in blocks; the same model.

    Raises:
        UsageError: there is no such stack, or the sizes do not add up to its blocks.
    """
    _require_stack(rack, at)
    whole, n_blocks = rack.stacks[at], len(rack.stacks[at].blocks)
    require(
        min(sizes, default=0) >= 1 and sum(sizes) == n_blocks,
        f"stack {at} of {n_blocks} blocks cannot be split into {list(sizes)}; write sizes >= 1 that add up to it",
    )
    counts = [len(stack.blocks) for stack in rack.stacks]
    divided = regroup(rack, [*counts[:at], *sizes, *counts[at + 1 :]])
    parts, ends = divided.stacks[at : at + len(sizes)], list(itertools.accumulate(sizes))

    def cut(tree: Params) -> list[Params]:
        blocks = unstack_blocks(whole, tree)
        return [stack_blocks(part, blocks[end - n : end]) for part, n, end in zip(parts, sizes, ends, strict=True)]

    adapter = (adapters or {}).get(stack_name(at))
    trees = cut(params["stacks"][stack_name(at)])
    return _replaced(divided, params, adapters, at, 1, trees, cut(adapter) if adapter else [None] * len(sizes))


def _require_stack(rack: Rack, at: int) -> None:
    n_stacks = len(rack.stacks)
    require(0 <= at < n_stacks, f"there is no stack {at} in a rack of {n_stacks}; write 0 to {n_stacks - 1}")


def _with_stacks(rack: Rack, stacks: Sequence[Stack]) -> Rack:
    numbered = tuple(stack.clone(stack_id=i, parent=None) for i, stack in enumerate(stacks))
    return rack.clone(stacks=numbered, parent=None)


def _replaced(
    rack: Rack,
    params: Params,
    adapters: Mapping[str, Params] | None,
    at: int,
    removed: int,
    trees: Sequence[Params],
    adapter_trees: Sequence[Params | None],
) -> Edited:
    """The new rack with the trees of the old one, `removed` of them at `at` replaced by these."""

    def spliced(old: Mapping[str, Params], new: Sequence[Params | None]) -> dict[str, Params]:
        n_old = len(rack.stacks) + removed - len(new)
        row = [old.get(stack_name(i)) for i in range(n_old)]
        row[at : at + removed] = new
        return {stack_name(i): tree for i, tree in enumerate(row) if tree is not None}

    stacks = spliced(params["stacks"], trees)
    return Edited(rack, {**params, "stacks": stacks}, spliced(adapters or {}, adapter_trees))


def _kind(adapter_tree: Params) -> set[tuple]:
    """What the adapters of two stacks must have in common to be those of one."""
    leaves = jax.tree_util.tree_flatten_with_path(adapter_tree)[0]
    # Without the name of the block; the rank is the last axis of a.
    return {(path[1:], leaf.shape[-1] if path[-1].key == "a" else None) for path, leaf in leaves}
