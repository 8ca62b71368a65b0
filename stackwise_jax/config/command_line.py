"""The command line of every command: its own options, and --section.key overrides of the configuration."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from stackwise_jax.config.bounds import ENTRIES
from stackwise_jax.config.keys import describe, hint_of, list_keys, section_hints
from stackwise_jax.config.paths import expanded
from stackwise_jax.config.schema import StackWiseConfig
from stackwise_jax.config.unknown import COMMAND_LINE, advice, refuse_option
from stackwise_jax.config.values import shown
from stackwise_jax.errors import UsageError

_REPEATABLE = ("--config",)
_KEYS = "Each configuration key can be changed by --section.key VALUE or --section.key=VALUE:"


def whole_number(smallest: int, largest: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number in this range."""

    def read(text: str) -> int:
        if re.fullmatch(r"[-+]?[0-9]{1,20}", text) and smallest <= int(text) <= largest:
            return int(text)
        raise argparse.ArgumentTypeError(f"{shown(text)} is no whole number from {smallest} to {largest}")

    return read


def whole_numbers(smallest: int, largest: int) -> Callable[[str], tuple[int, ...]]:
    """The type of an option that takes whole numbers in this range with commas between them."""
    one = whole_number(smallest, largest)

    def read(text: str) -> tuple[int, ...]:
        if text.count(",") >= ENTRIES:
            raise argparse.ArgumentTypeError(f"these are more than {ENTRIES} numbers")
        return tuple(one(part.strip()) for part in text.split(","))

    return read


def number(text: str) -> float:
    """The type of an option that takes a finite number."""
    if re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,4})?", text) and abs(float(text)) < float("inf"):
        return float(text)
    raise argparse.ArgumentTypeError(f"{shown(text)} is no finite number")


def path(text: str) -> str:
    """The type of an option that takes a path; ~ is the home directory."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no path")
    return expanded(text)


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose mistakes are UsageErrors of one sentence, with the nearest option for unknown ones."""

    takes_keys = False  # --section.key for each key of the configuration

    def __init__(self, prog: str | None = None, description: str | None = None, **how: Any):
        super().__init__(prog=prog, description=description, allow_abbrev=False, **how)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """The command's options; an option that is given twice is named on stderr, since only the last one counts.

        Raises:
            UsageError: an option or a value is wrong.
        """
        tokens = list(sys.argv[1:] if args is None else args)
        given: dict[str, list[str]] = {}
        for name, text in self._given(tokens):
            if name not in self._option_string_actions:
                options = [option for option in self._option_string_actions if option.startswith("--")]
                refuse_option(name, options, self.takes_keys)
            if self._takes_value(name) and name not in _REPEATABLE:
                given.setdefault(name, []).append(text)
        options = super().parse_args(tokens, namespace)
        for name, texts in given.items():
            if len(set(texts)) > 1:
                print(
                    f"note: {name} is given {len(texts)} times; the last one, {shown(texts[-1])}, counts",
                    file=sys.stderr,
                )
        return options

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print with its usage."""
        raise UsageError(f"{COMMAND_LINE}: {_printable(message)}; -h shows what can be written")

    def _given(self, tokens: list[str]) -> Iterator[tuple[str, str]]:
        """(name, text of its value) of each option; what follows -- is none."""
        rest = iter(tokens)
        for token in rest:
            name, equals, text = token.partition("=")
            if token == "--":
                return
            if token.startswith("-") and token != "-" and not _is_number(token):
                yield name, text if equals or not self._takes_value(name) else next(rest, "")

    def _takes_value(self, name: str) -> bool:
        action = self._option_string_actions.get(name)
        return action is not None and action.nargs is None


class ConfigArgumentParser(CommandParser):
    """An argument parser that also takes --section.key value (or --section.key=value) for every configuration key.

    The parsed options have `overrides`: those arguments, in order, for `load_config`. Misspelled options and keys raise
    UsageError with what to write; -h lists the command's options and all keys with types and defaults.
    """

    takes_keys = True

    def add_config_arguments(self) -> None:
        """Add --config FILE and --print_config."""
        self.add_argument(
            "--config",
            metavar="FILE",
            type=path,
            action="append",
            help="YAML file with the keys that differ from the defaults; may be repeated, later files win",
        )
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

    def format_help(self) -> str:
        """The command's own options, then every configuration key with its comment, type and default."""
        return super().format_help() + "\n" + _keys_help()

    def _split(self, arguments: list[str]) -> tuple[list[str], list[str]]:
        """(overrides, the command's own arguments)."""
        overrides, own = [], []
        rest = iter(arguments)
        for token in rest:
            name, equals, _ = token.partition("=")
            if token == "--":
                own += [token, *rest]
            elif name.startswith("--") and "." in name and name[2:].split(".")[0] in section_hints(StackWiseConfig):
                overrides += [token, *([] if equals else _next(rest))]
            else:
                if not token.startswith("-"):
                    self._refuse_stray(token)
                own += [token, *(_next(rest) if self._takes_value(name) and not equals else [])]
        return overrides, own

    def _refuse_stray(self, token: str) -> None:
        """Say how to write what other programs take without dashes; what else stands alone is left to argparse."""
        name, equals, value = token.lstrip("+~").partition("=")
        if token.endswith((".yaml", ".yml")) and not equals:
            raise UsageError(f"{COMMAND_LINE}: {shown(token)} stands alone; write --config {token}")
        if not equals:
            return
        if hint_of(name) is None:
            remedy = advice(name) or "-h shows what can be written"
        elif name in section_hints(StackWiseConfig):
            remedy = "write --config FILE for a group of settings, or --section.key VALUE for one"
        else:
            remedy = f"write --{name}={value}" if value else f"write --{name}=VALUE"
        raise UsageError(f"{COMMAND_LINE}: {shown(token)} has no dashes before it; {remedy}")


def _next(rest: Iterator[str]) -> list[str]:
    return [token] if (token := next(rest, None)) is not None else []


def _is_number(token: str) -> bool:
    return re.fullmatch(r"-[0-9.]+([eE][-+]?[0-9]+)?", token) is not None


def _printable(message: str) -> str:
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in message)
    return text if len(text) <= 400 else f"{text[:400]} ..."


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
