"""A run directory that is there whole or not at all: written under another name, renamed when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from stackwise_jax import files
from stackwise_jax.checkpoint import Store, writing
from stackwise_jax.config.paths import check_place
from stackwise_jax.engine.entries import CHECKPOINTS, check_entries
from stackwise_jax.errors import UsageError

MARK = ".converting"  # a file in a directory that is being built, by which a leftover is known as one


@contextlib.contextmanager
def building(out: Path) -> Iterator[Path]:
    """Gives the path of a new directory to write into, which becomes `out` at the end.

    After an error or Ctrl-C it is removed, and the folders above it that were made for it. What a kill left is
    replaced by the next call; nothing else ever is.

    Raises:
        UsageError: something that was not made here has the name of the directory, or it cannot be there.
        RunError: it cannot be written, or another process is writing it.
    """
    Store(out / CHECKPOINTS)  # refuses names that it cannot use
    check_place(out, "OUT")
    path = out.with_name(f".{out.name}{MARK}")
    _clear(path)
    made = [folder for folder in path.parents if not folder.exists()]  # the deepest first
    try:
        with writing(path):
            path.mkdir(parents=True)
            files.write_atomically(path / MARK, "removed when the directory is complete\n")
        yield path
        with writing(out):
            files.sync(path)
            os.rename(path, out)
            (out / MARK).unlink()
            files.sync(out.parent)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process may use it by now
            for folder in made:
                folder.rmdir()
        raise


def _clear(path: Path) -> None:
    """Remove what a killed call left at `path`."""
    if not os.path.lexists(path):
        return
    ours = not path.is_symlink() and path.is_dir() and ((path / MARK).is_file() or not any(path.iterdir()))
    if not ours:
        raise UsageError(f"{path} is in the way and was not left by an earlier call; move it or name another directory")
    check_entries(path)  # the lock is a file in it
    store = Store(path / CHECKPOINTS)
    store.lock()  # its process may be alive
    store.close()
    with writing(path):
        shutil.rmtree(path)
