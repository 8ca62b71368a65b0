"""What the command plan shows to people: a line per kind of phase, what does not fit, and what would help."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console

from stackwise_jax.curriculum import Phase
from stackwise_jax.memory.budget import limits_of
from stackwise_jax.reporting.tables import Columns, clock, count, make_console, make_table, print_line, size

SOURCES = {"shapes": "from shapes", "compiled": "from the compiled step", "formula": "by formula"}


def print_run_plan(plan: Any, console: Console | None = None) -> None:
    """Print an engine.planner.RunPlan: phases, parts, the peak in each place, and whether it fits."""
    console = console or make_console()
    rows = [_row(list(run)) for _, run in itertools.groupby(plan.phases, key=_kind)]
    columns: Columns = (
        ("phases", "name", str),
        ("device", "device", size),
        ("host", "host", size),
        ("disk", "disk", size),
        ("FLOPs", "flops", count),
        ("time", "seconds", clock),
        ("fits", "fits", str),
    )
    console.print(make_table("Phases, the most of each line", columns, rows))
    for place in ("device", "host", "disk"):
        most = max(plan.phases, key=lambda phase: phase.demand.total(place))
        console.print()
        parts = [
            {"part": name, "bytes": part.bytes, "how": SOURCES[part.source]}
            for name, part in getattr(most.demand, place).items()
            if part.bytes
        ]
        title = f"{place.capitalize()}: {size(most.demand.total(place))} in phase '{most.phase.name}' ({most.executor})"
        how: Columns = (("part", "part", str), ("bytes", "bytes", size), ("known", "how", str))
        console.print(make_table(title, how, parts))
    console.print()
    _print_verdict(plan, console)


def _print_verdict(plan: Any, console: Console) -> None:
    machine, limits = plan.machine, limits_of(plan.machine)
    known = ", ".join(f"{place} {size(limit)}" for place, limit in limits.items() if limit is not None)
    unknown = [place for place, limit in limits.items() if limit is None and not (place == "device" and machine.shared)]
    known += "".join(f", {place} not limited" for place in unknown)
    shared = "; device and host are one memory" if machine.shared else ""
    memory = "" if machine.device.memory is None else f" ({size(machine.device.memory)})"
    print_line(console, f"machine: {machine.device.name}{memory}; may be used: {known}{shared}")
    if plan.seconds is not None:
        from stackwise_jax.memory.devices import EFFICIENCY

        console.print(f"time at {EFFICIENCY:.0%} of the device's peak: {clock(plan.seconds)}")
    short = [(phase, s) for phase in plan.phases for s in phase.shortfalls]
    if not short:
        console.print("it fits")
    for phase, shortfall in _worst(short):
        print_line(console, f"does not fit: phase '{phase.phase.name}' needs {shortfall}")


def _worst(short: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """The greatest shortfall of each place."""
    worst: dict[str, tuple[Any, Any]] = {}
    for phase, shortfall in short:
        if shortfall.place not in worst or shortfall.need > worst[shortfall.place][1].need:
            worst[shortfall.place] = phase, shortfall
    return list(worst.values())


def print_changes(changes: Sequence[Any], fitting: Any | None, console: Console | None = None) -> None:
    """Print what helps (engine.plan_changes.Change), cheapest first, and what makes the run fit."""
    console = console or make_console()
    rows = [_change_row(change.options, change) for change in changes]
    if rows:
        console.print()
        console.print(make_table("What helps, cheapest first", _CHANGE, rows))
    console.print()
    if fitting is None:
        console.print("no combination of these makes it fit; take a smaller model, stacks of fewer blocks, or --advise")
    else:
        print_line(console, f"it fits with: {fitting.options}")


def print_ways(ways: Sequence[Any], console: Console | None = None) -> None:
    """Print the ways to train the model (engine.plan_changes.Way), best expected quality first."""
    console = console or make_console()
    rows = [_change_row(way.name, way.change) | {"days": way.days} for way in ways]
    days = ("days per\n1B tokens", "days", lambda x: f"{x:.3g}")
    console.print()
    console.print(make_table("Ways to train this model, best expected quality first", (*_CHANGE, days), rows))
    console.print("days: of compute, where every phase sees a billion tokens; tokens split over the phases cost less")
    first = next((way for way in ways if way.change.plan.fits), None)
    if first is None:
        console.print("none of them fits")
    else:
        print_line(console, f"the first that fits: {first.name}: {first.change.options}")


_CHANGE: Columns = (
    ("change", "what", str),
    ("device", "device", size),
    ("host", "host", size),
    ("disk", "disk", size),
    ("time", "seconds", clock),
    ("fits", "fits", str),
)


def _change_row(what: str, change: Any) -> dict[str, Any]:
    plan = change.plan
    places = {place: plan.peak(place) for place in ("device", "host", "disk")}
    return {"what": what, **places, "seconds": plan.seconds, "fits": "yes" if plan.fits else "no"}


def _kind(phase: Any) -> tuple:
    """Phases that are shown as one: the same work on the device."""
    return phase.executor, phase.demand.total("device"), phase.phase.steps, not phase.shortfalls


def _row(phases: list[Any]) -> dict[str, Any]:
    first, last = phases[0].phase.name, phases[-1].phase.name
    times = [phase.seconds for phase in phases]
    return {
        "name": first if len(phases) == 1 else f"{first} .. {last} ({len(phases)} phases)",
        **{place: max(p.demand.total(place) for p in phases) for place in ("device", "host", "disk")},
        "flops": sum(phase.flops for phase in phases),
        "seconds": None if None in times else sum(times),
        "fits": "no" if any(phase.shortfalls for phase in phases) else "yes",
    }


def dry_run_rows(plan: Any) -> list[dict[str, Any]]:
    """An engine.planner.RunPlan as rows for `print_plan`."""
    return [_describe(p.phase) | _bytes(p) for p in plan.phases]


def _bytes(phase: Any) -> dict[str, Any]:
    parts = {name: part.bytes for name, part in phase.demand.device.items()}
    weights = sum(parts.get(name, 0) for name in ("weights", "learning weights"))
    known = {"gradients": parts.get("gradients", 0), "optimizer": parts.get("optimizer", 0)}
    return {
        "trainable_params": phase.trainable,
        "frozen_params": phase.not_trained,
        "flops": phase.flops,
        "cache": phase.cache.reason,
        "cache_bytes": phase.cache_bytes,
        "weights_bytes": weights,
        **{f"{name}_bytes": n for name, n in known.items()},
        "activations_bytes": sum(parts.values()) - weights - sum(known.values()),
        "total_bytes": sum(parts.values()),
    }


def _describe(phase: Phase) -> dict:
    """What a phase does, in words."""
    noise = phase.noise
    span = f"{noise.low:g}-{noise.high:g}"
    spans = {"none": "-", "fixed": f"{noise.low:g}", "range": span, "elbo": f"{span} elbo"}
    ends = (["embed"] if phase.train_embed else []), (["head"] if phase.train_head else [])
    return {
        "name": phase.name,
        "path": list(phase.path),
        "learns": [*ends[0], *sorted(phase.train), *(f"~{i}" for i in sorted(phase.adapt)), *ends[1]],
        "objective": phase.objective.kind,
        "noise": spans[noise.kind],
        "corruption": "-" if phase.objective.kind == "clm" else phase.corruption,
        "attention": phase.attention_mode or "model",
        "frozen": phase.frozen,
        "steps": phase.steps,
    }
