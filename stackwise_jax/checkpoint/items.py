"""One saved tree: a directory that holds the arrays and meta.json, and appears whole or not at all.

meta.json lists every leaf with shape and dtype, so that these are known without reading arrays, and every file with its
sha256, so that damage is noticed before anything is read from it. A file that it does not list is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from stackwise_jax.checkpoint import fields
from stackwise_jax.checkpoint.arrays import ARRAYS, READ_BACK, Read, Sizes, check_arrays, nested, raw, save_arrays
from stackwise_jax.checkpoint.fields import Wrong, expect, is_table
from stackwise_jax.checkpoint.files import (
    LINK,
    Intruder,
    brief,
    by_first_process,
    read_json,
    remove_tree,
    write_json,
    writing,
)
from stackwise_jax.errors import RunError, UsageError
from stackwise_jax.files import make_directory, sync
from stackwise_jax.memory.hashing import is_whole_here, leaf_name, named_leaves
from stackwise_jax.memory.placement import HOST_MEMORY

META = "meta.json"


def save_tree(path: Path, tree: Any, meta: dict) -> None:
    """Save a tree of arrays (any pytree container) and a JSON-able `meta` as the new directory `path`.

    Every process calls this. Leaves that a process sees whole are copied to the host and written by process 0; those
    that are sharded over several processes are written by all. What was written is checked before it gets its name.

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
                save_arrays(temporary / ARRAYS, arrays)
            by_first_process(lambda: _complete(temporary, path, meta, leaves))
    except RunError:
        if jax.process_index() == 0:
            _discard(temporary)
        raise


def load_tree(path: Path, like: Any = None) -> Any:
    """Read a saved tree.

    Args:
        path: the directory that `save_tree` made.
        like: tree of ShapeDtypeStructs (or arrays): the result has its containers, dtypes and, where a leaf has a
            sharding, its place (any sharding and memory kind). None: nested dicts of numpy arrays as they were saved.

    Raises:
        RunError: a file is missing, damaged or not listed.
        UsageError: the saved tree does not fit `like`.
    """
    saved = _read(path)
    table, targets = saved["leaves"], named_leaves(like)
    if like is not None:
        _check_fit(path, table, targets)
    sizes = check_complete(path, saved)
    if stray := sorted(sizes.keys() - saved["files"].keys()):  # Orbax reads a `checkpoint` beside arrays before them
        raise Intruder(f"{path / stray[0]} is not part of the checkpoint ({META} does not list it); remove that file")
    _check_files(path, saved["files"])
    reads = check_arrays(path, table, sizes)
    if like is None:
        return nested({name: _leaf(path, entry, reads.get(name), None) for name, entry in table.items()})
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    names = [(leaf_name(key), target) for key, target in paths]
    return treedef.unflatten([_leaf(path, table[name], reads.get(name), target) for name, target in names])


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
    return nested({n: jax.ShapeDtypeStruct(tuple(e["shape"]), np.dtype(e["dtype"])) for n, e in table.items()})


def check_complete(path: Path, saved: dict | None = None) -> Sizes:
    """The files of an item with their sizes, if those that meta.json lists are all there.

    Args:
        saved: the content of meta.json, where it has been read already.

    Raises:
        RunError: a file is missing, or something is a link or neither a file nor a directory.
    """
    listed = (saved or _read(path))["files"]
    found = _walk(path)
    found.pop(META, None)
    if missing := sorted(listed.keys() - found.keys()):
        raise RunError(f"{path / missing[0]} is missing")
    return found


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
    if _text(_table(hosts)) != _text(saved["leaves"]):
        return False
    present = named_leaves(load_tree(path))
    return all(np.array_equal(raw(host), raw(present[name])) for name, host in hosts.items())


def _make_empty(directory: Path) -> None:
    with writing(directory):
        _discard(directory)
        make_directory(directory)


def _discard(directory: Path) -> None:
    """Remove what a save left half done; the failure that ended it is what is told."""
    if os.path.lexists(directory):
        remove_tree(directory)


def _complete(temporary: Path, path: Path, meta: dict, leaves: dict[str, Any]) -> None:
    """Write meta.json, check what was written, force everything to the disk, and give the directory its name."""
    with writing(path):
        sizes = _walk(temporary)
        with ThreadPoolExecutor(32) as pool:  # side by side, the waits for the disk become one
            files = dict(zip(sizes, pool.map(lambda name: _file_digest(temporary / name), sizes), strict=True))
            write_json(temporary / META, {"meta": meta, "leaves": _table(leaves), "files": files})
            _check_written(temporary, sizes, leaves)
            list(pool.map(sync, temporary.rglob("*")))
        os.rename(temporary, path)
        sync(path.parent)


def _check_written(path: Path, sizes: Sizes, leaves: dict[str, Any]) -> None:
    """All that loading asks of an item, and the smallest leaves bit by bit.

    The rest was written by the same calls and has the right names and sizes; to read it back would take as long, and
    as much memory, as to load it.
    """
    table = _read(path)["leaves"]
    reads, left = check_arrays(path, table, sizes), READ_BACK
    for name in sorted(reads, key=lambda name: leaves[name].nbytes):
        left -= leaves[name].nbytes
        if left < 0:
            return
        if isinstance(leaves[name], np.ndarray):
            written = _leaf(path, table[name], reads[name], None)
            if not np.array_equal(raw(written), raw(leaves[name])):
                raise RunError(f"{path / ARRAYS}: '{name}' is not what was written; check the disk")


def _walk(path: Path) -> Sizes:
    """The files below a directory, by relative path. Raises RunError for what is neither a file nor a directory."""
    found: Sizes = {}
    waiting = [path]
    try:
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        raise Intruder(f"{entry.path} {LINK}")
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    elif entry.is_file(follow_symlinks=False):
                        name = Path(entry.path).relative_to(path).as_posix()
                        found[name] = entry.stat(follow_symlinks=False).st_size
                    else:
                        raise Intruder(f"{entry.path} is neither a file nor a directory; remove it")
    except FileNotFoundError as error:
        raise RunError(f"{error.filename} is missing") from None
    except OSError as error:
        raise RunError(f"{error.filename} cannot be read: {error.strerror or brief(error)}") from error
    return found


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


def _text(data: Any) -> str:
    return json.dumps(data, sort_keys=True)


def _table(leaves: dict[str, Any]) -> dict[str, dict]:
    return {name: {"shape": list(leaf.shape), "dtype": leaf.dtype.name} for name, leaf in leaves.items()}


def _read(path: Path) -> dict:
    """The content of meta.json. Raises RunError when it is missing, damaged or cannot be true."""
    if not path.is_dir():
        raise RunError(f"{path} is missing")
    saved = read_json(path / META)
    try:
        for field in ("meta", "leaves", "files"):
            expect(isinstance(saved.get(field), dict), field, saved.get(field))
        for name, good in fields.IN_META.items():
            if name in saved["meta"]:
                expect(good(saved["meta"][name]), f"meta.{name}", saved["meta"][name])
        for name, entry in saved["leaves"].items():
            within = [name[:i] for i, letter in enumerate(name) if letter == "/"]
            expect(fields.is_leaf(name) and not saved["leaves"].keys() & {*within}, "the name of a leaf", name)
            expect(isinstance(entry, dict), f"leaves.{name}", entry)
            expect(fields.is_shape(entry.get("shape")), f"leaves.{name}.shape", entry.get("shape"))
            expect(entry.get("dtype") in fields.DTYPES, f"leaves.{name}.dtype", entry.get("dtype"))
        for name in saved["files"]:
            expect(fields.is_file(name), "the name of a file", name)
        expect(is_table(saved["files"], fields.is_file, fields.is_digest), "files", saved["files"])
    except (Wrong, TypeError) as error:
        raise RunError(f"{path / META} is damaged: {error}") from error
    return saved


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


def _leaf(path: Path, entry: dict, read: Read | None, target: Any) -> Any:
    """One leaf, cast and moved to where its target says; without a target as a numpy array, as it was saved.

    Args:
        read: reads a part of it; None: it is empty.
        target: what a target spreads over processes is read shard by shard.
    """
    shape, dtype = tuple(entry["shape"]), np.dtype(entry["dtype"])

    def part(index: Any) -> np.ndarray:
        try:
            array = np.zeros(shape, dtype) if read is None else read(index)
        except (OSError, ValueError, RuntimeError) as error:  # TensorStore raises many kinds for a damaged file
            raise RunError(f"{path / ARRAYS} is damaged: {brief(error)}") from error
        with np.errstate(over="ignore"):
            return array if target is None else array.astype(target.dtype, copy=False)

    sharding = getattr(target, "sharding", None)
    if sharding is not None and not sharding.is_fully_addressable:
        return jax.make_array_from_callback(shape, sharding, part)
    whole = part(tuple(slice(0, n) for n in shape))
    return whole if sharding is None else jax.device_put(whole, sharding)
