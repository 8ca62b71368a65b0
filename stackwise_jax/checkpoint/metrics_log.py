"""metrics.jsonl: one JSON object per line, cut back to a known length when a run goes on from an earlier state."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import jax

from stackwise_jax.checkpoint.files import is_at, open_own, plain, writing
from stackwise_jax.errors import RunError
from stackwise_jax.files import make_directory, read_regular, sync

log = logging.getLogger(__name__)


class MetricsLog:
    """Appends rows to a file. Only process 0 of a run writes; the others' calls do nothing.

    Args:
        path: made, with its directory, when it is not there.

    Raises:
        RunError: (every method) the disk is full or not writable, or the path is a link or no regular file.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._file = None
        if jax.process_index() == 0:
            with writing(self.path):
                make_directory(self.path.parent)
                descriptor = open_own(self.path, os.O_WRONLY | os.O_APPEND)
                self._file = open(descriptor, "ab", buffering=0)  # noqa: SIM115 (held until close)
                sync(self.path.parent)

    def append(self, row: dict[str, Any]) -> None:
        """Add one line. Numbers may be numpy or jax scalars; a number that is not finite becomes null."""
        if self._file is None:
            return
        line = json.dumps(plain(row)) + "\n"
        rest = memoryview(line.encode())
        with writing(self.path):
            while rest:  # a nearly full disk takes a part of the line and refuses the rest
                rest = rest[self._file.write(rest) :]

    def tell(self) -> int:
        """Length of the file in bytes."""
        return 0 if self._file is None else os.fstat(self._file.fileno()).st_size

    def truncate(self, length: int) -> None:
        """Cut the file back to `length` bytes: the rows written after the state that the run goes on from.

        A file that is shorter (someone removed or cut it) is kept up to its last whole line, with a warning.
        """
        if self._file is None:
            return
        if (present := self.tell()) < length:
            log.warning("%s holds %d of %d bytes; its earlier rows are lost", self.path, present, length)
            with writing(self.path):
                length = read_regular(self.path, limit=None, follow=False).rfind(b"\n") + 1
        with writing(self.path):
            os.ftruncate(self._file.fileno(), length)

    def sync(self) -> None:
        """Force all rows to the disk; called before a progress record that counts them is committed.

        Raises:
            RunError: also when the file was removed or replaced, so that the rows would go nowhere.
        """
        if self._file is None:
            return
        if not is_at(self._file.fileno(), self.path):
            raise RunError(
                f"{self.path} was moved, removed or replaced while this run was writing it; put it back and run the "
                "same command again, or use another run.dir"
            )
        with writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
