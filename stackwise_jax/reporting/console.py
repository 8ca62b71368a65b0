"""A run on the terminal: a progress bar for people, plain lines now and then for log files."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.rule import Rule
from rich.table import Column

from stackwise_jax.curriculum.phase import Phase
from stackwise_jax.reporting.tables import (
    clock,
    count,
    figure,
    make_console,
    print_line,
    print_summary,
    size,
    stack_ids,
)
from stackwise_jax.reporting.terminal import OUTPUT_ERRORS, discard, escape_unencodable, printable

_REDRAW = 0.1  # seconds; a step may be far shorter


def _never_fails(draw: Callable[..., None]) -> Callable[..., None]:
    """A method of the reporter that does nothing once its output has failed: a run does not end because of a line."""

    @functools.wraps(draw)
    def method(self: ConsoleReporter, *args: Any, **named: Any) -> None:
        if self.lost:
            return
        try:
            draw(self, *args, **named)
        except BlockingIOError:  # a reader that is slow and lets nobody wait; later lines may come through
            return
        except (*OUTPUT_ERRORS, SystemExit):  # the last is what rich makes of a reader that went away
            self.lost = True
            discard(self._console.file)
            with contextlib.suppress(*OUTPUT_ERRORS, SystemExit):
                self._stop_bar()

    return method


def _learners(phase: Phase) -> str:
    parts = ["embedding"] if phase.train_embed else []
    if phase.train:
        parts.append(f"stack{'s' * (len(phase.train) > 1)} {stack_ids(sorted(phase.train))}")
    if phase.adapt:
        parts.append(f"adapters of {stack_ids(sorted(phase.adapt))}")
    return ", ".join(parts + (["head"] if phase.train_head else []))


def _figures(row: Mapping[str, Any]) -> str:
    """What is worth watching in a step, in one line."""
    device, host = row.get("device_bytes"), row.get("host_bytes")
    memory = f"host {size(host)}" if device is None else f"device {size(device)}, host {size(host)}"
    return (
        f"loss {figure(row.get('loss'))} · {figure(row.get('bits_per_byte'))} bits/byte · "
        f"{count(row.get('tokens_per_second'))} tokens/s · {clock(row.get('seconds_left'))} left · {memory}"
    )


class ConsoleReporter:
    """Draws a run (engine.events.Reporter), and its end, on a rich console.

    On a terminal a progress bar lives at the bottom; `close` (or `finish`) must be called before anyone else prints,
    also when the run fails. Elsewhere a line is written when `interval` seconds have passed since the last one. When
    the output fails (a full disk, a reader or a terminal that is gone) the reporter is silent from then on.

    Args:
        console: where to; None: stdout.
        interval: seconds between the lines of steps when there is no terminal.

    Attributes:
        lost: the output has failed.
    """

    def __init__(self, console: Console | None = None, interval: float = 10.0):
        self.lost = False
        self._console = console or make_console()
        escape_unencodable(self._console.file)
        self._interval = interval if not self._console.is_terminal else _REDRAW
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._label = ""
        self._depth = self._steps = 0
        self._last = 0.0  # when a step was last shown

    def _line(self, text: str) -> None:
        print_line(self._console, text)

    @_never_fails
    def note(self, text: str) -> None:
        """Print one sentence."""
        self._line(text)

    @_never_fails
    def phase_start(self, index: int, total: int, phase: Phase, info: Mapping[str, Any]) -> None:
        """Announce a phase (index counts from 0) and, on a terminal, begin its bar."""
        self._stop_bar()
        self._label, self._depth = f"[{index + 1}/{total}] {printable(phase.name)}", len(phase.path)
        self._steps = steps = info["steps"]
        done = info.get("start_step", 0)
        resumed = f", going on at step {done}" if done else ""
        self._line(
            f"{self._label}: path {stack_ids(phase.path)}; learning: {_learners(phase)} "
            f"({count(info.get('trainable_params'))} parameters, {count(info.get('frozen_params'))} frozen); "
            f"{steps} steps{resumed}"
        )
        if info.get("cache"):
            self._line(f"  cache: {info['cache']}")
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=10), MofNCompleteColumn())
            shown = TextColumn("{task.fields[figures]}", markup=False, table_column=Column(no_wrap=False))
            # Drawn by `step` alone: in a thread of its own a failure would be nobody's.
            self._progress = Progress(*columns, shown, console=self._console, transient=True, auto_refresh=False)
            self._task = self._progress.add_task(self._label, total=steps, completed=done, figures="compiling")
            self._progress.start()
        self._last = time.monotonic()

    @_never_fails
    def step(self, row: Mapping[str, Any]) -> None:
        """Show a step that is done; row["step"] counts from 0 within the phase."""
        now, done = time.monotonic(), row["step"] + 1
        if now - self._last < self._interval and done < row["steps"]:
            return
        self._last = now
        if self._progress is not None:
            self._progress.update(self._task, completed=done, figures=_figures(row), refresh=True)
        else:
            self._line(f"  {self._label} step {done}/{row['steps']} · {_figures(row)}")

    @_never_fails
    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Print a held-out figure inside a phase (its end is told by phase_end); row["step"] counts the steps done."""
        if row["step"] == self._steps:
            return
        self._line(
            f"  held out after step {row['step']}, depth {row['depth']}: loss {figure(row['held_out_loss'], 4)}, "
            f"{figure(row['bits_per_byte'], 4)} bits per byte"
        )

    @_never_fails
    def phase_end(self, result: Mapping[str, Any]) -> None:
        """Take the bar away and print the held-out figures at the depth of the phase."""
        self._stop_bar()
        self._line(
            f"{self._label}: {figure(result['bits_per_byte'], 4)} bits per byte held out at depth {self._depth} "
            f"(loss {figure(result['held_out_loss'], 4)}) · {count(result['tokens'])} tokens, "
            f"{count(result['flops'])} FLOPs in {clock(result['seconds'])}"
        )

    @_never_fails
    def finish(self, summary: Mapping[str, Any], sample: str | None = None) -> None:
        """Print the table of summary["phases"] and the text sample."""
        self._stop_bar()
        print_summary(summary["phases"], self._console)
        if sample:
            self._console.print(Rule("sample", align="left"))
            print_line(self._console, sample, keep="\n\t")

    @_never_fails
    def close(self) -> None:
        """Take the bar away, if there is one."""
        self._stop_bar()

    def _stop_bar(self) -> None:
        progress, self._progress = self._progress, None
        if progress is not None:
            progress.stop()
