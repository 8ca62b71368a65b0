"""How good a trained run is."""

from stackwise_jax.evaluation.held_out import Task, evaluate_experts, evaluate_run, held_out_text, task_of

__all__ = ["Task", "evaluate_experts", "evaluate_run", "held_out_text", "task_of"]
