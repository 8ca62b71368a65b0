"""The same blocks in other stacks. Values never change: there and back is the identity.

Legend: L blocks in a stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stackwise_jax.memory.quantized import formats_of
from stackwise_jax.model.functional import stack_name
from stackwise_jax.model.rack import Rack
from stackwise_jax.model.spec import Params, require
from stackwise_jax.model.stack import Stack, block_name


def concat_blocks(params_list: Sequence[Params]) -> Params:
    """The trees of stacks of alike blocks as the tree of one stack that holds all their blocks.

    Raises:
        UsageError: their weights are in different formats, one of them quantized.
    """
    if len(params_list) == 1:
        return params_list[0]
    _require_one_format(params_list)
    return jax.tree.map(lambda *leaves: _library(leaves).concatenate(leaves), *params_list)


def split_blocks(params: Params, sizes: Sequence[int]) -> list[Params]:
    """The tree of a stack of alike blocks as the trees of consecutive stacks of these sizes."""
    if len(sizes) == 1:
        return [params]
    ends = np.cumsum(sizes).tolist()
    return [jax.tree.map(lambda leaf, a=e - n, b=e: leaf[a:b], params) for n, e in zip(sizes, ends, strict=True)]


def merge_alike(stacks: Sequence[Stack]) -> tuple[list[Stack], list[tuple[int, ...]]]:
    """Runs of consecutive stacks of equal blocks as one stack each, so that one scan runs each of them.

    Returns the merged stacks and, for each, the sizes (in blocks) of the stacks that it stands for. The merged stacks
    have neither id nor freeze_blocks: stacks that compute the same compare equal and share one compiled program.
    """
    merged: list[Stack] = []
    sizes: list[tuple[int, ...]] = []
    for stack in stacks:
        joins = bool(merged) and stack.block_alike and merged[-1].block_alike
        joins = joins and stack.blocks[0] == merged[-1].blocks[0] and stack.remat == merged[-1].remat
        if joins:
            merged[-1] = Stack(blocks=merged[-1].blocks + stack.blocks, remat=stack.remat, parent=None)
            sizes[-1] += (len(stack.blocks),)
        else:
            merged.append(Stack(blocks=stack.blocks, remat=stack.remat, parent=None))
            sizes.append((len(stack.blocks),))
    return merged, sizes


def merge_params(params_list: Sequence[Params], sizes: Sequence[Sequence[int]]) -> list[Params]:
    """The stacks' trees as the trees of the stacks of `merge_alike`; `sizes` is what it returned."""
    trees = iter(params_list)
    return [concat_blocks([next(trees) for _ in group]) for group in sizes]


def split_params(merged_params: Sequence[Params], sizes: Sequence[Sequence[int]]) -> list[Params]:
    """The way back from `merge_params`."""
    return [tree for params, group in zip(merged_params, sizes, strict=True) for tree in split_blocks(params, group)]


def regroup(rack: Rack, sizes: Sequence[int]) -> Rack:
    """The rack with its blocks, in order, in stacks of these sizes.

    Raises:
        UsageError: the sizes do not add up to the blocks of the rack, or a new stack would join frozen blocks
            (freeze_blocks) with learning ones.
    """
    flat = [(block, stack.freeze_blocks, stack.remat) for stack in rack.stacks for block in stack.blocks]
    require(
        min(sizes, default=0) >= 1 and sum(sizes) == len(flat),
        f"stacks of {list(sizes)} blocks do not fit a rack of {len(flat)} blocks; write sizes >= 1 that add up to it",
    )
    stacks, start = [], 0
    for index, size in enumerate(sizes):
        blocks, frozen, remat = zip(*flat[start : start + size], strict=True)
        require(
            len(set(frozen)) == 1,
            f"stack {index} of the regrouped rack would join blocks {start}..{start + size - 1}, some of them "
            "frozen (freeze_blocks) and some not; choose sizes that keep them apart",
        )
        stacks.append(Stack(blocks=blocks, stack_id=index, freeze_blocks=frozen[0], remat=any(remat), parent=None))
        start += size
    return rack.clone(stacks=tuple(stacks), parent=None)


def regroup_params(rack: Rack, params: Params, sizes: Sequence[int]) -> Params:
    """The parameters of `rack` as those of `regroup(rack, sizes)`, which is bitwise the same model."""
    trees = [
        tree for i, stack in enumerate(rack.stacks) for tree in unstack_blocks(stack, params["stacks"][stack_name(i)])
    ]
    stacks, start = {}, 0
    for index, stack in enumerate(regroup(rack, sizes).stacks):
        size = len(stack.blocks)
        stacks[stack_name(index)] = stack_blocks(stack, trees[start : start + size])
        start += size
    return {**params, "stacks": stacks}


def unstack_blocks(stack: Stack, params: Params) -> list[Params]:
    """The tree of each block of a stack, from the stack's tree (its weights, its adapters, or both)."""
    count = len(stack.blocks)
    if stack.block_alike:
        return [jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(count)]
    return [params[block_name(i)] for i in range(count)]


def stack_blocks(stack: Stack, trees: Sequence[Params]) -> Params:
    """The way back from `unstack_blocks`.

    Raises:
        UsageError: weights of alike blocks are in different formats, one of them quantized.
    """
    if stack.block_alike:
        _require_one_format(trees)
        return {"blocks": jax.tree.map(lambda *leaves: _library(leaves).stack(leaves), *trees)}
    return {block_name(i): tree for i, tree in enumerate(trees)}


def _require_one_format(trees: Sequence[Params]) -> None:
    formats = [formats_of(tree) for tree in trees]
    require(
        all(found == formats[0] for found in formats),
        f"blocks with weights in the formats {sorted(set().union(*formats))} cannot become one stack; bring them into "
        "one format first (memory.quantized.to_format)",
    )


def _library(leaves: Sequence[Any]) -> Any:
    """NumPy for host arrays, so that regrouping a checkpoint touches no device; else jax.numpy."""
    return np if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp
