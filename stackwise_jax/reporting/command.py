"""What all commands share: how they parse, fail in one sentence, answer with JSON and choose the exit code."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
import threading
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from stackwise_jax.checkpoint import plain
from stackwise_jax.errors import UsageError
from stackwise_jax.random_streams import fix_settings
from stackwise_jax.reporting.failures import FAILURE, INTERRUPTED, explain
from stackwise_jax.reporting.terminal import OUTPUT_ERRORS, open_streams, say, settle


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
        argv: the arguments after the program's name; None: those of the process, which then belongs to the command.
        interrupted: the sentence after a KeyboardInterrupt that brings none.

    Returns:
        0 done; 2 the request is wrong (UsageError, or the parser refuses); 130 interrupted; 1 anything else failed.
    """
    owns_process = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    as_json, debug = "--json" in argv, "--debug" in argv  # known even when the parser fails
    open_streams()
    if owns_process:
        _own_process(debug)
    try:
        args = _parse(parser, argv)
        fix_settings()
        answer = main(args)
        if as_json and answer is not None:
            print_json(answer)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader (head, less) has seen enough; nothing more can be said on stdout
        return FAILURE
    except (Exception, KeyboardInterrupt) as error:
        sentence, code = explain(error, interrupted)
        code = FAILURE if debug else code  # what Python itself exits with after a traceback
        if as_json:
            with contextlib.suppress(*OUTPUT_ERRORS):
                print_json({"error": sentence, "exit_code": code})
        if debug:
            raise
        say(sentence if code == INTERRUPTED else f"error: {sentence}", stderr=True)
        return code
    finally:
        settle(sys.stdout)
        settle(sys.stderr)


def print_notes(lines: Iterable[str]) -> None:
    """Print what the user should know of what was asked for, a line each, on stderr."""
    for line in lines:
        say(f"note: {line}", stderr=True)


def print_json(answer: Mapping[str, Any]) -> None:
    """Print one JSON object on a line of its own; numbers that JSON does not know (nan, inf) become null."""
    settle(sys.stderr)
    print(json.dumps(plain(answer)), flush=True)


def _own_process(debug: bool) -> None:
    """Take over what there is once in a process: Ctrl-C, and errors that nobody catches."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see stackwise_jax/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if debug:
        return
    logging.captureWarnings(True)  # a line each, as all log lines, and nothing of the source beside it
    sys.excepthook = lambda kind, error, traceback: say(explain(error)[0], stderr=True)
    sys.unraisablehook = lambda unraisable: None  # while something is collected or Python exits; it changes nothing
    threading.excepthook = lambda report: _report_of_thread(report.exc_value)


def _report_of_thread(error: BaseException | None) -> None:
    if error is not None and not isinstance(error, SystemExit):
        say(f"error: {explain(error)[0]}", stderr=True)


def _parse(parser: ArgumentParser, argv: list[str]) -> Any:
    def refuse(message: str) -> NoReturn:
        raise UsageError(f"{message}; -h shows what can be written")

    if type(parser).error is ArgumentParser.error:  # which prints its usage and exits
        vars(parser)["error"] = refuse
    return parser.parse_args(argv)
