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
from stackwise_jax.curriculum.recorded import check_rows, first_difference, is_complete, plan_from_json, plan_to_json
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
    "check_rows",
    "config_shape",
    "first_difference",
    "format_phase_table",
    "is_complete",
    "make_plan",
    "noise_cut",
    "overruled",
    "phase_table",
    "plan_from_json",
    "plan_to_json",
    "stack_levels",
    "trained_apart",
]
