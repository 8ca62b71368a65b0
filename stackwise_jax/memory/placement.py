"""Where arrays live: the mesh of devices, the shardings of batches and parameters, and explicit transfers.

The mesh has two axes. `data` splits the batch; `fsdp` splits the batch too and, in addition, each weight.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from stackwise_jax.config.schema import MeshConfig
from stackwise_jax.errors import UsageError

HOST_MEMORY = "pinned_host"
STACKED = "blocks"  # under this key of a parameter tree, axis 0 of every leaf counts blocks


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh (data, fsdp) over `devices`; None: over all devices of all processes.

    The axes are Auto: under Explicit axes, plain indexing of a sharded array raises.

    Raises:
        UsageError: data * fsdp is not the number of devices.
    """
    n_devices = jax.device_count() if devices is None else len(devices)
    if cfg.fsdp < 1 or n_devices % cfg.fsdp:
        raise UsageError(
            f"mesh.fsdp {cfg.fsdp} does not divide the {n_devices} devices at hand; write a divisor of {n_devices}"
        )
    data = n_devices // cfg.fsdp if cfg.data == -1 else cfg.data
    if data * cfg.fsdp != n_devices:
        raise UsageError(
            f"mesh.data {cfg.data} times mesh.fsdp {cfg.fsdp} is not the number of devices, {n_devices}; "
            f"write mesh.data {n_devices // cfg.fsdp} or -1"
        )
    axis_types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, cfg.fsdp), ("data", "fsdp"), axis_types=axis_types, devices=devices)


@dataclass(frozen=True)
class Placement:
    """The shardings of one mesh and the explicit transfers to them. Hashable, so it may be a static argument of jit.

    All processes hold the same Placement and call `put` with the same values.
    """

    mesh: Mesh

    @property
    def batch(self) -> NamedSharding:
        """Axis 0 split over all devices, in device memory."""
        return NamedSharding(self.mesh, P(("data", "fsdp")))

    @property
    def host_batch(self) -> NamedSharding:
        """As `batch`, in pinned host memory."""
        return NamedSharding(self.mesh, P(("data", "fsdp")), memory_kind=HOST_MEMORY)

    @property
    def replicated(self) -> NamedSharding:
        """The whole array on every device."""
        return NamedSharding(self.mesh, P())

    def params(self, tree: Any) -> Any:
        """A tree of shardings for a tree of arrays or ShapeDtypeStructs (parameters, gradients, optimizer state).

        The largest axis that the size of `fsdp` divides is split over `fsdp`; the axis that counts the blocks of a
        stack is left whole, because the scan walks along it. Leaves without such an axis are replicated.
        """
        return jax.tree_util.tree_map_with_path(self._param, tree)

    def _param(self, path, leaf) -> NamedSharding:
        n_shards = self.mesh.shape["fsdp"]
        stacked = any(getattr(entry, "key", None) == STACKED for entry in path)
        axes = [i for i in range(int(stacked), len(leaf.shape)) if leaf.shape[i] and leaf.shape[i] % n_shards == 0]
        if n_shards == 1 or not axes:
            return self.replicated
        split = max(axes, key=lambda i: leaf.shape[i])
        return NamedSharding(self.mesh, P(*[None] * split, "fsdp"))

    def check_batch(self, batch_size: int) -> None:
        """Raises UsageError where the batch cannot be split evenly over the devices."""
        if batch_size < 1 or batch_size % self.mesh.size:
            raise UsageError(
                f"data.batch_size {batch_size} cannot be split evenly over the {self.mesh.size} devices of the mesh "
                f"(mesh.data {self.mesh.shape['data']} x mesh.fsdp {self.mesh.shape['fsdp']}); "
                f"write a multiple of {self.mesh.size}"
            )

    def put(self, tree: Any, shardings: Any) -> Any:
        """Transfer a tree to `shardings`: one sharding for all leaves, or a tree of them.

        Leaves are numpy arrays, scalars or jax arrays. The result never shares memory with a numpy leaf and always
        carries exactly the given sharding, so that a jitted function meets one signature only; a jax array that is
        already there is passed on, so donating the result deletes the argument too. With several
        processes every process holds the whole of each numpy leaf and contributes its own part.
        """
        if isinstance(shardings, Sharding):
            return jax.tree.map(lambda leaf: _put(leaf, shardings), tree)
        return jax.tree.map(_put, tree, shardings)


def _put(leaf: Any, sharding: Sharding) -> jax.Array:
    if isinstance(leaf, jax.Array):
        if sharding.is_fully_addressable or not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            key_data = _put(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(key_data, impl=jax.random.key_impl(leaf))
        leaf = jax.device_get(leaf)
    # On a CPU device_put may alias the numpy buffer, elsewhere it may still read from it later: hand it a private copy.
    value = np.array(leaf, dtype=jax.dtypes.canonicalize_dtype(np.asarray(leaf).dtype))
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    parts = [(device, value[index]) for device, index in sharding.addressable_devices_indices_map(value.shape).items()]
    return assemble(value.shape, sharding, parts)


def assemble(shape: tuple[int, ...], sharding: Sharding, parts: Iterable[tuple[Any, Any]]) -> jax.Array:
    """A global array from this process's parts: (device, the part of the array that belongs there) each.

    Parts are numpy arrays or arrays on one device. Unlike make_array_from_callback, all transfers are explicit.
    """
    kind = sharding.memory_kind
    shards = [jax.device_put(part, SingleDeviceSharding(device, memory_kind=kind)) for device, part in parts]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def peak_device_bytes() -> int | None:
    """The most bytes ever in use on one local device since the process started; None where it is not counted (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return max(peaks) if peaks else None


def peak_host_bytes() -> int:
    """The largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def format_bytes(n: int) -> str:
    """A size for people, in binary units: 4.0 GiB."""
    size, units = float(n), ["B", "KiB", "MiB", "GiB"]
    for unit in units:
        if abs(size) < 1024:
            return f"{n} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
