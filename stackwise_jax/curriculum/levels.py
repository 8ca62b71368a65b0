"""Noise of phases: how much is hidden, and which stack works at which level. Pure Python, no JAX.

Under objective.time depth the level of noise belongs to the place of a stack: the leftmost, at the input, sees the
most. A phase that trains one stage of the depth works at one level, that of the leftmost of its new stacks. Phases in
which the whole depth learns together, and plans that always run the full path, see all levels: a range.
"""

from __future__ import annotations

import math

from stackwise_jax.config.schema import NoiseSchedule, ObjectiveConfig
from stackwise_jax.curriculum.phase import Noise
from stackwise_jax.errors import UsageError


def schedule_share(schedule: NoiseSchedule, u: float) -> float:
    """The share m(u) that a schedule gives at u in 0..1; the formulas of objectives/schedules.py."""
    if schedule == "linear" or u in (0.0, 1.0):  # both ends exactly
        return u
    match schedule:
        case "cosine":
            return 1.0 - math.cos(0.5 * math.pi * u)
        case "exponential":
            return math.expm1(3.0 * u) / math.expm1(3.0)


def stack_levels(objective: ObjectiveConfig, n_stacks: int) -> tuple[float, ...]:
    """The share that is hidden at each stack under objective.time depth, from the input.

    objective.levels, or by schedule from max_fraction at the leftmost stack to min_fraction at the rightmost:
    min + (max - min) * m(1 - k / (n_stacks - 1)).

    Raises:
        UsageError: objective.levels does not have one entry per stack.
    """
    if objective.levels:
        if len(objective.levels) != n_stacks:
            raise UsageError(
                f"objective.levels has {len(objective.levels)} entries and the rack {n_stacks} stacks; write one for "
                "each stack, from the input"
            )
        return tuple(objective.levels)
    low, high, last = objective.min_fraction, objective.max_fraction, max(n_stacks - 1, 1)
    return tuple(_between(low, high, schedule_share(objective.schedule, (last - k) / last)) for k in range(n_stacks))


def noise_cut(objective: ObjectiveConfig, stack: int, n_stacks: int) -> Noise:
    """The cut of the noise that a stack alone is trained on (plan independent), leftmost highest.

    The share that is hidden is cut in equal parts, from 0 to 1 for noise elbo and from min_fraction to max_fraction for
    range. Each reaches objective.interval_overlap parts into both neighbours, and not beyond the whole. The borders of
    neighbours are equal numbers, so that without overlap the cuts of the bound add up to it exactly.
    """
    whole = whole_noise(objective)
    place = n_stacks - 1 - stack  # counted from the least noise
    low, high = max(place - objective.interval_overlap, 0), min(place + 1 + objective.interval_overlap, n_stacks)
    return Noise(
        kind=whole.kind,
        low=_between(whole.low, whole.high, low / n_stacks),
        high=_between(whole.low, whole.high, high / n_stacks),
        schedule=objective.schedule,
    )


def whole_noise(objective: ObjectiveConfig) -> Noise:
    """The noise of a phase whose stacks have no level of their own.

    Raises:
        UsageError: mlm would hide nothing or everything.
    """
    match objective.kind, objective.noise:
        case "clm", _:
            return Noise()
        case "mlm", _:
            share = objective.mask_fraction
            if not 0 < share < 1:
                raise UsageError(f"objective.mask_fraction {share} is no share between 0 and 1; write one such as 0.15")
            return fixed_noise(share)
        case _, "elbo":
            return Noise(kind="elbo", low=0.0, high=1.0, schedule=objective.schedule)
    return Noise(kind="range", low=objective.min_fraction, high=objective.max_fraction, schedule=objective.schedule)


def depth_noise(objective: ObjectiveConfig, stack: int | None, n_stacks: int) -> Noise:
    """The noise under objective.time depth: at the level of one stack, or of all (None).

    All levels: the bound for noise elbo, else a share from the lowest to the highest level.
    """
    levels = stack_levels(objective, n_stacks)
    if stack is not None:
        return fixed_noise(levels[stack])
    if objective.noise == "elbo":
        return whole_noise(objective)
    low, high = min(levels), max(levels)
    return fixed_noise(low) if low == high else Noise(kind="range", low=low, high=high, schedule=objective.schedule)


def fixed_noise(share: float) -> Noise:
    """One share for every sequence."""
    return Noise(kind="fixed", low=share, high=share)


def _between(low: float, high: float, share: float) -> float:
    return low * (1.0 - share) + high * share  # exact at both ends
