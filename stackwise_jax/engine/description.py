"""What a run directory says about its run: configuration, rack, plan and newest record, read back and checked.

They are checked one by one, for what is possible at all, and against each other.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from stackwise_jax.checkpoint import Progress, Store, check_goes_on
from stackwise_jax.config import StackWiseConfig, config_from_yaml, resolved_yaml, validate
from stackwise_jax.config.schema import Format
from stackwise_jax.curriculum import (
    Plan,
    check_rows,
    first_difference,
    is_complete,
    make_plan,
    plan_from_json,
    plan_to_json,
)
from stackwise_jax.engine import entries
from stackwise_jax.engine.entries import CHECKPOINTS, CONFIG, PHASES, RACK
from stackwise_jax.engine.shape import rack_shape
from stackwise_jax.errors import RunError, UsageError
from stackwise_jax.model import Rack, rack_from_dict, rack_to_dict

# Of a configuration: where a run starts from. It is not needed again once it has been taken over.
ORIGIN = ("run.init_from", "run.init_depth", "run.init_stacks")
ADAPTERS = "curriculum.adapters.load_from"
# The paths of what is compared by its content, or not needed once a run has begun.
PATHS = ("data.path", "data.valid_path", "tokenizer.path", "run.init_from", ADAPTERS)
_ITEM = re.compile(r"embed|head|stacks/(\d{3,9})|adapters/(\d{3,9})/(stack|trunk)|optimizer(/\w+)*|moments/[\w/]+")


def check_files(run_dir: Path, reader: Store | None = None) -> Progress | None:
    """The newest record of a run, after a look at every file of the directory; None: nothing was saved yet.

    Args:
        reader: a store that from now on holds the record, see `Store.hold`; None: nothing is held.

    Raises:
        UsageError: a name of the run is a link, or something else than a run has there.
        RunError: a file was changed or removed since the run was begun, or no record is sound.
    """
    entries.check_entries(run_dir)
    progress = Store(run_dir / CHECKPOINTS).latest() if reader is None else reader.hold()
    if progress is not None and (run_dir / CONFIG).exists():
        entries.check_digests(run_dir, progress.digests)
    return progress


def read_config(run_dir: Path) -> StackWiseConfig:
    """The configuration of a run. The text and the tokenizer that it names need not be there.

    Raises:
        UsageError: the file was cut (a run writes down every section), or a value is impossible.
        RunError: it is missing or cannot be read.
    """
    path = run_dir / CONFIG
    content = entries.read(path)
    config = config_from_yaml(content, str(path))
    present = content.splitlines()
    if missing := [section for section in config.to_dict() if f"{section}:".encode() not in present]:
        raise UsageError(f"{path} is damaged (section {missing[0]} is missing); restore it from a copy")
    try:
        validate(config, files=False)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return config


def read_rack(run_dir: Path) -> Rack:
    """The rack of a run, also one that was built by hand.

    Raises:
        UsageError: the file does not describe a rack.
        RunError: it is missing or cannot be read.
    """
    try:
        return rack_from_dict(entries.read_json(run_dir / RACK))
    except UsageError as error:
        raise UsageError(f"{run_dir / RACK} does not describe a rack ({error}); restore it from a copy") from None


def read_plan(run_dir: Path, config: StackWiseConfig, rack: Rack) -> Plan:
    """The plan that a run was begun with, as it was written down. Version 0.1 wrote less: there it is made from the
    configuration and compared with what is there.

    Raises:
        UsageError: the file does not describe a plan, or one for another rack or configuration.
        RunError: it is missing or cannot be read.
    """
    path, rows = run_dir / PHASES, read_rows(run_dir)
    try:
        if is_complete(rows):
            plan = plan_from_json(rows)
        else:
            plan = make_plan(config, rack_shape(rack, config.data))
            check_plan(run_dir, rows, plan)
    except UsageError as error:
        raise _no_plan(run_dir, error) from None
    blocks = tuple(len(stack.blocks) for stack in rack.stacks)
    if plan.stack_sizes != blocks:
        raise UsageError(
            f"{path} is of a rack with {list(plan.stack_sizes)} blocks per stack and {RACK} has {list(blocks)}; "
            "restore both from a copy"
        )
    return plan


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The phases of a run as they were written down.

    Raises:
        UsageError: the file is no list of phases.
        RunError: it is missing or cannot be read.
    """
    rows = entries.read_json(run_dir / PHASES)
    try:
        check_rows(rows)
    except UsageError as error:
        raise _no_plan(run_dir, error) from None
    return rows


def _no_plan(run_dir: Path, error: UsageError) -> UsageError:
    return UsageError(f"{run_dir / PHASES} does not describe the plan of a run ({error}); restore it from a copy")


def check_record(run_dir: Path, progress: Progress, plan: Plan) -> None:
    """Refuse a record that is not of this plan.

    Raises:
        RunError: it lacks something, or names a phase, a step, an item or a format that the run does not have.
    """
    check_goes_on(progress, len(plan.phases), run_dir)
    if strange := next(_strange(progress, plan), None):
        where = run_dir / CHECKPOINTS / "progress"
        raise RunError(f"the newest record in {where} does not fit {PHASES}: {strange}; restore both from a copy")


def _strange(progress: Progress, plan: Plan) -> Iterator[str]:
    phases = plan.phases
    steps = phases[progress.phase].steps if 0 <= progress.phase < len(phases) else 0
    if not (0 <= progress.phase <= len(phases) and 0 <= progress.step <= steps):
        yield f"it stands at phase {progress.phase}, step {progress.step}"
    tables: list[tuple[Any, Any]] = [(progress.versions, progress.formats)]
    for result in progress.results:
        index = result.get("index") if isinstance(result, dict) else None
        if not isinstance(index, int) or not 0 <= index < len(phases):
            yield f"it has the result of phase {index}"
        elif "versions" in result:
            tables.append((result["versions"], result.get("formats")))
    for versions, formats in tables:
        if not isinstance(versions, dict) or not isinstance(formats, dict):
            yield "it lacks versions or formats of items"
            continue
        for item in [*versions, *formats]:
            found = _ITEM.fullmatch(item)
            if not found or any(int(n) >= len(plan.stack_sizes) for n in found.groups()[:2] if n):
                yield f"it names the item '{item}'"
        for item, fmt in formats.items():
            if fmt not in get_args(Format):
                yield f"it names the format '{fmt}' of {item}"


def check_plan(run_dir: Path, rows: list[dict[str, Any]], plan: Plan) -> None:
    """Refuse a plan that is not the recorded one.

    Raises:
        UsageError: the recorded one is none, or the first phase that differs, the field, and both values.
    """
    if is_complete(rows):  # an earlier version of this program may have written fewer fields: they have their defaults
        try:
            rows = plan_to_json(plan_from_json(rows))
        except UsageError as error:
            raise _no_plan(run_dir, error) from None
    found = first_difference(rows, plan_to_json(plan), partial=not is_complete(rows))
    if found:
        phase, field, recorded, made = found
        raise UsageError(
            f"phase '{phase}': {field} is {recorded} in {run_dir / PHASES} and {made} by the configuration; continue "
            "with the version of this program that began the run, or name another run.dir"
        )


def write_description(run_dir: Path, plan: Plan, rack: Rack, config: StackWiseConfig) -> None:
    """Write the plan, the rack and the configuration of a run. Raises RunError when the disk does not take them."""
    text = resolved_yaml(config)  # which may be refused, and then nothing is written
    entries.write(run_dir / PHASES, json.dumps(plan_to_json(plan), indent=2) + "\n")
    entries.write(run_dir / RACK, json.dumps(rack_to_dict(rack), indent=2) + "\n")
    entries.write(run_dir / CONFIG, text)


def recorded_config(config: StackWiseConfig) -> StackWiseConfig:
    """The configuration as a run directory holds it: its paths are absolute, so that the run can be read from any
    working directory, and its own place is left out, so that it can be moved.

    Raises:
        UsageError: it could not be read back, as in a working directory of an odd name.
    """
    config = _changed(with_absolute_paths(config), "run.dir", None)
    validate(config, files=False)
    return config


def with_absolute_paths(config: StackWiseConfig) -> StackWiseConfig:
    """The configuration as it means the same in any working directory."""
    for key in (*PATHS, "cache.dir"):
        if (value := value_at(config, key)) is not None:
            config = _changed(config, key, os.path.abspath(value))
    return config


def with_origin(config: StackWiseConfig, before: StackWiseConfig) -> StackWiseConfig:
    """The configuration with what it leaves out of where the run started from, as the run was begun (`before`)."""
    if config.run.init_from is None:
        for key in ORIGIN:
            config = _changed(config, key, value_at(before, key))
    if value_at(config, ADAPTERS) is None:
        config = _changed(config, ADAPTERS, value_at(before, ADAPTERS))
    return config


def with_places(before: StackWiseConfig, config: StackWiseConfig) -> StackWiseConfig:
    """The configuration that a run was begun with, with what `config` says of where things lie now."""
    now = with_absolute_paths(config)
    for key in (*PATHS, "cache.dir"):
        before = _changed(before, key, value_at(now, key))
    return before


def value_at(config: Any, key: str) -> Any:
    """The value of a key of the configuration."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _changed(section: Any, key: str, value: Any) -> Any:
    """A copy of a section with another value for a key in it."""
    name, _, rest = key.partition(".")
    return dataclasses.replace(section, **{name: _changed(getattr(section, name), rest, value) if rest else value})
