"""Is every bad input answered with a sentence? Hundreds of command lines of all six commands, and what came of them.

    python experiments/trust/bad_inputs.py [--only TEXT] [--processes 30] [--json]

A tiny run is trained, odd files and damaged copies of the run are laid beside it (bad_files.py), and the cases
(bad_cases.py) are run inside a process per command (bad_worker.py), some of them as processes of their own too. A case
fails where there is a traceback, a sentence that nobody wrote (the name of an exception, and --debug), an exit code
other than 1 or 2, more than one line on stderr besides notes and warnings, a character that steers a terminal, more
than --seconds, or anything that was written, changed or removed. The exit code of the script is 1 when a case fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bad_cases import Case, all_cases
from bad_files import build, contents, snapshot
from rich.console import Console
from rich.table import Table
from rich.text import Text

HERE = Path(__file__).parent
UNFORESEEN = "run again with --debug for the traceback"
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def environment() -> dict[str, str]:
    """Of every process: this checkout, on the CPU."""
    paths = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}


class Workers:
    """A process per command, started again when it hangs or dies."""

    def __init__(self, cwd: Path, seconds: float):
        self._cwd, self._seconds = cwd, seconds
        self._running: dict[str, subprocess.Popen] = {}

    def run(self, command: str, argv: Sequence[str]) -> dict[str, Any]:
        """What came of a command line; see bad_worker.run."""
        worker = self._running.get(command) or self._start(command)
        assert worker.stdin and worker.stdout
        print(json.dumps(argv), file=worker.stdin, flush=True)
        ready, _, _ = select.select([worker.stdout], [], [], 2 * self._seconds + 40)  # the import is not timed
        line = worker.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        worker.kill()
        code = worker.wait()
        del self._running[command]
        return {"code": code, "seconds": 2 * self._seconds, "out": "", "err": "the process hung or died"}

    def _start(self, command: str) -> subprocess.Popen:
        line = [sys.executable, str(HERE / "bad_worker.py"), command, str(self._seconds)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._running[command] = subprocess.Popen(line, cwd=self._cwd, env=environment(), **pipes)
        return self._running[command]

    def close(self) -> None:
        """End them."""
        for worker in self._running.values():
            worker.communicate()


def as_process(command: str, argv: Sequence[str], cwd: Path, seconds: float) -> dict[str, Any]:
    """The same by a process of its own."""
    line = [sys.executable, "-m", f"stackwise_jax.{command}", *argv]
    begun = time.perf_counter()
    try:
        done = subprocess.run(line, cwd=cwd, env=environment(), capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"code": None, "seconds": seconds, "out": "", "err": "too long"}
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    return {"code": done.returncode, "seconds": time.perf_counter() - begun, "out": out, "err": err}


def faults(case: Case, result: dict[str, Any], before: dict, after: dict, seconds: float) -> list[str]:
    """What is wrong with how a case was answered."""
    said = result["err"] + result["out"]
    lines = [line for line in result["err"].splitlines() if not line.startswith(("note: ", "warning: "))]
    found = []
    if "Traceback (most recent call last)" in said:
        found.append("a traceback")
    if UNFORESEEN in said:
        found.append("an unforeseen error")
    if result["code"] not in ((0, 1, 2) if case.allowed else (1, 2)):
        found.append(f"exit code {result['code']}")
    if result["seconds"] > seconds:
        found.append(f"{result['seconds']:.0f} seconds")
    if result["code"] != 0 and len(lines) != 1:
        found.append(f"{len(lines)} lines on stderr")
    if STEERING.search(said):
        found.append("a control character")
    changed = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    if case.allowed and result["code"] == 0:  # it may write where it was asked to
        changed = [name for name in changed if Path(name).parent.name == "canary"]
    return found + [f"changed {name}" for name in changed[:1]]


def arguments_of(case: Case, folder: Path) -> list[str]:
    """The arguments with the places of this workshop; a YAML text becomes a file."""
    argv = list(case.argv)
    if case.yaml is not None:
        text = case.yaml if isinstance(case.yaml, bytes) else case.yaml.encode()
        path = folder.parent / "case.yaml"
        path.write_bytes(text.replace(b"@canary", os.fsencode(folder / "canary")))
        argv += ["--config", str(path)]
    for name in ("good", "files", "runs", "canary", "out", "absent"):
        argv = [part.replace(f"@{name}", str(folder / name)) for part in argv]
    return argv


def try_all(cases: Sequence[Case], folder: Path, processes: int, seconds: float) -> Iterator[dict[str, Any]]:
    """A row per case, and one more where it was a process of its own too, which has twice the time: it has to start."""
    workers, cwd, before = Workers(folder / "cwd", seconds), folder / "cwd", snapshot(folder)
    every = max(1, len(cases) // processes) if processes else 0
    for i, case in enumerate(cases):
        ways = [(case.command, workers.run, seconds)]
        if every and i % every == 0 and "\0" not in "".join(case.argv):
            ways.append((f"{case.command} *", partial(as_process, cwd=cwd, seconds=2 * seconds), 2 * seconds))
        for shown, run, limit in ways:
            argv = arguments_of(case, folder)
            result = run(case.command, argv)
            after = snapshot(folder)
            found = faults(case, result, before, after, limit)
            if before != after:
                restore(before, after)
                before = snapshot(folder)
            yield {"command": shown, "name": case.name, "argv": argv, "faults": found, **result}
    workers.close()


def restore(before: dict, after: dict) -> None:
    """Remove what a case left, so that the next one finds what it should. What was changed stays changed."""
    for name in sorted(after.keys() - before.keys()):
        path = Path(name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Each case that failed, then a line per command."""
    console, failed = Console(width=160), [row for row in rows if row["faults"]]
    for row in failed:
        said = (row["err"].strip().splitlines() or ["nothing on stderr"])[-1]
        console.print(Text(f"{row['command']}: {row['name']!a}: {', '.join(row['faults'])}\n    {said[:300]!a}"))
    table = Table(title="Bad inputs (*: as processes of their own)", title_justify="left")
    for heading in ("command", "cases", "failed", "slowest, s"):
        table.add_column(heading, justify="left" if heading == "command" else "right")
    for command in sorted({row["command"] for row in rows}):
        mine = [row for row in rows if row["command"] == command]
        slowest = max(row["seconds"] for row in mine)
        table.add_row(command, str(len(mine)), str(sum(bool(row["faults"]) for row in mine)), f"{slowest:.1f}")
    console.print(table)
    console.print(f"{len(rows)} inputs, {len(failed)} failed")


def main() -> int:
    """Run the script; 1 when a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with this in 'command name'")
    parser.add_argument("--processes", type=int, default=30, help="so many cases as processes of their own too")
    parser.add_argument("--seconds", type=float, default=20.0, help="that a case may take")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    args = parser.parse_args()
    cases = [case for case in all_cases() if args.only in f"{case.command} {case.name}"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "workshop"
        build(folder)
        kept = [folder / "good", folder / "canary"]
        before, rows = [*map(contents, kept)], []
        for row in try_all(cases, folder, args.processes, args.seconds):
            rows.append(row)
            if row["faults"]:
                print(f"{row['command']}: {row['name']!a}: {', '.join(row['faults'])}", file=sys.stderr, flush=True)
        changed = before != [*map(contents, kept)]
    show(rows)
    if changed:
        print("the content of a file changed")
    if args.json:
        print(json.dumps({"cases": len(rows), "failed": [row for row in rows if row["faults"]]}))
    return int(changed or any(row["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
