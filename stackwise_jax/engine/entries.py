"""What lies in a run directory under which name, and the checks that come before anything of it is used.

A run directory may be somebody else's. A link in it could lead a reader or a writer elsewhere, a pipe would never end,
and a file that was changed would give other results than the run had.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stackwise_jax import files
from stackwise_jax.checkpoint import writing
from stackwise_jax.errors import RunError, UsageError

CONFIG, RACK, PHASES, METRICS, SUMMARY = "config.yaml", "rack.json", "phases.json", "metrics.jsonl", "summary.json"
TOKENIZER, CHECKPOINTS, TENSORBOARD, CACHE = "tokenizer", "checkpoints", "tensorboard", "cache"
PROGRESS = "progress"  # in CHECKPOINTS
OFFLOAD = "offload"  # where scratch files of memory.offload_to disk are opened
FIXED = (PHASES, RACK, CONFIG)  # written when the run begins, config.yaml last; see directory.take_places on that one
NEXT_CONFIG = "config.yaml.next"  # in the digests of a record: config.yaml may also be as it is about to be written
TOKENIZER_FILES = (f"{TOKENIZER}/tokenizer.json", f"{TOKENIZER}/tokenizer.model")
FOLDERS = (TOKENIZER, CHECKPOINTS, TENSORBOARD, CACHE, OFFLOAD)
_FILES = (*FIXED, METRICS, SUMMARY, *TOKENIZER_FILES)


def check_entries(run_dir: Path) -> None:
    """Refuse a run directory in which a name that a run uses is something else: a link, a pipe, a file for a folder.

    Also a record that is a link: it would be passed over as damaged, and an older state be taken for the newest.

    The directory itself may be a link.

    Raises:
        UsageError: the first such entry.
    """
    wanted = {name: "folder" for name in FOLDERS}
    wanted |= {name + end: "file" for name in _FILES for end in ("", ".tmp")}
    for name, kind in wanted.items():  # folders first, so that no link is followed to a file in one
        path = run_dir / name
        try:
            mode = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UsageError(f"{path} cannot be looked at ({error.strerror}); check the rights of the folder") from None
        if stat.S_ISLNK(mode):
            raise _link(path, kind)
        if not (stat.S_ISDIR(mode) if kind == "folder" else stat.S_ISREG(mode)):
            raise UsageError(f"{path} is no regular {kind}; restore it from a copy")
    for path in (run_dir / CHECKPOINTS / PROGRESS).glob("*.json"):
        if path.is_symlink():
            raise _link(path, "file")


def _link(path: Path, kind: str) -> UsageError:
    return UsageError(f"{path} is a symbolic link; put the {kind} itself there, a run follows no links inside it")


def check_is_run(run_dir: Path) -> None:
    """Refuse what is no run directory.

    Raises:
        UsageError: it has no config.yaml, which is written last when a run begins.
    """
    if not os.path.lexists(run_dir / CONFIG):  # what it is, `check_entries` looks at
        raise UsageError(f"{run_dir} is no run directory (it has no {CONFIG}); name the directory that train printed")


def read(path: Path) -> bytes:
    """A small file of a run.

    Raises:
        RunError: it is missing, is a link or a pipe, is too large, or cannot be read.
    """
    try:
        return files.read_regular(path, follow=False)
    except FileNotFoundError:
        raise RunError(f"{path} is missing; restore it from a copy") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); restore it from a copy") from None


def read_json(path: Path) -> Any:
    """The content of a small JSON file of a run. Raises RunError as `read`, or when it is no JSON."""
    try:
        return json.loads(read(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is no JSON ({str(error)[:200]}); restore it from a copy") from None


def write(path: Path, text: str) -> None:
    """Write a small file of a run, whole or not at all. Raises RunError when the disk does not take it."""
    with writing(path):
        files.write_atomically(path, text)


def digests(run_dir: Path) -> dict[str, str]:
    """The sha256 of each file that does not change while a run trains, by its name in the directory."""
    present = [name for name in TOKENIZER_FILES if (run_dir / name).exists()]
    return {name: digest_of(read(run_dir / name)) for name in (*FIXED, *present)}


def check_digests(run_dir: Path, recorded: Mapping[str, str]) -> None:
    """Compare the files of a run with the digests in its record. A record of version 0.1 has none.

    Raises:
        RunError: the first file that is missing or differs.
    """
    for name, digest in recorded.items():
        if name == NEXT_CONFIG:
            continue
        if name not in (*FIXED, *TOKENIZER_FILES):
            raise RunError(
                f"the newest record in {run_dir / CHECKPOINTS} has a digest of '{name}', which is no file of a run; "
                "restore the record from a copy"
            )
        accepted = {digest, recorded.get(NEXT_CONFIG, digest) if name == CONFIG else digest}
        if digest_of(read(run_dir / name)) not in accepted:
            raise RunError(
                f"{run_dir / name} is not as it was when its run was trained (its sha256 differs from the one in the "
                "record); restore it from a copy"
            )


def digest_of(content: bytes) -> str:
    """The sha256 of the content of a file, as records name it."""
    return hashlib.sha256(content).hexdigest()
