"""What makes a Linen module usable as a frozen spec: it can be copied free of its parent, its parameters are one tree.

All parameters are made by plain functions of (spec, key) and used by plain functions of (spec, tree), so that a tree
may hold whatever those functions accept (a quantized weight, say). Linen gives the spec its equality and `apply`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import LazyRng

from stackwise_jax.errors import UsageError
from stackwise_jax.random_streams import root_key

Params = dict[str, Any]
M = TypeVar("M", bound=nn.Module)

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}


def dtype_of(name: str) -> Any:
    """The dtype that a name of the configuration stands for: fp32, bf16 or fp16.

    Raises:
        UsageError: the name is none of these.
    """
    if name not in DTYPES:
        raise UsageError(f"dtype '{name}' is unknown (model.param_dtype, compute_dtype); write one of {[*DTYPES]}")
    return DTYPES[name]


def require(condition: bool, why: str) -> None:
    """Raise UsageError with this sentence unless the condition holds."""
    if not condition:
        raise UsageError(why)


def refuse_unknown(given: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """Raise UsageError for a name that is not known, with the nearest one; `what` it is a name of."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UsageError(f"unknown {what} {name}; the nearest valid one is {near[0]}")


def unbound(module: M) -> M:
    """A copy of a module, and of the modules in its fields, that belongs to no parent.

    Linen gives a module's submodules a parent while the module is applied; such copies no longer compare by value and
    cannot be applied on their own inside `lax.scan`.
    """
    names = [f.name for f in dataclasses.fields(module) if f.init and f.name not in ("parent", "name")]
    return type(module)(**{name: _free(getattr(module, name)) for name in names}, parent=None)


def _free(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return unbound(value)
    return tuple(map(_free, value)) if isinstance(value, tuple) else value


def module_params(module: nn.Module, make: Callable[[jax.Array], Params]) -> Params:
    """The parameter tree of a module that is being applied; under `init` it is `make(key)` with the caller's key."""
    if not module.is_initializing():
        return dict(module.variables.get("params", {}))
    assert module.scope is not None
    params = make(LazyRng.create(module.scope.rngs["params"]).as_jax_rng())
    for name, tree in params.items():
        module.put_variable("params", name, tree)
    return params


def call(module: nn.Module, params: Params, *args: Any, method: str | None = None) -> Any:
    """module.apply on a bare parameter tree."""
    return module.apply({"params": params}, *args, method=method)


def count(make: Callable[[jax.Array], Params]) -> int:
    """How many numbers the tree `make(key)` holds; nothing is allocated."""
    return size_of(jax.eval_shape(lambda: make(root_key(0))))


def size_of(tree: Any) -> int:
    """How many numbers a tree of arrays (or of their shapes) holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
