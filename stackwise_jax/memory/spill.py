"""A scratch file for what does not fit into host memory: raw bytes at offsets, gone when the process is gone."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from stackwise_jax.errors import RunError, UsageError
from stackwise_jax.memory.placement import format_bytes


class SpillFile:
    """Bytes on disk, one file per process.

    The file has no name (it is unlinked as soon as it is open), so the system removes it when it is closed and also
    when the process is killed: nothing is ever left behind. It is read and written with pread and pwrite through the
    page cache rather than mapped: a full disk is then an error to report (a store into a map would kill the process
    with SIGBUS), and what is read is a private copy that no later write can change under a live array.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self._file = None

    def reserve(self, n_bytes: int) -> None:
        """Open the file and check that `n_bytes` are free on its disk.

        Raises:
            UsageError: no file can be made in the directory.
            RunError: the disk has less than that.
        """
        if self._file is None:
            self._file = _scratch_file(self.directory)
        free = shutil.disk_usage(self.directory).free
        if free < n_bytes:
            raise RunError(
                f"the activation cache needs {format_bytes(n_bytes)} on disk and {self.directory} has only "
                f"{format_bytes(free)} free; name another disk in cache.dir, or set cache.kind recompute"
            )

    def write(self, offset: int, parts: list[np.ndarray]) -> None:
        """Write arrays one after the other from `offset` on, as their raw bytes.

        Raises:
            RunError: the disk is full or fails.
        """
        try:
            for part in parts:
                left = _raw(part).data
                while left:
                    written = os.pwrite(self._fd, left, offset)
                    offset, left = offset + written, left[written:]
        except OSError as error:
            raise self._failure("written", error) from error

    def read(self, offset: int, n_bytes: int) -> np.ndarray:
        """A fresh uint8 array of the `n_bytes` at `offset`.

        Raises:
            RunError: the disk fails or the file is shorter.
        """
        data = np.empty(n_bytes, np.uint8)
        left = data.data
        try:
            while left:
                n_read = os.preadv(self._fd, [left], offset)
                if n_read == 0:
                    raise OSError(errno.EIO, "the file ends early")
                offset, left = offset + n_read, left[n_read:]
        except OSError as error:
            raise self._failure("read", error) from error
        return data

    def clear(self) -> None:
        """Give the disk space back; the file can be used again."""
        if self._file is not None:
            os.ftruncate(self._fd, 0)

    def close(self) -> None:
        """Remove the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _fd(self) -> int:
        if self._file is None:
            raise RunError("the spill file of the activation cache is closed")
        return self._file.fileno()

    def _failure(self, verb: str, error: OSError) -> RunError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return RunError(
                f"the disk of {self.directory} is full: the activation cache could not be {verb}; free some space, "
                "name another disk in cache.dir, or set cache.kind recompute"
            )
        return RunError(f"cache.dir {self.directory}: the spill file could not be {verb} ({error.strerror})")


def _raw(part: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(part).reshape(-1).view(np.uint8)


def check_scratch(directory: Path | str) -> None:
    """Make a folder for spill files, if it is not there, and try it.

    Raises:
        UsageError: no file can be made in it.
    """
    _scratch_file(Path(directory)).close()


def _scratch_file(directory: Path) -> Any:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=directory, buffering=0)
    except OSError as error:
        raise UsageError(
            f"cache.dir: no spill file can be made in {directory} ({error.strerror}); name a writable folder"
        ) from error
