"""What a run, a checkpoint store or one of its items holds, as plain data. Arrays are read only for norms."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stackwise_jax.checkpoint import Location, Progress, Store, readable
from stackwise_jax.checkpoint.files import read_json
from stackwise_jax.checkpoint.items import META, check_complete
from stackwise_jax.engine.description import read_config, read_rows
from stackwise_jax.engine.entries import CHECKPOINTS, CONFIG, FIXED, PHASES, check_digests, check_entries
from stackwise_jax.errors import RunError, UsageError
from stackwise_jax.memory.quantized import QuantizedTensor, dequantize


def inspect_path(path: str | Path, stack: int | None = None, norms: bool = False) -> dict[str, Any]:
    """Look into a run directory, a checkpoint store, an item of it, or one version of an item.

    Args:
        path: what to look into.
        stack: of a run or a store, only the items of this stack.
        norms: read the arrays of the newest version of each item and add the 2-norm of each leaf, of a quantized
            matrix that of the numbers that it stands for.

    Returns:
        "kind" (run, store or item), "path", "records" (progress records), "items" (one entry per version, the newest
        of a name last), "damage" (a sentence for everything that cannot be read), and for a run also "config", "state"
        (where it stands, in words), "finished" and "phases".

    Raises:
        UsageError: there is nothing of the kind at `path`, or no such stack.
        RunError: the path is one version, and it is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"{path} does not exist; name a run directory, its checkpoints/ or an item in there")
    location = readable(path)
    if location is None and (path / CONFIG).is_file():
        location = Location("run", path.absolute() / CHECKPOINTS)  # killed before its first checkpoint
    run_dir = None if location is None else _run_of(location)
    if run_dir is not None:
        check_entries(run_dir)
    if location is None:
        raise UsageError(f"{path} holds no run and no checkpoint; name a run directory, its checkpoints/ or an item")
    if stack is not None and location.kind == "item":
        raise UsageError(f"{path} is an item already; leave --stack out, or name the run directory")

    store, damage = Store(location.store), []
    with contextlib.suppress(RunError):  # no record is sound: what there is is shown
        store.hold()
    records = list(_records(store, damage))
    report: dict[str, Any] = {"kind": location.kind, "path": str(path)}
    if run_dir is not None and records:
        _found(lambda: check_digests(run_dir, records[-1].digests), damage)
    if location.kind == "run":
        report |= _run(path, records, damage)
    report["records"] = [_record(record) for record in records]
    report["items"] = list(_items(store, _wanted(store, location, stack), records, norms, damage))
    report["damage"] = damage
    if location.version is not None and damage:
        raise RunError(damage[-1])
    return report


def _run_of(location: Location) -> Path | None:
    """The directory of the run that is looked into as a whole, or whose store is; None: an item, or a store alone."""
    run_dir = location.store.parent
    in_run = location.store.name == CHECKPOINTS and any(os.path.lexists(run_dir / name) for name in FIXED)
    return run_dir if location.kind == "run" or (location.kind == "store" and in_run) else None


def _records(store: Store, damage: list[str]) -> Iterator[Progress]:
    for number in store.records():
        try:
            yield store.read(number)
        except RunError as error:
            if number in store.records():  # else a run that goes on has just removed it
                damage.append(str(error))


def _record(record: Progress) -> dict[str, Any]:
    keys = ("number", "phase", "step", "global_step", "finished", "versions", "formats")
    return {key: getattr(record, key) for key in keys}


def _run(path: Path, records: list[Progress], damage: list[str]) -> dict[str, Any]:
    """The part of the report that only a run has."""
    newest = records[-1] if records else None
    found = lambda read: _found(read, damage)
    config = found(lambda: read_config(path).to_dict()) if (path / CONFIG).exists() else {}
    phases = found(lambda: _phases(path)) if (path / PHASES).exists() else []
    config, phases = config or {}, phases or []
    results = newest.results if newest else []
    finished = bool(newest and newest.finished)
    entries = [dict(phase) | dict(results[i] if i < len(results) else {}) for i, phase in enumerate(phases)]
    if newest is None:
        state = "nothing saved yet"
    elif finished:
        state = f"finished after {newest.global_step} steps"
    else:
        current = phases[newest.phase] if newest.phase < len(phases) else {}
        name, steps = current.get("name", newest.phase), current.get("steps", "?")
        state = f"phase {newest.phase + 1} of {len(phases) or '?'} ('{name}'), step {newest.step} of {steps}"
    for i, entry in enumerate(entries):
        for key in ("versions", "formats"):  # of all items, which have entries of their own
            entry.pop(key, None)
        begun = newest is not None and not finished and i == newest.phase
        entry["state"] = "done" if i < len(results) else f"at step {newest.step}" if newest and begun else "to come"
    return {"state": state, "finished": finished, "config": config, "phases": entries}


def _found(read: Callable[[], Any], damage: list[str]) -> Any:
    """What `read` gives; None where that is damaged, which is noted once."""
    try:
        return read()
    except (UsageError, RunError) as error:
        damage += [] if str(error) in damage else [str(error)]
        return None


def _phases(path: Path) -> list[dict[str, Any]]:
    """The table of phases. Raises UsageError or RunError where it is damaged."""
    rows = read_rows(path)
    if not all(map(_is_phase, rows)):
        raise UsageError(f"{path / PHASES} is damaged: a phase has no name or no stacks; restore it from a copy")
    return rows


def _is_phase(phase: Any) -> bool:
    if not isinstance(phase, dict) or not isinstance(phase.get("name"), str):
        return False
    return all(_are_numbers(phase.get(key, [])) for key in ("path", "train", "adapt"))


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


def _wanted(store: Store, location: Location, stack: int | None) -> dict[str, list[int]]:
    """The names and versions to report."""
    found = store.items()
    if location.name is not None:
        versions = found[location.name] if location.version is None else [location.version]
        return {location.name: versions}
    if stack is None:
        return found
    name = f"stacks/{stack:03d}"
    wanted = {n: versions for n, versions in found.items() if n == name or n.startswith(f"{name}/")}
    if not wanted:
        names = {n.split("/")[1] for n in found if n.startswith("stacks/")}
        stacks = sorted(int(n) for n in names if n.isascii() and n.isdigit())
        known = ", ".join(map(str, stacks)) or "none yet"
        raise UsageError(f"--stack {stack} is not among the saved stacks of {store.directory}; there are: {known}")
    return wanted


def _items(
    store: Store, wanted: Mapping[str, list[int]], records: list[Progress], norms: bool, damage: list[str]
) -> Iterator[dict[str, Any]]:
    for name, versions in wanted.items():
        for version in versions:
            try:
                item = _item(store, name, version, norms and version == versions[-1])
            except (RunError, FileNotFoundError) as error:
                if store.path(name, version).exists():  # else a run that goes on has just replaced it
                    damage.append(str(error))
                continue
            item["records"] = [record.number for record in records if record.versions.get(name) == version]
            yield item


def _item(store: Store, name: str, version: int, norms: bool) -> dict[str, Any]:
    """One version of an item: its meta, its leaves and, if asked, their norms."""
    path = store.path(name, version)
    shapes = dict(_leaves(store.item_shapes(name, version)))
    _check_names(path)
    leaves = [
        {"name": leaf, "shape": list(s.shape), "dtype": s.dtype.name, "bytes": s.size * s.dtype.itemsize}
        for leaf, s in shapes.items()
    ]
    item: dict[str, Any] = {"values": sum(s.size for s in shapes.values())}  # the meta knows better: what is quantized
    item |= _meta(path, store.item_meta(name, version)) | {"name": name, "version": version, "path": str(path)}
    item["bytes"] = sum(leaf["bytes"] for leaf in leaves)
    item["bits_per_value"] = 8 * item["bytes"] / max(item["values"], 1)
    item["disk_bytes"] = store.item_bytes(name, version)
    if norms:
        tree = store.load_item(name, version)
        try:
            found = dict(_norms(tree, item.get("format", "")))
        except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise RunError(f"{path} is damaged: its leaves do not fit each other; restore it from a copy") from error
        for leaf in leaves:
            if leaf["name"] in found:
                leaf["norm"] = found[leaf["name"]]
        item["norm"] = math.hypot(*found.values())
    return item | {"leaves": leaves}


def _check_names(path: Path) -> None:
    """Look whether an item has the files that its meta lists, and no others.

    Raises:
        RunError: one is missing, or one is not listed.
    """
    listed = read_json(path / META)["files"]
    found = check_complete(path, {"files": {}})
    if missing := sorted(listed.keys() - found.keys()):
        raise RunError(f"{path / missing[0]} is missing; restore it from a copy")
    if stray := sorted(found.keys() - listed.keys()):
        raise RunError(f"{path / stray[0]} is not part of the checkpoint ({META} does not list it); remove that file")


def _norms(tree: Any, fmt: str, path: str = "") -> Iterator[tuple[str, float]]:
    """(path, 2-norm) of the leaves; of a quantized matrix its own at the place of the payload, none of the scales."""
    if isinstance(tree, Mapping) and "payload" in tree:
        # Padding is zeros, so all rows that are stored may count.
        whole = QuantizedTensor(**tree, fmt=fmt, rows=2 * tree["payload"].shape[-2])
        path, tree = f"{path}/payload", np.asarray(dequantize(whole, np.float32))
    if isinstance(tree, Mapping):
        for key, branch in tree.items():
            yield from _norms(branch, fmt, f"{path}/{key}" if path else key)
    else:
        yield path, float(np.linalg.norm(np.abs(tree).astype(np.float64).ravel()))


def _meta(path: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The facts about an item, with the loss history as [{"step", "loss"}, ...]; steps count over the whole run.

    Raises:
        RunError: a fact is not of its kind.
    """
    try:
        history = [dict(point) if isinstance(point, Mapping) else dict(zip(("step", "loss"), point, strict=True))
                   for point in meta.get("loss_history", [])]  # fmt: skip
        sound = all(type(p["step"]) is int and (p["loss"] is None or _is_number(p["loss"])) for p in history)
        sound &= type(meta.get("values", 0)) is int and type(meta.get("step", 0)) is int
        if not sound or not all(isinstance(meta.get(key, ""), str) for key in ("phase", "format")):
            raise ValueError("a fact about it is not of its kind")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path}: what meta.json says is damaged ({error}); restore it from a copy") from error
    return {**meta, "loss_history": history}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of nested dicts, in the order of the keys."""
    if isinstance(tree, Mapping):
        for key in sorted(tree):
            yield from _leaves(tree[key], f"{prefix}/{key}" if prefix else key)
    else:
        yield prefix, tree
