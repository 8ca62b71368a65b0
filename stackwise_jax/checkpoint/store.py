"""A run's saved state: a directory per item and version, and numbered progress records that say which belong together.

    <directory>/stacks/003/00000012/{arrays/, meta.json}
    <directory>/progress/00000040.json

An item is saved first and counts only once a record that names its version is committed. So a kill at any moment loses
nothing: what is half done is removed by the next write, what no record names by the next commit. A version that a
kept record names is never written again.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackwise_jax.checkpoint import items
from stackwise_jax.checkpoint.files import by_first_process, remove_tree, writing
from stackwise_jax.checkpoint.progress import Progress, read_progress, write_progress
from stackwise_jax.errors import RunError, UsageError

log = logging.getLogger(__name__)

PROGRESS = "progress"
_VERSION = re.compile(r"\d{8}")
_LEFTOVER = re.compile(r"\d{8}\.tmp")
_NAME = re.compile(r"(?!\d{8}(/|$))\w[\w-]*(/(?!\d{8}(/|$))\w[\w-]*)*")


class Store:
    """The checkpoints of one run.

    With several processes, all call `save_item` and `commit`, in the same order, on a directory that they share. One
    run at a time may write; any number may read.

    Args:
        directory: made by the first write.
        keep: progress records that stay, newest first; at least 1.
    """

    def __init__(self, directory: Path | str, keep: int = 2):
        if keep < 1:
            raise UsageError(f"run.keep is {keep}; write at least 1")
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._lock = None

    def path(self, name: str, version: int) -> Path:
        """Where a version of an item lies."""
        if not _NAME.fullmatch(name) or name.split("/")[0] == PROGRESS:
            raise ValueError(f"'{name}' cannot name an item")
        return self.directory / name / f"{version:08d}"

    def save_item(self, name: str, version: int, tree: Any, meta: dict) -> None:
        """Save a tree of arrays as a version of an item; it is there whole or not at all.

        A committed version that already holds the same is left alone; leftovers of a killed run are replaced.

        Args:
            name: such as "stacks/003", "embed", "optimizer".
            tree: any pytree of arrays (numpy or jax, any place and dtype that Orbax can save).
            meta: JSON-able facts that `item_meta` returns.

        Raises:
            RunError: the disk is full or not writable, another run is writing here, or the version is committed and
                holds something else. Everything saved before stays.
        """
        path = self.path(name, version)
        if any((name, version) in record.needed for record in self._valid()):
            if items.holds_same(path, tree, meta):
                return
            raise RunError(f"{path} is committed and holds something else; save it as another version")
        by_first_process(lambda: self._clear(path))
        items.save_tree(path, tree, meta)

    def load_item(self, name: str, version: int, like: Any = None) -> Any:
        """Read one item and nothing else.

        Args:
            like: tree of ShapeDtypeStructs: the result has its containers, dtypes and shardings (where a leaf has one).
                None: nested dicts of numpy arrays.

        Raises:
            RunError: the item is missing or damaged; the sentence says what can be done.
            UsageError: it does not fit `like`.
        """
        return self._explained(items.load_tree, name, version, like)

    def item_meta(self, name: str, version: int) -> dict:
        """The `meta` given to `save_item`, without reading arrays. Raises RunError as `load_item`."""
        return self._explained(items.read_meta, name, version)

    def item_shapes(self, name: str, version: int) -> dict:
        """Nested dicts of ShapeDtypeStructs, without reading arrays. Raises RunError as `load_item`."""
        return self._explained(items.read_shapes, name, version)

    def items(self) -> dict[str, list[int]]:
        """All saved versions by item name, ascending, whether or not a record names them."""
        found: dict[str, list[int]] = {}
        for path in self._directories(_VERSION):
            found.setdefault(path.parent.relative_to(self.directory).as_posix(), []).append(int(path.name))
        return {name: sorted(versions) for name, versions in sorted(found.items())}

    def commit(self, progress: Progress) -> None:
        """Make `progress` the newest state, then remove what no kept record needs.

        Raises:
            RunError: an item it names is not there, its number is not the highest, or the disk is full or not writable.
                The records before it stay.
        """
        by_first_process(lambda: self._commit(progress))

    def latest(self) -> Progress | None:
        """The newest sound record, or None when nothing was committed yet. Damaged ones are passed over with a warning.

        Raises:
            RunError: there are records and none is sound.
        """
        numbers = self.records()
        for number in reversed(numbers):
            try:
                return self.read(number)
            except RunError as error:
                log.warning("%s; looking for the record before it", error)
        if numbers:
            raise RunError(f"no record in {self.directory / PROGRESS} is sound; restore one, or use another run.dir")
        return None

    def records(self) -> list[int]:
        """Numbers of the progress records that exist, ascending; `read` finds out whether one is sound."""
        return sorted(int(path.stem) for path in (self.directory / PROGRESS).glob("[0-9]" * 8 + ".json"))

    def read(self, number: int) -> Progress:
        """One progress record. Raises RunError when it is missing or damaged."""
        return read_progress(self._record(number))

    def lock(self) -> None:
        """Make sure that no other process writes here; the first write does the same. All processes of a run call it.

        Raises:
            RunError: another run is writing here.
        """
        by_first_process(self._open)

    def close(self) -> None:
        """Let another process write here. The end of the process does the same."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _record(self, number: int) -> Path:
        return self.directory / PROGRESS / f"{number:08d}.json"

    def _valid(self) -> list[Progress]:
        found = []
        for number in self.records():
            try:
                found.append(self.read(number))
            except RunError:
                continue
        return found

    def _directories(self, kind: re.Pattern) -> list[Path]:
        """Directories whose name fits, at any depth, without looking into versions and leftovers."""
        found = []
        for directory, names, _ in os.walk(self.directory):
            found += [Path(directory, name) for name in names if kind.fullmatch(name)]
            names[:] = [name for name in names if not (_VERSION.fullmatch(name) or _LEFTOVER.fullmatch(name))]
        return found

    def _clear(self, path: Path) -> None:
        """Take the lock and remove what a killed run left at `path`."""
        self._open()
        if path.exists():
            with writing(path):
                remove_tree(path)

    def _commit(self, progress: Progress) -> None:
        self._open()
        record = self._record(progress.number)
        for name, version in sorted(progress.needed):
            if not (self.path(name, version) / items.META).exists():
                raise RunError(f"{self.path(name, version)} is missing, so {record} cannot be committed")
        older = self._valid()
        if older and older[-1].number >= progress.number:
            raise RunError(f"{self._record(older[-1].number)} is not older than {record}; remove it to go back")
        with writing(record):
            write_progress(record, progress)
            self._remove_unneeded([*older, progress][-self.keep :])

    def _remove_unneeded(self, kept: list[Progress]) -> None:
        """Records first: a kill between the two steps leaves items without a record, never the reverse."""
        for number in set(self.records()) - {record.number for record in kept}:
            self._record(number).unlink()
        needed = {self.path(name, version) for record in kept for name, version in record.needed}
        for path in set(self._directories(_VERSION)) - needed:
            remove_tree(path)

    def _open(self) -> None:
        """Make the directory and hold its lock: two runs that write here would remove each other's files."""
        if self._lock is not None:
            return
        with writing(self.directory):
            (self.directory / PROGRESS).mkdir(parents=True, exist_ok=True)
            lock = open(self.directory / ".lock", "w")  # noqa: SIM115 (held until close)
        try:
            import fcntl

            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RunError(
                f"another run is writing {self.directory}; wait for it to end, or use another run.dir"
            ) from None
        except (ImportError, OSError):
            log.debug("no file locks here; %s is not protected from a second run", self.directory)
        self._lock = lock
        with writing(self.directory):  # what a kill left half done
            for path in self._directories(_LEFTOVER):
                remove_tree(path)
            for path in (self.directory / PROGRESS).glob("*.tmp"):
                path.unlink()

    def _explained(self, read, name: str, version: int, *args):
        """Call read(path, *args); add to its RunError which records need the item and how to do without."""
        try:
            return read(self.path(name, version), *args)
        except RunError as error:
            records = self._valid()
            needing = [record.number for record in records if (name, version) in record.needed]
            others = [record.number for record in records if record.number not in needing]
            remedy = "restore it from a copy"
            if needing and others and max(others) < min(needing):
                names = ", ".join(str(self._record(number)) for number in needing)
                remedy += f", or remove {names} to go on from record {max(others)}"
            elif needing:
                remedy += ", or start again in another run.dir"
            raise RunError(f"{error}; {remedy}") from error


@dataclass(frozen=True)
class Location:
    """What a path on the disk is, for people who look into it."""

    kind: str  # run | store | item
    store: Path  # the store's directory
    name: str | None = None  # item: such as "stacks/003"
    version: int | None = None  # item: None when the path names the item and no version of it


def readable(path: Path | str) -> Location | None:
    """Say whether a path is a run (holds checkpoints/), a store, or an item of a store (with or without a version)."""
    path = Path(path).absolute()
    if not path.is_dir():
        return None
    if (path / "checkpoints" / PROGRESS).is_dir():
        return Location("run", path / "checkpoints")
    if (path / PROGRESS).is_dir():
        return Location("store", path)
    store = next((parent for parent in path.parents if (parent / PROGRESS).is_dir()), None)
    if store is None:
        return None
    version = int(path.name) if _VERSION.fullmatch(path.name) else None
    item = path if version is None else path.parent
    if not any(_VERSION.fullmatch(child.name) for child in item.iterdir()):
        return None
    return Location("item", store, item.relative_to(store).as_posix(), version)
