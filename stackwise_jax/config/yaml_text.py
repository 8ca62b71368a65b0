"""YAML to plain values: what YAML 1.2 and its core schema read, without anchors, tags, merge keys or endless nesting.

A scalar without quotes stays text (`Plain`): what it means depends on the type of its key, see values.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import yaml

from stackwise_jax.errors import UsageError

MOST_LEVELS = 32  # of nesting; the deepest key, of an adapter's table in a list of plans, has 7
MOST_NODES = 4_000_000  # scalars, lists and sections: more than a stored configuration of 16 MiB can hold
_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # of libyaml, 50 times as fast, where PyYAML has it
_LINES = "write lines of the form key: value"


class Plain(str):
    """A scalar that was written without quotes."""


class _Problem(Exception):
    """What is wrong with a text, on which line (from 1; None: unknown), and what to write instead."""

    def __init__(self, line: int | None, problem: str, remedy: str = _LINES):
        super().__init__(problem)
        self.line, self.remedy = line, remedy


def parse_yaml(text: str, where: str) -> Any:
    """The one document of a YAML text: dict, list, `Plain`, str (a quoted scalar) or None (nothing is written).

    Args:
        where: what the sentence of an error begins with.

    Raises:
        UsageError: the text is no YAML, or it holds what a configuration does not need: anchors and aliases, tags,
            merge keys, keys that are no text, a key twice, a second document, or too many or too deeply nested values.
    """
    try:
        if strange := yaml.SafeLoader.NON_PRINTABLE.search(text):
            line = text.count("\n", 0, strange.start()) + 1
            raise _Problem(
                line, _invalid(f"the character U+{ord(strange[0]):04X}"), "write text without control characters"
            )
        return _Builder(yaml.parse(text, Loader=_Parser)).document()
    except _Problem as problem:
        found = problem
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = _invalid(getattr(error, "problem", None) or "unreadable text")
        found = _Problem(mark.line + 1 if mark else None, problem)
    line = f", line {found.line}" if found.line else ""
    raise UsageError(f"{where}{line}: {found}; {found.remedy}")


def _invalid(problem: str) -> str:
    return f"this is no valid YAML ({problem})"


class _Builder:
    """Builds the values from the events of the parser, so that nothing is expanded before it is counted."""

    def __init__(self, events: Iterator[yaml.Event]):
        self._events, self._nodes = events, 0

    def document(self) -> Any:
        """The value of the only document."""
        value: Any = None
        n_documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                n_documents += 1
                if n_documents > 1:
                    _refuse(
                        event, "a second document begins, which is not read here", "write one document, without ---"
                    )
                value = self._value(next(self._events), 0)
        return value

    def _value(self, event: Any, level: int) -> Any:
        self._check(event, level)
        if isinstance(event, yaml.ScalarEvent):
            if event.style:
                return str(event.value)
            return Plain(event.value) if event.value else None
        if isinstance(event, yaml.SequenceStartEvent):
            return [self._value(item, level + 1) for item in self._until(yaml.SequenceEndEvent)]
        mapping: dict[str, Any] = {}
        for key in self._until(yaml.MappingEndEvent):
            name = self._name(key, level + 1)
            if name in mapping:
                _refuse(key, f"the key {name} stands twice")
            mapping[name] = self._value(next(self._events), level + 1)
        return mapping

    def _name(self, event: Any, level: int) -> str:
        """The name of a key."""
        self._check(event, level)
        if not isinstance(event, yaml.ScalarEvent):
            _refuse(event, "a list or a section stands where a key has to be")
        if not event.style and event.value == "<<":
            _refuse(event, "merge keys (<<) are not read here", "write the keys out, or give --config several times")
        if not event.value:
            _refuse(event, "there is no key before the colon")
        return event.value

    def _check(self, event: Any, level: int) -> None:
        self._nodes += 1
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            _refuse(
                event,
                "anchors and aliases are not read here",
                "write values out, and in quotes what begins with & or *",
            )
        if event.tag is not None:
            _refuse(event, "tags are not read here", "write values without them, and in quotes what begins with !")
        if level > MOST_LEVELS:
            _refuse(event, f"more than {MOST_LEVELS} levels of nesting are not read here")
        if self._nodes > MOST_NODES:
            _refuse(event, f"more than {MOST_NODES:,} values are not read here")

    def _until(self, end: type) -> Iterator[Any]:
        """The events before the one that ends a list or a section; what stands below them is taken meanwhile."""
        for event in self._events:
            if isinstance(event, end):
                return
            yield event


def _refuse(event: Any, problem: str, remedy: str = _LINES) -> NoReturn:
    raise _Problem(event.start_mark.line + 1, problem, remedy)
