"""The run directory: made once, never overwritten, continued only by the configuration that made it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from stackwise_jax.checkpoint import Progress, writing
from stackwise_jax.config import StackWiseConfig, differing_keys, load_config, resolved_yaml
from stackwise_jax.curriculum import Plan, phase_table
from stackwise_jax.data import Tokenizer
from stackwise_jax.errors import UsageError

CONFIG, PHASES, METRICS, SUMMARY = "config.yaml", "phases.json", "metrics.jsonl", "summary.json"
TOKENIZER, CHECKPOINTS, TENSORBOARD, CACHE = "tokenizer", "checkpoints", "tensorboard", "cache"
# Keys that say where and how a run is continued, not what it computes.
FREE_KEYS = frozenset(
    {"run.resume", "run.dir", "run.name", "mesh.coordinator", "mesh.process_id", "mesh.num_processes"}
)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is either there whole or not at all. Raises RunError when the disk does not take it."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def check_directory(run_dir: Path, config: StackWiseConfig) -> bool:
    """Whether a run of this configuration was begun here.

    Raises:
        UsageError: the directory holds a run of another configuration or something else, or run.resume forbids.
    """
    if not run_dir.exists():
        return False
    if not run_dir.is_dir():
        raise UsageError(f"run.dir {run_dir} is a file; name a directory")
    if not (run_dir / CONFIG).exists():
        strange = {entry.name for entry in run_dir.iterdir()} - {TOKENIZER, PHASES, PHASES + ".tmp", CONFIG + ".tmp"}
        if strange:
            names = ", ".join(sorted(strange)[:3])
            raise UsageError(f"run.dir {run_dir} holds files that are no run ({names}); name another run.dir")
        return False
    if config.run.resume == "never":
        raise UsageError(
            f"run.dir {run_dir} holds a run and run.resume is never; name another run.dir or run.resume auto"
        )
    before = load_config(str(run_dir / CONFIG))
    if keys := [key for key in differing_keys(before, config) if key not in FREE_KEYS]:
        raise UsageError(
            f"run.dir {run_dir} was made with another configuration: {', '.join(keys)} differ; "
            "give the same values to continue it, or name another run.dir"
        )
    return True


def check_tokenizer(run_dir: Path, progress: Progress, tokenizer: Tokenizer) -> None:
    """Raises UsageError unless the tokenizer is the one whose ids the saved weights know."""
    if progress.data["tokenizer"] != tokenizer.fingerprint:
        raise UsageError(
            f"the tokenizer in {run_dir / TOKENIZER} is not the one that the checkpoints of {run_dir} were trained "
            "with; restore that folder from a copy, or train in another run.dir"
        )


def create_directory(run_dir: Path, config: StackWiseConfig, plan: Plan, tokenizer: Tokenizer) -> None:
    """Lay down what does not change during a run; config.yaml comes last and marks the directory as a run."""
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(run_dir / TOKENIZER)
    write_atomically(run_dir / PHASES, json.dumps(phase_table(plan), indent=2) + "\n")
    write_atomically(run_dir / CONFIG, resolved_yaml(config))
