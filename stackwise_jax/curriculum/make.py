"""From a configuration to the plan that the engine runs: the entries of a curriculum, one after another."""

from __future__ import annotations

import dataclasses

from stackwise_jax.config.bounds import COUNTER, PHASES
from stackwise_jax.config.checks import parse_budget
from stackwise_jax.config.schema import AdaptersConfig, CurriculumConfig, PlanConfig, StackWiseConfig
from stackwise_jax.config.values import shown
from stackwise_jax.curriculum.budget import scale_steps
from stackwise_jax.curriculum.complete import Past, complete_plan
from stackwise_jax.curriculum.phase import Phase
from stackwise_jax.curriculum.plans import EVERY_PLAN, PLANS, config_shape
from stackwise_jax.curriculum.shape import Plan, RackShape
from stackwise_jax.errors import UsageError


def make_plan(config: StackWiseConfig, shape: RackShape | None = None) -> Plan:
    """The plan of the section curriculum, for a rack of this shape (None: the one that the section model describes).

    The entries of curriculum.plans run one after another on the same stacks; what one of them grew or trained is there
    for the next. A phase whose name an earlier entry has used gets the number of its entry in front.

    Raises:
        UsageError: a phase cannot be run on this rack, a key does nothing, or the budget is too small; the sentence
            says where and what to write instead.
    """
    shape = shape or config_shape(config)
    past, made, names = Past(), [], set()
    for i, entry in enumerate(_entries(config)):
        try:
            plan = complete_plan(entry, shape, past)
        except UsageError as error:
            raise UsageError(f"curriculum.plans[{i}]: {error}" if config.curriculum.plans else str(error)) from None
        if made and plan.stack_sizes != made[0].stack_sizes:
            raise UsageError(
                f"curriculum.plans[{i}] cuts the rack into stacks of {_blocks(plan)} blocks and the first entry into "
                f"stacks of {_blocks(made[0])}; write plans that do it alike, or a model.architecture that suits both"
            )
        own = [dataclasses.replace(p, name=f"{i} {p.name}") if p.name in names else p for p in plan.phases]
        names |= {phase.name for phase in own}
        made.append(dataclasses.replace(plan, phases=tuple(own)))
        if (count := sum(len(plan.phases) for plan in made)) > PHASES:
            raise UsageError(f"curriculum.plans[{i}] makes {count:,} phases in all; write at most {PHASES:,}")
    phases = _within_budget(config, shape, made)
    if (total := sum(phase.steps for phase in phases)) > COUNTER:
        key = "steps" if config.curriculum.budget is None else "budget"
        raise UsageError(f"curriculum.{key} comes to {shown(total)} steps in all; write at most {COUNTER} for a run")
    return Plan(made[0].stack_sizes, phases, made[0].start)


def _entries(config: StackWiseConfig) -> list[StackWiseConfig]:
    """The configuration of each entry of curriculum.plans, or the only one. Keys that do nothing are refused."""
    curriculum, entries = config.curriculum, [config]
    if curriculum.plans:
        default = PlanConfig()
        loading = dataclasses.replace(default.adapters, load_from=curriculum.adapters.load_from)
        for key in _differing(curriculum, dataclasses.replace(default, adapters=loading)):
            raise UsageError(
                f"curriculum.{key} does nothing beside curriculum.plans; write it into the entries of plans"
            )
        own = [
            {key.name: getattr(entry, key.name) for key in dataclasses.fields(default)} for entry in curriculum.plans
        ]
        entries = [dataclasses.replace(config, curriculum=CurriculumConfig(**keys)) for keys in own]
    for i, entry in enumerate(entries):
        where = f"curriculum.plans[{i}]." if curriculum.plans else "curriculum."
        _refuse_unused(entry.curriculum, where)
        if curriculum.plans and entry.curriculum.adapters.load_from is not None:
            raise UsageError(f"{where}adapters.load_from is for the whole run; write curriculum.adapters.load_from")
    _refuse_overlap(config, entries)
    return entries


def _refuse_overlap(config: StackWiseConfig, entries: list[StackWiseConfig]) -> None:
    """Intervals of noise exist only where stacks have their cuts of it."""
    given = [("", config.objective, any(PLANS[entry.curriculum.plan].noise == "cut" for entry in entries))]
    for entry in entries:
        cut = PLANS[entry.curriculum.plan].noise == "cut"
        own = [*entry.curriculum.stages, *entry.curriculum.phases]
        given += [("of a phase: ", one.objective, cut) for one in own if one.objective is not None]
    for where, objective, cut in given:
        if objective.interval_overlap and not cut:
            raise UsageError(f"{where}objective.interval_overlap does nothing outside plan independent; leave it out")


def _refuse_unused(curriculum: CurriculumConfig, where: str) -> None:
    """Refuse keys that mean nothing for the plan."""
    used = PLANS[curriculum.plan].keys | EVERY_PLAN
    for key in _differing(curriculum, PlanConfig()):
        if key not in used:
            plans = ", ".join(name for name, kind in PLANS.items() if key in kind.keys)
            raise UsageError(
                f"{where}{key} does nothing under {where}plan {curriculum.plan}; leave it out or use a plan that heeds "
                f"it: {plans}"
            )
    if curriculum.trunk == "frozen" and "trunk" in used:
        for key in _differing(curriculum.adapters, AdaptersConfig()):
            raise UsageError(f"{where}adapters.{key} does nothing under {where}trunk frozen; write trunk adapt")


def _differing(given: PlanConfig | AdaptersConfig, default: PlanConfig | AdaptersConfig) -> list[str]:
    """The names of the keys of `default` that have another value in `given`."""
    names = [key.name for key in dataclasses.fields(default)]
    return [name for name in names if getattr(given, name) != getattr(default, name)]


def _within_budget(config: StackWiseConfig, shape: RackShape, made: list[Plan]) -> tuple[Phase, ...]:
    """The phases of all entries, with their steps scaled to curriculum.budget if there is one."""
    curriculum, phases = config.curriculum, tuple(phase for plan in made for phase in plan.phases)
    if curriculum.budget is None:
        for i, entry in enumerate(curriculum.plans):
            if entry.share != 1:
                raise UsageError(
                    f"curriculum.plans[{i}].share is {entry.share:g} and there is no curriculum.budget to share; write "
                    "one, or steps in the entries"
                )
        return phases
    amount, unit = parse_budget(curriculum.budget)

    def cost(phase: Phase) -> int:
        match unit:
            case "steps":
                return 1
            case "tokens":
                return config.data.batch_size * config.data.seq_len
        if shape.step_flops is None:
            raise UsageError(
                f"curriculum.budget is {curriculum.budget}, and the FLOPs of a step are not known here; write a budget "
                "in steps or tokens, or give a RackShape with step_flops"
            )
        return shape.step_flops(made[0].stack_sizes, phase)

    shares = [entry.share for entry in curriculum.plans] or [1.0]
    scaled = scale_steps([[(phase.steps, cost(phase)) for phase in plan.phases] for plan in made], shares, amount)
    flat = [steps for entry in scaled for steps in entry]
    return tuple(dataclasses.replace(phase, steps=steps) for phase, steps in zip(phases, flat, strict=True))


def _blocks(plan: Plan) -> str:
    return " + ".join(map(str, plan.stack_sizes))
