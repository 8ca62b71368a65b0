"""What a command says about an exception: one sentence, and its exit code."""

from __future__ import annotations

import errno
import os

import jax

from stackwise_jax.errors import RunError, UsageError

USAGE, FAILURE, INTERRUPTED = 2, 1, 130  # exit codes
_SHOWN = 160  # characters of an error of XLA or numpy

_REMEDIES = {  # what to do about an error of the operating system
    errno.ENOENT: "write the path of something that exists",
    errno.EACCES: "change its rights, or write another path",
    errno.EPERM: "change its rights, or write another path",
    errno.EROFS: "write a path on another disk",
    errno.EISDIR: "write the path of a file",
    errno.ENOTDIR: "write a path whose folders are folders",
    errno.EEXIST: "write a path that is free",
    errno.ENAMETOOLONG: "write a shorter path",
    errno.ELOOP: "write a path without that link",
    errno.EINVAL: "write the path of a file or a folder",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs",
}


def explain(error: BaseException, interrupted: str = "interrupted before the end") -> tuple[str, int]:
    """The sentence and the exit code for an exception.

    Args:
        interrupted: the sentence for a KeyboardInterrupt that brings none.
    """
    text = " ".join(str(error).split())
    if memory := _memory_that_ran_out(error, text):
        detail = f" ({text[:_SHOWN]})" if text else ""
        return f"{memory} ran out{detail}; {_LESS_MEMORY}", FAILURE
    match error:
        case UsageError():
            return text, USAGE
        case KeyboardInterrupt():
            return text or interrupted, INTERRUPTED
        case RunError():
            return text, FAILURE
        case OSError() if error.filename is not None or error.errno is not None:
            return _explain_system(error), FAILURE
        case RecursionError():
            return "an argument or a file is nested too deeply; write fewer levels of brackets or sections", FAILURE
        case _:
            what = type(error).__name__ + (f": {text}" if text else "")
            return f"{what}; run again with --debug for the traceback", FAILURE


_LESS_MEMORY = "python3 -m stackwise_jax.plan with the arguments of the training says what takes most and what helps"


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _explain_system(error: OSError) -> str:
    """What the operating system refuses, and what to do."""
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else error.filename
    if _is_full(error):
        where = f" at {name}" if name is not None else ""
        return f"the disk is full{where}; free some space and run the same command again"
    why = (error.strerror or type(error).__name__).removesuffix(".")
    remedy = _REMEDIES.get(error.errno or 0, "look at the disk and run the same command again")
    where = "" if name is None else f"{name or 'an empty path'}: "
    return f"{where}{why[:1].lower()}{why[1:]}; {remedy}"


def _memory_that_ran_out(error: BaseException, text: str) -> str | None:
    """Which memory was too small, where an exception of Python, numpy or XLA says so."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "std::bad_alloc" in text):
        return "host memory"
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    if "host memory" in text:
        return "pinned host memory"
    if "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        return "host memory" if jax.default_backend() == "cpu" else "device memory"
    return None
