"""Checks of what was read from a record or a table of leaves: anybody may have written it, with a fitting checksum."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import numpy as np

from stackwise_jax.config.schema import Format

# What arrays are saved as; jax registers the names of the small floats with numpy.
DTYPES = {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "complex64", "complex128"}
DTYPES |= {"float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e4m3b11fnuz", "float8_e4m3fnuz"}
DTYPES |= {"float8_e5m2", "float8_e5m2fnuz"}
LARGEST = 2**62  # steps, bytes
LARGEST_NUMBER = 10**300  # FLOPs and all other figures: what a float holds
LAST_VERSION = 10**8 - 1  # eight digits in a file name
_ITEM = re.compile(r"(?!\d{8}(/|$))\w[\w-]*(/(?!\d{8}(/|$))\w[\w-]*)*", re.ASCII)
_LEAF = re.compile(r"(?!\.)[^\\/\0-\x1f]+(/(?!\.)[^\\/\0-\x1f]+)*")
_FILE = re.compile(r"(?!\.\.?(/|$))[^\\/\0]+(/(?!\.\.?(/|$))[^\\/\0]+)*")


class Wrong(ValueError):
    """A field has a value that it cannot have; the text names it."""


def expect(good: bool, field: str, value: Any) -> None:
    """Raises Wrong, with the value in short, unless it is good."""
    if not good:
        shown = repr(value)
        raise Wrong(f"{field} cannot be {shown if len(shown) <= 60 else shown[:60] + '..'}")


def is_item(name: Any) -> bool:
    """Whether a text may name an item: no part of it leaves the store or could be taken for a version."""
    return isinstance(name, str) and _ITEM.fullmatch(name) is not None and name.split("/")[0] != "progress"


def is_leaf(name: Any) -> bool:
    """Whether a text may name a leaf, after which a directory is named."""
    return isinstance(name, str) and _LEAF.fullmatch(name) is not None


def is_file(name: Any) -> bool:
    """Whether a text is a path that stays in the directory that it is relative to."""
    return isinstance(name, str) and _FILE.fullmatch(name) is not None


def is_count(value: Any, most: int = LARGEST) -> bool:
    """Whether a value is a whole number from 0 to `most`."""
    return type(value) is int and 0 <= value <= most


def is_number(value: Any) -> bool:
    """Whether a value is a number or null, which stands for one that is not finite or was not measured."""
    return value is None or type(value) is float or (type(value) is int and abs(value) <= LARGEST_NUMBER)


def is_text(value: Any) -> bool:
    """Whether a value is a text."""
    return isinstance(value, str)


def is_digest(value: Any) -> bool:
    """Whether a value is a sha256 in hex."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def is_table(value: Any, key: Callable[[Any], bool], entry: Callable[[Any], bool]) -> bool:
    """Whether a value is a mapping all of whose keys and entries are good."""
    return isinstance(value, dict) and all(key(k) and entry(v) for k, v in value.items())


def is_format(value: Any) -> bool:
    """Whether a value names a format of weights."""
    return value in get_args(Format)


def is_point(value: Any) -> bool:
    """Whether a value is a point of a loss history: [step, loss], or the two by name."""
    pair = [value.get("step"), value.get("loss")] if isinstance(value, dict) else value
    return isinstance(pair, list) and len(pair) == 2 and is_count(pair[0]) and is_number(pair[1])


def is_list(value: Any, entry: Callable[[Any], bool]) -> bool:
    """Whether a value is a list all of whose entries are good."""
    return isinstance(value, list) and all(map(entry, value))


def is_shape(value: Any) -> bool:
    """Whether a value is a shape that an array can have."""
    if not (isinstance(value, list) and len(value) <= 32 and all(map(is_count, value))):
        return False
    return math.prod(max(n, 1) for n in value) <= LARGEST // 16  # bytes, of the widest dtype, in a machine word


def array_bytes(entry: dict) -> int:
    """Bytes of a leaf from its entry in the table of leaves."""
    return math.prod(entry["shape"]) * np.dtype(entry["dtype"]).itemsize


# What the rest of the program reads of the `meta` of an item; each may be missing.
IN_META: dict[str, Callable[[Any], bool]] = {
    "format": is_format,
    "values": is_count,
    "loss_history": partial(is_list, entry=is_point),
    "names": partial(is_list, entry=is_text),
    "adapter": lambda value: isinstance(value, dict),
}
