"""What all commands share: how they parse, fail in one sentence, answer with JSON and choose the exit code."""

from __future__ import annotations

import errno
import json
import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import jax

from stackwise_jax.checkpoint import plain
from stackwise_jax.errors import RunError, UsageError
from stackwise_jax.random_streams import fix_settings

USAGE, FAILURE, INTERRUPTED = 2, 1, 130  # exit codes


def add_common(parser: ArgumentParser) -> None:
    """Add the arguments that each command understands: --json and --debug (both off unless given)."""
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run_command(
    main: Callable[[Any], Mapping[str, Any] | None],
    parser: ArgumentParser,
    argv: Sequence[str] | None = None,
    *,
    interrupted: str = "interrupted before the end",
) -> int:
    """Parse, call `main` with the parsed arguments, and turn what comes of it into output and an exit code.

    A failure is one sentence on stderr, and with --json also the object {"error", "exit_code"} on the last line of
    stdout. With --debug the exception is raised after that instead, so that its traceback is seen.

    Args:
        main: does the work; what it returns is the JSON answer (None: another process of the run gives it).
        parser: one that went through `add_common`.
        argv: the arguments after the program's name; None: those of the process.
        interrupted: the sentence after a KeyboardInterrupt that brings none.

    Returns:
        0 done; 2 the request is wrong (UsageError, or the parser refuses); 130 interrupted; 1 anything else failed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    as_json, debug = "--json" in argv, "--debug" in argv  # known even when the parser fails
    try:
        args = _parse(parser, argv)
        fix_settings()
        answer = main(args)
        if as_json and answer is not None:
            print_json(answer)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader (head, less) has seen enough; nothing more can be said on stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except (Exception, KeyboardInterrupt) as error:
        sentence, code = _explain(error, interrupted)
        code = FAILURE if debug else code  # what Python itself exits with after a traceback
        if as_json:
            print_json({"error": sentence, "exit_code": code})
        if debug:
            raise
        print(sentence if code == INTERRUPTED else f"error: {sentence}", file=sys.stderr)
        return code


def print_notes(lines: Iterable[str]) -> None:
    """Print what the user should know of what was asked for, a line each, on stderr."""
    for line in lines:
        print(f"note: {line}", file=sys.stderr)


def print_json(answer: Mapping[str, Any]) -> None:
    """Print one JSON object on a line of its own; numbers that JSON does not know (nan, inf) become null."""
    sys.stderr.flush()
    print(json.dumps(plain(answer)), flush=True)


def _parse(parser: ArgumentParser, argv: list[str]) -> Any:
    def refuse(message: str) -> NoReturn:
        raise UsageError(f"{message}; -h shows what can be written")

    if type(parser).error is ArgumentParser.error:  # which prints its usage and exits
        vars(parser)["error"] = refuse
    return parser.parse_args(argv)


def _explain(error: BaseException, interrupted: str) -> tuple[str, int]:
    """The one sentence and the exit code for an exception."""
    text = " ".join(str(error).split())
    match error:
        case UsageError():
            return text, USAGE
        case KeyboardInterrupt():
            return text or interrupted, INTERRUPTED
        case RunError():
            return text, FAILURE
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EFBIG):
            where = f" at {error.filename}" if error.filename else ""
            return f"the disk is full{where}; free some space and run the same command again", FAILURE
        case jax.errors.JaxRuntimeError() if memory := _memory_that_ran_out(text):
            remedy = "python3 -m stackwise_jax.plan with the same arguments says what takes most and what helps"
            return f"{memory} ran out; {remedy} ({text[:160]})", FAILURE
        case _:
            what = type(error).__name__ + (f": {text}" if text else "")
            return f"{what}; run again with --debug for the traceback", FAILURE


def _memory_that_ran_out(text: str) -> str | None:
    """Which memory XLA found too small, where an error of it says so."""
    if "host memory" in text:
        return "pinned host memory"
    return "device memory" if "RESOURCE_EXHAUSTED" in text or "Out of memory" in text else None
