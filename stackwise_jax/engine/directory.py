"""The run directory: made once, never overwritten, continued only by the configuration and plan that made it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from stackwise_jax.checkpoint import Progress, Store, by_first_process, writing
from stackwise_jax.config import StackWiseConfig, differing_keys, resolved_yaml
from stackwise_jax.config.paths import check_place
from stackwise_jax.engine.description import (
    PATHS,
    check_files,
    check_plan,
    check_record,
    read_config,
    read_rack,
    read_rows,
    recorded_config,
    value_at,
    with_places,
    write_description,
)
from stackwise_jax.engine.entries import (
    CACHE,
    CHECKPOINTS,
    CONFIG,
    FIXED,
    METRICS,
    NEXT_CONFIG,
    OFFLOAD,
    RACK,
    SUMMARY,
    TENSORBOARD,
    TOKENIZER,
    digest_of,
    digests,
    read,
    write,
)
from stackwise_jax.engine.executor import streams
from stackwise_jax.engine.saved_shapes import check_shapes
from stackwise_jax.errors import UsageError
from stackwise_jax.memory.spill import check_scratch
from stackwise_jax.model import Rack, rack_to_dict

if TYPE_CHECKING:
    from stackwise_jax.engine.setup import Setup

# Keys that say where, on what and how visibly a run is computed, and not what it computes. A number may differ by
# rounding where another device or implementation computes it.
FREE_KEYS = frozenset(
    {
        "run.resume",
        "run.dir",
        "run.name",
        "run.keep",
        "run.keep_depths",
        "run.save_every",
        "run.max_bad_steps",
        "run.tensorboard",
        "run.sample_tokens",
        "run.sample_prompt",
        "model.attention_implementation",
        "model.remat",
        "cache.dir",
        "cache.read_ahead",
        "memory.offload",  # but within a phase, see _check_offload
        "memory.offload_to",
        "memory.stack_inputs",
        "memory.device",
        "memory.host",
        "memory.disk",
        "memory.check",
        "mesh.data",
        "mesh.fsdp",
        "mesh.coordinator",
        "mesh.process_id",
        "mesh.num_processes",
    }
)
TEXT_FORMAT = "bos text eos"  # of a document; records of version 0.1 do not say, and had no eos
# Under cache.kind auto the budgets decide whether tokens are met again, otherwise only where the activations lie.
BUDGETS = frozenset({"cache.host_budget", "cache.disk_budget"})
FREE_IN_RACK = ("attention_implementation", "remat")


def is_finished(run_dir: Path) -> bool:
    """Whether a run was trained to its end here."""
    progress = Store(run_dir / CHECKPOINTS).latest()
    return progress is not None and progress.finished


def check_directory(setup: Setup) -> bool:
    """Whether a run of this configuration was begun here. Nothing is written.

    Raises:
        UsageError: the directory holds a run of another configuration, plan or rack, what is left of a run, or
            something else, or run.resume forbids.
        RunError: a file of the run was changed.
    """
    run_dir, config = setup.run_dir, setup.config
    if not run_dir.exists():
        check_place(run_dir, "run.dir")
        return False
    if not run_dir.is_dir():
        raise UsageError(f"run.dir {run_dir} is a file; name a directory")
    progress = check_files(run_dir)
    if not (run_dir / CONFIG).exists():
        if progress is not None:
            raise UsageError(f"{run_dir / CONFIG} is missing; restore it from a copy, or name another run.dir")
        if strange := sorted(entry.name for entry in run_dir.iterdir() if not _laid_down(entry)):
            names = ", ".join(strange[:3])
            raise UsageError(f"run.dir {run_dir} holds files that are no run ({names}); name another run.dir")
        return False
    if config.run.resume == "never":
        raise UsageError(
            f"run.dir {run_dir} holds a run and run.resume is never; name another run.dir or run.resume auto"
        )
    if progress is None and (left := [name for name in (METRICS, SUMMARY) if _size(run_dir / name)]):
        raise UsageError(
            f"run.dir {run_dir} holds the {' and '.join(left)} of a run and no checkpoint; restore {CHECKPOINTS}/ from "
            "a copy, or name another run.dir"
        )
    _check_configuration(run_dir, config)
    if _meaning(read_rack(run_dir)) != _meaning(setup.rack):
        raise UsageError(f"the rack is not that of {run_dir / RACK}; give the same one, or name another run.dir")
    check_plan(run_dir, read_rows(run_dir), setup.plan)
    if progress is not None:
        check_record(run_dir, progress, setup.plan)
        _check_offload(setup, progress)
        _check_metrics(run_dir, progress)
    return True


def _laid_down(entry: Path) -> bool:
    """Whether a start that was killed before config.yaml was written may have left this."""
    if entry.name in (CACHE, OFFLOAD, TENSORBOARD):
        return not any(entry.iterdir())
    if entry.name == CHECKPOINTS:  # the lock comes before config.yaml, items come after
        left = {path.name for path in entry.iterdir()}
        return left <= {".lock", "progress"} and not any((entry / "progress").glob("*"))
    if entry.name == METRICS:
        return not _size(entry)
    return entry.name == TOKENIZER or entry.name.removesuffix(".tmp") in FIXED


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_configuration(run_dir: Path, config: StackWiseConfig) -> None:
    before = read_config(run_dir)
    free = FREE_KEYS | {"model.kernel.bandwidth"}  # null stands for a number, and the racks have it
    kinds = {before.cache.kind, config.cache.kind}
    free |= BUDGETS if "auto" not in kinds else set()
    free |= {"cache.kind"} if kinds == {"host", "disk"} else set()
    free |= {key for key in PATHS if value_at(before, key) is not None and value_at(config, key) is not None}
    if keys := [key for key in differing_keys(before, config) if key not in free]:
        raise UsageError(
            f"run.dir {run_dir} was made with another configuration: {', '.join(keys)} differ; "
            "give the same values to continue it, or name another run.dir"
        )


def _meaning(rack: Rack) -> Any:
    """The rack as plain data without what only says how it is computed."""

    def without(data: Any) -> Any:
        if isinstance(data, dict):
            return {name: without(value) for name, value in data.items() if name not in FREE_IN_RACK}
        return [without(entry) for entry in data] if isinstance(data, list) else data

    return without(json.loads(json.dumps(rack_to_dict(rack))))


def _check_offload(setup: Setup, progress: Progress) -> None:
    """Optimizer state that was saved within a phase is that of one executor."""
    if not progress.step:
        return
    phase, before = setup.plan.phases[progress.phase], read_config(setup.run_dir).memory
    now = setup.config.memory
    if streams(before, phase) != streams(now, phase):
        raise UsageError(
            f"memory.offload is {now.offload} and the newest checkpoint of {setup.run_dir} lies inside phase "
            f"'{phase.name}', which was begun with {before.offload}; write {before.offload} until the phase has ended"
        )


def _check_metrics(run_dir: Path, progress: Progress) -> None:
    present = _size(run_dir / METRICS)
    if present < progress.metrics_bytes:
        state = f"has {present} of {progress.metrics_bytes} bytes" if present else "is missing"
        raise UsageError(
            f"{run_dir / METRICS} {state}, so the run cannot go on in it; restore it from a copy, or start from the "
            f"weights in another run.dir with run.init_from {run_dir}"
        )


def fingerprints(setup: Setup) -> dict[str, str]:
    """Of what a run must find again as it was: its text and its tokenizer, and adapters that it has yet to take."""
    found = {
        "text_format": TEXT_FORMAT,
        "fingerprint": setup.train.fingerprint,
        "held_out": setup.valid.fingerprint,
        "tokenizer": setup.tokenizer.fingerprint,
    }
    return found if setup.adapters is None else found | {"adapters": setup.adapters.fingerprint}


def check_unchanged(run_dir: Path, progress: Progress, found: dict[str, str]) -> None:
    """Compare what was found (all of `fingerprints` or a part) with what the run was begun with.

    Raises:
        UsageError: the text, the tokenizer or the run that adapters come from has changed since.
    """
    if found["tokenizer"] != progress.data.get("tokenizer"):
        raise UsageError(
            f"the tokenizer in {run_dir / TOKENIZER} is not the one that the checkpoints of {run_dir} were trained "
            "with; restore that folder from a copy, or train in another run.dir"
        )
    texts = {"fingerprint": ("training", "data.path"), "held_out": ("held-out", "data.valid_path or data.path")}
    if found.keys() & texts.keys() and progress.data.get("text_format") != TEXT_FORMAT:
        raise UsageError(
            f"{run_dir} was begun by version 0.1 of this program, whose documents had no end token, so it cannot go on "
            "or be evaluated on its own text here; evaluate on a file with --data.path, or train in another run.dir "
            f"from its weights (run.init_from {run_dir})"
        )
    for name, (what, key) in texts.items():
        if name in found and found[name] != progress.data.get(name):
            raise UsageError(
                f"the {what} text is not the one that {run_dir} was begun with; restore {key} (or data.source), "
                "evaluate on a file with --data.path, or name another run.dir"
            )
    recorded = progress.data.get("adapters", "")
    if recorded and found.get("adapters", recorded) != recorded:
        raise UsageError(
            f"curriculum.adapters.load_from is not the run, or not the state of it, that {run_dir} was begun with; "
            "name that one, or another run.dir"
        )


def open_store(setup: Setup) -> Store:
    """The checkpoints of a run directory that is made if need be, fits the setup, and is locked. All processes call it.

    A second run is refused before it writes anything.

    Raises:
        UsageError: as `check_directory`, or the text or the tokenizer has changed.
        RunError: another run is writing here, or a file of the run was changed or does not fit the others.
    """
    store = Store(setup.run_dir / CHECKPOINTS, keep=setup.config.run.keep)
    by_first_process(lambda: check_directory(setup))  # before the lock, which is a file in it
    cache = setup.config.cache
    if cache.dir is not None and cache.kind != "recompute" and not is_finished(setup.run_dir):
        check_scratch(cache.dir)  # now, and not when the first phase with a frozen prefix begins
    store.lock()

    def lay_down() -> None:
        if not check_directory(setup) or store.latest() is None:  # where nothing was saved yet, all is written again
            create_directory(setup)

    try:
        by_first_process(lay_down)
        if progress := store.latest():
            check_unchanged(setup.run_dir, progress, fingerprints(setup))
            check_shapes(store, setup.rack, progress.versions)
            take_places(setup, store, progress)
    except BaseException:
        store.close()
        raise
    return store


def take_places(setup: Setup, store: Store, progress: Progress) -> None:
    """Write down where things lie now, where that is not what config.yaml says. All processes call it.

    Records have the digest of config.yaml, so one that accepts it as it is and as it is about to be goes before, and
    one that has only the new digest follows: after a kill at any moment the run can be opened.

    Raises:
        RunError: the disk does not take it.
    """
    path = setup.run_dir / CONFIG
    before = read_config(setup.run_dir)
    after = with_places(before, setup.config)
    if not _as_first_process(after != before or NEXT_CONFIG in progress.digests):
        return
    content = read(path) if after == before else resolved_yaml(after).encode()
    there = (progress.digests or digests(setup.run_dir)) | {CONFIG: digest_of(read(path))}
    both = there | {NEXT_CONFIG: digest_of(content)}
    store.commit(dataclasses.replace(progress, number=progress.number + 1, digests=both))
    by_first_process(lambda: write(path, content.decode()))
    final = {name: both[NEXT_CONFIG if name == CONFIG else name] for name in both if name != NEXT_CONFIG}
    store.commit(dataclasses.replace(progress, number=progress.number + 2, digests=final))


def _as_first_process(answer: bool) -> bool:
    """The answer of process 0, for all."""
    return answer if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))


def create_directory(setup: Setup) -> None:
    """Lay down what does not change during a run; config.yaml comes last and marks the directory as a run."""
    run_dir, config = setup.run_dir, recorded_config(setup.config)
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    setup.tokenizer.save(run_dir / TOKENIZER)
    write_description(run_dir, setup.plan, setup.rack, config)
