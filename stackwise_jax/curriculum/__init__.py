"""Curricula: what a phase is, and the plans that make lists of phases. Pure data, no JAX."""

from stackwise_jax.curriculum.phase import AttentionMode, Noise, Objective, Phase
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
    "AttentionMode",
    "Noise",
    "Objective",
    "Phase",
    "Plan",
    "RackShape",
    "config_shape",
    "format_phase_table",
    "make_plan",
    "phase_table",
]
