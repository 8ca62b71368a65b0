"""What the engine tells the outside while it works. Reporters draw it; the engine knows none of them."""

from __future__ import annotations

from typing import Protocol

from stackwise_jax.curriculum.phase import Phase


class Reporter(Protocol):
    """The listener of a run. All numbers are host values."""

    def note(self, text: str) -> None:
        """One sentence for people."""

    def phase_start(self, index: int, total: int, phase: Phase, info: dict) -> None:
        """info: steps, start_step, trainable_params, frozen_params, cache (the choice and its reason)."""

    def step(self, row: dict) -> None:
        """phase, step, global_step, steps, loss, bits_per_byte, accuracy, lr, grad_norm, tokens_per_second,
        seconds_left, device_bytes (None where the backend keeps no count), host_bytes."""

    def evaluation(self, row: dict) -> None:
        """phase, step, global_step, depth (stacks), held_out_loss, bits_per_byte."""

    def phase_end(self, result: dict) -> None:
        """name, held_out_loss, bits_per_byte, trainable_params, frozen_params, tokens, flops, seconds,
        peak_device_bytes, peak_host_bytes."""


class StopFlag:
    """Asks a run to save and stop. It holds no lock: signal handlers nest, and would wait for themselves."""

    def __init__(self):
        self._asked = False

    def set(self) -> None:
        """Ask."""
        self._asked = True

    def is_set(self) -> bool:
        """Whether the run was asked."""
        return self._asked


class NullReporter:
    """Says nothing: for tests and for all processes but the first."""

    def note(self, text: str) -> None: ...

    def phase_start(self, index: int, total: int, phase: Phase, info: dict) -> None: ...

    def step(self, row: dict) -> None: ...

    def evaluation(self, row: dict) -> None: ...

    def phase_end(self, result: dict) -> None: ...
