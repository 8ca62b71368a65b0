"""The two executors of a phase: on the device as a whole, or stack by stack from where its weights rest."""

from __future__ import annotations

from typing import Any

from stackwise_jax.config.schema import MemoryConfig
from stackwise_jax.curriculum import Phase
from stackwise_jax.engine.programs import StepPrograms
from stackwise_jax.engine.resident import Resident
from stackwise_jax.engine.step import TaskSpec
from stackwise_jax.engine.streamed import Streamed
from stackwise_jax.engine.weights import Weights

Executor = Resident | Streamed


def streams(cfg: MemoryConfig, phase: Phase) -> bool:
    """Whether something of the phase's window waits off the device, so that stacks have to come and go."""
    if cfg.offload in ("none", "trunk"):
        return cfg.offload == "trunk" and not set(phase.window) <= phase.learning
    return True


def make_executor(
    cfg: MemoryConfig,
    phase: Phase,
    task: TaskSpec,
    weights: Weights,
    programs: StepPrograms,
    constants: Any,
    reference: Any | None,
) -> Executor:
    """What trains the window of the phase."""
    common = weights.rack, phase, task, weights, programs, constants
    if streams(cfg, phase):
        return Streamed(*common, cfg, weights.scratch, reference)
    return Resident(*common, reference)
