"""Ranks of adapters by depth: from the section curriculum.adapters to one AdapterSpec per stack.

k is the place of the stack, 0 at the input; r stands for rank and likewise for alpha, r0 for the configured value:

- simplified: r = r0.
- progressive: constant r = r0; increasing r = r0 * 2^k; decreasing r = r0 / 2^k, not below 1 and for ranks rounded
  down; linear r = r0 * (k + 1). Rank and alpha have a pattern each.
- variable: r of stack k is row k of the table. Trunk adapters are as in simplified.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from stackwise_jax.config.bounds import RANK
from stackwise_jax.config.schema import AdapterPattern, AdaptersConfig
from stackwise_jax.curriculum.phase import AdapterSpec, StackAdapter
from stackwise_jax.errors import UsageError


def adapters_of(adapters: AdaptersConfig, stacks: Iterable[int], n_stacks: int, arrival: bool) -> list[StackAdapter]:
    """The adapters that stacks of a rack have in a phase in which they adapt.

    Each has a stack adapter, of its own time of freezing. Where new stacks arrive it has a trunk adapter too, and also
    where it would have none otherwise. A rank of 0 leaves an adapter out.

    Args:
        stacks: ids of the stacks that adapt.
        n_stacks: of the whole rack, after regrouping.
        arrival: the phase brings stacks that no earlier phase had.

    Raises:
        UsageError: curriculum.adapters.table does not have one row per stack.
    """
    made = []
    for stack in sorted(stacks):
        spec, trunk = adapter_spec(adapters, "stack", stack, n_stacks), adapter_spec(adapters, "trunk", stack, n_stacks)
        if spec is not None:
            made.append(StackAdapter(stack=stack, name="stack", spec=spec))
        if trunk is not None and (arrival or spec is None):
            made.append(StackAdapter(stack=stack, name="trunk", spec=trunk))
    return made


def adapter_spec(
    adapters: AdaptersConfig, name: Literal["stack", "trunk"], stack: int, n_stacks: int
) -> AdapterSpec | None:
    """Rank and alpha of one adapter by the strategy (see the top of this file); None where its rank is 0."""
    rank, alpha = (adapters.rank, adapters.alpha) if name == "stack" else (adapters.trunk_rank, adapters.trunk_alpha)
    if adapters.strategy == "variable":
        if len(adapters.table) != n_stacks:
            raise UsageError(
                f"curriculum.adapters.table has {len(adapters.table)} rows and the rack {n_stacks} stacks; write one "
                "for each stack, from the input"
            )
        if name == "stack":
            rank, alpha = adapters.table[stack].rank, adapters.table[stack].alpha
    if rank == 0:
        return None
    if adapters.strategy == "progressive":
        _refuse_large(adapters, name, rank, alpha, stack)
        rank = int(_by_depth(rank, adapters.rank_pattern, stack))
        alpha = _by_depth(alpha, adapters.alpha_pattern, stack)
    return AdapterSpec(rank=rank, alpha=alpha, dropout=adapters.dropout, targets=tuple(adapters.targets))


def _refuse_large(adapters: AdaptersConfig, name: str, rank: int, alpha: float, stack: int) -> None:
    """Refuse a pattern that grows beyond all sense with depth, before it overflows."""
    for key, value in (("rank", rank), ("alpha", alpha)):
        pattern = getattr(adapters, f"{key}_pattern")
        doublings = {"increasing": stack, "linear": math.log2(stack + 1)}.get(pattern, 0)
        if math.log2(value) + doublings > math.log2(RANK):
            what = f"{'trunk_' if name == 'trunk' else ''}{key}"
            raise UsageError(
                f"curriculum.adapters.{key}_pattern is {pattern} and makes the {what} of stack {stack} larger than "
                f"{RANK}; write another pattern or a smaller curriculum.adapters.{what}"
            )


def _by_depth(value: float, pattern: AdapterPattern, stack: int) -> float:
    match pattern:
        case "constant":
            return value
        case "increasing":
            return value * 2**stack
        case "decreasing":
            return max(value / 2**stack, min(value, 1.0))
        case "linear":
            return value * (stack + 1)
