"""Devices by name, and what of this machine is free: what a plan is held against."""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax

from stackwise_jax.config import parse_bytes
from stackwise_jax.errors import UsageError

MEMORY_FRACTION = 0.95  # of a GPU: what XLA's allocator may take; the driver and the libraries have the rest
EFFICIENCY = 0.4  # share of the peak that a step is taken to reach where times are predicted
FRAGMENTATION = 50  # one part in so many is lost between arrays
CPU_CORE_FLOPS = 5e10  # fp32, of one core with wide vector units; a rough figure


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        memory: bytes that arrays may take; None: unknown, or shared with the host (a CPU).
        flops: dense matrix products per second by dtype, a multiply and an add counting two, as the makers state them;
            empty: unknown. For fp32 those of the default precision, which is TF32 where there is one.
        bandwidth: bytes per second of its memory, as stated by the makers; None: unknown.
        link: bytes per second between host and device in one direction, as usually measured; None: unknown.
        reserve: of these, what fragmentation takes.
    """

    name: str
    memory: int | None
    flops: tuple[tuple[str, float], ...] = ()
    bandwidth: float | None = None
    link: float | None = None
    reserve: int = 0

    def peak(self, dtype: str) -> float | None:
        """FLOP/s in a dtype; None: unknown."""
        return dict(self.flops).get(dtype)


def _gpu(name: str, memory: float, half: float, fp32: float, bandwidth: float, link: float, bf16: float | None = None):
    rates = (("bf16", bf16 or half), ("fp16", half), ("fp32", fp32))
    usable = int(MEMORY_FRACTION * memory)
    return Device(name, usable, rates, bandwidth, link, reserve=usable // FRAGMENTATION)


# A T4 has no bf16 units: it computes as in fp32.
DEVICES = {
    device.name: device
    for device in (
        _gpu("h200", 141e9, 989e12, 494e12, 4.8e12, 5.5e10),
        _gpu("a100-80", 80e9, 312e12, 156e12, 2.0e12, 2.5e10),
        _gpu("rtx4090", 24e9, 165e12, 83e12, 1.0e12, 2.5e10),
        _gpu("t4", 16e9, 65e12, 8.1e12, 3.2e11, 1.2e10, bf16=8.1e12),
    )
}


@dataclass(frozen=True)
class Machine:
    """What a run has to fit into. None: unknown, so that nothing is too large for it.

    Attributes:
        host, disk: bytes.
        shared: device and host are one memory (a CPU), whose size is `host`.
        here: the device is of the kind that this process computes on.
    """

    device: Device
    host: int | None
    disk: int | None
    shared: bool = False
    here: bool = False


def machine_of(
    device: str | None, host: str | None, disk: str | None, run_dir: Path, *, another: bool = False
) -> Machine:
    """The machine to plan for.

    Args:
        device: a name of DEVICES, "cpu", or a size such as "40GB"; None: what is here.
        host, disk: sizes; None: what is available here, for the disk with what the run already holds.
        another: a device that is not the one here stands in another machine, whose host and disk are unknown.

    Raises:
        UsageError: a name or a size that is none.
    """
    found = _device_here() if device is None else _device_named(device)
    here = device is None or (device == "cpu" and jax.default_backend() == "cpu")
    elsewhere = another and not here
    host_bytes = None if elsewhere else available_host_bytes()
    disk_bytes = None if elsewhere else available_disk_bytes(run_dir)
    if host is not None:
        host_bytes = parse_bytes(host, "memory.host")
    if disk is not None:
        disk_bytes = parse_bytes(disk, "memory.disk")
    return Machine(found, host_bytes, disk_bytes, shared=found.name == "cpu", here=here)


def _device_named(text: str) -> Device:
    if text in DEVICES:
        return DEVICES[text]
    if text == "cpu":
        return _cpu()
    try:
        return Device(text, parse_bytes(text, "memory.device"))
    except UsageError:
        names = ", ".join([*DEVICES, "cpu"])
        raise UsageError(f'memory.device is "{text}"; write one of {names}, or a size such as 40GB') from None


def _device_here() -> Device:
    """The first local device, with the limit that its allocator has."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return _cpu()
    limit = (device.memory_stats() or {}).get("bytes_limit")
    kind = device.device_kind.lower()
    words = kind.replace("-", " ").split()
    known = next((d for d in DEVICES.values() if d.name.split("-")[0].removeprefix("rtx") in words), None)
    reserve = 0 if limit is None else limit // FRAGMENTATION
    if known is None:
        return Device(device.device_kind, limit, reserve=reserve)
    return dataclasses.replace(known, name=device.device_kind, memory=limit, reserve=reserve)


def claim_memory() -> None:
    """Tell XLA how much it may take of a GPU and of the host: nearly all, where its defaults are three quarters and 64
    GB. Without effect once a device has been used, or where the environment says it already."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))
    host = available_host_bytes()
    if host is not None:
        os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(max(host // 10**9, 1)))


def same_disk(a: Path | str, b: Path | str) -> bool:
    """Whether two folders, which need not exist yet, lie on one file system."""

    def number(path: Path) -> int:
        return next(place.stat().st_dev for place in (path, *path.parents) if place.exists())

    return number(Path(a).absolute()) == number(Path(b).absolute())


def _cpu() -> Device:
    rate = (os.cpu_count() or 1) * CPU_CORE_FLOPS
    return Device("cpu", None, (("fp32", rate), ("bf16", rate / 2), ("fp16", rate / 2)))


def available_host_bytes() -> int | None:
    """Memory that this process may still take, and what it has; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":") for line in lines)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (ValueError, OSError, AttributeError):
            return None
    return min([available, *_container_limits()])


def _container_limits() -> list[int]:
    """What the container of this process may still take (cgroup v2 and v1), where there is one with a limit."""
    limits = []
    # What is cached of files is given back when it is needed, so it does not count as used.
    for limit, stat, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.stat", "anon "),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.stat", "total_rss "),
    ):
        try:
            lines = Path(stat).read_text().splitlines()
            taken = next(int(line.split()[1]) for line in lines if line.startswith(used))
            limits.append(int(Path(limit).read_text()) - taken)
        except (OSError, ValueError, StopIteration):  # no such file, or "max"
            continue
    return [limit for limit in limits if limit > 0]


def available_disk_bytes(run_dir: Path) -> int | None:
    """Free bytes where the run directory is or will be, and what it already holds."""
    place = next((p for p in (run_dir, *run_dir.absolute().parents) if p.exists()), Path("."))
    held = sum(f.stat().st_size for f in run_dir.rglob("*") if f.is_file()) if run_dir.exists() else 0
    try:
        return shutil.disk_usage(place).free + held
    except OSError:
        return None
