"""The report of an inspection for people: a run's state, its items, their trees, the loss of each stack."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from stackwise_jax.reporting.tables import (
    Columns,
    clock,
    count,
    figure,
    make_console,
    make_table,
    members,
    print_line,
    size,
)
from stackwise_jax.reporting.terminal import printable

_BARS = "▁▂▃▄▅▆▇█"
_PHASES: Columns = (
    ("phase", "name", str),
    ("path", "path", members),
    ("learns", "learns", members),
    ("steps", "steps", str),
    ("state", "state", str),
    ("held-out\nloss", "held_out_loss", lambda x: figure(x, 4)),
    ("bits/\nbyte", "bits_per_byte", lambda x: figure(x, 4)),
    ("time", "seconds", clock),
)
_ITEMS: Columns = (
    ("item", "name", str),
    ("version", "version", str),
    ("values", "values", count),
    ("bytes", "bytes", size),
    ("format", "format", str),
    ("bits/\nvalue", "bits_per_value", lambda x: f"{x:.4g}"),
    ("written by", "phase", str),
    ("at step", "step", str),
    ("records", "records", lambda numbers: members(numbers) or "none"),
    ("norm", "norm", lambda x: f"{x:.4g}"),
)
_RECORDS: Columns = (
    ("record", "number", str),
    ("phase", "phase", lambda index: str(index + 1)),
    ("step", "step", str),
    ("steps of\nthe run", "global_step", str),
    ("finished", "finished", lambda done: "yes" if done else "no"),
)


def print_inspection(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `inspection.inspect_path` found.

    Args:
        report: its result.
        console: where to; None: stdout.
    """
    console = console or make_console()
    state = f": {report['state']}" if "state" in report else ""
    print_line(console, f"{report['kind']} {report['path']}{state}")
    if report.get("config"):
        _print_config(report["config"], console)
    if report.get("phases"):
        phases = [phase | {"learns": phase.get("learns") or _learns(phase)} for phase in report["phases"]]
        console.print()
        console.print(make_table("Phases", _PHASES, phases))
    if report["records"] and report["kind"] != "item":
        console.print()
        console.print(make_table("Progress records", _RECORDS, report["records"]))
    if report["items"]:
        console.print()
        measured = tuple(c for c in _ITEMS if c[1] != "norm" or any("norm" in item for item in report["items"]))
        console.print(make_table("Items", measured, report["items"]))
    newest = {item["name"]: item for item in report["items"]}
    for alike in _alike(newest.values()):
        console.print()
        _print_tree(alike, console)
    _print_losses([item for item in report["items"] if len(newest) == 1 or item["name"].startswith("stacks/")], console)
    for sentence in report["damage"]:
        print_line(console, f"damaged: {sentence}")


def _print_config(config: Mapping[str, Any], console: Console) -> None:
    """The keys that say what kind of run it is, in two lines."""

    def get(key: str) -> Any:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    print_line(
        console,
        f"  model: {get('model.architecture.n_stacks')} stacks of {get('model.architecture.blocks_per_stack')} blocks, "
        f"d_model {get('model.d_model')}, {get('model.n_heads')} heads, {get('model.attention_preset')}",
    )
    plans = [entry.get("plan") for entry in get("curriculum.plans") or [] if isinstance(entry, Mapping)]
    plan = " + ".join(map(str, plans)) or get("curriculum.plan")
    print_line(
        console,
        f"  {get('objective.kind')}, plan {plan}, {get('optimizer.name')} at {get('optimizer.lr')}, "
        f"text {get('data.path') or get('data.source')}, {get('tokenizer.kind')} tokens",
    )


def _learns(phase: Mapping[str, Any]) -> list:
    """Embedding, head and the ids of the stacks that learn in a phase of phases.json; ~ where only adapters do."""
    parts = [name for name, key in (("embed", "train_embed"), ("head", "train_head")) if phase.get(key)]
    return parts + list(phase.get("train") or []) + [f"~{stack}" for stack in phase.get("adapt") or []]


def _alike(items: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Items with the same tree together; those with norms stay alone."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for item in items:
        tree = tuple((leaf["name"], tuple(leaf["shape"]), leaf["dtype"]) for leaf in item["leaves"])
        groups.setdefault(item["name"] if "norm" in item else tree, []).append(item)
    yield from groups.values()


def _print_tree(alike: Sequence[Mapping[str, Any]], console: Console) -> None:
    """One tree with shape, dtype, bytes (and norm) of each leaf, under the names of all items that have it."""
    names = ", ".join(item["name"] for item in alike)
    tree = Tree(_label(names + (" (each)" if len(alike) > 1 else "")))
    if spec := alike[0].get("spec"):
        tree.add(_label(f"spec: {spec}"))
    branches = {"": tree}
    for leaf in alike[0]["leaves"]:
        *parents, last = leaf["name"].split("/")
        path = ""
        for parent in parents:
            above, path = branches[path], f"{path}/{parent}"
            if path not in branches:
                branches[path] = above.add(_label(parent))
        norm = f"  norm {leaf['norm']:.4g}" if "norm" in leaf else ""
        shape = "x".join(map(str, leaf["shape"])) or "scalar"
        branches[path].add(_label(f"{last}  {shape}  {leaf['dtype']}  {size(leaf['bytes'])}{norm}"))
    console.print(tree)


def _label(text: str) -> Text:
    return Text(printable(text))


def _print_losses(items: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A line per stack: how its training loss went, in the newest version that has a history."""
    histories = {item["name"]: item for item in items if item.get("loss_history")}
    if histories:
        console.print("\nTraining loss", style="bold")
    for name, item in histories.items():
        losses = [point["loss"] for point in item["loss_history"] if point["loss"] is not None]
        steps = [point["step"] for point in item["loss_history"]]
        ends = f"{figure(losses[0])} -> {figure(losses[-1])}" if losses else "never finite"
        print_line(console, f"{name}  {sparkline(losses)}  {ends}  (steps {steps[0]} to {steps[-1]})")


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """A line of at most `width` bars, each the mean of its share of the values; empty for no values."""
    if not values:
        return ""
    width = min(width, len(values))
    cuts = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)
