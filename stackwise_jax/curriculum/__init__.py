"""Curricula: what a phase is, and the plans that make lists of phases. Pure data, no JAX."""

from stackwise_jax.curriculum.phase import (
    AdapterSpec,
    AttentionMode,
    Consistency,
    Noise,
    Objective,
    Phase,
    StackAdapter,
)
from stackwise_jax.curriculum.plans import (
    PLANS,
    Plan,
    RackShape,
    config_shape,
    format_phase_table,
    make_plan,
    phase_table,
)

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
    "phase_table",
]
