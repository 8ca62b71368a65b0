"""Curricula: what a phase is, and the plans that make lists of phases. Pure data, no JAX."""

from stackwise_jax.curriculum.levels import noise_cut, stack_levels
from stackwise_jax.curriculum.make import make_plan
from stackwise_jax.curriculum.overruled import overruled
from stackwise_jax.curriculum.phase import (
    AdapterSpec,
    AttentionMode,
    Consistency,
    Noise,
    Objective,
    Phase,
    StackAdapter,
)
from stackwise_jax.curriculum.plans import PLANS, config_shape
from stackwise_jax.curriculum.shape import Plan, RackShape, trained_apart
from stackwise_jax.curriculum.table import format_phase_table, phase_table

__all__ = [
    "PLANS",
    "AdapterSpec",
    "AttentionMode",
    "Consistency",
    "Noise",
    "Objective",
    "Phase",
    "Plan",
    "RackShape",
    "StackAdapter",
    "config_shape",
    "format_phase_table",
    "make_plan",
    "noise_cut",
    "overruled",
    "phase_table",
    "stack_levels",
    "trained_apart",
]
