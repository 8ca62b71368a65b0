"""What a run needs before it begins: bytes per phase, place and part, FLOPs, time, and whether that fits a machine.

Nothing is allocated. Bytes on the device are those of one device, bytes on host and disk those of this process.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax

from stackwise_jax.config import parse_bytes
from stackwise_jax.curriculum import Phase
from stackwise_jax.engine.account import phase_flops_of, trainable_and_frozen
from stackwise_jax.engine.border import place_of
from stackwise_jax.engine.dryrun import advanced_stacks
from stackwise_jax.engine.executor import streams
from stackwise_jax.engine.heldout import GROUP
from stackwise_jax.engine.holdings import homes
from stackwise_jax.engine.plan_bytes import head_moment, score_bytes, tree_bytes, width
from stackwise_jax.engine.plan_disk import Disk
from stackwise_jax.engine.plan_step import (
    Parts,
    Sizes,
    added,
    estimated,
    exact,
    largest,
    opt_bytes,
    resident_parts,
    streamed_parts,
    total,
)
from stackwise_jax.engine.prefix import PrefixCache
from stackwise_jax.engine.programs import StepPrograms, bare
from stackwise_jax.engine.setup import Setup
from stackwise_jax.engine.weights import EMBED, HEAD, Weights, adapter_item, item_format, learning_items, stack_item
from stackwise_jax.memory import CacheChoice
from stackwise_jax.memory.budget import PLACES, Demand, Machine, Part, Shortfall, peak, shortfalls
from stackwise_jax.memory.devices import EFFICIENCY, same_disk
from stackwise_jax.random_streams import root_key

HOST_RUNTIME = {True: 8e8, False: 3e9}  # bytes of the process itself, on a CPU and beside a GPU; a rough figure
CHUNKS_UNDERWAY = 2  # of the cache, on the device beside the one in use and the one being written


@dataclass(frozen=True)
class PhasePlan:
    """What a phase needs."""

    index: int
    phase: Phase
    executor: str  # "resident" or "streamed"
    cache: CacheChoice
    cache_bytes: int
    demand: Demand
    step_bytes: int  # on the device, of the step alone: arguments, outputs that reuse none, temporaries
    flops: int
    seconds: float | None  # at memory.devices.EFFICIENCY; None: the device's peak is unknown
    trainable: int
    not_trained: int
    shortfalls: list[Shortfall]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        places = {place: {n: p.bytes for n, p in getattr(self.demand, place).items()} for place in PLACES}
        sources = {place: {n: p.source for n, p in getattr(self.demand, place).items()} for place in PLACES}
        return {
            "index": self.index,
            "name": self.phase.name,
            "path": list(self.phase.path),
            "steps": self.phase.steps,
            "executor": self.executor,
            "step_bytes": self.step_bytes,
            **places,
            **{f"{place}_bytes": self.demand.total(place) for place in PLACES},
            "sources": sources,
            "cache": self.cache.reason,
            "flops": self.flops,
            "seconds": self.seconds,
            "trainable_params": self.trainable,
            "frozen_params": self.not_trained,
            "fits": not self.shortfalls,
        }


@dataclass(frozen=True)
class RunPlan:
    """What a run needs, phase by phase, and the machine that it is held against."""

    machine: Machine
    phases: list[PhasePlan]

    @property
    def fits(self) -> bool:
        """Whether every phase fits."""
        return not any(phase.shortfalls for phase in self.phases)

    def peak(self, place: Any) -> int:
        """The most that any phase needs in a place."""
        return peak((phase.demand for phase in self.phases), place)

    @property
    def seconds(self) -> float | None:
        """Of all phases."""
        times = [phase.seconds for phase in self.phases]
        return None if None in times else sum(t for t in times if t is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "fits": self.fits,
            **{f"peak_{place}_bytes": self.peak(place) for place in PLACES},
            "flops": sum(phase.flops for phase in self.phases),
            "seconds": self.seconds,
            "efficiency": EFFICIENCY,
            "device": self.machine.device.name,
            "phases": [phase.to_dict() for phase in self.phases],
        }


def plan_run(setup: Setup, machine: Machine, *, compiled: bool = False) -> RunPlan:
    """The plan of a run.

    Args:
        compiled: compile the steps for the device at hand and read their temporaries off; else by formula.

    Raises:
        UsageError: a cache that is asked for does not fit into its budgets.
    """
    planner = _Planner(setup, machine, StepPrograms(setup.placement) if compiled else None)
    return RunPlan(machine, [planner.phase(i) for i in range(len(setup.plan.phases))])


class _Planner:
    """Walks the phases and remembers what equal phases need."""

    def __init__(self, setup: Setup, machine: Machine, programs: StepPrograms | None):
        self._setup, self._machine, self._programs = setup, machine, programs
        self._memory = setup.config.memory
        root: Any = jax.eval_shape(lambda: root_key(0))
        self._weights = Weights(setup.rack, setup.placement, None, root)
        self._loader = setup.loader()
        self._cache = PrefixCache(setup.config.cache, setup.placement, setup.run_dir)
        self._before: Phase | None = None  # the last phase, if it was cached
        self._steps: dict[Any, tuple[Parts, Parts]] = {}
        self._bytes: dict[Any, int] = {}
        self._device: dict[Any, Parts] = {}
        self._counts: dict[Any, tuple[int, int]] = {}
        self._disk = Disk(setup, self._weights.master, self._item, self._state)
        # Where weights that are not at work rest; a prefix that is cached leaves the device in any case.
        self._away = "host" if self._memory.offload == "none" else self._memory.offload_to

    def phase(self, index: int) -> PhasePlan:
        setup = self._setup
        phase = setup.plan.phases[index]
        self._weights.declare(phase)
        task = setup.task(phase)
        choice = self._cache.choose(phase, self._loader, task)
        if phase.corruption == "auto":
            phase = dataclasses.replace(phase, corruption="fixed" if choice.use else "fresh")
        advanced = advanced_stacks(self._before, phase, self._loader) if choice.use else None
        self._before = phase if choice.use else None
        streamed = streams(self._memory, phase)
        step, away = self._step(phase, streamed)
        chunk = self._cache.chunk_bytes(self._loader, task)
        alike = dataclasses.replace(phase, name="", steps=1, keep_optimizer=False), choice.use
        if alike not in self._device:
            self._device[alike] = largest(
                [self._training(phase, step, choice, chunk), *self._others(phase, choice, chunk)]
            )
            self._counts[alike] = trainable_and_frozen(setup.rack, phase)
        device = self._device[alike]
        if self._machine.device.reserve:
            device = device | {"runtime": estimated(self._machine.device.reserve)}
        host, disk = self._host_and_disk(index, phase, choice, chunk, away)
        demand = Demand(device, host, disk)
        flops = phase_flops_of(
            setup.rack,
            phase,
            setup.config.data,
            cached_batches=choice.n_chunks if choice.use else None,
            advanced_stacks=advanced,
            streamed=streamed,
        )
        trainable, not_trained = self._counts[alike]
        seconds = self._seconds(phase, flops, choice, chunk, streamed)
        name = "streamed" if streamed else "resident"
        found = shortfalls(demand, self._machine)
        cached = choice.n_chunks * chunk
        return PhasePlan(
            index, phase, name, choice, cached, demand, total(step), flops, seconds, trainable, not_trained, found
        )

    # Bytes of items.

    def _item(self, item: str, fmt: str) -> int:
        """Bytes on one device of an item in a format; equal stacks and adapters are looked at once."""
        kind = self._kind(item)
        if (kind, fmt) not in self._bytes:
            self._bytes[kind, fmt] = tree_bytes(self._weights.shapes(item, fmt))
        return self._bytes[kind, fmt]

    def _state(self, item: str, index: int) -> int:
        """Bytes of the optimizer state of an item that learns in a phase."""
        cfg = self._setup.plan.phases[index].optimizer
        kind = self._kind(item), cfg
        if kind not in self._bytes:
            tree = self._weights.shapes(item, self._weights.master)
            self._bytes[kind] = opt_bytes(
                self._setup, cfg, {item: tree} if item in (EMBED, HEAD) else {"stacks": (tree,)}
            )
        return self._bytes[kind]

    def _kind(self, item: str) -> Any:
        """What the shape of an item depends on."""
        stack = self._setup.rack.stacks[int(item.split("/")[1])] if "/" in item else None
        if stack is None:
            return item
        return bare(stack), self._weights.adapters[item].spec if item in self._weights.adapters else None

    def _stack(self, phase: Phase, index: int) -> int:
        """A stack of the path with its adapters, in the phase's formats."""
        master = self._weights.master
        own = self._item(stack_item(index), item_format(phase, stack_item(index), master))
        return own + sum(self._item(adapter_item(a), master) for a in phase.adapters if a.stack == index)

    def _end(self, phase: Phase, item: str) -> int:
        return self._item(item, item_format(phase, item, self._weights.master))

    # The device.

    def _step(self, phase: Phase, streamed: bool) -> tuple[Parts, Parts]:
        """(parts on the device, parts off it) of the step, remembered for equal phases."""
        formats = tuple(item_format(phase, stack_item(i), self._weights.master) for i in phase.window)
        kinds = tuple(bare(self._setup.rack.stacks[i]) for i in phase.window)
        learns = tuple((i in phase.train, i in phase.adapt) for i in phase.window)
        adapters = tuple(
            (phase.window.index(a.stack), a.name, a.spec) for a in phase.adapters if a.stack in phase.window
        )
        ends = phase.train_embed, phase.train_head, bool(phase.prefix), phase.frozen, phase.consistency is None
        task = phase.objective, phase.noise, phase.attention_mode, phase.optimizer
        key = (kinds, formats, learns, adapters, ends, task)
        if key not in self._steps:
            if streamed:
                self._steps[key] = streamed_parts(self._setup, self._weights, phase, self._memory, self._programs)
            else:
                self._steps[key] = resident_parts(self._setup, self._weights, phase, self._programs)
        return self._steps[key]

    def _training(self, phase: Phase, step: Parts, choice: CacheChoice, chunk: int) -> Parts:
        """The step and what is on the device beside it."""
        parts = dict(step)
        if choice.use:
            chunks = self._setup.config.cache.read_ahead + 1
            parts = added(parts, {"buffers": exact(chunks * chunk // self._shards)})
        resting = self._resting(phase, choice)
        in_step = {HEAD, *map(stack_item, phase.window)} | ({EMBED} if not phase.prefix or self._tied else set())
        there = sum(n for item, (place, n) in resting.items() if place == "device" and item not in in_step)
        passing = [n for item, (place, n) in resting.items() if place != "device" and item not in in_step]
        if not choice.use and passing:  # the prefix is recomputed from where it waits
            there += 2 * max(passing)
        return added(parts, {"weights": exact(there)})

    @property
    def _tied(self) -> bool:
        return self._setup.rack.tie_embeddings

    def _resting(self, phase: Phase, choice: CacheChoice) -> dict[str, tuple[str, int]]:
        """(place, bytes with adapters) of embedding, head and the stacks of the path that do not learn, by item."""
        cached = choice.use and bool(phase.prefix)
        how = {"cached": cached, "tied": self._tied}
        still = [stack_item(i) for i in phase.path if i not in phase.learning]
        ends = [item for item, learns in ((EMBED, phase.train_embed), (HEAD, phase.train_head)) if not learns]
        found = {}
        for item in (*ends, *still):
            place = place_of(self._memory, phase, item, **how)
            n = self._end(phase, item) if item in ends else self._stack(phase, int(item.split("/")[1]))
            found[item] = place, n
        return found

    def _others(self, phase: Phase, choice: CacheChoice, chunk: int) -> list[Parts]:
        """Filling the cache, and the evaluation of the whole path at the end."""
        setup, sizes = self._setup, Sizes.of(self._setup, phase)
        rows = max(setup.config.data.batch_size // self._shards, 1)
        hidden = rows * sizes.seq_len * setup.rack.d_model * width(setup.rack.compute_dtype)
        stacks = [self._stack(phase, i) for i in phase.path]
        block = setup.rack.stacks[phase.path[0]].blocks[0]
        moment = rows * sizes.seq_len * 3 * block.d_ff * width(setup.rack.compute_dtype)
        moment += score_bytes(block, rows, sizes.seq_len, backward=False)
        moments = []
        if choice.use and phase.prefix:
            waiting = sum(map(self._item_here, learning_items(phase)))
            fill = {
                "weights": exact(self._end(phase, EMBED) + 2 * max(self._stack(phase, i) for i in phase.prefix)),
                "learning weights": exact(waiting if self._memory.offload != "all" else 0),
                "buffers": exact((CHUNKS_UNDERWAY + 1) * chunk // self._shards),
                "activations": estimated(moment),
            }
            moments.append(fill)
        resting = self._resting(phase, choice)
        there = sum(n for place, n in resting.values() if place == "device")
        learning = sum(map(self._item_here, learning_items(phase)))
        if homes(self._memory)[0] != "device" or any(place != "device" for place, _ in resting.values()):
            there += 2 * max(stacks)  # what rests elsewhere passes stack by stack
        shards = sizes.shards
        head = head_moment(setup.rack, rows, sizes.predicted, learns=False, shards=shards, backward=False)
        moments.append(
            {
                "weights": exact(there),
                "learning weights": exact(learning if homes(self._memory)[0] == "device" else 0),
                "activations": estimated((GROUP + 1) * hidden + moment),
                "head loss": estimated(head),
            }
        )
        return moments

    @property
    def _shards(self) -> int:
        return self._setup.placement.mesh.size

    def _item_here(self, item: str) -> int:
        return self._item(item, self._weights.master)

    # Host and disk.

    def _host_and_disk(
        self, index: int, phase: Phase, choice: CacheChoice, chunk: int, away: Parts
    ) -> tuple[Parts, Parts]:
        setup, cfg = self._setup, self._setup.config
        waiting = sum(n for place, n in self._resting(phase, choice).values() if place != "device")
        off = dict(away)
        state = off.pop("saving")
        if waiting:
            off = added(off, {"weights": exact(waiting)})
        local = setup.placement.mesh.local_mesh.size
        off = {name: Part(part.bytes * local, part.source) for name, part in off.items()}
        host: Parts = {"runtime": estimated(HOST_RUNTIME[self._machine.shared])}
        disk: Parts = {}
        if self._away == "host":
            host |= off
        else:
            disk |= {f"offloaded {name}": part for name, part in off.items()}
        if choice.use:
            in_host = 0
            if choice.kind == "host":
                in_host = min(parse_bytes(cfg.cache.host_budget, "cache.host_budget") // max(chunk, 1), choice.n_chunks)
            host["cache"] = exact(in_host * chunk)
            if cfg.cache.dir is None or same_disk(cfg.cache.dir, setup.run_dir):
                disk["cache"] = exact((choice.n_chunks - in_host) * chunk)
        text = setup.train, setup.valid
        if any(t.n_bytes for t in text):
            host["text"] = exact(sum(t.tokens_NT.nbytes * 3 for t in text))
        saving = max([state.bytes, *map(self._item_here, learning_items(phase))])
        host["saving"] = estimated(2 * saving)  # a copy, and what Orbax makes of it
        return host, disk | self._disk.during(index)

    # Time.

    def _seconds(self, phase: Phase, flops: int, choice: CacheChoice, chunk: int, streamed: bool) -> float | None:
        """At the stated efficiency; transfers run beside the computation, so the slower of the two counts."""
        device = self._machine.device
        rate = device.peak(self._setup.rack.compute_dtype)
        if rate is None:
            return None
        seconds = flops / (rate * EFFICIENCY * self._setup.placement.mesh.size)
        if device.link is None:
            return seconds
        moved = chunk if choice.use else 0
        if self._memory.offload != "none" and not choice.use:
            moved += sum(self._stack(phase, i) for i in phase.prefix)
        if streamed:
            still = sum(self._stack(phase, i) for i in phase.window if i not in phase.learning)
            learning = sum(map(self._item_here, learning_items(phase)))
            moved += 2 * still + (3 * learning if self._memory.offload == "all" else 0)
            if self._memory.offload != "trunk":
                _, away = self._step(phase, streamed)
                moved += 2 * sum(p.bytes for name, p in away.items() if name in ("optimizer", "gradients"))
        return max(seconds, phase.steps * moved / device.link)
