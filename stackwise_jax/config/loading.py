"""From YAML files and --section.key overrides to a StackWiseConfig, and back to text.

Every mistake is a UsageError of one sentence that says where (the file or the command line), which key, and what would
be right. YAML is read by the safe loader only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin

import yaml

from stackwise_jax.config.keys import describe, list_names, nearest, section_hints, split_optional
from stackwise_jax.config.schema import StackWiseConfig
from stackwise_jax.errors import UsageError

COMMAND_LINE = "command line"
Section = TypeVar("Section")


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> StackWiseConfig:
    """The defaults, changed by a YAML file of differences, changed by overrides.

    Keys and types are checked here; values that no type catches are checked by `validate`.

    Args:
        path: the YAML file; None: only the defaults.
        overrides: as on the command line: ["--model.d_model", "64", "--optimizer.lr=1e-3"]; the last one wins.

    Raises:
        UsageError: a missing, empty or unreadable file, an unknown key or a value of the wrong type.
    """
    config = StackWiseConfig()
    if path is not None:
        config = _changed(config, _read_yaml(Path(path)), "", str(path), list_names())
    for key, text in _pairs(overrides):
        if key not in list_names():
            refuse_unknown(key, COMMAND_LINE, list_names())
        config = _changed(config, _nested(key, text), "", COMMAND_LINE, list_names())
    return config


def config_from_dict(given: Mapping[str, Any], where: str = "configuration") -> StackWiseConfig:
    """The inverse of `StackWiseConfig.to_dict`; keys that are left out keep their defaults.

    Raises:
        UsageError: an unknown key or a value of the wrong type; the sentence begins with `where`.
    """
    return _changed(StackWiseConfig(), given, "", where, list_names())


def resolved_yaml(config: StackWiseConfig) -> str:
    """All keys with their values as YAML; `load_config` reads it back to an equal configuration."""
    return yaml.dump(config.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def differing_keys(a: StackWiseConfig, b: StackWiseConfig) -> list[str]:
    """The names of the keys whose values differ, in the order of the schema."""
    flat_a, flat_b = dict(_flat(a.to_dict())), dict(_flat(b.to_dict()))
    missing = object()
    return [key for key in flat_a | flat_b if flat_a.get(key, missing) != flat_b.get(key, missing)]


def run_directory(config: StackWiseConfig, config_path: str | Path | None = None) -> Path:
    """Where the run lives: run.dir, else runs/<run.name>, else runs/<stem of the config file, or "default">."""
    if config.run.dir is not None:
        return Path(config.run.dir)
    return Path("runs") / (config.run.name or (Path(config_path).stem if config_path else "default"))


def refuse_unknown(key: str, where: str, known: Collection[str]) -> NoReturn:
    """Raise the UsageError for a key or an option that does not exist, with the nearest of the `known` ones."""
    if re.split(r"[.\-]", key)[-1] == "n_blocks":
        raise UsageError(
            f"{where}: the key {key} is no longer used; write model.architecture.n_stacks and "
            "model.architecture.blocks_per_stack"
        )
    if key in known:
        raise UsageError(f"{where}: {key} is written with dots; in YAML write each section on its own line, indented")
    what = "option" if key.startswith("-") else "key"
    raise UsageError(f"{where}: unknown {what} {key}; the nearest valid one is {nearest(key, known)}")


def _changed(base: Section, given: Any, prefix: str, where: str, known: Collection[str]) -> Section:
    """A copy of a section with what is given replaced; `prefix` is the section's name, with a dot at its end."""
    hints = section_hints(type(base))
    if not isinstance(given, Mapping):
        raise UsageError(
            f"{where}: {prefix[:-1] or 'the file'} is {_shown(given)}; write keys below it, such as {', '.join(hints)}"
        )
    values = {}
    for name, value in given.items():
        if name not in hints:
            refuse_unknown(f"{prefix}{name}", where, known)
        values[name] = _value(hints[name], getattr(base, name), value, f"{prefix}{name}", where, known)
    return dataclasses.replace(base, **values)  # pyright: ignore[reportArgumentType]


def _value(hint: Any, base: Any, value: Any, key: str, where: str, known: Collection[str]) -> Any:
    """The value for a key of type `hint`, checked; `base` is what it replaces."""
    inner, optional = split_optional(hint)
    if dataclasses.is_dataclass(inner):
        if value is None:  # a section whose lines are all commented out, or no objective of its own
            return base if not optional else None
        return _changed(base or inner(), value, f"{key}.", where, known)  # pyright: ignore[reportCallIssue]
    quotes = " (in quotes what YAML reads as something else)" if inner is str else ""
    wrong = UsageError(f"{where}: {key} is {_shown(value)}; write {describe(hint)}{quotes}")
    if value is None and not optional:
        raise wrong
    if get_origin(inner) is list and dataclasses.is_dataclass(entry := get_args(inner)[0]):
        entries = _parsed(value, f"{where}: {key}") if isinstance(value, str) else value
        if not isinstance(entries, list):
            raise wrong
        names = [f"{key}[{i}]." for i in range(len(entries))]
        return [
            _changed(entry(), item, name, where, list_names(entry, name))  # pyright: ignore
            for name, item in zip(names, entries, strict=True)
        ]
    try:
        return _reader(hint).parse_object({"value": value}).value
    except argparse.ArgumentError:
        raise wrong from None


@cache
def _reader(hint: Any) -> Any:
    """A parser of one value of type `hint`, from what YAML holds or from the text of the command line."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(key, text) of each override."""
    rest = iter(overrides)
    for token in rest:
        key, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not key:
            raise UsageError(f"{COMMAND_LINE}: {token!r} stands alone; write --section.key value")
        if not equals:
            text = next(rest, None)
            if text is None or text.startswith("--"):
                raise UsageError(f"{COMMAND_LINE}: {token} has no value; write {token} VALUE or {token}=VALUE")
        yield key, text


def _nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of every key of nested dicts and of the entries of lists of dicts."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _flat(value, f"{prefix}.{name}" if prefix else name)
    elif isinstance(tree, list) and any(isinstance(entry, dict) for entry in tree):
        for i, entry in enumerate(tree):
            yield from _flat(entry, f"{prefix}[{i}]")
    else:
        yield prefix, tree


def _shown(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; give --config a YAML file that does") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text; give --config a YAML file") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); give --config a readable YAML file") from None
    given = _parsed(text, str(path))
    if given is None:
        raise UsageError(f"{path} is empty; write the keys that differ from the defaults, or leave --config out")
    return given


def _parsed(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "unreadable text"
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(
            f"{where}{line}: this is no valid YAML ({problem}); write lines of the form key: value"
        ) from None


class _Loader(yaml.SafeLoader):
    """The safe loader, which also refuses a key that stands twice in a section (YAML would keep the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} stands twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The safe dumper."""


def _read_exponents(handlers: Iterable[Any]) -> None:
    """YAML 1.1 reads 1e-4 as text because it has no dot; read and write it as the number it is in YAML 1.2."""
    for handler in handlers:
        handler.add_implicit_resolver(
            "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
        )


_read_exponents((_Loader, _Dumper))
