"""Which implementation computes an operation: the one asked for where it can, else the best that can."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping

import jax

log = logging.getLogger("stackwise_jax")

Obstacle = Callable[[], str | None]


def cuda_capability() -> float | None:
    """Compute capability of the default device, such as 9.0; None: it is no NVIDIA GPU."""
    device = jax.devices()[0]
    if device.platform != "gpu" or not device.device_kind.startswith("NVIDIA"):
        return None
    return float(device.compute_capability)


def choose(
    operation: str, asked: str, *, special: Mapping[str, Obstacle], general: tuple[str, ...], otherwise: str, fast: bool
) -> str:
    """The name of the implementation to use.

    Args:
        operation: its name, for messages.
        asked: "auto" or the name of an implementation.
        special: implementations that cannot do every case, best first; each says what stands against it, or None.
        general: implementations that can do every case.
        otherwise: which of these is best here.
        fast: whether "auto" prefers the special ones.

    One that is asked for by name but cannot do the case gives way to the best that can; a log line says so, once for
    each reason.

    Raises:
        ValueError: there is no implementation of this name.
    """
    names = ("auto", *general, *special)
    if asked not in names:
        raise ValueError(f'{operation} has no implementation "{asked}"; write one of {", ".join(names)}')
    if asked in general:
        return asked
    against = None if asked == "auto" else special[asked]()
    if asked != "auto" and against is None:
        return asked
    candidates = [name for name in special if name != asked] if fast else []
    chosen = next((name for name in candidates if special[name]() is None), otherwise)
    if against is not None:
        _log_once(f"{operation}: {chosen} instead of {asked}: {against}")
    return chosen


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)
