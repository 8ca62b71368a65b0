"""Kills runs with SIGKILL at random moments, lets them go on, and compares their end with that of a run never killed.

Metrics, every array of the last record and all of the summary but its clocks have to be equal, bit by bit. Each plan
keeps other things between its steps: an activation cache, adapters over weights in 4 bits, optimizer state on disk with
checkpoints inside the phases, denoisers that were trained apart.

    python experiments/trust/kills.py --json

Exits with 1 where a run differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from small_run import SMALL

from stackwise_jax.checkpoint import Store
from stackwise_jax.memory.hashing import named_leaves

TINY = SMALL | {
    "model.architecture.n_stacks": 3,
    "curriculum.steps": 12,
    "optimizer.lr": 0.01,
    "run.save_every": 3,
    "run.eval_every": 4,
    "run.log_every": 1,
    "run.tensorboard": "false",
}
PLANS: dict[str, dict[str, Any]] = {
    "stackwise, cached": {"curriculum.plan": "stackwise", "cache.kind": "host", "model.dropout": 0.1},
    "append, adapters over nf4": {
        "curriculum.plan": "append",
        "curriculum.trunk": "adapt",
        "curriculum.frozen": "nf4",
        "curriculum.adapters.merge": "true",
        "memory.finished": "frozen",
    },
    "rackwise, streamed from disk": {
        "curriculum.plan": "rackwise",
        "curriculum.steps": 30,
        "memory.offload": "all",
        "memory.offload_to": "disk",
        "memory.stack_inputs": "host",
    },
    "independent": {"curriculum.plan": "independent", "objective.kind": "diffusion", "objective.noise": "elbo"},
}
CLOCKS = {"run", "seconds", "peak_device_bytes", "peak_host_bytes"}


def start(changes: dict[str, Any], run_dir: Path, compiled: Path) -> subprocess.Popen[str]:
    """Start `train` with compiled programs that all processes of this script share."""
    line = [f"--{key}={value}" for key, value in (TINY | changes | {"run.dir": run_dir}).items()]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of the time
    }
    command = [sys.executable, "-m", "stackwise_jax.train", *line]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str | None:
    """Wait for the end; what a process that failed said."""
    _, error = process.communicate(timeout=600)
    return None if process.returncode == 0 else error.strip()


def kill_after(process: subprocess.Popen[str], seconds: float) -> bool:
    """Kill the process so long after now; False where it ended before."""
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True


def arrays(run_dir: Path) -> dict[str, np.ndarray]:
    """Every array that the last record names, by item and leaf."""
    store = Store(run_dir / "checkpoints")
    last = store.latest()
    if last is None or not last.finished:
        return {}
    trees = {name: store.load_item(name, version) for name, version in last.versions.items()}
    return {f"{name}/{leaf}": array for name, tree in trees.items() for leaf, array in named_leaves(tree).items()}


def summary(run_dir: Path) -> Any:
    """summary.json without what a clock or the machine says."""

    def without(data: Any) -> Any:
        if isinstance(data, dict):
            return {key: without(value) for key, value in data.items() if key not in CLOCKS}
        return [without(entry) for entry in data] if isinstance(data, list) else data

    return without(json.loads((run_dir / "summary.json").read_text()))


def differences(run_dir: Path, whole: Path) -> list[str]:
    """What of a run is not as in the run that was never killed."""
    found = []
    if (run_dir / "metrics.jsonl").read_bytes() != (whole / "metrics.jsonl").read_bytes():
        found.append("metrics.jsonl")
    if summary(run_dir) != summary(whole):
        found.append("summary.json")
    ours, theirs = arrays(run_dir), arrays(whole)
    if not theirs or ours.keys() != theirs.keys():
        return [*found, "the items of the last record"]
    same = lambda a, b: a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return found + [name for name, array in theirs.items() if not same(ours[name], array)]


def try_plan(name: str, n_kills: int, draw: random.Random, folder: Path, compiled: Path) -> dict[str, Any]:
    """Kill runs of a plan so often in all; each goes on until it is killed again or has ended, and is then compared."""
    changes, whole = PLANS[name], folder / "whole"
    finish(start(changes, folder / "first", compiled))  # compiles
    begun = time.monotonic()
    if said := finish(start(changes, whole, compiled)):
        return {"plan": name, "kills": 0, "runs": 0, "differences": [said]}
    seconds, kills, runs, found = time.monotonic() - begun, 0, 0, []
    while kills < n_kills:
        runs += 1
        run_dir, killed = folder / f"run {runs}", True
        while killed and kills < n_kills:
            process = start(changes, run_dir, compiled)
            killed = kill_after(process, draw.uniform(0.2, 1.0) * seconds)
            kills += killed
            if not killed and process.returncode:
                found.append(finish(process))
        if said := finish(start(changes, run_dir, compiled)):
            found.append(said)
        else:
            found += differences(run_dir, whole)
    return {"plan": name, "kills": kills, "runs": runs, "differences": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="over all plans")
    parser.add_argument("--plans", nargs="*", choices=[*PLANS], default=[*PLANS], metavar="NAME", help="only these")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        for i, name in enumerate(args.plans):
            n = args.kills // len(args.plans) + (i < args.kills % len(args.plans))
            draw, folder = random.Random(f"{args.seed} {name}"), Path(scratch, f"plan{i}")
            rows.append(try_plan(name, n, draw, folder, Path(scratch, "compiled")))
            row = rows[-1]
            said = "equal" if not row["differences"] else "; ".join(row["differences"])
            print(f"{name:30} {row['kills']:3} kills in {row['runs']:2} runs: {said}", flush=True)
    if args.json:
        print(json.dumps({"kills": sum(row["kills"] for row in rows), "plans": rows}))
    return int(any(row["differences"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
