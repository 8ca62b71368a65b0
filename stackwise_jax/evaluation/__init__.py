"""How good a trained run is."""

from stackwise_jax.evaluation.held_out import evaluate_run, held_out_text

__all__ = ["evaluate_run", "held_out_text"]
