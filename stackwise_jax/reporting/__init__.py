"""What people and scripts see of a command: progress, tables, TensorBoard curves, JSON, errors and exit codes."""

from stackwise_jax.reporting.command import add_common, print_json, print_notes, run_command
from stackwise_jax.reporting.console import ConsoleReporter
from stackwise_jax.reporting.fanout import Reporters
from stackwise_jax.reporting.tables import make_console, print_plan, print_summary
from stackwise_jax.reporting.tensorboard import TensorBoardReporter

__all__ = [
    "ConsoleReporter",
    "Reporters",
    "TensorBoardReporter",
    "add_common",
    "make_console",
    "print_json",
    "print_notes",
    "print_plan",
    "print_summary",
    "run_command",
]
