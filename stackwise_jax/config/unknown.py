"""What to say about a key or an option that does not exist: what it is called here, or the near ones."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NoReturn, cast

from stackwise_jax.config.keys import hint_of, list_names, section_hints, split_optional
from stackwise_jax.config.schema import StackWiseConfig
from stackwise_jax.config.synonyms import SYNONYMS
from stackwise_jax.errors import UsageError

COMMAND_LINE = "command line"
_ALIKE = 0.7  # of difflib: below it two words have little in common
_MOST_ANSWERS = 12  # in a sentence


def refuse_unknown(
    name: str, where: str, section: type = StackWiseConfig, prefix: str = "", value: Any = None
) -> NoReturn:
    """Raise the UsageError for a key that a section does not have.

    Args:
        name: as it is written; dots are sections.
        prefix: the name of the section, with a dot at its end.
        value: what is written for it; where it is a section of another program, its keys are answered one by one.
    """
    key = prefix + name
    if where != COMMAND_LINE and hint_of(key) is not None:
        raise UsageError(f"{where}: {key} is written with dots; in YAML write each section on its own line, indented")
    inside = [leaf for leaf in _leaves(value, f"{key}.") if _known_elsewhere(leaf)]
    if inside and not _near(name, {own: own for own in section_hints(section)}):
        answers = "; ".join(f"for {_short(leaf)} {_known_elsewhere(leaf)}" for leaf in inside[:_MOST_ANSWERS])
        raise UsageError(f"{where}: unknown section {_short(key)}; {answers}")
    answer = advice(name, section, prefix) or (
        _keys_of(section, prefix) if prefix else f"the sections are {', '.join(section_hints(section))}"
    )
    raise UsageError(f"{where}: unknown key {_short(key)}; {answer}")


def refuse_option(option: str, options: Collection[str], keys: bool) -> NoReturn:
    """Raise the UsageError for an option that a command does not have.

    Args:
        option: without its value.
        options: those of the command.
        keys: whether the command takes --section.key for each key of the configuration.
    """
    answer = _synonym(option.lstrip("-")) if keys else None
    near = _near(option.replace("_", "-"), {known.replace("_", "-"): known for known in options}, prefix_too=True)
    if answer is None and near is not None:
        answer = f"the nearest valid one is {near}"
    elif keys:
        dashed = lambda match: f"--{match[0]}" if hint_of(match[0]) else match[0]
        answer = re.sub(r"(?<![\w.-])[a-z_]+(\.[a-z_0-9]+)+", dashed, answer or advice(option.lstrip("-")) or "")
    raise UsageError(f"{COMMAND_LINE}: unknown option {_short(option)}; {answer or '-h shows what can be written'}")


def advice(name: str, section: type = StackWiseConfig, prefix: str = "") -> str | None:
    """What to write instead of a key that the section does not have, as the end of a sentence; None: nobody knows."""
    if answer := _synonym(prefix + name):
        return answer
    plain = re.sub(r"[\s-]", "_", name).lower()
    if hint := hint_of(prefix + plain):
        if not dataclasses.is_dataclass(hint):
            return f"write {prefix}{plain}"
        return f"write a key of this section, such as {list_names(cast(type, hint), f'{prefix}{plain}.')[0]}"
    *_, last = plain.split(".")
    if last.startswith("no_") and (same := [key for key in list_names() if _last(key) == last[3:]]):
        return f"write {same[0]} false"
    same = [key for key in list_names(section, prefix) if _last(key) == last]
    found = _choice(same) or _choice([key for key in list_names() if _last(key) == last])
    return found or _spelled_alike(plain.split("."), section, prefix)


def _synonym(key: str) -> str | None:
    """What to write for a key that has another name here."""
    return next((f"write {SYNONYMS[word]}" for word in _endings(key) if word in SYNONYMS), None)


def _known_elsewhere(key: str) -> str | None:
    """What to write for a key of a section that does not exist, where that is known for sure."""
    return _synonym(key) or _choice([name for name in list_names() if _last(name) == _last(key)])


def _choice(keys: list[str]) -> str | None:
    if len(keys) < 2:
        return f"the nearest valid one is {keys[0]}" if keys else None
    return f"write {', '.join(keys[:-1])} or {keys[-1]}"


def _leaves(value: Any, prefix: str) -> Iterator[str]:
    """The names of the keys below a section that does not exist."""
    for name, inner in value.items() if isinstance(value, Mapping) else ():
        if isinstance(inner, Mapping) and inner:
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _spelled_alike(names: list[str], section: Any, prefix: str) -> str | None:
    """The key whose name, and whose section's, looks most like what is written."""
    first, *rest = names
    own = section_hints(section)
    near = first if first in own else _near(first, {name: name for name in own})
    inner = split_optional(own[near])[0] if near else None
    if rest and dataclasses.is_dataclass(inner):
        return _spelled_alike(rest, inner, f"{prefix}{near}.") or _keys_of(inner, f"{prefix}{near}.")
    found = f"{prefix}{near}" if near else _near(names[-1], {_last(key): key for key in list_names(section, prefix)})
    return f"the nearest valid one is {found}" if found else None


def _keys_of(section: Any, prefix: str) -> str:
    return f"{prefix[:-1]} has the keys {', '.join(section_hints(section))}"


def _near(word: str, known: dict[str, str], prefix_too: bool = False) -> str | None:
    """What is known under the word that is spelled most like this one; None: none is."""
    alike = difflib.get_close_matches(word, known, n=1, cutoff=_ALIKE)
    begun = [name for name in known if prefix_too and len(word) > 3 and name.startswith(word)]
    return known[(alike or begun)[0]] if alike or begun else None


def _endings(key: str) -> Iterator[str]:
    """The key in small letters and underscores without the indices of lists, then without its first sections."""
    words = re.sub(r"\[\d*\]", "", key).replace("-", "_").replace(" ", "_").lower().split(".")
    for i in range(len(words)):
        yield ".".join(words[i:])


def _last(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _short(text: str) -> str:
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
    return text if len(text) <= 100 else f"{text[:80]} ... ({len(text):,} characters)"
