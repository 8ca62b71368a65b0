"""A run's saved state: a directory per item and version, and numbered progress records that say which belong together.

    <directory>/stacks/003/00000012/{arrays/, meta.json}
    <directory>/progress/00000040.json

An item is saved first and counts only once a record that names its version is committed. So a kill at any moment loses
nothing: what is half done is removed by the next write, what no record names by the next commit. A version that a
kept record names is never written again. What somebody reads is kept until a commit finds that it is no longer read.

A store may be somebody else's: no symbolic link in it is followed, and what records and tables say is checked.
"""

from __future__ import annotations

import logging
import os
import re
import time
import weakref
from pathlib import Path
from typing import Any

from stackwise_jax.checkpoint import fields, items, locks
from stackwise_jax.checkpoint.files import LINK, Intruder, brief, by_first_process, refuse_links, remove_tree, writing
from stackwise_jax.checkpoint.location import PROGRESS, VERSION
from stackwise_jax.checkpoint.progress import Progress, read_progress, write_progress
from stackwise_jax.errors import RunError, UsageError
from stackwise_jax.files import make_directory

log = logging.getLogger(__name__)

_LEFTOVER = re.compile(r"\d{8}\.tmp")
_RECORD = re.compile(r"\d{8}\.json")
_URL = re.compile("[a-z][a-z0-9+.-]+:")
NAME_BYTES, PATH_BYTES = 255, 3500  # what file systems take, less what stands below a store
PATIENCE = 60  # seconds


class Store:
    """The checkpoints of one run.

    With several processes, all call `save_item` and `commit`, in the same order, on a directory that they share. One
    run at a time may write; any number may read.

    Args:
        directory: made by the first write.
        keep: progress records that stay, newest first; at least 1.

    Raises:
        UsageError: no store can be in such a directory.
    """

    def __init__(self, directory: Path | str, keep: int = 2):
        if keep < 1:
            raise UsageError(f"run.keep is {keep}; write at least 1")
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._lock: locks.WriteLock | None = None
        self._reading: weakref.finalize | None = None
        self._read_records: dict[int, tuple[tuple[int, int, int], Progress]] = {}
        _check_directory(self.directory)

    def path(self, name: str, version: int) -> Path:
        """Where a version of an item lies."""
        if not fields.is_item(name):
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
        by_first_process(self._open)
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

    def item_bytes(self, name: str, version: int) -> int:
        """The bytes of its files. Raises RunError as `load_item` where one is missing or a link; reads no arrays."""
        return sum(self._explained(items.check_complete, name, version).values())

    def items(self) -> dict[str, list[int]]:
        """All saved versions by item name, ascending, whether or not a record names them."""
        found: dict[str, list[int]] = {}
        for path in self._directories(VERSION):
            found.setdefault(self._item_of(path), []).append(int(path.name))
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
        numbers: list[int] = []
        for _ in range(locks.ATTEMPTS):
            numbers = self.records()
            if not numbers:
                return None
            for number in reversed(numbers):
                try:
                    return self.read(number)
                except RunError as error:
                    if not os.path.lexists(self._record(number)):
                        break  # the run has gone on and removed it: there are newer ones
                    log.warning("%s; looking for the record before it", error)
            else:
                break
        raise RunError(f"no record in {self.directory / PROGRESS} is sound; restore one, or use another run.dir")

    def hold(self) -> Progress | None:
        """`latest` for a reader beside a run that goes on: neither this record nor what it names is removed until
        `close`, or until this store is collected.

        It needs no right to write. Where the file system has no locks it is `latest`.

        Raises:
            RunError: there are records and none is sound, or all were removed before they could be read.
        """
        end = time.monotonic() + PATIENCE
        while (progress := self.latest()) is not None:
            descriptor = locks.lock_for_reading(self._record(progress.number))
            if descriptor is not None:
                self._stop_reading()
                self._reading = weakref.finalize(self, os.close, descriptor)
                return progress
            if time.monotonic() > end:
                raise RunError(f"the run writes {self.directory} faster than it can be read; raise run.save_every")
            time.sleep(0.01)
        return None

    def records(self) -> list[int]:
        """Numbers of the progress records that exist, ascending; `read` finds out whether one is sound."""
        refuse_links(self.directory, self.directory / PROGRESS)
        try:
            names = os.listdir(self.directory / PROGRESS)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise _unreadable(error) from error
        return sorted(int(name.removesuffix(".json")) for name in names if _RECORD.fullmatch(name))

    def read(self, number: int) -> Progress:
        """One progress record. Raises RunError when it is missing or damaged."""
        path = self._record(number)
        progress = read_progress(path)
        if progress.number != number:
            raise RunError(f"{path} is damaged: it is the record {progress.number} under another name")
        return progress

    def lock(self) -> None:
        """Make sure that no other process writes here; the first write does the same. All processes of a run call it.

        The directory is made where it is not there. If nothing is saved before `close`, that removes it again.

        Raises:
            RunError: another run is writing here, the directory holds a symbolic link, or it is not writable.
        """
        by_first_process(self._open)

    def close(self) -> None:
        """Let another process write here, or remove what was read. The end of the process does the same."""
        self._stop_reading()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading()
            self._reading = None

    def _record(self, number: int) -> Path:
        return self.directory / PROGRESS / f"{number:08d}.json"

    def _valid(self) -> list[Progress]:
        """All sound records, ascending. Those that were read before and have not changed since are not read again."""
        before, self._read_records = self._read_records, {}
        for number in self.records():
            try:
                about = self._record(number).stat()
                key = about.st_ino, about.st_mtime_ns, about.st_size
                known = before.get(number)
                record = known[1] if known is not None and known[0] == key else self.read(number)
                self._read_records[number] = key, record
            except (RunError, OSError):
                continue
        return [record for _, record in self._read_records.values()]

    def _directories(self, kind: re.Pattern) -> list[Path]:
        """Versions or leftovers of items: directories whose name fits below one that can be an item, at any depth.

        Raises:
            RunError: there is a symbolic link, or a directory cannot be read.
        """
        refuse_links(self.directory, self.directory)
        found, waiting = [], [str(self.directory)]
        while waiting:
            try:
                with os.scandir(waiting.pop()) as entries:
                    for entry in entries:
                        if entry.is_symlink():
                            raise Intruder(f"{entry.path} {LINK}")
                        if not entry.is_dir(follow_symlinks=False):
                            continue
                        path = Path(entry.path)
                        if kind.fullmatch(entry.name) and fields.is_item(self._item_of(path)):
                            found.append(path)
                        if not (VERSION.fullmatch(entry.name) or _LEFTOVER.fullmatch(entry.name)):
                            waiting.append(entry.path)
            except (FileNotFoundError, NotADirectoryError):
                continue  # a run that goes on has removed it
            except OSError as error:
                raise _unreadable(error) from error
        return found

    def _clear(self, path: Path) -> None:
        """Remove what a killed run left at `path`, where an item is about to be saved."""
        with writing(path):
            make_directory(self.directory / PROGRESS)
            if path.exists():
                remove_tree(path)

    def _commit(self, progress: Progress) -> None:
        self._open()
        record = self._record(progress.number)
        for name, version in sorted(progress.needed):
            try:
                items.check_complete(self.path(name, version))
            except RunError as error:
                raise RunError(f"{error}, so {record} cannot be committed") from error
        older = self._valid()
        if older and older[-1].number >= progress.number:
            raise RunError(f"{self._record(older[-1].number)} is not older than {record}; remove it to go back")
        with writing(record):
            make_directory(record.parent)  # there are runs without items
            write_progress(record, progress)
            self._remove_unneeded([*older, progress][-self.keep :], older)

    def _remove_unneeded(self, kept: list[Progress], older: list[Progress]) -> None:
        """Records first: a kill between the two steps leaves items without a record, never the reverse."""
        sound = {record.number: record for record in older}
        for number in set(self.records()) - {record.number for record in kept}:
            if not locks.remove_unless_read(self._record(number)) and number in sound:
                kept = [*kept, sound[number]]
        needed = {self.path(name, version) for record in kept for name, version in record.needed}
        for path in set(self._directories(VERSION)) - needed:
            remove_tree(path)

    def _item_of(self, version: Path) -> str:
        """The name of the item of which a directory is a version."""
        return version.parent.relative_to(self.directory).as_posix()

    def _open(self) -> None:
        """Hold the lock: two runs that write here would remove each other's files. Then see that all is in place."""
        if self._lock is not None:
            self._lock.check()
            return
        refuse_links(self.directory, self.directory)
        self._lock = locks.WriteLock(self.directory)
        try:
            with writing(self.directory):  # what a kill left half done
                for path in self._directories(_LEFTOVER):
                    remove_tree(path)
                for path in (self.directory / PROGRESS).glob("*.tmp"):
                    path.unlink()
        except RunError:
            self.close()
            raise

    def _explained(self, read, name: str, version: int, *args):
        """Call read(path, *args); add to its RunError which records need the item and how to do without."""
        path = self.path(name, version)
        try:
            refuse_links(self.directory, path)
            return read(path, *args)
        except Intruder:
            raise
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
            elif records and not path.exists():
                remedy = "the run has gone on since; run the same command again"
            raise RunError(f"{error}; {remedy}") from error


def _check_directory(directory: Path) -> None:
    """Refuse what cannot hold a store before anything is written there."""
    for part in directory.parts:
        if _URL.fullmatch(part):
            raise UsageError(f"{directory}: '{part}' reads as a URL; name a directory of a mounted file system")
        if len(os.fsencode(part)) > NAME_BYTES:
            raise UsageError(f"{part[:40]}.. is longer than {NAME_BYTES} bytes; give the directory a shorter name")
    if "\0" in str(directory):
        raise UsageError(f"{str(directory)!r} has a NUL character; give the directory another name")
    if len(os.fsencode(directory)) > PATH_BYTES:
        raise UsageError(f"{str(directory)[:40]}.. is longer than {PATH_BYTES} bytes; name one with a shorter path")


def _unreadable(error: OSError) -> RunError:
    return RunError(f"{error.filename} cannot be read: {error.strerror or brief(error)}")
