"""Several reporters that listen to one run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from stackwise_jax.curriculum.phase import Phase
from stackwise_jax.reporting.console import ConsoleReporter
from stackwise_jax.reporting.tensorboard import TensorBoardReporter


class Reporters:
    """Tells each event (engine.events.Reporter) to all of its members, in order."""

    def __init__(self, members: Iterable[ConsoleReporter | TensorBoardReporter | Reporters]):
        self._members = tuple(members)

    def note(self, text: str) -> None:
        """One sentence for people."""
        for member in self._members:
            member.note(text)

    def phase_start(self, index: int, total: int, phase: Phase, info: Mapping[str, Any]) -> None:
        """A phase begins."""
        for member in self._members:
            member.phase_start(index, total, phase, info)

    def step(self, row: Mapping[str, Any]) -> None:
        """A step is done."""
        for member in self._members:
            member.step(row)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """The model was measured on held-out text."""
        for member in self._members:
            member.evaluation(row)

    def phase_end(self, result: Mapping[str, Any]) -> None:
        """A phase is done."""
        for member in self._members:
            member.phase_end(result)

    def finish(self, summary: Mapping[str, Any], sample: str | None = None) -> None:
        """The run is done."""
        for member in self._members:
            member.finish(summary, sample)

    def close(self) -> None:
        """Nothing more will come, be the run done or not."""
        for member in self._members:
            member.close()
