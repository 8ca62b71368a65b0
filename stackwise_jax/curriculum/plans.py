"""Plans: pure functions from a rack's shape and a configuration to a list of phases.

A new training mode is a new function here and a line in PLANS; the engine runs any list and knows no plan by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from stackwise_jax.config.schema import ObjectiveConfig, PhaseConfig, StackWiseConfig
from stackwise_jax.curriculum.phase import AttentionMode, Noise, Objective, Phase
from stackwise_jax.errors import UsageError


@dataclass(frozen=True)
class RackShape:
    """What a plan has to know of a rack."""

    block_counts: tuple[int, ...]  # blocks of each stack, input to head
    frozen: frozenset[int] = field(default_factory=frozenset)  # stack ids that never learn
    tied: bool = False  # the head's kernel is the embedding


@dataclass(frozen=True)
class Plan:
    """What the engine runs: first the rack is regrouped to `stack_sizes`, then one phase follows the other."""

    stack_sizes: tuple[int, ...]  # blocks per stack after regrouping
    phases: tuple[Phase, ...]
    start: frozenset[int]  # stack ids that exist before the first phase


def rackwise(shape: RackShape, config: StackWiseConfig) -> Plan:
    """End to end: one phase in which everything that is not frozen learns."""
    stacks = tuple(range(len(shape.block_counts)))
    phase = _phase(
        config, name="rack", path=stacks, train=frozenset(stacks) - shape.frozen, train_embed=True, train_head=True
    )
    return Plan(shape.block_counts, (phase,), frozenset(stacks))


def stackwise(shape: RackShape, config: StackWiseConfig) -> Plan:
    """One phase per stack that is not frozen: the tokens travel up to it, and it learns with the head.

    The embedding learns in the first phase only, whichever stack that is.
    """
    learning = [stack for stack in range(len(shape.block_counts)) if stack not in shape.frozen]
    if not learning:
        raise UsageError("every stack has freeze_blocks, so no stack is left to train; use curriculum.plan rackwise")
    phases = tuple(
        _phase(
            config,
            name=f"stack {stack}",
            path=tuple(range(stack + 1)),
            train=frozenset({stack}),
            train_embed=stack == learning[0],
            train_head=True,
        )
        for stack in learning
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


def custom(shape: RackShape, config: StackWiseConfig) -> Plan:
    """The phases that curriculum.phases spells out, in its order."""
    if not config.curriculum.phases:
        raise UsageError("curriculum.plan is custom and curriculum.phases is empty; write its phases or another plan")
    phases = []
    for i, entry in enumerate(config.curriculum.phases):
        try:
            phases.append(_custom_phase(i, entry, shape, config))
        except UsageError as error:
            raise UsageError(f"curriculum.phases[{i}]: {error}") from None
        name = phases[-1].name
        if name in [phase.name for phase in phases[:-1]]:
            raise UsageError(f"curriculum.phases[{i}].name is '{name}' as in an earlier phase; write another name")
    return Plan(shape.block_counts, tuple(phases), frozenset(range(len(shape.block_counts))))


PLANS: dict[str, Callable[[RackShape, StackWiseConfig], Plan]] = {
    "rackwise": rackwise,
    "stackwise": stackwise,
    "layerwise": layerwise,
    "blockwise": blockwise,
    "append": append,
    "custom": custom,
}


def config_shape(config: StackWiseConfig) -> RackShape:
    """The shape of the rack that the section model describes: equal stacks, none frozen."""
    depth = config.model.architecture
    return RackShape((depth.blocks_per_stack,) * depth.n_stacks, tied=config.model.tie_embeddings)


def make_plan(config: StackWiseConfig, shape: RackShape | None = None) -> Plan:
    """The plan that curriculum.plan names, for a rack of this shape (None: the one that the section model describes).

    Raises:
        UsageError: a phase cannot be run on this rack; the sentence says which and what to write instead.
    """
    shape = shape or config_shape(config)
    plan = PLANS[config.curriculum.plan](shape, config)
    for i, phase in enumerate(plan.phases):
        where = f"curriculum.phases[{i}]" if config.curriculum.plan == "custom" else f"phase '{phase.name}'"
        # A tied head is the embedding: training it would change the input of a prefix that is taken as fixed.
        if shape.tied and phase.train_head and not phase.train_embed:
            raise UsageError(
                f"{where}: the head learns and the embedding, which is tied to it, does not; write "
                "model.tie_embeddings false, curriculum.plan rackwise, or a phase that sets train_embed too"
            )
    return plan


def phase_table(plan: Plan) -> list[dict[str, Any]]:
    """One JSON-able dict per phase: what is written to phases.json."""
    rows, existing = [], set(plan.start)
    for i, phase in enumerate(plan.phases):
        row = {
            "phase": i,
            "name": phase.name,
            "path": list(phase.path),
            "blocks": [plan.stack_sizes[stack] for stack in phase.path],
            "grow": sorted(set(phase.path) - existing),
            "prefix": list(phase.prefix),
            "window": list(phase.window),
            "train": sorted(phase.train),
            "train_embed": phase.train_embed,
            "train_head": phase.train_head,
            "objective": phase.objective.kind,
            "noise": dataclasses.asdict(phase.noise),
            "attention_mode": phase.attention_mode,
            "corruption": phase.corruption,
            "frozen": phase.frozen,
            "steps": phase.steps,
            "seed": phase.seed,
            "optimizer": dataclasses.asdict(phase.optimizer),
        }
        existing |= set(phase.path)
        rows.append(row)
    return rows


def format_phase_table(plan: Plan) -> str:
    """The phase table as plain text: a line on the rack, a line of column names, a line per phase."""
    lines = [["phase", "name", "path", "prefix", "grow", "learns", "objective", "attention", "frozen", "steps", "lr"]]
    for row in phase_table(plan):
        learns = [name for name in ("embed", "head") if row[f"train_{name}"]]
        if row["train"]:
            learns.insert(int(row["train_embed"]), _ids(row["train"]))
        cells = (
            row["phase"],
            row["name"],
            _ids(row["path"]),
            _ids(row["prefix"]),
            _ids(row["grow"]),
            " ".join(learns),
            _task(plan.phases[row["phase"]]),
            row["attention_mode"] or "model",
            row["frozen"],
            row["steps"],
            f"{row['optimizer']['lr']:g}",
        )
        lines.append([str(cell) for cell in cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    sizes = plan.stack_sizes
    rack = f"{len(sizes)} stacks, {sum(sizes)} blocks ({' + '.join(map(str, sizes))})"
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([rack, *table])


def _phase(config: StackWiseConfig, *, objective: ObjectiveConfig | None = None, **given: Any) -> Phase:
    """A phase with everything that is not given taken from the configuration."""
    objective = objective or config.objective
    settings = {
        "objective": Objective(kind=objective.kind),
        "noise": _noise(objective),
        "attention_mode": _attention_mode(objective),
        "corruption": "auto" if objective.kind == "clm" else objective.corruption,
        "frozen": config.curriculum.frozen,
        "steps": config.curriculum.steps,
        "optimizer": config.optimizer,
        "seed": config.run.seed,
    }
    return Phase(**(settings | given))


def _noise(objective: ObjectiveConfig) -> Noise:
    if objective.kind == "clm":
        return Noise()
    if objective.kind == "mlm":
        return Noise(kind="fixed", low=objective.mask_fraction, high=objective.mask_fraction)
    if objective.noise == "elbo":
        return Noise(kind="elbo", low=0.0, high=1.0, schedule=objective.schedule)
    return Noise(kind="range", low=objective.min_fraction, high=objective.max_fraction, schedule=objective.schedule)


def _attention_mode(objective: ObjectiveConfig) -> AttentionMode | None:
    if objective.attention_mode == "model":
        return None
    if objective.attention_mode == "auto":
        return "causal" if objective.kind == "clm" else "bidirectional"
    return objective.attention_mode


def _custom_phase(i: int, entry: PhaseConfig, shape: RackShape, config: StackWiseConfig) -> Phase:
    n_stacks = len(shape.block_counts)
    stacks = tuple(range(n_stacks))
    path, train = tuple(entry.path) or stacks, frozenset(entry.train)
    if unknown := sorted((set(path) | train) - set(stacks)):
        raise UsageError(f"stacks {unknown} do not exist; the rack has the stacks {_ids(stacks)}")
    if frozen := sorted(train & shape.frozen):
        raise UsageError(f"stacks {frozen} have freeze_blocks and cannot learn; leave them out of train")
    changes = {"steps": entry.steps, "frozen": entry.frozen}
    if entry.lr is not None:
        changes["optimizer"] = dataclasses.replace(config.optimizer, lr=entry.lr)
    return _phase(
        config,
        objective=entry.objective,
        name=entry.name or f"phase {i}",
        path=path,
        train=train,
        train_embed=entry.train_embed,
        train_head=entry.train_head,
        **{key: value for key, value in changes.items() if value is not None},
    )


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
    return RackShape(tuple(counts), frozenset(frozen), shape.tied)


def _task(phase: Phase) -> str:
    """The objective with its noise and corruption, in few words."""
    noise = phase.noise
    words = [phase.objective.kind]
    match noise.kind:
        case "fixed":
            words += [f"{noise.low:g}"]
        case "range":
            words += [f"{noise.low:g}-{noise.high:g}", noise.schedule]
        case "elbo":
            words += ["elbo", noise.schedule]
    if phase.corruption != "auto":
        words += [phase.corruption]
    return " ".join(words)


def _ids(stacks: Sequence[int]) -> str:
    """Stack ids for people: 0-3 for neighbours, else 0,2,5; - for none."""
    if len(stacks) > 1 and list(stacks) == list(range(stacks[0], stacks[-1] + 1)):
        return f"{stacks[0]}-{stacks[-1]}"
    return ",".join(map(str, stacks)) or "-"
