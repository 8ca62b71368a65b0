"""From YAML files and --section.key overrides to a StackWiseConfig, and back to text.

Every mistake is a UsageError of one sentence that says where (the file or the command line), which key, and what would
be right.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml

from stackwise_jax.config.keys import describe, hint_of, list_keys, section_hints, split_optional, value_of
from stackwise_jax.config.paths import PATHS, expanded
from stackwise_jax.config.schema import StackWiseConfig
from stackwise_jax.config.unknown import COMMAND_LINE, refuse_unknown
from stackwise_jax.config.values import meaning, shown, typed
from stackwise_jax.config.yaml_text import Plain, parse_yaml
from stackwise_jax.errors import UsageError
from stackwise_jax.files import read_regular

MOST_BYTES = 2**24  # of a YAML file: 10,000 phases with all their keys take half of it
Section = TypeVar("Section")
Files = str | Path | Sequence[str | Path] | None


@dataclass
class Written:
    """What the user wrote, besides its values."""

    keys: set[str] = field(default_factory=set)  # such as model.d_model or curriculum.stages[0].lr
    repeated: dict[str, str] = field(default_factory=dict)  # key -> the text that counts; twice on the command line
    notes: list[str] = field(default_factory=list)  # sentences on what is read otherwise than it stands there
    in_files: dict[str, tuple[str, Any]] = field(default_factory=dict)  # key -> the file that counts, and its value
    # (what wins, the file that loses) -> key -> (the value that counts, the one that does not)
    replaced: dict[tuple[str, str], dict[str, tuple[Any, Any]]] = field(default_factory=dict)

    def replace(self, config: StackWiseConfig, keys: Set[str], winner: str) -> None:
        """Note which of these keys, now as `config` has them, an earlier file wrote with another value."""
        for key in sorted(keys & self.in_files.keys()):
            now, (file, before) = value_of(config, key), self.in_files[key]
            if now != before:
                self.replaced.setdefault((winner, file), {})[key] = now, before


def load_config(files: Files = None, overrides: Sequence[str] = ()) -> StackWiseConfig:
    """The defaults, changed by YAML files of differences, changed by overrides.

    Keys and types are checked here; values that no type catches are checked by `validate`.

    Args:
        files: YAML files in the order in which they are merged: sections key by key, lists as a whole.
        overrides: as on the command line: ["--model.d_model", "64", "--optimizer.lr=1e-3"]; the last one wins.

    The run.dir of a configuration that lies in a run is the folder that it lies in, wherever the run was before.

    Raises:
        UsageError: a missing, empty or unreadable file, an unknown key or a value of the wrong type, or configurations
            of several runs without a run.dir beside them.
    """
    return load_written(files, overrides)[0]


def load_written(files: Files = None, overrides: Sequence[str] = ()) -> tuple[StackWiseConfig, Written]:
    """As `load_config`, and what the user wrote for it."""
    config, written = StackWiseConfig(), Written()
    moved: dict[str, list[str]] = {}  # folder of a run -> notes
    for path in _listed(files):
        path = expanded(str(path))
        given = _content(_read(path), path)
        if _is_of_run(path):
            given = _placed(given, path, moved)
        config = _merged(config, given, path, written)
    texts: dict[str, str] = {}
    for key, text in _pairs(overrides):
        if texts.get(key, text) != text:
            written.repeated[key] = text
        texts[key] = text
        config = _changed(config, _nested(key, _from_command_line(key, text)), "", COMMAND_LINE, written.keys)
    if config.run.dir in moved and "run.dir" not in texts:
        if len(moved) > 1:
            raise UsageError(f"--config names the configurations of {len(moved)} runs; write the run.dir that is meant")
        written.notes += moved[config.run.dir]
    written.replace(config, texts.keys(), f"the {COMMAND_LINE}")
    return config, written


def _is_of_run(path: str) -> bool:
    """Whether a file is the configuration that a run wrote down, in its folder."""
    return os.path.basename(path) == "config.yaml" and os.path.isfile(os.path.join(os.path.dirname(path), "rack.json"))


def _placed(given: Any, path: str, moved: dict[str, list[str]]) -> Any:
    """The content of a run's configuration with its folder as run.dir and without a name; says it where both differ."""
    run = given.get("run") or {} if isinstance(given, dict) else None
    if not isinstance(run, dict):
        return given  # no configuration, which is said where it is read
    folder, before = os.path.abspath(os.path.dirname(path)), run.get("dir")
    before = meaning(before) if isinstance(before, Plain) else before
    notes = moved.setdefault(folder, [])
    if isinstance(before, str) and os.path.realpath(expanded(before)) != os.path.realpath(folder):
        notes.append(f"{path} names run.dir {shown(before)}; the run is taken from where the file lies, {folder}")
    return given | {"run": run | {"dir": folder, "name": None}}


def config_from_yaml(content: bytes, where: str) -> StackWiseConfig:
    """The configuration that the content of a YAML file describes; `where` is how errors name the file.

    Raises:
        UsageError: it is no YAML, or holds an unknown key or a value of the wrong type.
    """
    return _merged(StackWiseConfig(), _content(content, where), where, Written())


def config_from_dict(given: Mapping[str, Any], where: str = "configuration") -> StackWiseConfig:
    """The inverse of `StackWiseConfig.to_dict`; keys that are left out keep their defaults.

    Raises:
        UsageError: an unknown key or a value of the wrong type; the sentence begins with `where`.
    """
    return _merged(StackWiseConfig(), given, where, Written())


def resolved_yaml(config: StackWiseConfig) -> str:
    """All keys with their values as YAML; `load_config` reads it back to an equal configuration.

    Raises:
        UsageError: the text is larger than what is read back.
    """
    text = yaml.dump(config.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    if (size := len(text.encode())) > MOST_BYTES:
        raise UsageError(
            f"the configuration with all its keys has {size:,} bytes, and at most {MOST_BYTES:,} are read; write "
            "shorter lists and texts"
        )
    return text


def differing_keys(a: StackWiseConfig, b: StackWiseConfig) -> list[str]:
    """The names of the keys whose values differ, in the order of the schema."""
    flat_a, flat_b = dict(_flat(a.to_dict())), dict(_flat(b.to_dict()))
    missing = object()
    return [key for key in flat_a | flat_b if flat_a.get(key, missing) != flat_b.get(key, missing)]


def run_directory(config: StackWiseConfig, files: Files = None) -> Path:
    """Where the run lives: run.dir, else runs/<run.name>, else runs/<stem of the last config file, or "default">."""
    if config.run.dir is not None:
        return Path(config.run.dir)
    names = [Path(path).stem for path in _listed(files)]
    return Path("runs") / (config.run.name or (names[-1] if names else "default"))


def _listed(files: Files) -> Sequence[str | Path]:
    return [files] if isinstance(files, str | Path) else files or []


def _merged(base: StackWiseConfig, given: Any, where: str, written: Written) -> StackWiseConfig:
    """The configuration changed by the content of one file.

    A section that names all its keys was written by --print_config or by a run: what it repeats of the defaults is not
    the user's.
    """
    keys: set[str] = set()
    config = _changed(base, given, "", where, keys)
    whole = {key for key in keys if "[" not in key}
    written.replace(config, whole, where)
    for section in section_hints(StackWiseConfig):
        own = {key.name: key.default for key in list_keys() if key.name.startswith(f"{section}.")}
        if keys >= own.keys():
            keys -= {name for name, default in own.items() if value_of(config, name) == default}
    _forget_entries(written.keys, keys)
    written.keys |= keys
    written.in_files |= {key: (where, value_of(config, key)) for key in whole & (keys | written.in_files.keys())}
    return config


def _forget_entries(keys: set[str], replaced: set[str]) -> None:
    """Remove what was written in the entries of lists that are now replaced."""
    keys -= {key for key in keys if key.partition("[")[0] in replaced}


def _changed(base: Section, given: Any, prefix: str, where: str, keys: set[str]) -> Section:
    """A copy of a section with what is given replaced, whose names are added to `keys`; `prefix` ends with a dot."""
    hints = section_hints(type(base))
    if not isinstance(given, Mapping):
        what = f"{prefix[:-1]} is" if prefix else "the file is"
        raise UsageError(f"{where}: {what} {shown(given)}; write keys below it, such as {', '.join(hints)}")
    values = {}
    for name, value in given.items():
        if name not in hints:
            refuse_unknown(str(name), where, type(base), prefix, value)
        values[name] = _value(hints[name], getattr(base, name), value, f"{prefix}{name}", where, keys)
    return dataclasses.replace(base, **values)  # pyright: ignore[reportArgumentType]


def _value(hint: Any, base: Any, value: Any, key: str, where: str, keys: set[str]) -> Any:
    """The value for a key of type `hint`, checked; `base` is what it replaces."""
    inner, optional = split_optional(hint)
    if dataclasses.is_dataclass(inner):
        if value is None or (isinstance(value, Plain) and meaning(value) is None):  # all its lines are commented out
            return base if not optional else None
        return _changed(base or inner(), value, f"{key}.", where, keys)  # pyright: ignore[reportCallIssue]
    if get_origin(inner) is list and value is None and where != COMMAND_LINE:  # the same
        return base
    keys.add(key)
    if get_origin(inner) is list and dataclasses.is_dataclass(entry := get_args(inner)[0]) and isinstance(value, list):
        if "[" not in key:  # a list inside an entry went with the entry
            _forget_entries(keys, {key})
            keys.add(key)
        return [
            _changed(entry(), {} if item is None else item, f"{key}[{i}].", where, keys)  # pyright: ignore
            for i, item in enumerate(value)
        ]
    try:
        found = typed(hint, value)
    except (ValueError, TypeError):
        quotes = " (in quotes what YAML reads as something else)" if inner is str else ""
        raise UsageError(f"{where}: {key} is {shown(value)}; write {describe(hint)}{quotes}") from None
    return expanded(found) if key in PATHS and found is not None else found


def _from_command_line(key: str, text: str) -> Any:
    """What the text of an override stands for: what is quoted and a list are YAML; text that may not be null and the
    path ~ are taken as they are."""
    hint = hint_of(key)
    if hint is None:
        refuse_unknown(key, COMMAND_LINE)
    inner, optional = split_optional(hint)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    if get_origin(inner) is list or quoted:
        return parse_yaml(text, f"{COMMAND_LINE}: {key}")
    return text if (inner is str and not optional) or (key in PATHS and text == "~") else Plain(text)


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
                if hint_of(key) is None:
                    refuse_unknown(key, COMMAND_LINE)
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


def _read(path: str) -> bytes:
    try:
        return read_regular(path, MOST_BYTES)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; give --config a YAML file that does") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{path} cannot be read ({why}); give --config a readable YAML file") from None


def _content(content: bytes, where: str) -> Any:
    """The value of a YAML file."""
    start = content[:1000]
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or start.count(b"\0") * 3 > len(start):
        raise UsageError(f"{where} is not UTF-8 text but looks like UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{where}, line {line}: the file is not UTF-8 text; give --config a YAML file") from None
    given = parse_yaml(text, where)
    if given is None:
        raise UsageError(f"{where} is empty; write the keys that differ from the defaults, or leave --config out")
    return given


_SafeDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # of libyaml, where PyYAML has it


class _Dumper(_SafeDumper):
    """The safe dumper, without anchors for values that are the same object."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
