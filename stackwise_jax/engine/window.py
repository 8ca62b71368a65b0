"""The window of a phase as the step sees it: the stacks from the first that learns to the head."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from typing import Any, Literal

import jax

from stackwise_jax.adapters import detach_adapters, split_adapters
from stackwise_jax.curriculum.phase import Phase
from stackwise_jax.model import Rack, Stack, combine, concat_blocks, merge_alike, split_blocks, split_fixed

Tree = Any
Learns = Literal["weights", "adapters", "nothing"]
Layout = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # per group: stack ids, and the blocks of each


class Window:
    """Neighbouring alike stacks that learn alike are merged into groups, so that one scan runs each group.

    groups: the merged stacks; learns: what of each group learns; ids: the stack ids of each group.

    Args:
        merge: False: each stack is a group of its own.
    """

    def __init__(self, rack: Rack, phase: Phase, *, merge: bool = True):
        self.groups: list[Stack] = []
        self.learns: list[Learns] = []
        self.ids: list[list[int]] = []
        apart = (lambda index: None) if merge else (lambda index: index)
        for (learns, *_), run in itertools.groupby(phase.window, key=lambda i: (*_kind(phase, i), apart(i))):
            indices = list(run)
            groups, sizes = merge_alike([rack.stacks[i] for i in indices])
            self.groups += groups
            self.learns.extend(itertools.repeat(learns, len(groups)))
            rest = iter(indices)
            self.ids += [list(itertools.islice(rest, len(group_sizes))) for group_sizes in sizes]
        self._sizes = [tuple(len(rack.stacks[i].blocks) for i in ids) for ids in self.ids]

    def split(self, trees: dict[int, Tree]) -> tuple[tuple[Tree, ...], tuple[Tree, ...]]:
        """(what learns, what does not) per group, from the full tree of each stack, adapters included."""
        learning, frozen = [], []
        for stack, learns, tree in zip(self.groups, self.learns, self._merge(trees), strict=True):
            free, fixed = {}, tree
            if learns == "weights":
                base, adapters = detach_adapters(tree)
                free, fixed = split_fixed(stack, base)
                fixed = combine(fixed, adapters)
            elif learns == "adapters":
                base, adapters = detach_adapters(tree)
                free, fixed = split_adapters(adapters)
                fixed = combine(base, fixed)
            learning.append(free)
            frozen.append(fixed)
        return tuple(learning), tuple(frozen)

    def unsplit(self, learning: tuple[Tree, ...], frozen: tuple[Tree, ...]) -> dict[int, Tree]:
        """The full trees of the stacks of which something learns, by id."""
        trees = {}
        for ids, sizes, learns, free, fixed in zip(self.ids, self._sizes, self.learns, learning, frozen, strict=True):
            if learns != "nothing":
                trees |= dict(zip(ids, self.split_group(combine(free, fixed), sizes), strict=True))
        return trees

    @property
    def layout(self) -> Layout:
        """Which stacks make up each group."""
        return tuple((tuple(ids), sizes) for ids, sizes in zip(self.ids, self._sizes, strict=True))

    def _merge(self, trees: dict[int, Tree]) -> list[Tree]:
        """The full tree of each group."""
        return [trees[ids[0]] if len(ids) == 1 else _concat([trees[i] for i in ids]) for ids in self.ids]

    @staticmethod
    def split_group(tree: Tree, sizes: tuple[int, ...]) -> list[Tree]:
        """The trees of the stacks of a group."""
        return [tree] if len(sizes) == 1 else _split(tree, sizes)


def _kind(phase: Phase, index: int) -> tuple[Learns, Hashable]:
    """What of a stack learns, and what else must be equal for its tree to have the shape of its neighbour's."""
    learns: Learns = "weights" if index in phase.train else "adapters" if index in phase.adapt else "nothing"
    shapes = [(a.name, a.spec.rank, a.spec.targets, a.spec.dropout > 0) for a in phase.adapters if a.stack == index]
    # In one format all leaves of neighbours have one dtype; what learns is in the master's.
    return learns, (tuple(sorted(shapes)), "" if learns == "weights" else phase.format_of(index))


_concat = jax.jit(concat_blocks)
_split = jax.jit(split_blocks, static_argnames=("sizes",))
