"""What every plan has in common: from the bare phases of a plan function to those that the engine runs.

Each phase is completed by what curriculum.stages and the keys of the plan say of it alone (`_own_settings`), and by
what depends on the phases before it: how new stacks begin, which adapters there are (`_settings_by_past`), and whether
optimizer state goes on.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from stackwise_jax.config.bounds import PHASE_STEPS
from stackwise_jax.config.schema import AdaptersConfig, StackWiseConfig, StageConfig, WhenLearns
from stackwise_jax.curriculum.adapter_ranks import adapters_of
from stackwise_jax.curriculum.levels import depth_noise, noise_cut
from stackwise_jax.curriculum.phase import Consistency, Noise, Phase, StackAdapter
from stackwise_jax.curriculum.plans import PLANS, Kind
from stackwise_jax.curriculum.settings import stage_settings
from stackwise_jax.curriculum.shape import Plan, RackShape
from stackwise_jax.errors import UsageError


@dataclass
class Past:
    """What the phases so far leave to those that follow."""

    existing: set[int] = field(default_factory=set)  # stack ids
    passed: set[int] = field(default_factory=set)  # stack ids that were on a path
    learned: set[tuple] = field(default_factory=set)  # ("stack", 0), ("adapter", 0, "trunk"), ("embed",), ("head",)
    adapters: dict[tuple[int, str], StackAdapter] = field(default_factory=dict)

    def note(self, phase: Phase) -> None:
        """Add what a phase leaves."""
        self.existing |= set(phase.path)
        self.passed |= set(phase.path)
        self.adapters |= {(adapter.stack, adapter.name): adapter for adapter in phase.adapters}
        if phase.merge_adapters:  # they begin anew
            self.learned -= {("adapter", adapter.stack, adapter.name) for adapter in phase.adapters}
        self.learned |= _learns(phase)


def complete_plan(config: StackWiseConfig, shape: RackShape, past: Past) -> Plan:
    """The plan that config.curriculum.plan names, its phases completed; they follow those in `past` and join them.

    Raises:
        UsageError: a phase cannot be run, or a key does nothing.
    """
    curriculum, kind = config.curriculum, PLANS[config.curriculum.plan]
    plan, phases = kind.make(shape, config), []
    frozen = _frozen_stacks(shape, plan.stack_sizes)
    if len(curriculum.stages) > len(plan.phases):
        raise UsageError(
            f"curriculum.stages has {len(curriculum.stages)} entries and the plan {len(plan.phases)} phases; leave out "
            "the rest"
        )
    if not past.passed:
        past.existing |= plan.start
    names: set[str] = set()
    for i, bare in enumerate(plan.phases):
        changes = _own_settings(i, plan, kind, config) if "stages" in kind.keys else {}
        changes |= _settings_by_past(bare, config, len(plan.stack_sizes), frozen, past)
        where = _where(config, i, bare)
        if bare.merge_adapters and not past.adapters and curriculum.adapters.load_from is None:
            raise UsageError(f"{where}.merge_adapters is true, and no adapter is there yet; leave it out")
        phase = _replaced(bare, changes, where)
        if "optimizer_state" in kind.keys:
            phase = dataclasses.replace(phase, keep_optimizer=_keeps_state(phase, config, past))
        if curriculum.consistency and phases and phase.suffix == phases[-1].path:
            consistency = Consistency(weight=curriculum.consistency, noise=phases[-1].noise)
            phase = dataclasses.replace(phase, consistency=consistency)
        if "phases" in kind.keys and curriculum.phases[i].init not in (None, phase.init):
            raise UsageError(
                f"{where}.init is {curriculum.phases[i].init}, and no stack joins others here: the first ones begin at "
                "random; leave it out, or write it in the phase whose path brings new stacks"
            )
        _check_phase(phase, names, shape, where)
        names.add(phase.name)
        past.note(phase)
        phases.append(phase)
    if curriculum.consistency and not any(phase.consistency for phase in phases):
        raise UsageError(
            "curriculum.consistency does nothing, since no stage is put before a frozen suffix; write several stages, "
            "overlap 0 and trunk frozen, or leave it out"
        )
    _refuse_idle_adapters(config, phases)
    return dataclasses.replace(plan, phases=tuple(phases))


def _refuse_idle_adapters(config: StackWiseConfig, phases: list[Phase]) -> None:
    """Refuse settings of adapters that no phase of the plan heeds."""
    given = dataclasses.replace(config.curriculum.adapters, load_from=None)
    if given != AdaptersConfig() and not any(phase.adapters for phase in phases):
        raise UsageError("curriculum.adapters does nothing, since no phase has adapters; adapt stacks or leave it out")
    if given.merge and not any(phase.merge_adapters for phase in phases):
        raise UsageError(
            "curriculum.adapters.merge does nothing, since no phase begins with adapters that were there before; leave "
            "it out"
        )


def _where(config: StackWiseConfig, i: int, phase: Phase) -> str:
    """How errors name a phase: by its entry in the configuration, if it has one."""
    if config.curriculum.phases:
        return f"curriculum.phases[{i}]"
    return f"curriculum.stages[{i}]" if i < len(config.curriculum.stages) else f"phase '{phase.name}'"


def _own_settings(i: int, plan: Plan, kind: Kind, config: StackWiseConfig) -> dict[str, Any]:
    """What phase i takes from the keys of its plan and from its entry in curriculum.stages."""
    curriculum, bare, last = config.curriculum, plan.phases[i], len(plan.phases) - 1
    given = i < len(curriculum.stages)
    stage = curriculum.stages[i] if given else StageConfig()
    try:
        changes = stage_settings(config, stage, bare.path, len(plan.stack_sizes), is_last=i == last)
        noise = _noise(i, plan, kind, config, stage)
    except UsageError as error:
        raise UsageError(f"curriculum.stages[{i}]: {error}" if given else str(error)) from None
    if noise is not None:
        changes["noise"] = noise
    if curriculum.steps_growth != 1 and stage.steps is None:
        changes["steps"] = _grown(bare.steps, curriculum.steps_growth, i)
    changes["train_embed"] = _now(curriculum.train_embed, i, last, bare.train_embed)
    changes["train_head"] = _now(curriculum.train_head, i, last, bare.train_head)
    return changes


def _grown(steps: int, growth: float, i: int) -> int:
    """The steps of phase i where each has `growth` times those of the one before."""
    if math.log(steps) + i * math.log(growth) > math.log(PHASE_STEPS):
        raise UsageError(
            f"curriculum.steps_growth is {growth:g} and gives phase {i} more than {PHASE_STEPS} steps; write a number "
            "nearer to 1"
        )
    return max(1, round(steps * growth**i))


def _noise(i: int, plan: Plan, kind: Kind, config: StackWiseConfig, stage: StageConfig) -> Noise | None:
    """The noise of the place in the rack that phase i works at; None: it has none of its own."""
    objective, phase, n_stacks = stage.objective or config.objective, plan.phases[i], len(plan.stack_sizes)
    if kind.noise == "cut":
        if objective.kind != "diffusion" or objective.time == "depth":
            found = f"objective.kind {objective.kind}" if objective.kind != "diffusion" else "objective.time depth"
            raise UsageError(
                f"curriculum.plan independent gives each stack its cut of the noise and does not go with {found}; "
                "write kind diffusion and time none or input"
            )
        return None if stage.level is not None else noise_cut(objective, phase.path[0], n_stacks)
    if kind.noise != "stage" or objective.time != "depth" or stage.level is not None:
        return None
    new = set(phase.path).difference(*(earlier.path for earlier in plan.phases[:i]))
    if len(new) == n_stacks:
        return None
    return depth_noise(objective, min(new & phase.train or phase.train or phase.path), n_stacks)


def _now(when: WhenLearns, i: int, last: int, auto: bool) -> bool:
    return {"auto": auto, "always": True, "first": i == 0, "last": i == last, "never": False}[when]


def _settings_by_past(
    phase: Phase, config: StackWiseConfig, n_stacks: int, frozen: frozenset[int], past: Past
) -> dict[str, Any]:
    """What a phase takes from the phases before it.

    An adapter stays on its stack once it is made, also where it does not learn, and keeps the rank it was made with.
    """
    curriculum, path, adapt = config.curriculum, set(phase.path), phase.adapt
    kept = {key: adapter for key, adapter in past.adapters.items() if adapter.stack in path}
    adapters: dict[tuple[int, str], StackAdapter] = {(a.stack, a.name): a for a in phase.adapters} | kept
    if curriculum.trunk == "adapt":
        resting = path - phase.train - frozen
        arrival = bool(past.passed) and not past.passed >= path
        made = adapters_of(curriculum.adapters, resting, n_stacks, arrival)
        adapters = {(a.stack, a.name): a for a in made} | kept
        adapt = frozenset(stack for stack, _ in adapters) & resting
        if resting and not adapt:
            raise UsageError(
                "curriculum.trunk is adapt and no stack has an adapter; write curriculum.adapters.rank or trunk_rank "
                "above 0"
            )
    merge = phase.merge_adapters or (curriculum.adapters.merge and bool(kept))
    # the first stacks of a rack have nothing to be a copy of or an identity beside; a run that starts from another has
    joins = bool(path - past.existing) and bool(past.existing or config.run.init_from)
    return {
        "adapt": adapt,
        "adapters": tuple(adapters[key] for key in sorted(adapters)),
        "merge_adapters": merge,
        "adapter_lr": curriculum.adapters.lr if adapt else None,
        "init": phase.init if joins else "random",
    }


def _learns(phase: Phase) -> set[tuple]:
    """What learns in a phase, as in Past.learned."""
    learns = {("stack", stack) for stack in phase.train}
    learns |= {("adapter", a.stack, a.name) for a in phase.adapters if a.stack in phase.adapt}
    return learns | {(end,) for end, on in (("embed", phase.train_embed), ("head", phase.train_head)) if on}


def _keeps_state(phase: Phase, config: StackWiseConfig, past: Past) -> bool:
    """Whether what learned before goes on with its optimizer state.

    auto: where stacks or adapters learned before, or the plan says so of any item.
    """
    again = _learns(phase) & past.learned
    if phase.merge_adapters:
        again = {item for item in again if item[0] != "adapter"}
    match config.curriculum.optimizer_state:
        case "auto":
            return bool(again) and (phase.keep_optimizer or any(item[0] in ("stack", "adapter") for item in again))
        case "keep":
            return bool(again)
    return False


def _replaced(phase: Phase, changes: dict[str, Any], where: str) -> Phase:
    try:
        return dataclasses.replace(phase, **changes)
    except UsageError as error:
        raise UsageError(str(error) if where in str(error) else f"{where}: {error}") from None


def _check_phase(phase: Phase, names: set[str], shape: RackShape, where: str) -> None:
    """Refuse what a phase alone does not know: the names of the earlier ones and what the rack ties together."""
    if phase.name in names:
        raise UsageError(f"{where}.name is '{phase.name}' as in an earlier phase; write another name")
    if shape.tied and phase.train_head and not phase.train_embed:
        # A tied head is the embedding: training it would change the input of a prefix that is taken as fixed.
        raise UsageError(
            f"{where}: the head learns and the embedding, which is tied to it, does not; write "
            "model.tie_embeddings false, curriculum.plan rackwise, or a phase that sets train_embed too"
        )


def _frozen_stacks(shape: RackShape, sizes: tuple[int, ...]) -> frozenset[int]:
    """Ids, after regrouping to `sizes`, of the stacks that never learn."""
    blocks = [stack in shape.frozen for stack, count in enumerate(shape.block_counts) for _ in range(count)]
    firsts = accumulate(sizes[:-1], initial=0)
    return frozenset(stack for stack, first in enumerate(firsts) if blocks[first])
