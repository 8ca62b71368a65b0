"""The value of a key from what is written: one reading for YAML files, the command line and stored plain values."""

from __future__ import annotations

import json
import math
import re
from typing import Any, Literal, get_args, get_origin

from stackwise_jax.config.keys import split_optional
from stackwise_jax.config.yaml_text import Plain

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = dict.fromkeys(("null", "Null", "NULL", "~"))
_WORDS |= {word: True for word in ("true", "True", "TRUE")} | {word: False for word in ("false", "False", "FALSE")}
_WORDS |= {sign + word: math.inf for sign in ("", "+") for word in (".inf", ".Inf", ".INF")}
_WORDS |= {word: -math.inf for word in ("-.inf", "-.Inf", "-.INF")}
_WORDS |= {word: math.nan for word in (".nan", ".NaN", ".NAN")}
_MOST_DIGITS = 40  # of a whole number; Python itself refuses more than 4300, and no key takes more than 20


def meaning(plain: str) -> Any:
    """What the core schema of YAML 1.2 reads in a scalar without quotes: None, bool, int, float or the text itself."""
    if plain in _WORDS:
        return _WORDS[plain]
    if _INT.fullmatch(plain) and len(plain) <= _MOST_DIGITS:
        return int(plain, {"0o": 8, "0x": 16}.get(plain[:2], 10))
    return float(plain) if _FLOAT.fullmatch(plain) else plain


def typed(hint: Any, value: Any) -> Any:
    """A value for a key of type `hint`, which is not a section: text (`Plain` or str), a number, bool, None or a list.

    Raises:
        ValueError: the value is none of this type.
    """
    inner, optional = split_optional(hint)
    known = meaning(value) if isinstance(value, Plain) else value
    if known is None and optional:
        return None
    if get_origin(inner) is list:
        if isinstance(value, list):
            return [typed(get_args(inner)[0], entry) for entry in value]
    elif inner is str or get_origin(inner) is Literal:
        if isinstance(value, str) and known is not None and (inner is str or value in get_args(inner)):
            return str(value)
    elif inner is float and isinstance(known, int | float) and not isinstance(known, bool):
        return _as_float(known)
    elif type(known) is inner:
        return known
    raise ValueError(value)


def shown(value: Any, most: int = 100) -> str:
    """A value as people write it, in at most about so many characters."""
    numeric = isinstance(value, Plain) and isinstance(meaning(value), int | float) and value not in _WORDS
    text = str(value) if numeric else json.dumps(_meant(value), default=str, ensure_ascii=False)
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
    return text if len(text) <= most else f"{text[: most - 20]} ... ({len(text):,} characters)"


def _meant(value: Any) -> Any:
    if isinstance(value, list):
        return [_meant(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _meant(entry) for key, entry in value.items()}
    return meaning(value) if isinstance(value, Plain) else value


def _as_float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf
