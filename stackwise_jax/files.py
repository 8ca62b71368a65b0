"""Small files: read with a bound and never from a pipe, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

SMALL = 64 * 2**20  # bytes; no configuration, record, table or tokenizer is larger


def read_regular(path: Path | str, limit: int | None = SMALL, *, follow: bool = True) -> bytes:
    """The content of a regular file.

    Args:
        limit: bytes; None: any size.
        follow: whether the last part of the path may be a symbolic link. False inside a run directory, which may be
            somebody else's.

    Raises:
        OSError: the file cannot be read, is no regular file (reading a pipe or a device may never end), is a link where
            `follow` is False, or is larger than `limit`; `strerror` says which.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    if not follow:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if not follow and error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a symbolic link", str(path)) from None
        raise
    with open(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if stat.S_ISDIR(about.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if limit is not None and about.st_size > limit:
            raise OSError(errno.EFBIG, f"it has {about.st_size:,} bytes; at most {limit:,} are read", str(path))
        return file.read() if limit is None else file.read(limit + 1)[:limit]


def write_atomically(path: Path | str, content: bytes | str) -> None:
    """Write a file that is there whole or not at all, also after a power failure.

    The content goes to a new file beside `path`, is forced to the disk and takes the name; then the folder is forced to
    the disk too. A symbolic link at `path` or at the temporary name is replaced, never followed.

    Raises:
        OSError: the disk does not take it; what was at `path` before is intact.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    data = content.encode("utf-8") if isinstance(content, str) else content
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()  # what a kill left, or a link that somebody put there
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def make_directory(path: Path | str) -> None:
    """Make a directory, and those above it that are missing, so that they are still there after a power failure.

    Raises:
        OSError: a part of the path is no directory, or the disk does not take it.
    """
    path = Path(path)
    made = [part for part in (path, *path.parents) if not part.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for part in made:
        sync(part.parent)


def sync(path: Path | str) -> None:
    """Have the kernel write a file or a directory's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
