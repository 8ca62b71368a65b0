"""One engine for every curriculum: it runs a list of phases on a rack."""

from stackwise_jax.engine.events import NullReporter, Reporter, StopFlag
from stackwise_jax.engine.heldout import held_out_batches, held_out_sums, quotients
from stackwise_jax.engine.load import LoadedRun, load_experts, load_rack
from stackwise_jax.engine.run import Interrupted, Run
from stackwise_jax.engine.setup import Setup, prepare, vocab_of
from stackwise_jax.engine.step import TaskSpec

__all__ = [
    "Interrupted",
    "LoadedRun",
    "NullReporter",
    "Reporter",
    "Run",
    "Setup",
    "StopFlag",
    "TaskSpec",
    "held_out_batches",
    "held_out_sums",
    "load_experts",
    "load_rack",
    "prepare",
    "quotients",
    "vocab_of",
]
