"""What would make a run fit, cheapest first, and which ways of training a model fit a machine.

Every change is a few keys of the configuration; its figures come from planning the changed configuration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stackwise_jax.config import StackWiseConfig
from stackwise_jax.engine.planner import RunPlan, plan_run
from stackwise_jax.engine.setup import Setup
from stackwise_jax.engine.sketch import resketch
from stackwise_jax.errors import UsageError
from stackwise_jax.memory import format_bytes
from stackwise_jax.memory.budget import PLACES, Part, Place, limits_of
from stackwise_jax.memory.devices import Machine, machine_of

Keys = Mapping[str, Any]
BILLION = 10**9


@dataclass(frozen=True)
class Change:
    """A change of keys and what the run needs with it; None: it cannot be planned."""

    keys: Keys
    plan: RunPlan

    @property
    def options(self) -> str:
        """As it is written on the command line."""
        return " ".join(f"--{key} {_written(value)}" for key, value in self.keys.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        peaks = {f"peak_{place}_bytes": self.plan.peak(place) for place in PLACES}
        return {"keys": dict(self.keys), **peaks, "seconds": self.plan.seconds, "fits": self.plan.fits}


@dataclass(frozen=True)
class Way:
    """A way to train the model, in the order of the quality that is to be expected.

    Attributes:
        days: of compute, where every phase sees a billion tokens; None: the device's peak is unknown.
    """

    name: str
    change: Change
    days: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        days = None if self.days is None else self.days / len(self.change.plan.phases)
        each = {"days_per_billion_tokens": days, "days_per_billion_tokens_in_every_phase": self.days}
        return {"name": self.name, **self.change.to_dict(), "phases": len(self.change.plan.phases), **each}


def changed(config: StackWiseConfig, keys: Keys) -> StackWiseConfig:
    """The configuration with keys such as "model.remat" replaced."""
    for key, value in keys.items():
        config = _replaced(config, key.split("."), value)
    return config


def _replaced(section: Any, names: list[str], value: Any) -> Any:
    name, *rest = names
    inner = _replaced(getattr(section, name), rest, value) if rest else value
    return dataclasses.replace(section, **{name: inner})


def what_helps(
    setup: Setup, machine: Machine, plan: RunPlan, *, compiled: bool = False
) -> tuple[list[Change], Change | None]:
    """(single changes that lower what is exceeded, cheapest first; the first of them, or of their combinations, that
    makes the run fit, if any does).

    Args:
        plan: of the run as it is, made in the same way as those of the changes.
        compiled: plan changes as `planner.plan_run` does.
    """
    config = setup.config
    if _hopeless(plan, machine):
        return [], None
    short: set[Place] = {s.place for phase in plan.phases for s in phase.shortfalls}
    helpful: list[Change] = []
    together: dict[str, Any] = {}
    best = plan
    for keys in _candidates(config, short, machine):
        keys = {k: v for k, v in keys.items() if _value(config, k) != v}
        change = _try(setup, keys, machine, compiled) if keys else None
        if change is None or _excess(change.plan, machine) >= _excess(plan, machine):
            continue
        helpful.append(change)
        if change.plan.fits:
            return helpful, change
        combined = _try(setup, {**together, **keys}, machine, compiled)
        if combined is not None and _excess(combined.plan, machine) < _excess(best, machine):
            together, best = dict(combined.keys), combined.plan
            if best.fits:
                return helpful, combined
    return helpful, None


def _hopeless(plan: RunPlan, machine: Machine) -> bool:
    """Whether what the process itself takes is too much already."""
    limits, nothing = limits_of(machine), Part(0, "formula")
    first = plan.phases[0].demand
    return any(
        limits[place] is not None and getattr(first, place).get("runtime", nothing).bytes > limits[place]
        for place in ("device", "host")
    )


def _candidates(config: StackWiseConfig, short: set[Place], machine: Machine) -> Iterator[Keys]:
    """Changes from the least to the greatest loss of speed or quality, of those that touch the places."""
    device = "device" in short or machine.shared
    size, now = config.data.batch_size, config.optimizer.microbatches
    if "disk" in short:
        yield {"run.keep": 1}
        yield {"run.keep_depths": 1}
        yield {"memory.finished": "frozen"}
        yield {"run.save_every": 0}
    if "disk" in short or "host" in short:
        yield {"cache.kind": "recompute"}
    if device:
        more = [n for n in (2 * now, 4 * now, size) if n <= size and size % n == 0]
        for n in dict.fromkeys(more):
            yield {"optimizer.microbatches": n}
        yield {"model.remat": True}
        yield {"model.compute_dtype": "bf16"}
    if not machine.shared and device:
        yield {"memory.offload": "trunk"}
        yield {"memory.offload": "trunk+optimizer", "optimizer.clip": "stack"}
    yield {"curriculum.frozen": "bf16"}
    yield {"curriculum.frozen": "int8"}
    yield {"curriculum.frozen": "nf4"}
    yield {"optimizer.name": "adamw8bit", "optimizer.state_dtype": None}
    if not machine.shared and device:
        yield {"memory.offload": "all", "optimizer.clip": "stack"}
        yield {"memory.offload": "all", "optimizer.clip": "stack", "memory.stack_inputs": "host"}
    yield {"model.param_dtype": "bf16", "optimizer.rounding": "stochastic"}
    if "host" in short:
        yield {"memory.offload": "all", "memory.offload_to": "disk", "optimizer.clip": "stack"}
    yield {"curriculum.train_head": "first"}


def _value(config: StackWiseConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _try(setup: Setup, keys: Keys, machine: Machine, compiled: bool = False) -> Change | None:
    """The change, planned; None where it is refused."""
    try:
        return Change(keys, plan_run(resketch(setup, changed(setup.config, keys)), machine, compiled=compiled))
    except UsageError:
        return None


def _excess(plan: RunPlan, machine: Machine) -> int:
    """Bytes over the limits, over all places."""
    limits = limits_of(machine)
    host = plan.peak("host") + (plan.peak("device") if machine.shared else 0)
    needs = {"device": plan.peak("device"), "host": host, "disk": plan.peak("disk")}
    return sum(max(needs[place] - limit, 0) for place, limit in limits.items() if limit is not None)


_OWN_LIST = {"curriculum.plans": [], "curriculum.phases": [], "curriculum.stages": [], "curriculum.budget": None}
_ALL = {"memory.offload": "all"}
_SMALL = {"optimizer.name": "adamw8bit", "optimizer.state_dtype": None, "optimizer.clip": "stack", "model.remat": True}


def advise(setup: Setup, machine: Machine) -> list[Way]:
    """The ways to train this model here, best expected quality first."""
    end_to_end = _OWN_LIST | {"curriculum.plan": "rackwise"}
    parts = _OWN_LIST | {"curriculum.plan": "append", "curriculum.trunk": "frozen", "memory.finished": "frozen"}
    trunk = {"curriculum.frozen": "nf4", "memory.offload": "trunk+optimizer"}
    options = (
        ("end to end, resident", end_to_end | {"memory.offload": "none"}),
        ("end to end, resident, small optimizer state", end_to_end | _SMALL | {"memory.offload": "none"}),
        ("end to end, streamed", end_to_end | _SMALL | _ALL),
        (
            "end to end, streamed from disk",
            end_to_end | _SMALL | {"memory.offload": "all", "memory.offload_to": "disk"},
        ),
        ("overlapping stacks", parts | _SMALL | trunk | {"curriculum.overlap": 1}),
        ("greedy stacks", parts | _SMALL | trunk | {"curriculum.overlap": 0}),
    )
    ways = []
    for name, keys in options:
        change = _try(setup, keys, machine)
        if change is not None:
            ways.append(Way(name, change, _days(setup.config, change.plan)))
    return ways


def _days(config: StackWiseConfig, plan: RunPlan) -> float | None:
    """Days of a run in which every phase sees a billion tokens."""
    total = 0.0
    for phase in plan.phases:
        if phase.seconds is None:
            return None
        total += phase.seconds * BILLION / (phase.phase.steps * config.data.batch_size * config.data.seq_len)
    return total / 86_400


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def too_large(setup: Setup) -> str | None:
    """One sentence about why a run cannot fit what `memory` names or what is here, and what to write instead; None: it
    may fit. What only a formula says is believed where even a lower figure would not fit.
    """
    memory = setup.config.memory
    machine = machine_of(memory.device, memory.host, memory.disk, setup.run_dir)
    plan = plan_run(setup, machine)
    short = [(phase, s) for phase in plan.phases for s in phase.shortfalls if s.certain]
    if not short:
        return None
    phase, shortfall = max(short, key=lambda entry: entry[1].need / max(entry[1].limit, 1))
    changes, fitting = what_helps(setup, machine, plan)
    remedy = "none of the changes that were tried makes it fit: "
    remedy += "python -m stackwise_jax.plan --advise compares the ways to train this model"
    if fitting is not None:
        remedy = f"write {fitting.options}, which needs {_figures(fitting.plan, machine)}"
    elif changes:
        remedy = f"{changes[0].options} lowers it to {_figures(changes[0].plan, machine)}, and {remedy}"
    anyway = "memory.check off runs it anyway"
    return f"the run does not fit: phase '{phase.phase.name}' needs {shortfall}; {remedy} ({anyway})"


def _figures(plan: RunPlan, machine: Machine) -> str:
    """The peaks in the places that have a limit."""
    places = [place for place, limit in limits_of(machine).items() if limit is not None]
    more = plan.peak("device") if machine.shared else 0
    peaks = [(place, plan.peak(place) + (more if place == "host" else 0)) for place in places]
    return ", ".join(f"{place} {format_bytes(n)}" for place, n in peaks)
