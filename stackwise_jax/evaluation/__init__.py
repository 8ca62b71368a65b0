"""How good a trained run is, and what it looks at."""

from stackwise_jax.evaluation.attention import attention_weights
from stackwise_jax.evaluation.held_out import Task, evaluate_experts, evaluate_run, held_out_text, task_of

__all__ = ["Task", "attention_weights", "evaluate_experts", "evaluate_run", "held_out_text", "task_of"]
