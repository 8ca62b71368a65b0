"""Whether a phase caches the activations of its frozen prefix, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stackwise_jax.errors import UsageError
from stackwise_jax.memory.placement import format_bytes

MAX_VISITS = 2.0  # per cached batch and phase; a small set that is revisited more often overfits


@dataclass(frozen=True)
class CacheChoice:
    """What a phase does with its prefix. `reason` is one sentence for the person who runs it."""

    use: bool
    kind: Literal["host", "disk", "recompute"]
    reason: str
    n_chunks: int  # batches that are cached; 0 without a cache


def choose_cache(
    kind: Literal["auto", "host", "disk", "recompute"],
    *,
    phase_visits: int,
    dataset_batches: int,
    chunk_bytes: int,
    host_budget: int,
    disk_budget: int,
    has_prefix: bool,
    corruption: Literal["auto", "fixed", "fresh"],
) -> CacheChoice:
    """The rule: auto caches where everything fits and no batch is visited more than about twice in the phase.

    Cached tokens are the same tokens again; recomputing sends fresh ones through the trunk, which costs its forward
    pass but does not overfit. A kind that is asked for is obeyed wherever there is a prefix.

    Args:
        kind: the key cache.kind.
        phase_visits: batches that the phase visits, repeats counted (its steps).
        dataset_batches: distinct batches of the training data.
        chunk_bytes: activations of one batch on one process.
        host_budget, disk_budget: bytes per process. Kind host spills to disk, kind disk uses disk only.
        has_prefix: whether anything lies before the first part that learns.
        corruption: fresh corruption changes the activations at every visit, so they cannot be cached.

    Raises:
        UsageError: host or disk is asked for and the activations do not fit, or the corruption is fresh.
    """
    if not has_prefix:
        return _recompute("there is nothing to cache: no frozen part comes before what learns")
    if kind == "recompute":
        return _recompute("cache.kind is recompute")
    if corruption == "fresh":
        if kind != "auto":
            raise UsageError(
                f"cache.kind {kind} does not go with objective.corruption fresh, which changes the activations at "
                "every visit; set objective.corruption fixed or cache.kind recompute"
            )
        return _recompute("fresh corruption changes the activations at every visit")

    n_chunks = min(phase_visits, dataset_batches)
    visits, need = phase_visits / n_chunks, n_chunks * chunk_bytes
    size = f"{n_chunks} batches of {format_bytes(chunk_bytes)}, {format_bytes(need)} in all,"
    room, budgets = _room(kind, chunk_bytes, host_budget, disk_budget)
    if need > room:
        if kind != "auto":
            raise UsageError(
                f"cache.kind {kind}: {size} do not fit into {budgets}; raise them or set cache.kind recompute"
            )
        return _recompute(f"{size} do not fit into {budgets}")
    if kind != "auto":
        return CacheChoice(True, kind, f"cache.kind is {kind}: {size} are visited {visits:.1f} times each", n_chunks)
    if visits > MAX_VISITS:
        return _recompute(
            f"{phase_visits} steps over {n_chunks} batches would visit each cached batch {visits:.1f} times, and more "
            f"than about {MAX_VISITS:.0f} overfits: fresh tokens go through the trunk instead"
        )
    return CacheChoice(True, "host", f"{size} fit and are visited {visits:.1f} times each", n_chunks)


def _room(kind: str, chunk_bytes: int, host_budget: int, disk_budget: int) -> tuple[int, str]:
    """(bytes that whole chunks may take, the keys that say so)."""
    disk = f"cache.disk_budget {format_bytes(disk_budget)}"
    if kind == "disk":
        return disk_budget, disk
    room = host_budget // chunk_bytes * chunk_bytes + disk_budget
    return room, f"cache.host_budget {format_bytes(host_budget)} and {disk}"


def _recompute(reason: str) -> CacheChoice:
    return CacheChoice(False, "recompute", reason, 0)
