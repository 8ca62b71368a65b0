"""Plans: pure functions from a rack's shape and a configuration to a list of phases.

A new training mode is a new function here and a line in PLANS; the engine runs any list and knows no plan by name. A
plan says which stacks each phase passes and which learn. What is the same for every plan (adapters, stages with
settings of their own, budgets, optimizer state) is added by make_plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from stackwise_jax.config.bounds import PASSES, PHASES
from stackwise_jax.config.schema import PhaseConfig, StackWiseConfig
from stackwise_jax.curriculum.adapter_ranks import adapters_of
from stackwise_jax.curriculum.phase import Phase
from stackwise_jax.curriculum.settings import stage_settings, task_settings
from stackwise_jax.curriculum.shape import Plan, RackShape, ids_text
from stackwise_jax.errors import UsageError


def rackwise(shape: RackShape, config: StackWiseConfig) -> Plan:
    """End to end: one phase in which everything that is not frozen learns."""
    stacks = tuple(range(len(shape.block_counts)))
    phase = _phase(
        config, name="rack", path=stacks, train=frozenset(shape.learnable), train_embed=True, train_head=True
    )
    return Plan(shape.block_counts, (phase,), frozenset(stacks))


def stackwise(shape: RackShape, config: StackWiseConfig) -> Plan:
    """From the input to the head, stage by stage over the stacks that are not frozen, with the head.

    A stage is curriculum.stacks_per_stage stacks; the tokens travel up to it. The curriculum.overlap stacks before it
    learn on beside it. The embedding learns as long as the first of the stacks does.
    """
    first = _learnable(shape)[0]
    phases = tuple(
        _phase(
            config,
            name=_name(new),
            path=tuple(range(max(new) + 1)),
            train=frozenset(train),
            train_embed=first in train,
            train_head=True,
        )
        for new, train in _stages(shape.learnable, config)
    )
    return Plan(shape.block_counts, phases, frozenset(range(len(shape.block_counts))))


def layerwise(shape: RackShape, config: StackWiseConfig) -> Plan:
    """Stackwise over the rack regrouped to one block per stack."""
    return stackwise(_regrouped(shape, 1), config)


def blockwise(shape: RackShape, config: StackWiseConfig) -> Plan:
    """Stackwise over the rack regrouped to curriculum.block_size blocks per stack."""
    return stackwise(_regrouped(shape, config.curriculum.block_size), config)


def append(shape: RackShape, config: StackWiseConfig) -> Plan:
    """Stackwise from an empty rack: each stack is grown when the first phase that needs it begins."""
    return dataclasses.replace(stackwise(shape, config), start=frozenset())


def prepend(shape: RackShape, config: StackWiseConfig) -> Plan:
    """From the head to the input: each stage puts new stacks in front of those that are there.

    The path runs from the newest stack to the last, so there is no prefix to cache; the gradient passes the frozen
    stacks behind. Embedding and head learn in every phase. A single stage over all stacks is rackwise.
    """
    n_stacks = len(shape.block_counts)
    left = min(_learnable(shape))
    phases = tuple(
        _phase(
            config,
            name=_name(sorted(new)),
            # frozen stacks at the input join with the last stage, so that the whole rack ends up in use
            path=tuple(range(0 if left in new else min(new), n_stacks)),
            train=frozenset(train),
            train_embed=True,
            train_head=True,
        )
        for new, train in _stages(shape.learnable[::-1], config)
    )
    return Plan(shape.block_counts, phases, frozenset())


def grow(shape: RackShape, config: StackWiseConfig) -> Plan:
    """From the input to the head from an empty rack, and everything that is there learns in every phase."""
    phases = tuple(
        _phase(
            config,
            name=_name(new),
            path=tuple(range(max(new) + 1)),
            train=frozenset(stack for stack in _learnable(shape) if stack <= max(new)),
            train_embed=True,
            train_head=True,
        )
        for new, _ in _stages(_learnable(shape), config)
    )
    return Plan(shape.block_counts, phases, frozenset())


def keep_last(shape: RackShape, config: StackWiseConfig) -> Plan:
    """As append, but the last stack of the rack stays on top of every stage.

    The first phase trains the first stage and the last stack, with the embedding. New stacks are put between; the last
    one goes on learning if curriculum.last_learns. A rack with no other stack to train is trained end to end.
    """
    last = len(shape.block_counts) - 1
    below = [stack for stack in _learnable(shape) if stack != last]
    if not below:
        return dataclasses.replace(rackwise(shape, config), start=frozenset())
    phases = []
    for new, train in _stages(below, config):
        top = {last} - shape.frozen if config.curriculum.last_learns or not phases else set()
        phases.append(
            _phase(
                config,
                name=_name((*new, last) if not phases else new),
                path=(*range(max(new) + 1), last),
                train=frozenset(train) | top,
                train_embed=below[0] in train,
                train_head=True,
            )
        )
    return Plan(shape.block_counts, tuple(phases), frozenset())


def cycle(shape: RackShape, config: StackWiseConfig) -> Plan:
    """Block coordinate descent: the full path, and the stacks learn in turns, curriculum.rounds times over.

    A turn is curriculum.stacks_per_stage neighbouring stacks, with the head; the embedding learns with the first stack.
    Optimizer state waits for the next turn, and the head's goes on from turn to turn.
    """
    stacks, rounds = tuple(range(len(shape.block_counts))), config.curriculum.rounds
    first, turns = _learnable(shape)[0], _stages(shape.learnable, config)
    most = min(PHASES, PASSES // len(stacks)) // len(turns)
    if rounds > most:
        raise UsageError(f"curriculum.rounds is {rounds}, with {len(turns)} phases each; write at most {most}")
    phases = tuple(
        _phase(
            config,
            name=f"round {turn} {_name(new)}" if rounds > 1 else _name(new),
            path=stacks,
            train=frozenset(new),
            train_embed=first in new,
            train_head=True,
            keep_optimizer=True,
        )
        for turn in range(rounds)
        for new, _ in turns
    )
    return Plan(shape.block_counts, phases, frozenset(stacks))


def independent(shape: RackShape, config: StackWiseConfig) -> Plan:
    """Each stack alone between embedding and head, on tokens hidden within its own cut of the noise.

    As in DiffusionBlocks (Shing et al. 2025). The cuts are those of levels.noise_cut, leftmost highest. Embedding and
    head are shared, and learn in every phase.
    """
    phases = tuple(
        _phase(
            config,
            name=_name([stack]),
            path=(stack,),
            train=frozenset({stack}),
            train_embed=True,
            train_head=True,
        )
        for stack in _learnable(shape)
    )
    return Plan(shape.block_counts, phases, frozenset(range(len(shape.block_counts))))


def fusion(shape: RackShape, config: StackWiseConfig) -> Plan:
    """One phase over all stacks in which those of curriculum.learn (empty: the last) learn, with the head.

    The others are the backbone, frozen or adapted. The embedding learns with the first stack.
    """
    stacks = tuple(range(len(shape.block_counts)))
    learn = config.curriculum.learn or _learnable(shape)[-1:]
    if strange := sorted(set(learn) - set(shape.learnable)):
        raise UsageError(
            f"curriculum.learn names the stacks {strange}, which do not exist or have freeze_blocks; write some of "
            f"{ids_text(shape.learnable)}"
        )
    phase = _phase(
        config,
        name="fusion",
        path=stacks,
        train=frozenset(learn),
        train_embed=_learnable(shape)[0] in learn,
        train_head=True,
    )
    return Plan(shape.block_counts, (phase,), frozenset(stacks))


def joint(shape: RackShape, config: StackWiseConfig) -> Plan:
    """One phase over all stacks in which everything learns; with curriculum.trunk adapt the adapters and the head."""
    adapt = config.curriculum.trunk == "adapt"
    (phase,) = rackwise(shape, config).phases
    train = frozenset() if adapt else phase.train
    phase = dataclasses.replace(phase, name="joint", train=train, train_embed=not adapt)
    return Plan(shape.block_counts, (phase,), frozenset(phase.path))


def custom(shape: RackShape, config: StackWiseConfig) -> Plan:
    """The phases that curriculum.phases spells out, in its order.

    All stacks exist from the start, unless a phase or the curriculum says how new ones begin (init): then the rack
    starts empty, and each stack is grown by the first phase that passes it.
    """
    entries, phases = config.curriculum.phases, []
    if not entries:
        raise UsageError("curriculum.plan is custom and curriculum.phases is empty; write its phases or another plan")
    earlier: frozenset[int] = frozenset()
    for i, entry in enumerate(entries):
        try:
            phases.append(_custom_phase(i, entry, shape, config, earlier))
        except UsageError as error:
            raise UsageError(f"curriculum.phases[{i}]: {error}") from None
        earlier |= set(phases[-1].path)
    grows = config.curriculum.init != "random" or any(entry.init for entry in entries)
    return Plan(shape.block_counts, tuple(phases), frozenset(() if grows else range(len(shape.block_counts))))


@dataclass(frozen=True)
class Kind:
    """A plan function, and what of the configuration counts for it."""

    make: Callable[[RackShape, StackWiseConfig], Plan]
    keys: frozenset[str] = frozenset()  # of PlanConfig, beside those of every plan
    # whole: all of it; stage: under objective.time depth the level of the new stacks; cut: the cut of the path's stack
    noise: Literal["whole", "stage", "cut"] = "whole"


EVERY_PLAN = frozenset({"plan", "steps", "frozen", "frozen_stacks"})  # keys of PlanConfig that count for each of them
_ONE = frozenset({"stages", "train_embed", "train_head", "optimizer_state"})
_MANY = _ONE | {"steps_growth", "decay"}
_STAGED = _MANY | {"stacks_per_stage", "overlap", "trunk", "adapters"}
PLANS: dict[str, Kind] = {
    "rackwise": Kind(rackwise, _ONE),
    "stackwise": Kind(stackwise, _STAGED, "stage"),
    "layerwise": Kind(layerwise, _STAGED, "stage"),
    "blockwise": Kind(blockwise, _STAGED | {"block_size"}, "stage"),
    "append": Kind(append, _STAGED | {"init"}, "stage"),
    "prepend": Kind(prepend, _STAGED | {"init", "consistency"}, "stage"),
    "grow": Kind(grow, _MANY | {"stacks_per_stage", "init"}),
    "keep_last": Kind(keep_last, _STAGED | {"init", "last_learns"}, "stage"),
    "cycle": Kind(cycle, _MANY | {"stacks_per_stage", "rounds"}),
    "independent": Kind(independent, _MANY, "cut"),
    "fusion": Kind(fusion, _ONE | {"learn", "trunk", "adapters"}),
    "joint": Kind(joint, _ONE | {"trunk", "adapters"}),
    "custom": Kind(custom, frozenset({"phases", "init", "adapters", "decay"})),
}


def config_shape(config: StackWiseConfig) -> RackShape:
    """The shape of the rack that the section model describes: equal stacks, none frozen."""
    depth = config.model.architecture
    return RackShape((depth.blocks_per_stack,) * depth.n_stacks, tied=config.model.tie_embeddings)


def _phase(config: StackWiseConfig, **given: Any) -> Phase:
    """A phase with everything that is not given taken from the configuration."""
    settings = {
        "frozen": config.curriculum.frozen,
        "init": config.curriculum.init,
        "steps": config.curriculum.steps,
        "optimizer": config.optimizer,
        "seed": config.run.seed,
    }
    return Phase(**(task_settings(config.objective) | settings | given))


def _custom_phase(
    i: int, entry: PhaseConfig, shape: RackShape, config: StackWiseConfig, earlier: frozenset[int]
) -> Phase:
    """Phase i; `earlier` are the stacks that the phases before it pass."""
    n_stacks = len(shape.block_counts)
    stacks = tuple(range(n_stacks))
    path, train, adapt = tuple(entry.path) or stacks, frozenset(entry.train), frozenset(entry.adapt)
    if unknown := sorted((set(path) | train | adapt) - set(stacks)):
        raise UsageError(f"stacks {unknown} do not exist; the rack has the stacks {ids_text(stacks)}")
    for key, named in (("train", train), ("adapt", adapt)):
        if frozen := sorted(named & shape.frozen):
            raise UsageError(f"stacks {frozen} have freeze_blocks and cannot learn; leave them out of {key}")
    arrival = bool(earlier) and not earlier >= set(path)
    adapters = adapters_of(config.curriculum.adapters, adapt, n_stacks, arrival)
    given: dict[str, Any] = {
        "name": f"phase {i}",
        "path": path,
        "train": train,
        "adapt": adapt,
        "train_embed": entry.train_embed,
        "train_head": entry.train_head,
        "adapters": tuple(adapter for adapter in adapters if adapter.stack in path),
        **({"init": entry.init} if entry.init else {}),
        "keep_optimizer": entry.keep_optimizer,
        "merge_adapters": entry.merge_adapters,
    }
    is_last = i == len(config.curriculum.phases) - 1
    return _phase(config, **(given | stage_settings(config, entry, path, n_stacks, is_last=is_last)))


def _learnable(shape: RackShape) -> tuple[int, ...]:
    if not shape.learnable:
        raise UsageError("every stack has freeze_blocks, so no stack is left to train; use curriculum.plan rackwise")
    return shape.learnable


def _stages(order: Sequence[int], config: StackWiseConfig) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Stacks in the order of their stages, as (new stacks, learning stacks); both in that order."""
    sizes, stages, done = config.curriculum.stacks_per_stage, [], 0
    if len(order) ** 2 // sizes[-1] > PASSES:
        raise UsageError(
            f"model.architecture.n_stacks is {len(order)}, and as many phases would pass {len(order) ** 2:,} stacks in "
            "all; write fewer stacks of more blocks, or larger curriculum.stacks_per_stage"
        )
    while done < len(order):
        size = sizes[min(len(stages), len(sizes) - 1)]
        new = tuple(order[done : done + size])
        stages.append((new, tuple(order[max(done - config.curriculum.overlap, 0) : done]) + new))
        done += size
    if len(sizes) > max(len(stages), 1):
        raise UsageError(
            f"curriculum.stacks_per_stage has {len(sizes)} entries, and the first {len(stages)} already hold all "
            f"{len(order)} stacks; leave out the rest"
        )
    return stages


def _name(stacks: Sequence[int]) -> str:
    return f"stack{'s' if len(stacks) > 1 else ''} {ids_text(stacks)}"


def _regrouped(shape: RackShape, size: int) -> RackShape:
    """The same blocks in stacks of `size`; no stack holds both frozen and learning blocks."""
    counts: list[int] = []
    frozen: set[int] = set()
    runs = groupby(enumerate(shape.block_counts), key=lambda stack: stack[0] in shape.frozen)
    for is_frozen, run in runs:
        n_blocks = sum(count for _, count in run)
        if n_blocks % size:
            whole = n_blocks == sum(shape.block_counts)
            what = f"the rack's {n_blocks} blocks" if whole else f"{n_blocks} neighbouring blocks, frozen apart,"
            raise UsageError(f"curriculum.block_size {size} does not divide {what}; write a divisor of {n_blocks}")
        if is_frozen:
            frozen |= set(range(len(counts), len(counts) + n_blocks // size))
        counts += [size] * (n_blocks // size)
    return dataclasses.replace(shape, block_counts=tuple(counts), frozen=frozenset(frozen))
