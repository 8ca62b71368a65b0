"""What a plan is made from, the shape of a rack, and what it makes, a list of phases. Pure data, no JAX."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stackwise_jax.curriculum.phase import Phase


@dataclass(frozen=True)
class RackShape:
    """What a plan has to know of a rack."""

    block_counts: tuple[int, ...]  # blocks of each stack, input to head
    frozen: frozenset[int] = field(default_factory=frozenset)  # stack ids that never learn
    tied: bool = False  # the head's kernel is the embedding
    # (blocks per stack after regrouping, phase) -> FLOPs of one step that recomputes its prefix; for budgets in FLOPs
    step_flops: Callable[[tuple[int, ...], Phase], int] | None = None

    @property
    def learnable(self) -> tuple[int, ...]:
        """Stack ids that may learn, from the input."""
        return tuple(stack for stack in range(len(self.block_counts)) if stack not in self.frozen)


@dataclass(frozen=True)
class Plan:
    """What the engine runs: first the rack is regrouped to `stack_sizes`, then one phase follows the other."""

    stack_sizes: tuple[int, ...]  # blocks per stack after regrouping
    phases: tuple[Phase, ...]
    start: frozenset[int]  # stack ids that exist before the first phase


def ids_text(stacks: Sequence[int]) -> str:
    """Stack ids for people: 0-3 for neighbours, else 0,2,5; - for none."""
    if len(stacks) > 1 and list(stacks) == list(range(stacks[0], stacks[-1] + 1)):
        return f"{stacks[0]}-{stacks[-1]}"
    return ",".join(map(str, stacks)) or "-"


def trained_apart(phases: Sequence[Phase]) -> list[int]:
    """Which phases end with a model of the run: the last one, or several denoisers that were trained apart.

    Those are phases of mask diffusion whose paths share no stack with a later one, and whose interval of noise falls
    from one to the next.
    """
    found: list[int] = []
    covered: set[int] = set()
    for index, phase in reversed(list(enumerate(phases))):
        if not covered & set(phase.path):
            found.insert(0, index)
        covered |= set(phase.path)
    noises = [phases[index].noise for index in found]
    diffusion = all(phases[index].objective.kind == "diffusion" for index in found)
    falls = all(a.low > b.low and a.high > b.high for a, b in itertools.pairwise(noises))
    return found if diffusion and falls else [len(phases) - 1]
