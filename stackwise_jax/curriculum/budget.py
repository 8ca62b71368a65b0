"""Budgets: the steps of phases, scaled in proportion so that their cost meets what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from stackwise_jax.errors import UsageError


def scale_steps(entries: Sequence[Sequence[tuple[int, int]]], shares: Sequence[float], budget: int) -> list[list[int]]:
    """Steps for each phase of each entry of a list of plans.

    An entry gets its share of the budget, and within it the steps of the phases keep their proportions as well as whole
    numbers allow; every phase gets at least one. The total never exceeds the budget, and what is left of it is less
    than one step of the cheapest phase of the last entry.

    Args:
        entries: for each entry (steps that give the proportions, cost of one step) of its phases; all above 0.
        shares: of the entries, relative to each other.
        budget: in the unit of the costs.

    Raises:
        UsageError: an entry's share is less than one step for each of its phases.
    """
    whole = sum(Fraction(share) for share in shares)
    result, rest = [], Fraction(0)
    for i, (phases, share) in enumerate(zip(entries, shares, strict=True)):
        rest += budget * Fraction(share) / whole
        least = sum(cost for _, cost in phases)
        if rest < least:
            where = f", and the share of curriculum.plans[{i}] is {float(rest):.6g}" if len(entries) > 1 else ""
            raise UsageError(
                f"curriculum.budget comes to {float(budget):.6g}{where}, less than one step for each of the "
                f"{len(phases)} phases ({float(least):.6g}); write a larger budget"
            )
        steps = _proportional(phases, rest)
        rest -= sum(n * cost for n, (_, cost) in zip(steps, phases, strict=True))
        result.append(steps)
    return result


def _proportional(phases: Sequence[tuple[int, int]], budget: Fraction) -> list[int]:
    """Whole steps that cost at most the budget and leave less of it than one step of the cheapest phase."""
    exact = [Fraction(1)] * len(phases)
    free = set(range(len(phases)))  # phases that get more than the one step that each has
    while free:
        left = budget - sum(phases[i][1] for i in range(len(phases)) if i not in free)
        scale = left / sum(phases[i][0] * phases[i][1] for i in free)
        short = {i for i in free if scale * phases[i][0] < 1}
        if not short:
            exact = [scale * n if i in free else Fraction(1) for i, (n, _) in enumerate(phases)]
            break
        free -= short
    steps = [int(n) for n in exact]
    left = budget - sum(n * cost for n, (_, cost) in zip(steps, phases, strict=True))
    for i in sorted(range(len(phases)), key=lambda i: (steps[i] - exact[i], i)):  # the most cut off comes first
        if phases[i][1] <= left:
            steps[i] += 1
            left -= phases[i][1]
    cheapest = min(range(len(phases)), key=lambda i: phases[i][1])
    steps[cheapest] += int(left // phases[cheapest][1])
    return steps
