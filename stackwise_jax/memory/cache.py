"""The activations of a frozen prefix, kept so that a step does not have to compute them again.

Shapes: B batch, T sequence, D d_model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from stackwise_jax.errors import RunError, UsageError
from stackwise_jax.memory.placement import Placement, assemble, format_bytes
from stackwise_jax.memory.read_ahead import read_ahead
from stackwise_jax.memory.spill import SpillFile

Progress = Callable[[int, int], None]  # chunks done, chunks in all


def cache_key(**parts: Any) -> str:
    """A sha256 over named parts (numbers, texts, None, lists, sets, dicts, dataclasses), independent of their order.

    Raises:
        TypeError: a part has no canonical form.
    """

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        if isinstance(value, (set, frozenset)):
            return sorted(value)
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"a {type(value).__name__} cannot be part of a cache key")

    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=plain)
    return hashlib.sha256(text.encode()).hexdigest()


class ActivationCache:
    """Chunks h_BTD of equal shape and dtype, one per batch, under one key that says what they are.

    A chunk is an immutable array, split over the devices as the batch is. kind "host" keeps chunks in pinned host
    memory until `host_budget` bytes are used and puts the rest into a spill file, kind "disk" puts all of them there.
    Budgets, and the bytes reported, are per process. What is read is bitwise what was put. One thread fills, advances
    and closes; a key is set only while every chunk belongs to it, so what was interrupted can never be read.
    """

    def __init__(
        self,
        placement: Placement,
        *,
        kind: Literal["host", "disk"],
        host_budget: int,
        disk_budget: int,
        directory: Path,
        read_ahead: int,
    ):
        self._placement = placement
        self._host_budget = host_budget if kind == "host" else 0
        self._disk_budget = disk_budget
        self._read_ahead = read_ahead
        self._spill = SpillFile(directory)
        self._clear()

    def _clear(self) -> None:
        self._key: str | None = None
        self._spill.clear()
        self._spec: jax.ShapeDtypeStruct | None = None  # of every chunk
        self._host: dict[int, jax.Array] = {}
        self._slots: dict[int, int] = {}  # chunk id -> its place in the spill file, counted in chunks

    @property
    def key(self) -> str | None:
        """What the chunks are; None while the cache is empty or being changed."""
        return self._key

    @property
    def ids(self) -> tuple[int, ...]:
        """The chunks held, in the order of filling."""
        return (*self._host, *self._slots)

    @property
    def chunk_bytes(self) -> int:
        """This process's part of one chunk, in bytes; 0 while empty."""
        if self._spec is None:
            return 0
        n_shards = len(self._placement.batch.addressable_devices)
        shard_shape = self._placement.batch.shard_shape(self._spec.shape)
        return n_shards * int(np.prod(shard_shape)) * np.dtype(self._spec.dtype).itemsize

    @property
    def host_bytes(self) -> int:
        """Bytes held in host memory by this process."""
        return len(self._host) * self.chunk_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes held in the spill file of this process."""
        return len(self._slots) * self.chunk_bytes

    def check(self, key: str) -> None:
        """Raises RunError unless the chunks are those of `key`."""
        if self._key != key:
            held = "nothing complete" if self._key is None else f"the activations of {self._key[:12]}"
            raise RunError(f"the activation cache holds {held}, not those of {key[:12]}; it has to be filled again")

    def fill(
        self, key: str, ids: Sequence[int], produce: Callable[[int], jax.Array], progress: Progress | None = None
    ) -> None:
        """Forget everything and hold produce(id), h_BTD on the device, for each id.

        Raises:
            UsageError: the chunks do not fit into the budgets.
            RunError: the disk is full.
        """
        self._clear()
        self._store(key, tuple(dict.fromkeys(ids)), produce, progress)

    def advance(self, key: str, fn: Callable[[int, jax.Array], jax.Array], progress: Progress | None = None) -> None:
        """Replace each chunk h_BTD by fn(id, h_BTD), of the same shape and dtype, in place and one at a time.

        If fn fails midway the cache is empty afterwards.

        Raises:
            RunError: there is nothing complete to advance, or the disk fails.
        """
        if self._key is None:
            raise RunError("the activation cache holds nothing that could be advanced; it has to be filled")
        self._key = None
        ids = self.ids
        with closing(read_ahead(self._load, ids, self._read_ahead)) as chunks:
            self._store(key, ids, lambda i: fn(i, next(chunks)), progress)

    def read(self, key: str, order: Iterable[int]) -> Iterator[jax.Array]:
        """The chunks named by `order` (any order, repeats allowed, may be endless) as device arrays h_BTD.

        A background thread keeps up to `read_ahead` chunks on the device besides the one in use.

        Raises:
            RunError: the cache is not that of `key`, now or by the time a chunk is loaded.
        """
        self.check(key)

        def load(i: int) -> jax.Array:
            self.check(key)
            h_BTD = self._load(i)
            self.check(key)  # again: a chunk that changed while it was loaded is not handed out
            return h_BTD

        return read_ahead(load, order, self._read_ahead)

    def close(self) -> None:
        """Forget everything and remove the spill file."""
        self._clear()
        self._spill.close()

    def __enter__(self) -> ActivationCache:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _store(self, key: str, ids: Sequence[int], make: Callable[[int], jax.Array], progress: Progress | None) -> None:
        """Put make(id) for each id; the next is dispatched before the last one's way to the host is waited for."""
        previous: tuple[int, jax.Array] | None = None
        try:
            for done, i in enumerate(ids, start=1):
                h_BTD = make(i)
                if self._spec is None:
                    self._admit(h_BTD, len(ids))
                arriving = (i, self._to_host(h_BTD))
                del h_BTD  # its device memory is free again once the copy is through
                if previous is not None:
                    self._settle(*previous)
                previous = arriving
                if progress is not None:
                    progress(done, len(ids))
            if previous is not None:
                self._settle(*previous)
        except BaseException as error:
            held = self.host_bytes
            self._clear()
            if isinstance(error, jax.errors.JaxRuntimeError) and "host memory" in str(error):
                raise RunError(
                    f"pinned host memory ran out with {format_bytes(held)} of activations in it; lower "
                    "cache.host_budget so that the rest goes to disk, or raise the limit that the device runtime sets "
                    "(XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB)"
                ) from error
            raise
        self._key = key

    def _admit(self, h_BTD: jax.Array, total: int) -> None:
        """Note the shape of the chunks and refuse them at once if they will not all fit."""
        self._spec = jax.ShapeDtypeStruct(h_BTD.shape, h_BTD.dtype)
        need = total * self.chunk_bytes
        spilled = (total - min(total, self._host_budget // self.chunk_bytes)) * self.chunk_bytes
        if spilled > self._disk_budget:
            raise UsageError(
                f"the activation cache needs {format_bytes(need)} per process for {total} batches, and "
                f"cache.host_budget {format_bytes(self._host_budget)} and cache.disk_budget "
                f"{format_bytes(self._disk_budget)} do not hold it; raise them or set cache.kind recompute"
            )
        if spilled:
            self._spill.reserve(spilled)

    def _to_host(self, h_BTD: jax.Array) -> jax.Array:
        """Start the copy to pinned host memory."""
        assert self._spec is not None
        if (h_BTD.shape, h_BTD.dtype) != (self._spec.shape, self._spec.dtype):
            raise ValueError(f"chunk {h_BTD.dtype}{h_BTD.shape} differs from {self._spec.dtype}{self._spec.shape}")
        if not h_BTD.sharding.is_equivalent_to(self._placement.batch, h_BTD.ndim):
            h_BTD = jax.device_put(h_BTD, self._placement.batch)
        return _move(h_BTD, self._placement.host_batch)

    def _settle(self, i: int, h_BTD: jax.Array) -> None:
        """Wait for a chunk to arrive in host memory and give it its place."""
        assert self._spec is not None
        h_BTD.block_until_ready()
        fits = self.host_bytes + self.chunk_bytes <= self._host_budget
        if i in self._host or (i not in self._slots and fits):
            self._host[i] = h_BTD
            return
        slot = self._slots.get(i, len(self._slots))
        parts = {shard.device: shard.data for shard in h_BTD.addressable_shards}
        self._spill.write(slot * self.chunk_bytes, [np.asarray(parts[device]) for device in self._devices(self._spec)])
        self._slots[i] = slot

    def _load(self, i: int) -> jax.Array:
        """Start the copy of a chunk to the device. Purely local, so that threads of several processes never meet."""
        spec, sharding = self._spec, self._placement.batch
        if i in self._host:
            return _move(self._host[i], sharding)
        if spec is None or i not in self._slots:
            raise KeyError(f"batch {i} is not in the activation cache")
        raw = self._spill.read(self._slots[i] * self.chunk_bytes, self.chunk_bytes)
        devices = self._devices(spec)
        parts = raw.view(spec.dtype).reshape(len(devices), *sharding.shard_shape(spec.shape))
        return assemble(spec.shape, sharding, zip(devices, parts, strict=True))

    def _devices(self, spec: jax.ShapeDtypeStruct) -> list:
        """This process's devices in the order in which their parts follow each other in the spill file."""
        return list(self._placement.batch.addressable_devices_indices_map(spec.shape))


def _move(x: jax.Array, sharding: jax.sharding.NamedSharding) -> jax.Array:
    """The same parts on the same devices in another kind of memory."""
    return assemble(x.shape, sharding, [(shard.device, shard.data) for shard in x.addressable_shards])
