"""A plan as JSON and back: what is written beside a run, so that it goes on by the plan that it was begun with."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from stackwise_jax.config.plain import from_plain
from stackwise_jax.config.values import shown
from stackwise_jax.curriculum.phase import Phase
from stackwise_jax.curriculum.shape import Plan
from stackwise_jax.curriculum.table import phase_table
from stackwise_jax.errors import UsageError

Rows = list[dict[str, Any]]


def plan_to_json(plan: Plan) -> Rows:
    """The plan in terms of JSON: the phase table, which says everything about each phase."""
    return json.loads(json.dumps(phase_table(plan)))


def plan_from_json(rows: Any) -> Plan:
    """The inverse of `plan_to_json`. A field that is missing has its default: it is newer than what wrote the plan.

    Raises:
        UsageError: a field of a phase is unknown, of the wrong type, missing and without a default, or does not follow
            from the others; the sentence names it.
    """
    check_rows(rows)
    phases = []
    for i, row in enumerate(rows):
        given = {f.name: row[f.name] for f in dataclasses.fields(Phase) if f.name in row}
        if "objective" in given:
            given["objective"] = {"kind": given["objective"]}
        phases.append(from_plain(Phase, given, f"phase {i}", partial=True))
    about = from_plain(
        _About, {name: rows[0][name] for name in ("stack_sizes", "existing") if name in rows[0]}, "phase 0"
    )
    n, used = len(about.stack_sizes), about.existing.union(*(phase.path for phase in phases))
    if min(about.stack_sizes, default=0) < 1 or not used <= set(range(n)):
        raise UsageError(f"stack_sizes has {n} entries and the phases name the stacks {shown(sorted(used))}")
    plan = Plan(about.stack_sizes, tuple(phases), about.existing)
    if found := first_difference(rows, plan_to_json(plan), partial=True):
        phase, field, there, derived = found
        raise UsageError(f"phase '{phase}': {field} is {there}, and {derived} follows from its other fields")
    return plan


@dataclasses.dataclass(frozen=True)
class _About:
    """What the first phase says about the whole plan."""

    stack_sizes: tuple[int, ...]
    existing: frozenset[int]


def check_rows(rows: Any) -> None:
    """Refuse what is no list of phases.

    Raises:
        UsageError: it is empty, or no list of objects.
    """
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UsageError("it is no list of phases")


def is_complete(rows: Rows) -> bool:
    """Whether a plan can be read back; version 0.1 wrote less than that."""
    return any("stack_sizes" in row for row in rows)


def first_difference(rows: Rows, others: Rows, *, partial: bool = False) -> tuple[str, str, str, str] | None:
    """Where two plans in terms of JSON part: (name of the phase, field, its value in each); None: nowhere.

    partial: fields that `rows` lacks are not compared, also those within fields.
    """
    for row, other in zip(rows, others, strict=False):
        if found := _difference("", row, other, partial):
            return str(row.get("name")), *found
    if len(rows) != len(others):
        longer = max(rows, others, key=len)[min(len(rows), len(others))]
        return str(longer.get("name")), "the number of phases", str(len(rows)), str(len(others))
    return None


def _difference(field: str, here: Any, there: Any, partial: bool) -> tuple[str, str, str] | None:
    """The innermost field that differs, such as optimizer.lr, and both values; None: none does."""
    inner: list[tuple[str, Any, Any]] = []
    if isinstance(here, dict) and isinstance(there, dict):
        names = [name for name in there | here if name in here or not partial]
        inner = [(f"{field}.{n}" if field else n, here.get(n, "nothing"), there.get(n, "nothing")) for n in names]
    elif _are_objects(here) and _are_objects(there) and len(here) == len(there):
        inner = [(f"{field}[{i}]", *pair) for i, pair in enumerate(zip(here, there, strict=True))]
    if inner:
        return next(filter(None, (_difference(*entry, partial) for entry in inner)), None)
    return None if here == there or (here == {} and partial) else (field, shown(here), shown(there))


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
