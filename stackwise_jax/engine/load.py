"""A trained rack from its run directory, in the formats that training last used it in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from stackwise_jax.checkpoint import Progress, Store
from stackwise_jax.config import StackWiseConfig
from stackwise_jax.config.schema import MeshConfig, ObjectiveKind
from stackwise_jax.curriculum import AttentionMode, Phase, make_plan
from stackwise_jax.data import Tokenizer, load_tokenizer
from stackwise_jax.engine.directory import CHECKPOINTS, TOKENIZER, check_unchanged, read_config, read_rack
from stackwise_jax.engine.setup import rack_shape
from stackwise_jax.engine.weights import EMBED, HEAD, Weights, stack_item
from stackwise_jax.errors import UsageError
from stackwise_jax.memory import Placement, make_mesh
from stackwise_jax.model import Rack


@dataclass(frozen=True)
class LoadedRun:
    """A rack cut to the stacks that were asked for; `rack.apply({"params": params}, ...)` takes its parameters."""

    config: StackWiseConfig
    run_dir: Path
    rack: Rack
    params: dict[str, Any]
    tokenizer: Tokenizer
    progress: Progress
    phase: Phase  # the last phase that trained this depth
    placement: Placement

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


def _snapshot(
    progress: Progress, phases: tuple[Phase, ...], depth: int | None
) -> tuple[dict, dict, tuple[int, ...], Phase]:
    """(versions, formats, path, phase) of the rack at a depth.

    A depth that some phase ended at is taken as it was then, with the head that was trained on it; otherwise it is the
    first stacks of the last state.
    """
    if progress.step > 0 or not progress.results:
        now = (progress.versions, progress.formats, phases[min(progress.phase, len(phases) - 1)])
    else:
        last = progress.results[-1]
        now = (last["versions"], last["formats"], phases[last["index"]])
    path = now[2].path
    if depth is None or depth == len(path):
        return now[0], now[1], path, now[2]
    for result in reversed(progress.results):
        phase = phases[result["index"]]
        if len(phase.path) == depth:
            return result["versions"], result["formats"], phase.path, phase
    if not 1 <= depth <= len(path):
        raise UsageError(f"--depth {depth} is not in this run; write 1 to {len(path)} stacks")
    return now[0], now[1], path[:depth], now[2]


def _placement(config: StackWiseConfig) -> Placement:
    """The mesh of the run where it fits the devices at hand, which need not be those of the training; else a device."""
    try:
        placement = Placement(make_mesh(config.mesh))
        placement.check_batch(config.data.batch_size)
        return placement
    except UsageError:
        return Placement(make_mesh(MeshConfig(data=1), jax.devices()[:1]))


def load_rack(run_dir: str | Path, depth: int | None = None) -> LoadedRun:
    """Load the rack of a run from its newest checkpoint, onto the devices.

    Args:
        run_dir: the run directory.
        depth: how many stacks; None: all that were trained so far.

    Raises:
        UsageError: there is no run, no checkpoint in it yet, or no such depth.
        RunError: a checkpoint is damaged.
    """
    run_dir = Path(run_dir)
    config = read_config(run_dir)
    store = Store(run_dir / CHECKPOINTS, keep=config.run.keep)
    progress = store.latest()
    if progress is None:
        raise UsageError(f"{run_dir} holds no checkpoint yet; let train reach its first save")
    tokenizer = load_tokenizer(config.tokenizer, None, run_dir / TOKENIZER)
    check_unchanged(run_dir, progress, {"tokenizer": tokenizer.fingerprint})
    rack = read_rack(run_dir)
    plan = make_plan(config, rack_shape(rack))
    versions, formats, path, phase = _snapshot(progress, plan.phases, depth)

    placement = _placement(config)
    weights = Weights(rack, placement, store, jax.random.key(config.run.seed))
    weights.versions = versions

    def load(item: str) -> Any:
        weights.ensure(item, formats.get(item, weights.master))
        return weights.trees[item]

    params = {
        "embed": load(EMBED),
        "head": load(HEAD),
        "stacks": {f"{i:03d}": load(stack_item(stack)) for i, stack in enumerate(path)},
    }
    rack = rack.clone(stacks=tuple(rack.stacks[i] for i in path), parent=None)
    return LoadedRun(config, run_dir, rack, params, tokenizer, progress, phase, placement)
