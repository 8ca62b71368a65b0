"""A run as TensorBoard curves over the steps of the whole run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise_jax.curriculum.phase import Phase

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

_STEP = {  # key of a step's row: tag
    "loss": "train/loss",
    "bits_per_byte": "train/bits_per_byte",
    "accuracy": "train/accuracy",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "speed/tokens_per_second",
    "device_bytes": "memory/device_bytes",
    "host_bytes": "memory/host_bytes",
}
_HELD_OUT = {"held_out_loss": "held_out/loss", "bits_per_byte": "held_out/bits_per_byte", "depth": "held_out/depth"}


class TensorBoardReporter:
    """Writes the steps and held-out figures of a run (engine.events.Reporter) as event files.

    Rows carry global_step. When a run goes on after a kill, what an earlier process wrote beyond the step at which it
    goes on is purged, so that no curve runs back over itself.

    Args:
        directory: of the event files; made when the first figure is written.
        every: steps between points.
    """

    def __init__(self, directory: str | Path, every: int = 1):
        self._directory = str(directory)
        self._every = every
        self._writer: SummaryWriter | None = None

    def _write(self, row: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        step = row["global_step"]
        if self._writer is None:
            from tensorboardX import SummaryWriter  # takes a while to import, and not every run writes curves

            self._writer = SummaryWriter(self._directory, purge_step=step)
        for key, tag in tags.items():
            if row.get(key) is not None:
                self._writer.add_scalar(tag, row[key], step)

    def note(self, text: str) -> None:
        """Not a curve."""

    def phase_start(self, index: int, total: int, phase: Phase, info: Mapping[str, Any]) -> None:
        """Not a curve."""

    def step(self, row: Mapping[str, Any]) -> None:
        """Write a step, every so often and at the end of a phase; row["step"] counts from 0."""
        if row["step"] % self._every == 0 or row["step"] == row["steps"] - 1:
            self._write(row, _STEP)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Write the held-out figures."""
        self._write(row, _HELD_OUT)

    def phase_end(self, result: Mapping[str, Any]) -> None:
        """Bring what was written to disk; the held-out figures of the end came as an evaluation."""
        if self._writer is not None:
            self._writer.flush()

    def finish(self, summary: Mapping[str, Any], sample: str | None = None) -> None:
        """Write the sample as text."""
        if self._writer is not None and sample:
            self._writer.add_text("sample", sample)
        self.close()

    def close(self) -> None:
        """Bring everything to disk and end the writer's thread."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
