"""The keys of a configuration, read from the schema: their names, types, defaults and comments."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from stackwise_jax.config import schema


@dataclass(frozen=True)
class Key:
    """One key that holds a value (not a section)."""

    name: str  # with its sections: model.architecture.n_stacks
    hint: Any  # its type
    default: Any
    comment: str  # what schema.py says next to it; empty if nothing


@cache
def section_hints(section: type) -> dict[str, Any]:
    """The types of a section's keys, by name."""
    return get_type_hints(section)


def list_keys(section: type = schema.StackWiseConfig, prefix: str = "") -> list[Key]:
    """All keys that hold a value, in the order of the schema, sections opened."""
    keys = []
    for field in dataclasses.fields(section):
        name, hint = prefix + field.name, section_hints(section)[field.name]
        if dataclasses.is_dataclass(hint):
            keys += list_keys(cast(type, hint), f"{name}.")
        else:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            keys.append(Key(name, hint, default, _comment(section, field.name)))
    return keys


@cache
def list_names(section: type = schema.StackWiseConfig, prefix: str = "") -> tuple[str, ...]:
    """The names of all keys and all sections; a section that may be null (a phase's objective) is opened too."""
    names: list[str] = []
    for name, hint in section_hints(section).items():
        inner, _ = split_optional(hint)
        names.append(prefix + name)
        if dataclasses.is_dataclass(inner):
            names += list_names(inner, f"{prefix}{name}.")
    return tuple(names)


def values_of(section: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of everything in a section, such as curriculum.stages[0].lr; a list comes before its entries."""
    if dataclasses.is_dataclass(section):
        for item in dataclasses.fields(section):
            yield from values_of(getattr(section, item.name), f"{key}.{item.name}" if key else item.name)
        return
    yield key, section
    if isinstance(section, list):
        for i, entry in enumerate(section):
            yield from values_of(entry, f"{key}[{i}]")


def value_of(section: Any, key: str) -> Any:
    """The value of a key with dots and places in lists; None also where one of its sections is None."""
    for name in key.replace("]", "").replace("[", ".").split("."):
        section = section[int(name)] if name.isdigit() else getattr(section, name)
        if section is None:
            return None
    return section


def hint_of(key: str) -> Any:
    """The type of a key or a section such as model.architecture; None: there is none of this name."""
    hint: Any = schema.StackWiseConfig
    for name in key.split("."):
        section, _ = split_optional(hint)
        hint = section_hints(section).get(name) if dataclasses.is_dataclass(section) else None  # pyright: ignore
    return hint


def split_optional(hint: Any) -> tuple[Any, bool]:
    """(type without None, whether None is allowed)."""
    if get_origin(hint) in (Union, UnionType):
        inner = [argument for argument in get_args(hint) if argument is not NoneType]
        return inner[0], len(inner) < len(get_args(hint))
    return hint, False


def describe(hint: Any) -> str:
    """What to write for a value of this type, as the end of a sentence."""
    inner, optional = split_optional(hint)
    if get_origin(inner) is Literal:
        text = "one of " + ", ".join(get_args(inner))
    elif get_origin(inner) is list:
        entry = get_args(inner)[0]
        if dataclasses.is_dataclass(entry):
            text = "a list of entries, each with its own keys"
        elif get_origin(entry) is Literal:
            text = "a list of any of " + ", ".join(get_args(entry))
        else:
            text = {int: "a list of whole numbers such as [0, 1]", float: "a list of numbers such as [0.5, 0.1]"}[entry]
    else:
        text = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[inner]
    return text + (" or null" if optional else "")


def _comment(section: type, name: str) -> str:
    """What schema.py says next to a key of a section, or of a section that it extends."""
    return next((text for base in section.__mro__ if (text := _comments().get((base.__name__, name)))), "")


@cache
def _comments() -> dict[tuple[str, str], str]:
    """{(section, key): the comment at the end of the key's line in schema.py}."""
    comments, section = {}, ""
    for line in inspect.getsource(schema).splitlines():
        if match := re.match(r"class (\w+)", line):
            section = match[1]
        elif match := re.match(r"    (\w+): .*?  # (.+)$", line):
            comments[section, match[1]] = match[2]
    return comments
