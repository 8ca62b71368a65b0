"""Runs commands inside one process, one after the other: reads a line of JSON (argv), answers with a line (what came).

python bad_worker.py COMMAND SECONDS
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback

MEMORY = 6 * 2**30  # bytes of data that the process may have


class TooLong(BaseException):
    """The time of a case is up; nothing that catches errors catches it."""


def stop(number, frame) -> None:
    """End the case that runs; for SIGALRM."""
    raise TooLong


@contextlib.contextmanager
def captured(name: str):
    """Everything that goes to stdout or stderr, what C++ writes included: a list that holds the text afterwards."""
    number, before, text = {"stdout": 1, "stderr": 2}[name], getattr(sys, name), []
    before.flush()
    saved = os.dup(number)
    with tempfile.TemporaryFile() as file, open(os.dup(file.fileno()), "w", encoding="utf-8") as stream:
        os.dup2(file.fileno(), number)
        setattr(sys, name, stream)
        try:
            yield text
        finally:
            stream.flush()
            setattr(sys, name, before)
            os.dup2(saved, number)
            os.close(saved)
            file.seek(0)
            text.append(file.read().decode(errors="replace"))


def run(main, argv: list[str], seconds: float) -> dict:
    """Call a command; returns exit code (None: none came), seconds, and what it wrote.

    Args:
        seconds: after which `stop` ends it, where it handles SIGALRM; 0: no end.
    """
    code, escaped = None, ""
    begun = time.perf_counter()
    with captured("stdout") as out, captured("stderr") as err:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            code = main(argv)
        except TooLong:
            escaped = "too long"
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:  # what a command must not let out
            escaped = traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.perf_counter() - begun
    return {"code": code, "seconds": seconds, "out": out[0], "err": err[0] + escaped}


def serve() -> None:
    """Answer until the input ends."""
    command, seconds = sys.argv[1], float(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    signal.signal(signal.SIGALRM, stop)
    main = importlib.import_module(f"stackwise_jax.{command}").main
    for line in sys.stdin:
        print(json.dumps(run(main, json.loads(line), seconds)), file=answers, flush=True)


if __name__ == "__main__":
    serve()
