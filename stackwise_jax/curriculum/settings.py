"""What a phase takes from the sections objective and optimizer and from the keys of its own stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from stackwise_jax.config.schema import ObjectiveConfig, StackWiseConfig, StageConfig
from stackwise_jax.curriculum.levels import depth_noise, fixed_noise, whole_noise
from stackwise_jax.curriculum.phase import AttentionMode, Objective
from stackwise_jax.errors import UsageError


def stage_settings(
    config: StackWiseConfig, stage: StageConfig, path: Sequence[int], n_stacks: int, *, is_last: bool
) -> dict[str, Any]:
    """The fields of a phase that its stage, or its entry in curriculum.phases, decides.

    With curriculum.decay last the learning rate stays up in all phases but the last of the plan (`is_last`); a stage
    with an optimizer section of its own keeps to that.

    Raises:
        UsageError: a level of noise for an objective that has none, or formats that do not fit the stacks.
    """
    curriculum, objective = config.curriculum, stage.objective or config.objective
    changes: dict[str, Any] = task_settings(objective) if stage.objective else {}
    if stage.level is not None:
        if objective.kind != "diffusion":
            raise UsageError(f"level is {stage.level}, which objective.kind {objective.kind} has not; write diffusion")
        changes["noise"] = fixed_noise(stage.level)
    elif objective.time == "depth":
        changes["noise"] = depth_noise(objective, None, n_stacks)
    optimizer = stage.optimizer or config.optimizer
    if curriculum.decay == "last" and not is_last and stage.optimizer is None:
        optimizer = dataclasses.replace(optimizer, schedule="constant")
    changes["optimizer"] = optimizer if stage.lr is None else dataclasses.replace(optimizer, lr=stage.lr)
    if curriculum.frozen_stacks and stage.frozen is None:
        if len(curriculum.frozen_stacks) != n_stacks:
            raise UsageError(
                f"curriculum.frozen_stacks has {len(curriculum.frozen_stacks)} entries and the rack {n_stacks} stacks; "
                "write one for each stack, from the input"
            )
        changes["frozen_stacks"] = tuple(curriculum.frozen_stacks[stack] for stack in path)
    given = {"name": stage.name, "steps": stage.steps, "frozen": stage.frozen}
    return changes | {key: value for key, value in given.items() if value is not None}


def task_settings(objective: ObjectiveConfig) -> dict[str, Any]:
    """The fields of a phase that follow from its objective."""
    return {
        "objective": Objective(kind=objective.kind),
        "noise": whole_noise(objective),
        "attention_mode": _attention_mode(objective),
        "corruption": "auto" if objective.kind == "clm" else objective.corruption,
    }


def _attention_mode(objective: ObjectiveConfig) -> AttentionMode | None:
    """None: each block's own."""
    if objective.attention_mode == "model":
        return None
    if objective.attention_mode == "auto":
        return "causal" if objective.kind == "clm" else "bidirectional"
    return objective.attention_mode
