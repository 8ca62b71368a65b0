"""Do readers beside a trainer always succeed? `python experiments/trust/readers.py [--n 60] [--json]`

A trainer saves after every step and keeps one record, so that what a reader has looked up is soon removed; beside it
evaluate, generate and inspect run one after another on the same directory. Every one of them has to exit with 0.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from small_run import SMALL

RUN = SMALL | {
    "curriculum.steps": 1_000_000,
    "run.save_every": 1,
    "run.keep": 1,
    "run.tensorboard": "false",
}
COMMANDS = {
    "evaluate": ("--batches", "2"),
    "generate": ("--max_tokens", "8", "--prompt", "a"),
    "inspect": ("--norms",),
}


def main() -> int:
    """Run the readers and print what became of them; 0 when all succeeded while the trainer went on."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=60, help="readers in all")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "stackwise_jax.train", "--run.dir", str(run_dir)]
        with open(Path(folder) / "log", "w") as log:
            trainer = subprocess.Popen([*command, *(f"--{k}={v}" for k, v in RUN.items())], stdout=log, stderr=log)
        try:
            found = read_beside(trainer, run_dir, args.n)
        finally:
            trainer.send_signal(signal.SIGTERM)
            stopped = trainer.wait(120)
    good = all(code == 0 for _, code, _ in found) and stopped == 130
    show(found, good)
    if args.json:
        failed = [{"command": name, "exit_code": code, "said": said} for name, code, said in found if code]
        print(json.dumps({"readers": len(found), "failed": failed, "trainer_exit_code": stopped, "ok": good}))
    return 0 if good else 1


def read_beside(trainer: subprocess.Popen, run_dir: Path, n: int) -> list[tuple[str, int, str]]:
    """(command, exit code, what it said on stderr) of each reader."""
    deadline = time.monotonic() + 120
    while not list(run_dir.glob("checkpoints/progress/*.json")):
        if trainer.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the trainer did not begin")
        time.sleep(0.2)
    found = []
    for i in range(n):
        name = [*COMMANDS][i % len(COMMANDS)]
        line = [sys.executable, "-m", f"stackwise_jax.{name}", str(run_dir), *COMMANDS[name]]
        done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        if trainer.poll() is not None:
            raise SystemExit(f"the trainer ended beside reader {i}")
        found.append((name, done.returncode, done.stderr.strip()))
    return found


def show(found: list[tuple[str, int, str]], good: bool) -> None:
    """A row per command, then each failure with its sentence."""
    console, table = Console(), Table("command", "readers", "succeeded")
    total = collections.Counter(name for name, _, _ in found)
    succeeded = collections.Counter(name for name, code, _ in found if code == 0)
    for name in total:
        table.add_row(name, str(total[name]), str(succeeded[name]))
    console.print(table)
    for name, code, said in found:
        if code:
            console.print(f"{name}: exit code {code}: {said}", markup=False)
    console.print("every reader succeeded" if good else "not every reader succeeded")


if __name__ == "__main__":
    sys.exit(main())
