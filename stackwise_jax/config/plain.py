"""Dataclasses from the plain data of a JSON file. Every field is checked, because the file may be anybody's."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal, TypeVar, get_args, get_origin

from stackwise_jax.config.values import shown
from stackwise_jax.errors import UsageError

T = TypeVar("T")


def from_plain(kind: type[T], given: Any, where: str, *, partial: bool = False, **ready: Any) -> T:
    """The instance of a dataclass that `given` describes, as `dataclasses.asdict` and JSON would.

    Fields may be bool, int, float, str, literals, dataclasses, None beside one of these, and tuples and frozen sets of
    them. A tuple or a set is a JSON list.

    Args:
        where: what `given` is, for messages, such as "phase 3".
        partial: fields that have a default may be missing.
        ready: fields whose values are not in `given`.

    Raises:
        UsageError: `given` is no object, a field is missing, unknown or of the wrong type, or the class refuses it.
    """
    if not isinstance(given, dict):
        raise UsageError(f"{where} is {shown(given)} and not an object with fields")
    hints = typing.get_type_hints(kind)
    fields = [f for f in dataclasses.fields(kind) if f.init and f.name not in ready]  # pyright: ignore
    if unknown := sorted(given.keys() - {f.name for f in fields}):
        raise UsageError(f"{where} has an unknown field {shown(unknown[0])}")
    values = dict(ready)
    for field in fields:
        if field.name in given:
            values[field.name] = _value(hints[field.name], given[field.name], f"{where}: {field.name}", partial)
        elif not partial or (field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING):
            raise UsageError(f"{where} lacks the field {field.name}")
    return kind(**values)


def _value(hint: Any, given: Any, where: str, partial: bool) -> Any:
    """`given` as the type `hint`."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        if given is None:
            return None
        hint = next(kind for kind in get_args(hint) if kind is not types.NoneType)
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast(type, hint), given, where, partial=partial)
    if origin in (tuple, frozenset, list) and isinstance(given, list):
        return origin(_value(get_args(hint)[0], entry, f"{where}[{i}]", partial) for i, entry in enumerate(given))
    fits = {
        bool: lambda: isinstance(given, bool),
        int: lambda: isinstance(given, int) and not isinstance(given, bool),
        float: lambda: isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given),
        str: lambda: isinstance(given, str),
    }
    if origin is Literal:
        if isinstance(given, str) and given in get_args(hint):
            return given
        raise UsageError(f"{where} is {shown(given)} and not one of {', '.join(get_args(hint))}")
    if hint not in fits or not fits[hint]():
        names = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
        raise UsageError(f"{where} is {shown(given)} and not {names.get(hint, 'a list')}")
    return given
