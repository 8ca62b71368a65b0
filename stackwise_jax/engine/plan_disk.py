"""Bytes that a run keeps on disk while a phase runs: items by version, and optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stackwise_jax.curriculum import Phase, trained_apart
from stackwise_jax.engine.carry import Survival
from stackwise_jax.engine.setup import Setup
from stackwise_jax.engine.weights import (
    EMBED,
    HEAD,
    adapter_item,
    final_format,
    item_format,
    learning_items,
    path_items,
    stack_item,
)
from stackwise_jax.memory.budget import Part

ItemBytes = Callable[[str, str], int]  # of an item in a format
StateBytes = Callable[[str, int], int]  # of the optimizer state of an item in a phase


class Disk:
    """The checkpoints of a run, from phase to phase. Phases are asked for in their order.

    Uncompressed, and with as many versions as there are at the worst moment: `run.keep` records stay until the next is
    committed, and a stop in the middle of a phase saves once more.
    """

    def __init__(self, setup: Setup, master: str, item_bytes: ItemBytes, state_bytes: StateBytes):
        self._setup, self._master, self._phases = setup, master, setup.plan.phases
        self._item_bytes, self._state_bytes = item_bytes, state_bytes
        start = [EMBED, HEAD, *map(stack_item, setup.plan.start)]
        self._held = dict.fromkeys(start, master)  # the format of the newest version of each item
        self._moments: dict[str, int] = {}
        self._survival = Survival(self._phases)
        self._other_path = _next_with_another_path(self._phases)
        self._depths: list[int] = []  # by phase: bytes that only its depth as it ended needs
        self._apart = trained_apart(self._phases)

    def during(self, index: int) -> dict[str, Part]:
        """The most that lies on disk while a phase runs and is saved."""
        run, phase = self._setup.config.run, self._phases[index]
        learning = learning_items(phase)
        inside = max((phase.steps - 1) // run.save_every if run.save_every else 0, 1)
        weights = state = 0
        for item in self._merged(phase).difference(learning):  # the record before still names the old version
            weights += self._item_bytes(item, self._held[item])
            self._held[item] = self._master
        for item in path_items(phase):
            if item not in learning:
                self._held.setdefault(item, self._master)
        for item in learning:
            versions = min(run.keep + 1, inside + 1 + (item in self._held))
            older, newest = (self._item_bytes(item, f) for f in (self._held.get(item, self._master), self._master))
            weights += (versions - 1) * newest + older
            state += min(run.keep + 1, inside) * self._state_bytes(item, index)
        still = sum(self._item_bytes(item, fmt) for item, fmt in self._held.items() if item not in learning)
        handed_on = [i for i in learning if self._survival.goes_on(index, i)]
        moments = sum(self._moments.values()) + sum(self._state_bytes(i, index) for i in handed_on)
        if phase.consistency is not None:  # the embedding as it was, see border.reference_embedding
            moments += self._item_bytes(EMBED, item_format(phase, EMBED, self._master))
        still += self._settle(index, learning)
        depths = self._kept_depths(run.keep_depths)
        self._depths.append(self._superseded(index, learning))
        return {"weights": Part(weights + still + depths, "shapes"), "optimizer": Part(state + moments, "shapes")}

    def _kept_depths(self, keep: int | None) -> int:
        """Bytes of the newest `keep` depths, and of those that are models of their own. None: of all."""
        others = [i for i in range(len(self._depths)) if i not in self._apart]
        forgotten = [] if keep is None else others[: max(len(others) - keep, 0)]
        return sum(n for i, n in enumerate(self._depths) if i not in forgotten)

    def _superseded(self, index: int, learning: list[str]) -> int:
        """Bytes of what the phase leaves and a later one with another path trains on, as a head learns at every
        depth: the version of this depth stays."""
        later = self._other_path[index]
        again = set() if later is None else set(learning_items(self._phases[later]))
        return sum(self._item_bytes(item, self._master) for item in learning if item in again)

    def _merged(self, phase: Phase) -> set[str]:
        """Adapters that are merged when the phase begins, and their stacks: all are saved once more."""
        there = [a for a in phase.adapters if phase.merge_adapters and adapter_item(a) in self._held]
        return {adapter_item(a) for a in there} | {stack_item(a.stack) for a in there}

    def _settle(self, index: int, learning: list[str]) -> int:
        """What stays when the phase has ended, as `Recorder.settle` has it. Returns the bytes of what did not learn and
        is saved in another format, beside the version that it replaces."""
        frozen, again = self._setup.config.memory.finished == "frozen", 0
        for item in path_items(self._phases[index]):
            fmt = final_format(self._phases, index, item, self._master) if frozen else self._master
            if item in learning:
                self._held[item] = fmt
            elif self._held[item] == self._master != fmt:
                again += self._item_bytes(item, fmt)
                self._held[item] = fmt
        for item in learning:
            if self._survival.goes_on(index, item):
                self._moments[item] = self._state_bytes(item, index)
        self._moments = {item: n for item, n in self._moments.items() if self._survival.goes_on(index, item)}
        return again


def _next_with_another_path(phases: Sequence[Phase]) -> list[int | None]:
    """For each phase the first later one with another path; None: there is none."""
    found: list[int | None] = [None] * len(phases)
    for i in range(len(phases) - 2, -1, -1):
        found[i] = i + 1 if phases[i + 1].path != phases[i].path else found[i + 1]
    return found
