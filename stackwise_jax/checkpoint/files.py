"""Small files that are either there whole or not at all, and errors of a disk said in one sentence."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from stackwise_jax.errors import RunError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_DISK_TEXTS = ("No space left", "quota exceeded", "File too large", "RESOURCE_EXHAUSTED")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn any failure of the writes inside into a RunError that names `path` and the remedy."""
    try:
        yield
    except RunError:
        raise
    # TensorStore reports a failed write as OSError, ValueError or XlaRuntimeError, depending on where it happens.
    except (OSError, ValueError, RuntimeError) as error:
        full = getattr(error, "errno", None) in FULL_DISK or any(text in str(error) for text in FULL_DISK_TEXTS)
        why = "the disk is full; free space and" if full else f"{brief(error)}; mend that and"
        raise RunError(
            f"cannot write {path}: {why} run the same command again (what was saved before is intact)"
        ) from error


def by_first_process(work: Callable[[], object]) -> None:
    """Run `work` in process 0 while the others wait; an exception there ends all of them."""
    error = None
    if jax.process_index() == 0:
        try:
            work()
        except Exception as raised:
            error = raised
    failed = error is not None
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.asarray(failed)))
    if failed:
        raise error or RunError("process 0 failed; its message says why")


def brief(error: BaseException) -> str:
    """The first line of an error, at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def sync(path: Path) -> None:
    """Have the kernel write a file or a directory's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, data: dict) -> None:
    """Write {"sha256", "data"} to a temporary file, force it to the disk, rename it to `path`."""
    text = json.dumps(data, sort_keys=True)
    body = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "data": data}
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(body, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        RunError: the file is missing, unreadable, or not what was written.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        text = json.dumps(body["data"], sort_keys=True)
        if hashlib.sha256(text.encode()).hexdigest() != body["sha256"]:
            raise ValueError("its checksum does not fit its content")
        return body["data"]
    except FileNotFoundError:
        raise RunError(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged: {brief(error)}") from error


def remove_tree(path: Path) -> None:
    """Remove a directory so that at no moment a part of it stands under its name."""
    doomed = path if path.name.endswith(".tmp") else path.with_name(path.name + ".tmp")
    if doomed != path:
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
    shutil.rmtree(doomed)


def plain(value: Any) -> Any:
    """The value in terms of JSON; numpy and JAX scalars and arrays become numbers and lists, paths become text.

    Numbers that JSON does not know (nan, inf) become null.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): plain(entry) for key, entry in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(entry) for entry in value]
        case Path():
            return str(value)
        case _ if hasattr(value, "tolist"):
            return plain(value.tolist())
        case _:
            raise TypeError(f"{type(value).__name__} has no place in JSON")
