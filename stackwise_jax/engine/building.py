"""A run directory that is there whole or not at all: written under another name, renamed when it is complete."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from stackwise_jax import files
from stackwise_jax.checkpoint import Store, writing
from stackwise_jax.checkpoint.locks import NAME as LOCK
from stackwise_jax.checkpoint.locks import WriteLock
from stackwise_jax.config.paths import check_place
from stackwise_jax.engine.entries import CHECKPOINTS, CONFIG, RACK
from stackwise_jax.errors import RunError, UsageError

MARK = ".converting"  # a file in a directory that is being built, by which a leftover is known as one


def check_out(out: Path | str) -> Path:
    """The absolute path of a run directory that can be made, without links on the way to it.

    Raises:
        UsageError: the path ends in no name, is too long or lies in a run or a store, or something has that name.
    """
    above, name = os.path.split(os.fspath(out).rstrip(os.sep))
    if name in ("", ".", ".."):
        raise UsageError(f"{out} does not end in the name of a directory; name one that does not exist")
    path = Path(os.path.realpath(above), name)
    Store(path / CHECKPOINTS)  # refuses a path that is too long
    if os.path.lexists(path):
        raise UsageError(f"{out} exists; name a directory that does not")
    check_place(path, "OUT")
    if run := next(filter(_is_run, path.parents), None):
        raise UsageError(f"{out} lies in the run {run}, which removes what is not its own; name a directory outside it")
    return path


def _is_run(path: Path) -> bool:
    """Whether a directory is a run, or a store of checkpoints."""
    return all(os.path.isfile(path / name) for name in (CONFIG, RACK)) or bool(Store(path).records())


def temporary(out: Path) -> Path:
    """Where `out` is written; the name is short however long that of `out` is."""
    return out.with_name(f"{MARK}-{hashlib.sha256(os.fsencode(out.name)).hexdigest()[:16]}")


@contextlib.contextmanager
def building(out: Path | str) -> Iterator[Path]:
    """Gives the path of a new directory to write into, which becomes `out` at the end.

    After an error or Ctrl-C it is removed, as are the directories that were made above it. What a kill left is replaced
    by the next call; nothing else ever is.

    Raises:
        UsageError: as `check_out`, or something that was not made here has the name of the directory.
        RunError: it cannot be written, or another process is writing it.
    """
    out = check_out(out)
    path = temporary(out)
    _check_ours(path)
    lock = _lock(path)
    try:
        check_out(out)  # whoever had the lock before may have made it
        with writing(path):
            (path / MARK).touch()
            _clear(path)
        yield path
        with writing(out):
            lock.check()
            files.sync(path)
            os.rename(path, out)
            for name in (MARK, LOCK):
                (out / name).unlink()
            files.sync(out.parent)
    except BaseException:
        with contextlib.suppress(OSError, RunError):
            lock.check()
            _clear(path)
            (path / MARK).unlink(missing_ok=True)
        raise
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            path.rmdir()  # it is empty, or there no longer


def _check_ours(path: Path) -> None:
    """Refuse a directory that no call left here: it has neither the mark nor, before that, the lock alone."""
    if not os.path.lexists(path):
        return
    with writing(path):
        ours = not path.is_symlink() and path.is_dir()
        ours = ours and ((path / MARK).is_file() or set(os.listdir(path)) <= {LOCK})
    if not ours:
        raise UsageError(f"{path} is in the way and was not left by an earlier call; move it or name another directory")


def _lock(path: Path) -> WriteLock:
    """The right to write the directory, which is made."""
    try:
        with writing(path):
            return WriteLock(path)
    except RunError as error:
        raise RunError(str(error).replace("run.dir", "OUT")) from error


def _clear(path: Path) -> None:
    """Remove what is in the directory, except the lock and the mark."""
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name not in (LOCK, MARK):
            entry.unlink()
