"""The phase table: a plan for people and as plain data."""

from __future__ import annotations

import dataclasses
from typing import Any

from stackwise_jax.curriculum.phase import Phase
from stackwise_jax.curriculum.shape import Plan, ids_text


def phase_table(plan: Plan) -> list[dict[str, Any]]:
    """One JSON-able dict per phase, with all its fields and what follows from them: what is written to phases.json.

    existing: the stacks that are there when the phase begins. stack_sizes: blocks of each stack of the rack.
    """
    rows, existing = [], set(plan.start)
    for i, phase in enumerate(plan.phases):
        row = {
            "phase": i,
            "name": phase.name,
            "path": list(phase.path),
            "blocks": [plan.stack_sizes[stack] for stack in phase.path],
            "stack_sizes": list(plan.stack_sizes),
            "existing": sorted(existing),
            "grow": sorted(set(phase.path) - existing),
            "init": phase.init,
            "prefix": list(phase.prefix),
            "window": list(phase.window),
            "train": sorted(phase.train),
            "adapt": sorted(phase.adapt),
            "train_embed": phase.train_embed,
            "train_head": phase.train_head,
            "adapters": [dataclasses.asdict(adapter) for adapter in phase.adapters],
            "merge_adapters": phase.merge_adapters,
            "adapter_lr": phase.adapter_lr,
            "objective": phase.objective.kind,
            "noise": dataclasses.asdict(phase.noise),
            "consistency": dataclasses.asdict(phase.consistency) if phase.consistency else None,
            "attention_mode": phase.attention_mode,
            "corruption": phase.corruption,
            "frozen": phase.frozen,
            "frozen_stacks": list(phase.frozen_stacks),
            "steps": phase.steps,
            "seed": phase.seed,
            "optimizer": dataclasses.asdict(phase.optimizer),
            "keep_optimizer": phase.keep_optimizer,
        }
        existing |= set(phase.path)
        rows.append(row)
    return rows


def format_phase_table(plan: Plan) -> str:
    """The phase table as plain text: a line on the rack, a line of column names, a line per phase.

    ~0-2: only the adapters of these stacks learn. "3 copy": stack 3 is grown as a copy.
    """
    lines = [["phase", "name", "path", "prefix", "grow", "learns", "objective", "attention", "frozen", "steps", "lr"]]
    for row, phase in zip(phase_table(plan), plan.phases, strict=True):
        cells = (
            row["phase"],
            row["name"],
            ids_text(row["path"]),
            ids_text(row["prefix"]),
            ids_text(row["grow"]) + (f" {phase.init}" if row["grow"] and phase.init != "random" else ""),
            _learns(phase),
            _task(phase),
            row["attention_mode"] or "model",
            _formats(phase),
            row["steps"],
            f"{row['optimizer']['lr']:g}",
        )
        lines.append([str(cell) for cell in cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    sizes = plan.stack_sizes
    rack = f"{len(sizes)} stacks, {sum(sizes)} blocks ({' + '.join(map(str, sizes))})"
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([rack, *table])


def _learns(phase: Phase) -> str:
    """What learns, from the input to the head."""
    groups = [(sorted(phase.train), ""), (sorted(phase.adapt), "~")]
    stacks = sorted((group[0], mark + ids_text(group)) for group, mark in groups if group)
    words = ["embed"] * phase.train_embed + [text for _, text in stacks] + ["head"] * phase.train_head
    return " ".join(words)


def _task(phase: Phase) -> str:
    """The objective with its noise and corruption, in few words."""
    noise = phase.noise
    words = [phase.objective.kind]
    match noise.kind:
        case "fixed":
            words += [f"{noise.low:.4g}"]
        case "range":
            words += [f"{noise.low:.4g}-{noise.high:.4g}", noise.schedule]
        case "elbo":
            interval = [] if (noise.low, noise.high) == (0.0, 1.0) else [f"{noise.low:.4g}-{noise.high:.4g}"]
            words += ["elbo", *interval, noise.schedule]
    if phase.corruption != "auto":
        words += [phase.corruption]
    if phase.consistency:
        words += [f"consistency {phase.consistency.weight:.4g}"]
    return " ".join(words)


def _formats(phase: Phase) -> str:
    """How what does not learn is stored; where stacks differ, each format with its stacks."""
    stacks: dict[str, list[int]] = {}
    for stack in phase.path:
        if stack not in phase.train:
            stacks.setdefault(phase.format_of(stack), []).append(stack)
    if len(stacks) > 1:
        return " ".join(f"{name} {ids_text(of)}" for name, of in stacks.items())
    return next(iter(stacks), phase.frozen)
