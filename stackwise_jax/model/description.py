"""A rack as plain data and back: what is written beside a run, so that also a rack built by hand can be loaded."""

from __future__ import annotations

import dataclasses
from itertools import groupby
from typing import Any

import flax.linen as nn

from stackwise_jax.config.plain import from_plain
from stackwise_jax.config.values import shown
from stackwise_jax.model.block import Block
from stackwise_jax.model.rack import MAX_BLOCKS, Rack
from stackwise_jax.model.spec import require
from stackwise_jax.model.stack import Stack

SPECS = ("mla", "kernel")  # fields of a Block that have fields of their own
MAX_SIZE = 2**24  # of a width, a vocabulary, a number of heads


def _fields(module: nn.Module, without: str) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(module) if f.init and f.name not in ("parent", "name", without)]
    return {name: getattr(module, name) for name in names}


def _block_fields(block: Block) -> dict[str, Any]:
    fields = _fields(block, "")
    return fields | {name: dataclasses.asdict(fields[name]) for name in SPECS if fields[name] is not None}


def rack_to_dict(rack: Rack) -> dict[str, Any]:
    """The rack as JSON-able data; neighbouring equal blocks are written once, with their number."""
    stacks = []
    for stack in rack.stacks:
        runs = [(block, len(list(run))) for block, run in groupby(stack.blocks)]
        blocks = [{"n_blocks": n, "block": _block_fields(block)} for block, n in runs]
        stacks.append(_fields(stack, "blocks") | {"blocks": blocks})
    return _fields(rack, "stacks") | {"stacks": stacks}


def rack_from_dict(given: Any) -> Rack:
    """The rack that `rack_to_dict` described; fields that the data lacks have their defaults.

    Nothing is allocated, and the data is refused before it can take long: a rack has at most MAX_BLOCKS blocks.

    Raises:
        UsageError: the data describes no rack; the sentence names the field.
    """
    rest, stacks = _split(given, "stacks", "the rack")
    built, n_blocks = [], 0
    for i, entry in enumerate(stacks):
        fields, runs = _split(entry, "blocks", f"stack {i}")
        blocks: list[Block] = []
        for run in runs:
            about, block = _split(run, "block", f"stack {i}: blocks")
            count = from_plain(_Run, about, f"stack {i}: blocks").n_blocks
            n_blocks += count
            require(count >= 1, f"stack {i}: n_blocks is {count} and not at least 1")
            require(n_blocks <= MAX_BLOCKS, f"stack {i}: the rack has more than {MAX_BLOCKS} blocks")
            blocks += [from_plain(Block, block, f"stack {i}: block", partial=True, parent=None, name=None)] * count
            _check_sizes(blocks[-1], f"stack {i}: block")
        about = {"blocks": tuple(blocks), "parent": None, "name": None}
        built.append(from_plain(Stack, fields, f"stack {i}", partial=True, **about))
    rack = from_plain(Rack, rest, "the rack", partial=True, stacks=tuple(built), parent=None, name=None)
    _check_sizes(rack, "the rack")
    return rack


@dataclasses.dataclass(frozen=True)
class _Run:
    """Neighbouring blocks that are equal."""

    n_blocks: int


def _split(given: Any, name: str, where: str) -> tuple[Any, Any]:
    """An object without one of its fields, and that field: a list, unless it is a block."""
    require(isinstance(given, dict) and name in given, f"{where} lacks the field {name}")
    inner = given[name]
    require(name == "block" or isinstance(inner, list), f"{where}: {name} is {shown(inner)} and not a list")
    return {key: value for key, value in given.items() if key != name}, inner


def _check_sizes(module: Any, where: str) -> None:
    """Refuse sizes that no array has: with them, shapes would overflow."""
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        if isinstance(value, int) and not isinstance(value, bool):
            require(value <= MAX_SIZE, f"{where}: {field.name} is {value} and not at most {MAX_SIZE}")
        elif field.name in SPECS and value is not None:
            _check_sizes(value, f"{where}: {field.name}")
