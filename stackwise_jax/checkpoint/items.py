"""One saved tree: a directory that holds the arrays (Orbax) and meta.json, and appears whole or not at all.

meta.json lists every leaf with shape and dtype, so that these are known without reading arrays, and every file with its
sha256, so that damage is noticed before anything is read from it.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from stackwise_jax.checkpoint.files import brief, by_first_process, read_json, sync, write_json, writing
from stackwise_jax.errors import RunError, UsageError
from stackwise_jax.memory.hashing import is_whole_here, leaf_name, named_leaves
from stackwise_jax.memory.placement import HOST_MEMORY

ARRAYS, META = "arrays", "meta.json"
LARGE = 2**25  # bytes


def save_tree(path: Path, tree: Any, meta: dict) -> None:
    """Save a tree of arrays (any pytree container) and a JSON-able `meta` as the new directory `path`.

    Every process calls this. Leaves that a process sees whole are copied to the host and written by process 0; those
    that are sharded over several processes are written by all.

    Raises:
        RunError: the disk is full or not writable; nothing then stands at `path`.
    """
    leaves = {name: _to_host(leaf) for name, leaf in named_leaves(tree).items()}
    temporary = path.with_name(path.name + ".tmp")
    try:
        with writing(path):
            by_first_process(lambda: _make_empty(temporary))
            # Orbax takes neither an empty tree nor an empty array; the table of leaves is enough for those.
            if arrays := {name: leaf for name, leaf in leaves.items() if leaf.size}:
                _save_arrays(temporary / ARRAYS, _nested(arrays))
                _release(arrays.values())
            table = {name: {"shape": leaf.shape, "dtype": leaf.dtype.name} for name, leaf in leaves.items()}
            by_first_process(lambda: _complete(temporary, path, {"meta": meta, "leaves": table}))
    except RunError:
        if jax.process_index() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def load_tree(path: Path, like: Any = None) -> Any:
    """Read a saved tree.

    Args:
        path: the directory that `save_tree` made.
        like: tree of ShapeDtypeStructs (or arrays): the result has its containers, dtypes and, where a leaf has a
            sharding, its place (any sharding and memory kind). None: nested dicts of numpy arrays as they were saved.

    Raises:
        RunError: a file is missing or damaged.
        UsageError: the saved tree does not fit `like`.
    """
    saved = _read(path)
    table, targets = saved["leaves"], named_leaves(like)
    if like is not None:
        _check_fit(path, table, targets)
    _check_files(path, saved["files"])
    if like is None:
        return _nested(_read_leaves(path, table, {}))
    leaves = _read_leaves(path, table, targets)
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    placed = [_place(leaves.pop(leaf_name(key)), target) for key, target in paths]
    return jax.tree_util.tree_unflatten(treedef, placed)


def read_meta(path: Path) -> dict:
    """The `meta` that was saved with a tree, without reading arrays.

    Raises:
        RunError: meta.json is missing or damaged.
    """
    return _read(path)["meta"]


def read_shapes(path: Path) -> dict:
    """Nested dicts of ShapeDtypeStructs of a saved tree, without reading arrays.

    Raises:
        RunError: meta.json is missing or damaged.
    """
    table = _read(path)["leaves"]
    return _nested({n: jax.ShapeDtypeStruct(tuple(e["shape"]), np.dtype(e["dtype"])) for n, e in table.items()})


def holds_same(path: Path, tree: Any, meta: dict) -> bool:
    """Whether the saved directory `path` holds exactly this tree and meta; False where that cannot be known."""
    try:
        saved = _read(path)
    except RunError:
        return False
    leaves = named_leaves(tree)
    if not all(map(is_whole_here, leaves.values())) or _text(saved["meta"]) != _text(meta):
        return False
    hosts = {name: _to_host(leaf) for name, leaf in leaves.items()}
    table = {name: {"shape": host.shape, "dtype": host.dtype.name} for name, host in hosts.items()}
    if _text(table) != _text(saved["leaves"]):
        return False
    present = named_leaves(load_tree(path))
    return all(np.array_equal(_raw(host), _raw(present[name])) for name, host in hosts.items())


def _make_empty(directory: Path) -> None:
    with writing(directory):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)


def _complete(temporary: Path, path: Path, body: dict) -> None:
    """Write meta.json, force everything to the disk, and give the directory its name."""
    with writing(path):
        files = [entry for entry in temporary.rglob("*") if entry.is_file()]
        names = [file.relative_to(temporary).as_posix() for file in files]
        with ThreadPoolExecutor(32) as pool:  # side by side, the waits for the disk become one
            digests = dict(zip(names, pool.map(_file_digest, files), strict=True))
            write_json(temporary / META, body | {"files": digests})
            list(pool.map(sync, temporary.rglob("*")))
        os.rename(temporary, path)
        sync(path.parent)


def _file_digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _check_files(path: Path, files: dict[str, str]) -> None:
    """Compare every file with its sha256. Each process checks its share, and all learn the result."""

    def damage(name: str) -> str | None:
        try:
            return None if _file_digest(path / name) == files[name] else f"{path / name} is damaged"
        except FileNotFoundError:
            return f"{path / name} is missing"
        except OSError as error:
            return f"{path / name} cannot be read: {brief(error)}"

    share = sorted(files)[jax.process_index() :: jax.process_count()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [text for text in pool.map(damage, share) if text]
    failed = bool(found)
    if jax.process_count() > 1:
        failed = bool(multihost_utils.process_allgather(np.asarray(failed)).any())
    if failed:
        raise RunError(found[0] if found else f"{path} is damaged; another process says where")


def _raw(array: np.ndarray) -> np.ndarray:
    """The bytes of an array, without a copy where they lie in one piece."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _text(data: Any) -> str:
    return json.dumps(data, sort_keys=True)


def _read(path: Path) -> dict:
    if not path.is_dir():
        raise RunError(f"{path} is missing")
    return read_json(path / META)


def _to_host(leaf: Any) -> Any:
    """A numpy array of what this process sees whole.

    From an accelerator by way of an array in host memory that nobody else holds: an array keeps the copy that it was
    asked for as long as it lives, and so all that is saved would pile up there.
    """
    if not is_whole_here(leaf):
        return leaf
    if isinstance(leaf, jax.Array) and next(iter(leaf.devices())).platform != "cpu":
        leaf = jax.device_put(leaf, leaf.sharding.with_memory_kind(HOST_MEMORY))
    return np.asarray(jax.device_get(leaf))


def _nested(leaves: dict[str, Any]) -> dict:
    """{"a/b": x} -> {"a": {"b": x}}"""
    tree: dict = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _check_fit(path: Path, table: dict, targets: dict) -> None:
    if stray := sorted(table.keys() ^ targets.keys()):
        side = "holds" if stray[0] in table else "lacks"
        raise UsageError(
            f"{path} does not fit the model: it {side} '{stray[0]}'; use the config that it was saved with"
        )
    for name, target in targets.items():
        if tuple(table[name]["shape"]) != tuple(target.shape):
            raise UsageError(
                f"{path} does not fit the model: '{name}' has shape {tuple(table[name]['shape'])} there and "
                f"{tuple(target.shape)} here; use the config that it was saved with"
            )


def _read_leaves(path: Path, table: dict, targets: dict) -> dict[str, Any]:
    """All leaves as numpy arrays; what a target spreads over processes as jax.Arrays, read shard by shard."""
    import orbax.checkpoint as ocp

    def restore_args(name: str):
        sharding = getattr(targets.get(name), "sharding", None)
        if sharding is None or sharding.is_fully_addressable or sharding.is_fully_replicated:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        shape = tuple(table[name]["shape"])
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shape, dtype=targets[name].dtype)

    empty = {n: np.zeros(e["shape"], np.dtype(e["dtype"])) for n, e in table.items() if 0 in e["shape"]}
    wanted = _nested({name: restore_args(name) for name in table if name not in empty})
    restored: Any = {}
    if wanted:
        try:
            with jax.transfer_guard("allow"):
                restored = _checkpointer().restore(path / ARRAYS, args=ocp.args.PyTreeRestore(restore_args=wanted))
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
            raise RunError(f"{path / ARRAYS} is damaged: {brief(error)}") from error
    leaves = named_leaves(restored) | empty
    _release(leaves.values())
    if leaves.keys() != table.keys():
        raise RunError(f"{path / ARRAYS} is damaged: its leaves are not those that {META} lists")
    return leaves


def _place(leaf: Any, target: Any) -> Any:
    """Cast and move a host array to where its target says."""
    if isinstance(leaf, jax.Array):
        return leaf
    with np.errstate(over="ignore"):
        leaf = leaf.astype(target.dtype, copy=False)
    sharding = getattr(target, "sharding", None)
    if sharding is None:
        return leaf
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def _save_arrays(path: Path, tree: dict) -> None:
    import orbax.checkpoint as ocp

    with jax.transfer_guard("allow"):
        _checkpointer().save(path, args=ocp.args.PyTreeSave(tree))


def _release(arrays: Iterable[Any]) -> None:
    """Collect what Orbax leaves in cycles, arrays among it, where that is too much to wait for."""
    if sum(array.nbytes for array in arrays) >= LARGE:
        gc.collect()


def _report_unraisable(report: Callable[[Any], Any], unraisable: Any) -> None:
    """Report all but one thing: after a failed write TensorStore tells of the other writes to a loop that is closed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        report(unraisable)


@functools.cache
def _checkpointer():
    """One synchronous Orbax checkpointer for the process; its log lines are dropped: what fails is raised.

    It takes no copies of host arrays, which nobody changes meanwhile, and does not compress: random weights shrink by
    a few percent, quantized ones not at all, and zstd takes several times as long as the disk.
    """
    import orbax.checkpoint as ocp

    sys.unraisablehook = functools.partial(_report_unraisable, sys.unraisablehook)
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    # Of several writes that fail together one is raised; asyncio would print the others when they are collected.
    logging.getLogger("asyncio").addFilter(lambda record: "was never retrieved" not in record.getMessage())
    handlers = ocp.type_handlers
    registry = handlers.create_type_handler_registry(
        (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False)), (jax.Array, handlers.ArrayHandler())
    )
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry))
