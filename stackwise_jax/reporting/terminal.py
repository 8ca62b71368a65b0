"""Text on its way to a terminal, a file or a pipe: what is written there, and what happens when it takes no more."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from typing import Any

# Control characters (C0, DEL, C1), separators of lines, marks that turn the direction of writing, lone surrogates.
_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
OUTPUT_ERRORS = (OSError, ValueError)  # of a stream: full, its reader or terminal gone, closed, unable to encode


def printable(text: str, *, keep: str = "") -> str:
    """The text with every character that could steer a terminal written as an escape such as \\x1b.

    Whatever comes from a file or the command line (names, paths, values) is printed through this.

    Args:
        keep: characters that stay: line feed and tab where text of several lines is shown.
    """
    return _STEERING.sub(lambda c: c[0] if c[0] in keep else c[0].encode("unicode_escape").decode(), text)


def say(text: str, *, stderr: bool = False) -> None:
    """Print one line. On stderr a failure is passed over, for there is no other place to report it.

    Raises:
        OSError, ValueError: stdout takes no more.
    """
    if not stderr:
        print(printable(text))
        return
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except OUTPUT_ERRORS:
        discard(sys.stderr)


def open_streams() -> None:
    """Make stdout and stderr take any character, and log lines printable. A descriptor that the shell closed (>&-)
    becomes the null device: the next file that is opened would take its number, and with it what others print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (as long as the process)
        escape_unencodable(getattr(sys, name))
    if not logging.root.handlers:
        logging.root.addHandler(_LogLines(logging.WARNING))


def escape_unencodable(stream: Any) -> None:
    """Have a text stream write what its encoding does not have (ascii, cp1252) as escapes instead of raising."""
    if hasattr(stream, "reconfigure"):
        with contextlib.suppress(*OUTPUT_ERRORS):  # it is closed, or broken with text in it
            stream.reconfigure(errors="backslashreplace")


def settle(stream: Any) -> None:
    """Bring a stream's text to where it goes; where that fails the text is lost, and nothing fails over it later."""
    try:
        if not getattr(stream, "closed", False):
            stream.flush()
    except OUTPUT_ERRORS:
        discard(stream)


def discard(stream: Any) -> None:
    """Send what a broken stream holds, and all that comes, to the null device, so that nothing fails over it again."""
    with contextlib.suppress(*OUTPUT_ERRORS, AttributeError):  # it may be closed, or no file at all
        number = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)


class _LogLines(logging.Handler):
    """Log records as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except Exception:  # a record of a library whose arguments do not fit its text
            text = str(record.msg)
        say(f"{record.levelname.lower()}: {' '.join(text.split())}", stderr=True)
