"""Texts and paths that people write: in keys of the configuration and as arguments of the commands."""

from __future__ import annotations

import os
import stat

from stackwise_jax.config.values import shown
from stackwise_jax.errors import UsageError

PATHS = frozenset(
    {
        "run.dir",
        "run.init_from",
        "data.path",
        "data.valid_path",
        "tokenizer.path",
        "cache.dir",
        "curriculum.adapters.load_from",
    }
)
_OF_MANY_LINES = frozenset({"run.sample_prompt"})
_MOST_BYTES = 4096  # of a path; file systems take no longer one
_MOST_NAME_BYTES = 255  # of a name in it; the same


def expanded(path: str) -> str:
    """The path with ~ (or ~name) at its beginning replaced by the home directory, as a shell does it."""
    return os.path.expanduser(path)


def check_text(text: str, key: str) -> None:
    """Refuse the value of a text key that cannot be stored or shown, or is a path that no file can have.

    Raises:
        UsageError: it holds half characters (bytes of the command line that are no UTF-8) or control characters, or a
            path in it is too long.
    """
    problem = None
    if any("\ud800" <= c <= "\udfff" for c in text):
        problem = "holds bytes or half characters that are no UTF-8 text"
    elif any(c < " " or "\x7f" <= c <= "\x9f" for c in text if key not in _OF_MANY_LINES or c not in "\n\r\t"):
        problem = "holds control characters"
    elif key in PATHS or key == "run.name":
        names = [len(name.encode()) for name in text.split("/")]
        if max(names) > _MOST_NAME_BYTES:
            problem = f"holds a name of {max(names):,} bytes, more than the {_MOST_NAME_BYTES} that a name may have"
        elif len(text.encode()) > _MOST_BYTES:
            problem = f"has {len(text.encode()):,} bytes, more than the {_MOST_BYTES:,} that a path may have"
    if problem:
        raise UsageError(f"{key} is {shown(text)}, which {problem}; write another one")


def check_place(path: str | os.PathLike, key: str) -> None:
    """Refuse a path at which no directory can be made, because something above it is no folder.

    Raises:
        UsageError: what that is.
    """
    above = os.path.abspath(path)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise UsageError(f"{key} {os.fspath(path)}: {above} is no folder; name a directory in one")


def check_there(path: str, key: str, remedy: str, *, folder: bool = True) -> None:
    """Refuse a path at which there is no file (or folder).

    Raises:
        UsageError: there is nothing, something that is neither (a pipe, a device), or it cannot be looked at.
    """
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        raise UsageError(f"{key} is {shown(path)}; write {remedy}") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{key} is {shown(path)}, which cannot be looked at ({why}); write {remedy}") from None
    if not (stat.S_ISREG(kind) or (folder and stat.S_ISDIR(kind))):
        what = "a folder" if stat.S_ISDIR(kind) else "neither a file nor a folder"
        raise UsageError(f"{key} is {shown(path)}, which is {what}; write {remedy}")
