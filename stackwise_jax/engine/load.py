"""A trained rack from its run directory, in the formats that training last used it in."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from stackwise_jax.checkpoint import Progress
from stackwise_jax.config import StackWiseConfig
from stackwise_jax.config.schema import MeshConfig, ObjectiveKind
from stackwise_jax.curriculum import AttentionMode, Phase
from stackwise_jax.data import Tokenizer
from stackwise_jax.engine.source import Source
from stackwise_jax.engine.weights import EMBED, HEAD, Weights
from stackwise_jax.errors import UsageError
from stackwise_jax.memory import Placement, make_mesh
from stackwise_jax.model import Rack, combine
from stackwise_jax.random_streams import check_settings, root_key

StackPlace = Literal["device", "host"]


@dataclass(frozen=True)
class LoadedRun:
    """A rack cut to the stacks that were asked for; `rack.apply({"params": params}, ...)` takes its parameters.

    Adapters stand in the parameters beside the weights that they adapt.
    """

    config: StackWiseConfig
    run_dir: Path
    rack: Rack
    params: dict[str, Any]
    tokenizer: Tokenizer
    progress: Progress
    phase: Phase  # the last phase that trained this path
    placement: Placement
    levels: tuple[float, ...] | None = None  # objective.time depth: the share hidden at each stack of the path

    @property
    def objective_kind(self) -> ObjectiveKind:
        return self.phase.objective.kind

    @property
    def attention_mode(self) -> AttentionMode | None:
        return self.phase.attention_mode

    @property
    def path(self) -> tuple[int, ...]:
        """The ids, in the run, of the rack's stacks."""
        return tuple(stack.stack_id for stack in self.rack.stacks)


def load_rack(run_dir: str | Path, depth: int | None = None, place: StackPlace = "device") -> LoadedRun:
    """Load the rack of a run from its newest checkpoint.

    Args:
        run_dir: the run directory.
        depth: how many stacks; None: all that were trained so far. A depth that some phase ended at is taken as it was
            then, with the head that was trained on it; otherwise it is the first stacks of the last state.
        place: of the stacks; embedding and head come onto the devices.

    Raises:
        UsageError: there is no run, no checkpoint in it yet, or no such depth.
        RunError: a checkpoint is damaged.
    """
    return _load(Source(run_dir, depth), place)


def load_experts(run_dir: str | Path, place: StackPlace = "device") -> list[LoadedRun]:
    """The models that a run made: one, or denoisers that were trained apart, highest noise first.

    Args:
        place: as in `load_rack`.

    Raises:
        UsageError: as `load_rack`, or not all denoisers have been trained yet.
        RunError: as `load_rack`.
    """
    found = Source(run_dir).experts
    if len(found) == 1:
        return [load_rack(run_dir, place=place)]
    return [_load(Source(run_dir, expert=index), place) for index in found]


def _load(source: Source, place: StackPlace) -> LoadedRun:
    tokenizer = source.tokenizer()
    placement = _placement(source.config)
    weights = Weights(source.rack, placement, source.store, root_key(source.config.run.seed))
    weights.versions = source.versions
    weights.adapters = source.adapters

    def load(item: str) -> Any:
        fmt = source.formats.get(item) or source.saved_format(item)
        weights.ensure(item, fmt, "device" if item in (EMBED, HEAD) else place)
        return weights.trees[item]

    params = {
        "embed": load(EMBED),
        "head": load(HEAD),
        "stacks": {
            f"{i:03d}": functools.reduce(combine, map(load, weights.stack_items(stack)))
            for i, stack in enumerate(source.path)
        },
    }
    rack = source.rack.clone(stacks=tuple(source.rack.stacks[i] for i in source.path), parent=None)
    run = source.config, source.run_dir, rack, params, tokenizer, source.progress, source.phase, placement
    return LoadedRun(*run, levels=_levels(source))


def _levels(source: Source) -> tuple[float, ...] | None:
    """The share hidden when each stack of the path first learned, if the rack was built right to left.

    Only then did a stack learn on embeddings, and what lies behind it on its output: what sampling in one pass needs.
    """
    if source.config.objective.time != "depth":
        return None
    first: dict[int, Phase] = {}
    for phase in source.plan.phases[: source.index + 1]:
        for stack in phase.learning:
            first.setdefault(stack, phase)
    levels = []
    for stack in source.path:
        phase = first.get(stack)
        if phase is None or phase.noise.kind != "fixed":
            return None
        if not phase.learning.issuperset(phase.path[: phase.path.index(stack)]):
            return None
        levels.append(phase.noise.low)
    return tuple(levels)


def _placement(config: StackWiseConfig) -> Placement:
    """The mesh of the run where it fits the devices at hand, which need not be those of the training; else a device."""
    check_settings()
    try:
        placement = Placement(make_mesh(config.mesh))
        placement.check_batch(config.data.batch_size)
        return placement
    except UsageError:
        return Placement(make_mesh(MeshConfig(data=1), jax.devices()[:1]))
