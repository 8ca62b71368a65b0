"""The configuration of a run: its keys and defaults, reading from YAML and the command line, checks."""

from stackwise_jax.config.checks import parse_bytes, validate
from stackwise_jax.config.command_line import ConfigArgumentParser
from stackwise_jax.config.loading import (
    config_from_dict,
    differing_keys,
    load_config,
    resolved_yaml,
    run_directory,
)
from stackwise_jax.config.schema import StackWiseConfig

__all__ = [
    "ConfigArgumentParser",
    "StackWiseConfig",
    "config_from_dict",
    "differing_keys",
    "load_config",
    "parse_bytes",
    "resolved_yaml",
    "run_directory",
    "validate",
]
