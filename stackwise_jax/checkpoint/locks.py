"""One run at a time writes a store, and what somebody reads is not removed meanwhile.

The lock on writing is a file in the store. It also tells whether the store is still the one that the run opened: a
directory that was moved or removed has taken the lock file with it.

A reader locks the progress record that it reads, which needs no right to write. The writer removes no record that is
locked, and so nothing that it names. Neither ever waits for the other.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from stackwise_jax.checkpoint.files import SAFELY, is_at, open_own, writing
from stackwise_jax.errors import RunError
from stackwise_jax.files import make_directory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)

NAME = ".lock"
ATTEMPTS = 100


class WriteLock:
    """The right to write a store, from here to `release` or the end of the process.

    Args:
        directory: of the store; made, with the directories above it, where it is not there.

    Raises:
        RunError: another run is writing here, the disk does not take it, or the lock file is a link.
    """

    def __init__(self, directory: Path):
        self.directory, self.path = directory, directory / NAME
        self._made = [path for path in (directory, *directory.parents) if not path.exists()]
        with writing(directory):
            make_directory(directory)
        try:
            self._descriptor = self._take()
        except RunError:
            self._remove_made()
            raise

    def check(self) -> None:
        """Raises RunError when the store is no longer where it was: what is written now would be lost."""
        if not is_at(self._descriptor, self.path):
            raise RunError(
                f"{self.directory} was moved, removed or replaced while this run was writing it; put it back and run "
                "the same command again, or use another run.dir"
            )

    def release(self) -> None:
        """Let another process write. A store in which nothing was saved leaves nothing behind."""
        with contextlib.suppress(OSError):
            if is_at(self._descriptor, self.path) and os.listdir(self.directory) == [NAME]:
                self.path.unlink()
        os.close(self._descriptor)
        self._remove_made()

    def _take(self) -> int:
        for _ in range(ATTEMPTS):
            with writing(self.path):
                descriptor = open_own(self.path, os.O_RDWR)
            try:
                _lock(descriptor)
            except (BlockingIOError, PermissionError):
                os.close(descriptor)
                break
            if is_at(descriptor, self.path):
                return descriptor
            os.close(descriptor)  # its owner removed it as it ended
        raise RunError(f"another run is writing {self.directory}; wait for it to end, or use another run.dir")

    def _remove_made(self) -> None:
        """The directories that were made for the lock, as far as they are empty."""
        with contextlib.suppress(OSError):
            for path in self._made:
                path.rmdir()


def _lock(descriptor: int) -> None:
    """Raises BlockingIOError or PermissionError when another process has the lock."""
    try:
        if fcntl is None:
            raise OSError("this system has no file locks")
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise
    except OSError as error:
        log.debug("no protection from a second run: %s", error)


def lock_for_reading(record: Path) -> int | None:
    """Keep a record from being removed until the descriptor is closed; None: it is gone or about to be.

    Where the file system has no locks, the descriptor protects nothing.
    """
    try:
        descriptor = os.open(record, os.O_RDONLY | SAFELY)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{record} cannot be read: {error.strerror}") from error
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        log.debug("%s is not protected while it is read: %s", record, error)
    if not is_at(descriptor, record):
        os.close(descriptor)
        return None
    return descriptor


def remove_unless_read(record: Path) -> bool:
    """Remove a record that nobody has locked for reading; False: somebody has."""
    if fcntl is None:
        record.unlink()
        return True
    try:
        descriptor = os.open(record, os.O_RDWR | SAFELY)  # over NFS only a file that is open for writing can be locked
    except PermissionError:
        descriptor = os.open(record, os.O_RDONLY | SAFELY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            log.debug("cannot tell whether %s is being read: %s", record, error)
        record.unlink()
        return True
    finally:
        os.close(descriptor)
