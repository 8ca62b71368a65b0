"""Small files that are either there whole or not at all, and errors of a disk said in one sentence."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from stackwise_jax.errors import RunError
from stackwise_jax.files import read_regular, write_atomically

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_DISK_TEXTS = ("No space left", "quota exceeded", "File too large", "RESOURCE_EXHAUSTED")
LINK = "is a symbolic link, which is not followed inside a run; put what it points to in its place, or remove it"

# A pipe does not block, a link is not followed, and a child process does not inherit the descriptor.
SAFELY = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


class Intruder(RunError):
    """Something stands in a store that no run puts there; the sentence says what to do about it."""


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
        why = "the disk is full; free space and" if full else f"{brief(error)}; remove the cause and"
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


def write_json(path: Path, data: dict) -> None:
    """Write {"sha256", "data"}; the file is there whole or not at all. Raises what the file system raises."""
    text = json.dumps(data, sort_keys=True)
    body = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "data": data}
    write_atomically(path, json.dumps(body, indent=1))


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        RunError: the file is missing, a symbolic link, too large, unreadable, or not what was written.
    """
    try:
        body = json.loads(read_regular(path, follow=False))
        text = json.dumps(body["data"], sort_keys=True)
        if hashlib.sha256(text.encode()).hexdigest() != body["sha256"]:
            raise ValueError("its checksum does not fit its content")
        if not isinstance(body["data"], dict):
            raise ValueError("its data is no mapping")
        return body["data"]
    except FileNotFoundError:
        raise RunError(f"{path} is missing") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or brief(error)}") from error
    except KeyError as error:
        raise RunError(f"{path} is damaged: it has no {error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {brief(error)}") from error


def refuse_links(root: Path, path: Path) -> None:
    """Refuse a path in `root` if `root` or anything on the way from it to `path` is a symbolic link.

    A run directory may be somebody else's. What a link in it points to would be read, overwritten or deleted there.

    Raises:
        RunError: which one is a link.
    """
    for part in (path, *path.parents):
        if stat.S_ISLNK(_mode(part)):
            raise Intruder(f"{part} {LINK}")
        if part == root:
            return


def _mode(path: Path) -> int:
    """What kind of thing a path is; 0 where nothing is."""
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or brief(error)}") from error


def open_own(path: Path, flags: int) -> int:
    """Open a file of the run for writing, or make it; a descriptor.

    Raises:
        RunError: it is a symbolic link or no regular file.
        OSError: it cannot be opened.
    """
    if path.is_symlink():
        raise Intruder(f"{path} {LINK}")
    descriptor = os.open(path, flags | os.O_CREAT | SAFELY, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RunError(f"{path} is not a regular file; remove it")
    return descriptor


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is what stands at `path`."""
    try:
        here, there = os.fstat(descriptor), os.lstat(path)
    except OSError:
        return False
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def remove_tree(path: Path) -> None:
    """Remove a directory so that at no moment a part of it stands under its name; of a link only the link itself."""
    doomed = path if path.name.endswith(".tmp") else path.with_name(path.name + ".tmp")
    if doomed != path:
        _remove(doomed)
        os.rename(path, doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        shutil.rmtree(path)
    elif mode:
        path.unlink()


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
