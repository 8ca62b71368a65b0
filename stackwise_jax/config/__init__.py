"""The configuration of a run: its keys and defaults, reading from YAML and the command line, checks."""

from stackwise_jax.config.checks import parse_bytes, validate
from stackwise_jax.config.command_line import (
    CommandParser,
    ConfigArgumentParser,
    number,
    path,
    whole_number,
    whole_numbers,
)
from stackwise_jax.config.loading import (
    Written,
    config_from_dict,
    config_from_yaml,
    differing_keys,
    load_config,
    load_written,
    resolved_yaml,
    run_directory,
)
from stackwise_jax.config.schema import StackWiseConfig

__all__ = [
    "CommandParser",
    "ConfigArgumentParser",
    "StackWiseConfig",
    "Written",
    "config_from_dict",
    "config_from_yaml",
    "differing_keys",
    "load_config",
    "load_written",
    "number",
    "parse_bytes",
    "path",
    "resolved_yaml",
    "run_directory",
    "validate",
    "whole_number",
    "whole_numbers",
]
