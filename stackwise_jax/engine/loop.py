"""The loop of a phase: what is fed to an executor's step, and in which order things happen. Any executor runs in it.

The order of operations in `run_phase` is a contract:
  1. the old state is evaluated and saved where that is due,
  2. step k is dispatched,
  3. the metrics of step k-1 are read (the only wait in the loop, for something that is already done),
  4. only then the data iterator advances.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from stackwise_jax.curriculum.phase import Phase
from stackwise_jax.data import Loader
from stackwise_jax.engine.optimizer import learning_rate
from stackwise_jax.engine.prefix import FIXED_VISIT, Prefix, PrefixCache, put_examples
from stackwise_jax.engine.step import StepData
from stackwise_jax.memory import Placement
from stackwise_jax.objectives import Examples


class Feed:
    """The data of a phase, step by step, on the device."""

    def __init__(
        self,
        phase: Phase,
        loader: Loader,
        prefix: Prefix,
        cache: PrefixCache | None,
        placement: Placement,
        offset: int,
        start: int,
    ):
        """loader: a fixed stream where there is a cache. cache None: the prefix (if any) is recomputed. offset: where
        in the stream the phase's step 0 stands."""
        self._phase, self._prefix, self._placement = phase, prefix, placement
        self._start, self._offset = start, offset
        self._stream = loader.iterate(offset + start)
        self._hidden: Any = None  # iterator over the cached chunks
        if cache is not None:
            self._hidden = cache.read(map(loader.batch_id, range(offset + start, offset + phase.steps)))
        self._fixed = phase.corruption == "fixed"

    def __iter__(self) -> Iterator[StepData]:
        put, whole = self._placement.put, self._placement.replicated
        for step in range(self._start, self._phase.steps):
            examples: Examples = put_examples(self._placement, next(self._stream))
            # Fresh corruption differs each time an example is met: the stream position is its number.
            visit = FIXED_VISIT if self._fixed else 1 + self._offset + step
            lr, visit = put((self.rate(step), np.int32(visit)), whole)
            hidden_BTD = None
            if self._hidden is not None:
                hidden_BTD = next(self._hidden)
            elif self._phase.prefix:
                hidden_BTD = self._prefix(examples, visit)
            yield StepData(examples, hidden_BTD, lr, visit)

    def rate(self, step: int) -> np.float32:
        """The learning rate of a step of the phase."""
        return learning_rate(self._phase.optimizer, self._phase.steps, step)

    def close(self) -> None:
        """End the threads that read ahead."""
        self._stream.close()
        if self._hidden is not None:
            self._hidden.close()


def run_phase(
    step: Callable[[StepData], dict[str, jax.Array]],
    feed: Iterator[StepData],
    steps: range,
    *,
    before_step: Callable[[int, Callable[[], None]], None],
    on_metrics: Callable[[int, dict[str, float], float], None],
) -> None:
    """The loop of a phase; see the contract at the top of this file.

    Args:
        step: one update by an executor, which holds the state; returns scalars on the device.
        before_step: called with (step, flush) to evaluate, save or stop; flush() delivers the metrics up to then.
        on_metrics: called once a step, in order, with (step, metrics as floats, seconds since the last step's).
    """
    pending: list[tuple[int, dict[str, jax.Array]]] = []
    clock = time.perf_counter()

    def flush() -> None:
        nonlocal clock
        while pending:
            index, metrics = pending.pop(0)
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            now = time.perf_counter()
            seconds, clock = now - clock, now
            on_metrics(index, values, seconds)

    data = next(feed, None)
    for index in steps:
        before_step(index, flush)
        assert data is not None
        # Whatever crosses between host and device in here is written down as a transfer, or it is an error.
        with jax.transfer_guard("disallow"):
            metrics = step(data)
            flush()
            pending.append((index, metrics))
            data = next(feed, None)
    flush()
