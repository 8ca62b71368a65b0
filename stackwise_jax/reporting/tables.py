"""Tables and numbers for people: the plan of a run before it starts, its summary when it ends."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stackwise_jax.memory.placement import format_bytes
from stackwise_jax.reporting.terminal import escape_unencodable, printable

_WIDTH_WITHOUT_TERMINAL = 200  # rich assumes 80 for files and pipes, which would fold the tables


def make_console(*, stderr: bool = False) -> Console:
    """A console on stdout (or stderr) that does not fold lines when it writes to a file or a pipe.

    Text is printed as it is: no markup, no emoji, no highlighting.
    """
    stream = sys.stderr if stderr else sys.stdout
    escape_unencodable(stream)
    terminal = stream is not None and stream.isatty()
    width = None if terminal or "COLUMNS" in os.environ else _WIDTH_WITHOUT_TERMINAL
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def print_line(console: Console, text: str, *, keep: str = "", fold: bool = False) -> None:
    """Print text that stands on lines of its own: markup is not read, `printable` holds back what steers a terminal.

    Args:
        keep: characters that `printable` keeps.
        fold: break the text at the width of the console.
    """
    console.print(Text(printable(text, keep=keep)), soft_wrap=not fold)


def count(n: float | None) -> str:
    """A number of things in four characters or so: 999, 12.3K, 4.56M, 1.2e+15."""
    if n is None or not math.isfinite(n):
        return "-"
    for limit, unit in ((1e3, ""), (1e6, "K"), (1e9, "M"), (1e12, "B")):
        if abs(n) < limit:
            return f"{n:g}" if not unit else f"{n / limit * 1e3:.3g}{unit}"
    return f"{n:.2e}"


def figure(x: float | None, digits: int = 3) -> str:
    """A measured number with fixed decimals; '-' where there is none."""
    return "-" if x is None else f"{x:.{digits}f}"


def size(n: int | None) -> str:
    """Bytes in binary units; '-' where the backend keeps no count."""
    return "-" if n is None else format_bytes(n)


def clock(seconds: float | None) -> str:
    """A duration: 7.2s, 03:05, 1:02:03."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 59.95:  # which would round to 60.0s
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def stack_ids(ids: Iterable[int]) -> str:
    """Stack ids with runs drawn together, in the order of the path: 0-3, 7."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


Columns = tuple[tuple[str, str, Callable[[Any], str]], ...]  # heading, key of the row, format


def members(value: Any) -> str:
    """Stack ids and names in one cell; text stays as it is."""
    if isinstance(value, str):
        return value
    ids = [v for v in value if isinstance(v, int)]
    names = [str(v) for v in value if not isinstance(v, int)]
    return ", ".join(names + ([stack_ids(ids)] if ids else []))


_PHASE: Columns = (("phase", "name", str), ("path", "path", members), ("learns", "learns", members))
_TASK: Columns = (
    ("objective", "objective", str),
    ("noise", "noise", str),
    ("corruption", "corruption", str),
    ("attention", "attention", str),
    ("frozen as", "frozen", str),
    ("steps", "steps", str),
)
_PARAMETERS: Columns = (
    ("learning\nparameters", "trainable_params", count),
    ("frozen\nparameters", "frozen_params", count),
)
_MEMORY: Columns = (
    ("phase", "name", str),
    ("weights", "weights_bytes", size),
    ("gradients", "gradients_bytes", size),
    ("optimizer", "optimizer_bytes", size),
    ("activations", "activations_bytes", size),
    ("on device", "total_bytes", size),
    ("cache", "cache_bytes", size),
)
_SUMMARY: Columns = (
    ("phase", "name", str),
    ("held-out\nloss", "held_out_loss", lambda x: figure(x, 4)),
    ("bits/\nbyte", "bits_per_byte", lambda x: figure(x, 4)),
    ("learns", "trainable_params", count),
    ("frozen", "frozen_params", count),
    ("tokens", "tokens", count),
    ("FLOPs", "flops", count),
    ("time", "seconds", clock),
    ("peak\ndevice", "peak_device_bytes", size),
    ("peak\nhost", "peak_host_bytes", size),
)


def make_table(title: str, columns: Columns, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of the rows, narrow enough for a terminal of 80 columns; a missing value shows as '-'."""
    shown = Text(printable(title), style="bold")
    drawn = Table(title=shown, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=0)
    for heading, key, _ in columns:
        number = all(not isinstance(row.get(key), (str, list, tuple)) for row in rows)
        drawn.add_column(heading, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        cells = ((row.get(key), form) for _, key, form in columns)
        drawn.add_row(*(Text(_cell(value, form)) for value, form in cells))
    return drawn


def _cell(value: Any, form: Callable[[Any], str]) -> str:
    if value is None:
        return "-"
    try:
        return printable(form(value))
    except (TypeError, ValueError):  # not of its kind, as a damaged file may say: shown as it is
        return printable(str(value))


def print_plan(rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print what each phase does and the memory that it needs; what all phases share is said once.

    Args:
        rows: one per phase, with the keys name, path and learns (stack ids, names, or text), objective, noise,
            corruption, attention, frozen (the format of what does not learn), steps, trainable_params, frozen_params,
            weights_bytes, gradients_bytes, optimizer_bytes, activations_bytes (and temporaries), total_bytes (of one
            device), cache_bytes, cache (the choice and its reason). What is missing or None shows as '-'.
        console: where to; None: stdout.
    """
    console = console or make_console()
    shared = [column for column in _TASK if len({str(row.get(column[1])) for row in rows}) == 1]
    varied = tuple(column for column in _TASK if column not in shared)
    console.print(make_table("Phases", _PHASE + varied + _PARAMETERS, rows))
    if shared:
        alike = ", ".join(f"{heading} {rows[0].get(key)}" for heading, key, _ in shared)
        print_line(console, f"all phases: {alike}", fold=True)
    console.print()
    console.print(make_table("Memory", _MEMORY, rows))
    for row in rows:
        if row.get("cache"):
            print_line(console, f"cache of {row['name']}: {row['cache']}")


def print_summary(phases: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print the results of the phases (the rows of summary.json); a column that nobody measured is left out."""
    columns = tuple(column for column in _SUMMARY if any(row.get(column[1]) is not None for row in phases))
    (console or make_console()).print(make_table("Summary", columns, phases))
