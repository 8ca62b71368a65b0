"""Runs of the commands as processes of their own, for tests that kill, resume or spread them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from stackwise_jax.checkpoint import Progress, Store

# A run of seconds: every kind of item, several checkpoints in each phase, held-out figures within and after it.
TINY = {
    "data.source": "synthetic",
    "data.synthetic_tokens": 2048,
    "data.seq_len": 16,
    "data.batch_size": 8,
    "model.d_model": 32,
    "model.n_heads": 2,
    "model.d_ff": 48,
    "model.architecture.n_stacks": 3,
    "model.architecture.blocks_per_stack": 1,
    "curriculum.steps": 12,
    "optimizer.lr": 0.01,
    "run.save_every": 3,
    "run.eval_every": 4,
    "run.eval_batches": 2,
    "run.log_every": 1,
    "run.keep": 2,
    "run.tensorboard": "false",
    "run.sample_tokens": 0,
}
SHORT = {"curriculum.steps": 4, "run.save_every": 2, "run.eval_every": 0}  # changes that make it shorter still


def arguments(changes: dict | None = None, **run_keys) -> list[str]:
    """The command-line arguments of the tiny run with other values for some keys; run_keys are keys of `run`."""
    keys = TINY | (changes or {}) | {f"run.{name}": value for name, value in run_keys.items()}
    return [f"--{key}={value}" for key, value in keys.items()]


def environment(devices: int = 1, compiled: Path | None = None) -> dict[str, str]:
    """The environment of a command on the CPU.

    Args:
        devices: CPU devices that the process is to see.
        compiled: a directory in which processes share compiled programs, which makes all but the first start quickly.
    """
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    if compiled is not None:
        env |= {
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    return env


def start(command: str, *argv: str, env: dict[str, str] | None = None) -> subprocess.Popen:
    """Start `python -m stackwise_jax.<command>`; its output is read by `communicate`."""
    line = [sys.executable, "-m", f"stackwise_jax.{command}", *argv]
    return subprocess.Popen(
        line, env=env or environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )


def finish(process: subprocess.Popen, code: int = 0, timeout: float = 300) -> tuple[str, str]:
    """Wait for the end, which must be with this exit code; returns (stdout, stderr)."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"no end after {timeout} s\n{out}\n{err}") from None
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    assert "Traceback" not in err
    return out, err


def rows(run_dir: Path) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def progress(run_dir: Path) -> Progress | None:
    """The newest record of a run."""
    return Store(run_dir / "checkpoints").latest()


def final_arrays(run_dir: Path) -> dict[str, np.ndarray]:
    """Every array of every item that the newest record names, by item and leaf."""
    from stackwise_jax.memory.hashing import named_leaves

    store, last = Store(run_dir / "checkpoints"), progress(run_dir)
    assert last is not None and last.finished
    loaded = {name: store.load_item(name, version) for name, version in last.versions.items()}
    return {f"{name}/{leaf}": array for name, tree in loaded.items() for leaf, array in named_leaves(tree).items()}


def assert_same_end(run_dir: Path, reference: Path) -> None:
    """Bitwise the same parameters of all items, the same metrics to the byte, the same figures of the phases."""
    ours, theirs = final_arrays(run_dir), final_arrays(reference)
    assert ours.keys() == theirs.keys() and len(ours) > 5
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype and ours[name].tobytes() == array.tobytes(), name
    assert (run_dir / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
    summaries = [json.loads((path / "summary.json").read_text()) for path in (run_dir, reference)]
    told = ("name", "held_out_loss", "bits_per_byte", "tokens", "trainable_params", "skipped_steps")
    ours, theirs = ([{k: phase[k] for k in told} for phase in summary["phases"]] for summary in summaries)
    assert ours == theirs


def content(directory: Path) -> dict[str, bytes]:
    """All files in a directory, by path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class Said:
    """The outcome of a command."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    @property
    def answer(self) -> dict:
        return json.loads(self.out.splitlines()[-1])

    def refuses(self, code: int, *parts: str) -> None:
        """One sentence on stderr with these parts, after notes on keys without effect, and this exit code."""
        assert self.code == code, self.err
        said = [line for line in self.err.splitlines() if not line.startswith("note: ")]
        assert len(said) == 1 and said[0].startswith("error: "), self.err
        assert "--debug" not in self.err, "an error that nobody thought of"
        for part in parts:
            assert part in self.err
