"""The run directory: made once, never overwritten, continued only by the configuration that made it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from stackwise_jax.checkpoint import Progress, Store, writing
from stackwise_jax.config import StackWiseConfig, differing_keys, load_config, resolved_yaml
from stackwise_jax.curriculum import phase_table
from stackwise_jax.errors import UsageError
from stackwise_jax.model import Rack, rack_from_dict, rack_to_dict

if TYPE_CHECKING:
    from stackwise_jax.engine.setup import Setup

RACK = "rack.json"
CONFIG, PHASES, METRICS, SUMMARY = "config.yaml", "phases.json", "metrics.jsonl", "summary.json"
TOKENIZER, CHECKPOINTS, TENSORBOARD, CACHE = "tokenizer", "checkpoints", "tensorboard", "cache"
OFFLOAD = "offload"  # where scratch files of memory.offload_to disk are opened
# Keys that say where and how a run is continued, not what it computes.
FREE_KEYS = frozenset(
    {
        "run.resume",
        "run.dir",
        "run.name",
        "run.keep",
        "run.keep_depths",
        "run.save_every",
        "run.tensorboard",
        "cache.dir",
        "cache.read_ahead",
        "memory.offload_to",
        "memory.stack_inputs",
        "memory.device",
        "memory.host",
        "memory.disk",
        "memory.check",
        "mesh.coordinator",
        "mesh.process_id",
        "mesh.num_processes",
    }
)
# Under cache.kind auto the budgets decide whether tokens are met again, otherwise only where the activations lie.
BUDGETS = frozenset({"cache.host_budget", "cache.disk_budget"})


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is either there whole or not at all. Raises RunError when the disk does not take it."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def check_directory(setup: Setup) -> bool:
    """Whether a run of this configuration was begun here.

    Raises:
        UsageError: the directory holds a run of another configuration or rack or something else, or run.resume forbids.
    """
    run_dir, config = setup.run_dir, setup.config
    if not run_dir.exists():
        return False
    if not run_dir.is_dir():
        raise UsageError(f"run.dir {run_dir} is a file; name a directory")
    if not (run_dir / CONFIG).exists():
        begun = {TOKENIZER, *(name + end for name in (PHASES, RACK, CONFIG) for end in ("", ".tmp"))}
        if strange := {entry.name for entry in run_dir.iterdir()} - begun:
            names = ", ".join(sorted(strange)[:3])
            raise UsageError(f"run.dir {run_dir} holds files that are no run ({names}); name another run.dir")
        return False
    if config.run.resume == "never":
        raise UsageError(
            f"run.dir {run_dir} holds a run and run.resume is never; name another run.dir or run.resume auto"
        )
    before = read_config(run_dir)
    free = FREE_KEYS | {"model.kernel.bandwidth"}  # null stands for a number, and the racks have it
    free |= BUDGETS if "auto" not in (before.cache.kind, config.cache.kind) else set()
    if keys := [key for key in differing_keys(before, config) if key not in free]:
        raise UsageError(
            f"run.dir {run_dir} was made with another configuration: {', '.join(keys)} differ; "
            "give the same values to continue it, or name another run.dir"
        )
    if read_rack(run_dir) != setup.rack:
        raise UsageError(f"the rack is not that of {run_dir / RACK}; give the same one, or name another run.dir")
    return True


def is_finished(run_dir: Path) -> bool:
    """Whether a run was trained to its end here."""
    progress = Store(run_dir / CHECKPOINTS).latest()
    return progress is not None and progress.finished


def read_config(run_dir: Path) -> StackWiseConfig:
    """The configuration of a run.

    Raises:
        UsageError: there is none, or the file was cut: a run writes down every section.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        raise UsageError(f"{run_dir} is no run directory (it has no {CONFIG}); name the directory that train printed")
    config = load_config(path)
    present = path.read_text(encoding="utf-8").splitlines()
    if missing := [section for section in config.to_dict() if f"{section}:" not in present]:
        raise UsageError(f"{path} is damaged (section {missing[0]} is missing); restore it from a copy")
    return config


def read_rack(run_dir: Path) -> Rack:
    """The rack of a run, also one that was built by hand.

    Raises:
        UsageError: the file is missing or does not describe a rack.
    """
    try:
        return rack_from_dict(json.loads((run_dir / RACK).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{run_dir / RACK} does not describe a rack ({error}); restore it from a copy") from error


def fingerprints(setup: Setup) -> dict[str, str]:
    """Of what a run must find again as it was: its text and its tokenizer."""
    return {
        "fingerprint": setup.train.fingerprint,
        "held_out": setup.valid.fingerprint,
        "tokenizer": setup.tokenizer.fingerprint,
    }


def check_unchanged(run_dir: Path, progress: Progress, found: dict[str, str]) -> None:
    """Compare what was found (all of `fingerprints` or a part) with what the run was begun with.

    Raises:
        UsageError: the text or the tokenizer has changed since.
    """
    if found["tokenizer"] != progress.data["tokenizer"]:
        raise UsageError(
            f"the tokenizer in {run_dir / TOKENIZER} is not the one that the checkpoints of {run_dir} were trained "
            "with; restore that folder from a copy, or train in another run.dir"
        )
    texts = {"fingerprint": ("training", "data.path"), "held_out": ("held-out", "data.valid_path or data.path")}
    for name, (what, key) in texts.items():
        if name in found and found[name] != progress.data[name]:
            raise UsageError(
                f"the {what} text is not the one that {run_dir} was begun with; restore {key} (or data.source), "
                "evaluate on a file with --data.path, or name another run.dir"
            )


def create_directory(setup: Setup) -> None:
    """Lay down what does not change during a run; config.yaml comes last and marks the directory as a run."""
    run_dir = setup.run_dir
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    setup.tokenizer.save(run_dir / TOKENIZER)
    write_atomically(run_dir / PHASES, json.dumps(phase_table(setup.plan), indent=2) + "\n")
    write_atomically(run_dir / RACK, json.dumps(rack_to_dict(setup.rack), indent=2) + "\n")
    write_atomically(run_dir / CONFIG, resolved_yaml(setup.config))
