"""A whole curriculum in the time given: trains, stops softly when the time is up, and says how far it has come.

    python experiments/h200/curriculum.py --config FILE --dir RUN --seconds N [--set KEY=VALUE ..]

The same command goes on where the last one stopped, also if that one was killed. The last line is one JSON object:
phases done, held-out loss at the first stack, at a quarter, at half and at full depth, the peaks of device and host
memory of all phases and of this command, and whether they are within the goals. Exit code 0: trained to the end; 3:
stopped before, go on.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stackwise_jax.checkpoint import Progress, Store
from stackwise_jax.config import load_config
from stackwise_jax.engine.directory import CHECKPOINTS
from stackwise_jax.memory.devices import available_host_bytes

GOALS = {"peak_device_bytes": 35e9, "peak_host_bytes": 100 * 2**30}
NOT_FINISHED = 3


def train(command: list[str], seconds: float, grace: float) -> tuple[int, int]:
    """Run the training; after `seconds` ask it to save and stop, after `grace` more end it.

    Returns:
        Its exit code, and by how many bytes the memory that the machine had to give sank at most: pinned memory, too,
        which the resident size of a process may leave out.
    """
    before = lowest = available_host_bytes() or 0
    start, asked = time.monotonic(), False
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        while process.poll() is None:
            lowest = min(lowest, available_host_bytes() or 0)
            passed = time.monotonic() - start
            if passed > seconds and not asked:
                process.send_signal(signal.SIGINT)
                asked = True
            if passed > seconds + grace:
                process.kill()  # the last record holds
            time.sleep(0.2)
        return process.wait(), before - lowest


def summary(progress: Progress, n_phases: int, folder: Path) -> dict[str, Any]:
    """What the phases that have ended say; peak_host_bytes is the resident size of the process."""
    results = progress.results
    by_depth = {result["depth"]: result["held_out_loss"] for result in results}
    wanted = sorted({1, n_phases // 4, n_phases // 2, n_phases} - {0})
    peaks = {name: max((result[name] or 0 for result in results), default=0) for name in GOALS}
    return {
        "finished": progress.finished,
        "phases_done": len(results),
        "phases": n_phases,
        "step_of_next_phase": progress.step,
        "held_out_loss": {str(depth): by_depth[depth] for depth in wanted if depth in by_depth},
        "tokens": sum(result["tokens"] for result in results),
        "train_seconds": sum(result["seconds"] for result in results),
        "flops": sum(result["flops"] for result in results),
        **peaks,
        "disk_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "within_goals": {name: peaks[name] < goal for name, goal in GOALS.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="a file")
    parser.add_argument("--dir", required=True, type=Path, help="the run directory")
    parser.add_argument("--seconds", type=float, required=True, help="for all of this command")
    parser.add_argument("--grace", type=float, default=60, help="of these, to save and stop")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a configuration key")
    args = parser.parse_args(argv)
    start = time.monotonic()
    overrides = [f"--{change}" for change in args.set] + [f"--run.dir={args.dir}"]
    config = load_config(args.config, overrides)
    command = [sys.executable, "-m", "stackwise_jax.train", "--config", args.config, *overrides]
    rc, taken = train(command, max(args.seconds - args.grace, 1), args.grace)
    progress = Store(args.dir / CHECKPOINTS).latest() if (args.dir / CHECKPOINTS).is_dir() else None
    if progress is None:
        print(json.dumps({"finished": False, "phases_done": 0, "train_rc": rc}))
        return NOT_FINISHED
    result = summary(progress, config.model.architecture.n_stacks, args.dir)
    result |= {"host_bytes_taken": taken, "train_rc": rc, "command_seconds": time.monotonic() - start}
    print(json.dumps(result))
    return 0 if progress.finished and rc == 0 else NOT_FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
