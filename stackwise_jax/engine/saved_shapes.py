"""Whether the items of a run have the shapes that its rack implies, found out before an array is read or made.

rack.json and the items say the same thing twice. A rack that somebody wrote may declare any size; only what really lies
on the disk is allocated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

import jax

from stackwise_jax.checkpoint import Store
from stackwise_jax.config.plain import from_plain
from stackwise_jax.config.schema import Format
from stackwise_jax.curriculum import AdapterSpec, StackAdapter
from stackwise_jax.engine.entries import RACK
from stackwise_jax.engine.programs import bare
from stackwise_jax.engine.weights import item_shapes
from stackwise_jax.errors import RunError, UsageError
from stackwise_jax.memory.hashing import named_leaves
from stackwise_jax.model import Rack

WEIGHTS = ("embed", "head", "stacks", "adapters")


def saved_format(store: Store, item: str, version: int, default: str) -> str:
    """The format in which an item lies in the store.

    Raises:
        RunError: the item is damaged, or its meta names no format.
    """
    fmt = store.item_meta(item, version).get("format", default)
    if fmt not in get_args(Format):
        raise RunError(f"{store.path(item, version)} names the format {str(fmt)[:40]!r}; restore it from a copy")
    return fmt


def saved_adapter(store: Store, item: str, version: int) -> StackAdapter:
    """The adapter that an item `adapters/<stack>/<name>` is.

    Raises:
        RunError: the item is damaged, or its meta describes no adapter.
    """
    _, stack, name = item.split("/")
    try:
        spec = from_plain(AdapterSpec, store.item_meta(item, version).get("adapter"), "adapter")
    except UsageError as error:
        raise RunError(f"{store.path(item, version)}: {error}; restore it from a copy") from None
    return StackAdapter(stack=int(stack), name="trunk" if name == "trunk" else "stack", spec=spec)


def check_shapes(store: Store, rack: Rack, versions: Mapping[str, int]) -> None:
    """Compare what is saved of the weights with the rack; nothing is allocated.

    Raises:
        RunError: the first leaf that has another shape or dtype, or that is there on one side only.
    """
    known: dict[Any, dict[str, tuple]] = {}
    for item, version in versions.items():
        kind = item.split("/")[0]
        if kind not in WEIGHTS:
            continue
        fmt = saved_format(store, item, version, rack.param_dtype)
        adapters = {item: saved_adapter(store, item, version)} if kind == "adapters" else {}
        key = (kind, fmt, *_likeness(rack, item, adapters))
        if key not in known:
            known[key] = _table(item_shapes(rack, item, fmt, adapters))
        implied, saved = known[key], _table(store.item_shapes(item, version))
        for leaf in sorted(implied.keys() | saved.keys()):
            if implied.get(leaf) != saved.get(leaf):
                raise RunError(
                    f"{store.path(item, version)}: '{leaf}' is {_shown(saved.get(leaf))} and {RACK} asks for "
                    f"{_shown(implied.get(leaf))}; restore both from a copy"
                )


def _likeness(rack: Rack, item: str, adapters: Mapping[str, StackAdapter]) -> tuple:
    """What the shapes of an item follow from: items that are alike in it are looked at once."""
    if "/" not in item:
        return ()
    stack = bare(rack.stacks[int(item.split("/")[1])])
    return (stack, dataclasses.replace(adapters[item], stack=0)) if adapters else (stack,)


def _table(tree: Any) -> dict[str, tuple]:
    return {name: (tuple(leaf.shape), jax.numpy.dtype(leaf.dtype).name) for name, leaf in named_leaves(tree).items()}


def _shown(entry: tuple | None) -> str:
    return "missing" if entry is None else f"{entry[1]} of shape {list(entry[0])}"
