"""Where a tree rests while no step needs it: in device memory, in pinned host memory, or in a file on disk.

A tree at rest is a tree of arrays: jax arrays in the memory of its place, or numpy views of a mapped file. In all three
cases `placement.put(tree, placement.params(tree))` brings it to the device.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import jax
import numpy as np

from stackwise_jax.errors import RunError
from stackwise_jax.memory.placement import HOST_MEMORY, Placement, format_bytes

Tree = Any
Place = Literal["device", "host", "disk"]
Key = TypeVar("Key")
Loaded = TypeVar("Loaded")
ALIGNMENT = 64  # bytes; what a device may read from without a copy


class Scratch:
    """Trees in files that have no name: the space of a tree is free again once its views are gone, at the latest when
    the process is, however it ends. The whole space is reserved before anything is written, so a full disk is an error
    here and not a signal at some later store into the map.

    Args:
        directory: made when the first tree is stored.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)

    def store(self, tree: Tree, into: Tree | None = None) -> Tree:
        """The tree as numpy views of a mapped file.

        Args:
            tree: arrays of any place.
            into: an earlier result of equal shapes and dtypes, which is overwritten. None: new space.

        Raises:
            RunError: the disk is full or cannot be written.
        """
        views = self._reserve(tree) if into is None else into
        for view, leaf in zip(jax.tree.leaves(views), jax.tree.leaves(tree), strict=True):
            view[...] = leaf if isinstance(leaf, np.ndarray) else np.asarray(jax.device_get(leaf))
        return views

    def _reserve(self, tree: Tree) -> Tree:
        leaves, structure = jax.tree.flatten(tree)
        starts, total = [], 0
        for leaf in leaves:
            starts.append(total)
            total += -(-leaf.size * np.dtype(leaf.dtype).itemsize // ALIGNMENT) * ALIGNMENT
        mapped = self._map(max(total, 1))
        views = [
            np.frombuffer(mapped, leaf.dtype, leaf.size, start).reshape(leaf.shape)
            for leaf, start in zip(leaves, starts, strict=True)
        ]
        return jax.tree.unflatten(structure, views)

    def _map(self, n_bytes: int) -> mmap.mmap:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory, buffering=0) as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, n_bytes)
                else:
                    file.truncate(n_bytes)
                return mmap.mmap(file.fileno(), n_bytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise RunError(
                    f"the disk of {self.directory} is full: {format_bytes(n_bytes)} of offloaded weights or optimizer "
                    "state found no room; free some space, or write memory.offload_to host"
                ) from error
            raise RunError(f"{self.directory} cannot hold offloaded weights: {error.strerror}") from error


def is_mapped(leaf: Any) -> bool:
    """Whether an array is a view of a file that `Scratch` mapped."""
    base = leaf
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return isinstance(base, mmap.mmap)


def rest(placement: Placement, tree: Tree, place: Place, scratch: Scratch | None, into: Tree | None = None) -> Tree:
    """The tree at rest in a place; as it is where it already rests there.

    Transfers between device and host are only begun; what is stored on disk is there on return.

    Args:
        scratch: for the place "disk".
        into: what rested there before, of equal shapes; its space is used again on disk.
    """
    if place == "disk":
        assert scratch is not None, "a tree cannot rest on disk without a scratch directory"
        return tree if all(map(is_mapped, jax.tree.leaves(tree))) else scratch.store(tree, into)
    shardings = placement.params(tree)
    if place == "host":
        shardings = jax.tree.map(lambda sharding: sharding.with_memory_kind(HOST_MEMORY), shardings)
    return placement.put(tree, shardings)


class Conveyor(Generic[Key, Loaded]):
    """Brings things to the device in a known order: while one is in use the next is on its way, and no third.

        for _ in order:
            thing = conveyor.take()
            result = compute(thing)       # dispatched
            conveyor.advance(before)      # waits for the result before that, then begins to load the next
            before = result

    Loading happens in a thread, so that reading from disk does not hold up the dispatch of computations.
    """

    def __init__(self, load: Callable[[Key], Loaded], order: Iterable[Key], pool: ThreadPoolExecutor):
        self._load, self._order, self._pool = load, iter(order), pool
        self._coming: Future[None] | None = None
        # What was loaded is handed over here: a thread may hold on to the result of its future for a while.
        self._loaded: list[Loaded] = []
        self._begin()

    def take(self) -> Loaded:
        """The next thing in the order."""
        assert self._coming is not None, "nothing is left in the order, or `advance` was not called"
        coming, self._coming = self._coming, None
        coming.result()
        return self._loaded.pop()

    def advance(self, settled: Any = None) -> None:
        """Wait for `settled`, what was computed with the thing before the one in use, and begin to load the next.

        Where the next was begun before, it is only waited.
        """
        jax.block_until_ready(settled)
        if self._coming is None:
            self._begin()

    def _begin(self) -> None:
        for key in self._order:
            self._coming = self._pool.submit(guarded, self._bring, key)
            return

    def _bring(self, key: Key) -> None:
        self._loaded.append(self._load(key))


def guarded(function: Callable, *args: Any) -> Any:
    """function(*args), where transfers that are not written down are errors: a thread does not inherit such a guard."""
    with jax.transfer_guard("disallow"):
        return function(*args)
