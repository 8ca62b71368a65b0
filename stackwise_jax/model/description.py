"""A rack as plain data and back: what is written beside a run, so that also a rack built by hand can be loaded."""

from __future__ import annotations

import dataclasses
from itertools import groupby
from typing import Any

import flax.linen as nn

from stackwise_jax.model.block import Block
from stackwise_jax.model.features import KernelSpec
from stackwise_jax.model.mla import MLASpec
from stackwise_jax.model.rack import Rack
from stackwise_jax.model.stack import Stack

SPECS = {"mla": MLASpec, "kernel": KernelSpec}  # fields of a Block that have fields of their own


def _fields(module: nn.Module, without: str) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(module) if f.init and f.name not in ("parent", "name", without)]
    return {name: getattr(module, name) for name in names}


def _block_fields(block: Block) -> dict[str, Any]:
    fields = _fields(block, "")
    return fields | {name: dataclasses.asdict(fields[name]) for name in SPECS if fields[name] is not None}


def _block(fields: dict[str, Any]) -> Block:
    specs = {name: make(**fields[name]) for name, make in SPECS.items() if fields.get(name) is not None}
    return Block(**{**fields, **specs}, parent=None)


def rack_to_dict(rack: Rack) -> dict[str, Any]:
    """The rack as JSON-able data; neighbouring equal blocks are written once, with their number."""
    stacks = []
    for stack in rack.stacks:
        runs = [(block, len(list(run))) for block, run in groupby(stack.blocks)]
        blocks = [{"n_blocks": n, "block": _block_fields(block)} for block, n in runs]
        stacks.append(_fields(stack, "blocks") | {"blocks": blocks})
    return _fields(rack, "stacks") | {"stacks": stacks}


def rack_from_dict(given: dict[str, Any]) -> Rack:
    """The rack that `rack_to_dict` described; fields that the data lacks have their defaults.

    Raises:
        KeyError, TypeError, UsageError: the data describes no rack.
    """
    stacks = []
    for stack in given["stacks"]:
        blocks = [_block(run["block"]) for run in stack["blocks"] for _ in range(run["n_blocks"])]
        fields: dict[str, Any] = stack | {"blocks": tuple(blocks)}
        stacks.append(Stack(**fields, parent=None))
    fields = given | {"stacks": tuple(stacks)}
    return Rack(**fields, parent=None)
