"""Content hashes of parameter trees: the identity of weights in cache keys and the check of what was saved."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def leaf_name(path: tuple) -> str:
    """A key path of jax.tree_util as text: "blocks/attn/q/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by path, sorted: {"blocks/attn/q/kernel": leaf, ...}; None and empty nodes vanish."""
    paths_and_leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {leaf_name(path): leaf for path, leaf in paths_and_leaves}
    if len(leaves) != len(paths_and_leaves):
        raise ValueError("two leaves of the tree have the same path; no key may hold a '/'")
    return dict(sorted(leaves.items()))


def is_whole_here(leaf: Any) -> bool:
    """Whether this process can see all of a leaf (numpy, or a jax.Array that is local or replicated)."""
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def digest(array: np.ndarray) -> str:
    """sha256 of an array's bytes in C order, any dtype (bf16 and fp8 included), as hex."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def tree_hash(tree: Any) -> str:
    """sha256 over the sorted paths, dtypes, shapes and bytes of a tree of arrays, as hex.

    It does not depend on the kind of array (numpy or jax), its place, its sharding, or the kind of container. Leaves
    are copied to the host one at a time. Leaves that are sharded over several processes are gathered, so then every
    process has to call this with the same tree.
    """
    total = hashlib.sha256()
    for path, leaf in named_leaves(tree).items():
        if is_whole_here(leaf):
            host = np.asarray(jax.device_get(leaf))
        else:
            host = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        total.update(f"{path} {host.dtype.name} {host.shape} {digest(host)}\n".encode())
    return total.hexdigest()
