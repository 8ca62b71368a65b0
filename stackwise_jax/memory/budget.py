"""Bytes by place and by part, and whether they fit into a machine: plain arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from stackwise_jax.memory.devices import Machine
from stackwise_jax.memory.placement import format_bytes

Place = Literal["device", "host", "disk"]
PLACES: tuple[Place, ...] = ("device", "host", "disk")

# How a part is known: "shapes" (exact, from the shapes of arrays), "compiled" (of the compiled step) or "formula".
Source = Literal["shapes", "compiled", "formula"]
ESTIMATED_SHARE = 0.75  # of what is known by formula only: as little as it may turn out to be


@dataclass(frozen=True)
class Part:
    """Some bytes with a purpose."""

    bytes: int
    source: Source


Parts = Mapping[str, Part]


@dataclass(frozen=True)
class Demand:
    """The most that a phase needs in each place at one time, by part."""

    device: Parts
    host: Parts
    disk: Parts

    def total(self, place: Place) -> int:
        """Bytes in a place."""
        return sum(part.bytes for part in getattr(self, place).values())

    def at_least(self, place: Place) -> int:
        """Bytes in a place below which the formulas cannot be wrong."""
        return sum(
            round(part.bytes * (ESTIMATED_SHARE if part.source == "formula" else 1.0))
            for part in getattr(self, place).values()
        )


@dataclass(frozen=True)
class Shortfall:
    """A place whose limit a phase exceeds.

    Attributes:
        certain: it does so whatever the formulas leave open.
    """

    place: Place
    need: int
    limit: int
    largest: str  # the part that takes most
    certain: bool

    @property
    def where(self) -> str:
        """The place in words."""
        return f"{self.place} memory" if self.place != "disk" else "disk"

    def __str__(self) -> str:
        need, limit = format_bytes(self.need), format_bytes(self.limit)
        return f"{need} of {self.where} where there are {limit} (most of it for {self.largest})"


def limits_of(machine: Machine) -> dict[Place, int | None]:
    """What may be used in each place; None: unknown. On a CPU device and host are one memory, under "host"."""
    device = None if machine.shared else machine.device.memory
    return {"device": device, "host": machine.host, "disk": machine.disk}


def shortfalls(demand: Demand, machine: Machine) -> list[Shortfall]:
    """Where a demand does not fit; empty if it fits."""
    found = []
    for place, limit in limits_of(machine).items():
        if limit is None:
            continue
        places: tuple[Place, ...] = ("device", "host") if machine.shared and place == "host" else (place,)
        need = sum(demand.total(p) for p in places)
        if need > limit:
            parts = {name: part.bytes for p in places for name, part in getattr(demand, p).items()}
            sure = sum(demand.at_least(p) for p in places) > limit
            found.append(Shortfall(place, need, limit, max(parts, key=lambda name: parts[name]), sure))
    return found


def peak(demands: Iterable[Demand], place: Place) -> int:
    """The most that any of the demands needs in a place."""
    return max((demand.total(place) for demand in demands), default=0)
