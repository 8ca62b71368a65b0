"""The command line of every command: its own options, and --section.key overrides of the configuration."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from stackwise_jax.config.keys import describe, list_keys, list_names, section_hints
from stackwise_jax.config.loading import COMMAND_LINE, refuse_unknown
from stackwise_jax.config.schema import StackWiseConfig
from stackwise_jax.errors import UsageError

_KEYS = "Each configuration key can be changed by --section.key VALUE or --section.key=VALUE:"


class ConfigArgumentParser(argparse.ArgumentParser):
    """An argument parser that also takes --section.key value (or --section.key=value) for every configuration key.

    The parsed options have `overrides`: those arguments, in order, for `load_config`. Misspelled options and keys raise
    UsageError with the nearest valid one; -h lists the command's options and all keys with types and defaults.
    """

    def __init__(self, prog: str | None = None, description: str | None = None):
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def add_config_arguments(self) -> None:
        """Add --config FILE and --print_config."""
        self.add_argument("--config", metavar="FILE", help="YAML file with the keys that differ from the defaults")
        self.add_argument(
            "--print_config", action="store_true", help="print the resolved configuration as YAML and exit"
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """The command's own options, and `overrides`.

        Raises:
            UsageError: an option, a key or a value is wrong.
        """
        overrides, own = self._split(list(sys.argv[1:] if args is None else args))
        options = super().parse_args(own, namespace)
        options.overrides = overrides
        return options

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print with its usage."""
        raise UsageError(f"{COMMAND_LINE}: {message}; -h shows what can be written")

    def format_help(self) -> str:
        """The command's own options, then every configuration key with its comment, type and default."""
        return super().format_help() + "\n" + _keys_help()

    def _split(self, arguments: list[str]) -> tuple[list[str], list[str]]:
        """(overrides, the command's own arguments)."""
        known = self._option_string_actions
        overrides, own = [], []
        rest = iter(arguments)
        for token in rest:
            name = token.partition("=")[0]
            if token == "--":
                own += [token, *rest]
            elif not token.startswith("--") or name in known:
                own.append(token)
            elif name[2:].split(".")[0] in section_hints(StackWiseConfig) and "." in name:
                overrides.append(token)
                if "=" not in token:
                    overrides += itertools.islice(rest, 1)
            else:
                options = [option for option in known if option.startswith("--")]
                refuse_unknown(name, COMMAND_LINE, options + [f"--{key}" for key in list_names() if "." in key])
        return overrides, own


def _keys_help() -> str:
    """The help text of the configuration keys."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False, description=_KEYS)
    groups: dict[str, Any] = {}
    for key in list_keys():
        section, *_, name = key.name.split(".")
        if section not in groups:
            about = section_hints(StackWiseConfig)[section].__doc__.split("\n")[0]
            groups[section] = parser.add_argument_group(section, about)
        default = f"{describe(key.hint)}; default {json.dumps(key.default)}"
        text = f"{key.comment} ({default})" if key.comment else f"({default})"
        groups[section].add_argument(f"--{key.name}", metavar=name.upper(), help=text.replace("%", "%%"))
    return parser.format_help()
