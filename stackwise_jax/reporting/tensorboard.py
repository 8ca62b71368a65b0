"""A run as TensorBoard curves over the steps of the whole run."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise_jax.curriculum.phase import Phase

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter

log = logging.getLogger(__name__)
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
_FLUSH = 10.0  # seconds between the moments at which a viewer sees what is new
_HELD_OUT = {"held_out_loss": "held_out/loss", "bits_per_byte": "held_out/bits_per_byte", "depth": "held_out/depth"}


class TensorBoardReporter:
    """Writes the steps and held-out figures of a run (engine.events.Reporter) as event files.

    Rows carry global_step. When a run goes on after a kill, what an earlier process wrote beyond the step at which it
    goes on is purged, so that no curve runs back over itself. Everything is written by the caller's thread: a queue to
    another one (as in tensorboardX's own writer) would block the run for ever once the disk is full. Where curves
    cannot be written (a full disk, no rights, a symbolic link in place of the directory), a warning says so once, and
    the run goes on without them.

    Args:
        directory: of the event files; made when the first figure is written.
        every: steps between points.

    Attributes:
        lost: writing has failed.
    """

    def __init__(self, directory: str | Path, every: int = 1):
        self._directory = Path(directory)
        self._every = every
        self._writer: EventsWriter | None = None
        self._flushed = 0.0
        self.lost = False

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            self.lost, self._writer = True, None
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            log.warning("curves cannot be written to %s (%s); the run goes on without them", self._directory, why)

    def _write(self, row: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        if self.lost:
            return
        from tensorboardX.summary import scalar  # takes a while to import, and not every run writes curves

        step = row["global_step"]
        with self._writing():
            for key, tag in tags.items():
                if row.get(key) is not None:
                    self._event(step, summary=scalar(tag, row[key]))
            if time.monotonic() - self._flushed > _FLUSH:
                self._flush()

    def _event(self, step: int, **content: Any) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        if self._writer is None:
            if self._directory.is_symlink():  # a run directory may be somebody else's: nothing is written beyond it
                raise OSError(errno.ELOOP, "it is a symbolic link", str(self._directory))
            self._directory.mkdir(parents=True, exist_ok=True)
            # The number keeps two processes that start within a second from writing one file.
            self._writer = EventsWriter(str(self._directory / "events"), f".{os.getpid()}")
            purge = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=step, session_log=purge))
        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))

    def _flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()
            self._flushed = time.monotonic()

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
        with self._writing():
            self._flush()

    def finish(self, summary: Mapping[str, Any], sample: str | None = None) -> None:
        """Write the sample as text."""
        if self._writer is not None and sample:
            from tensorboardX.summary import text

            with self._writing():
                self._event(0, summary=text("sample", sample))
        self.close()

    def close(self) -> None:
        """Bring everything to disk."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with self._writing():
                writer.close()
