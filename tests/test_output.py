"""Output never ends a run and never steers a terminal; what goes wrong is a sentence."""

from __future__ import annotations

import argparse
import errno
import io
import json
import logging
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import SHORT, arguments, environment, finish, progress, start
from rich.console import Console
from test_reporting import INFO, PHASE, RESULT, evaluation_row, plan_row, step_row
from tiny import tiny, train

from stackwise_jax.reporting import (
    ConsoleReporter,
    Reporters,
    TensorBoardReporter,
    add_common,
    print_plan,
    print_summary,
    run_command,
)
from stackwise_jax.reporting.inspection_text import print_inspection
from stackwise_jax.reporting.terminal import open_streams, printable
from stackwise_jax.train import stop_on_signal

HOSTILE = "[red]a[/] [/b]\x1b[31m\x9b2J\u202eb\r\n\x07"  # rich markup, escape sequences, a turned direction, a new line
ESCAPED = "[red]a[/] [/b]\\x1b[31m\\x9b2J\\u202eb\\r\\n\\x07"


class Broken(io.StringIO):
    """A stream that takes `whole` writes and fails from then on."""

    def __init__(self, error: Exception, whole: int = 0, terminal: bool = False):
        super().__init__()
        self.error, self.left, self.terminal = error, whole, terminal

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)

    def isatty(self) -> bool:
        return self.terminal


def tell(reporter) -> None:
    """Every event of a small run."""
    reporter.note("a note")
    reporter.phase_start(0, 1, PHASE, INFO)
    for step in range(20):
        reporter.step(step_row(step))
    reporter.evaluation(evaluation_row(10))
    reporter.phase_end(RESULT)
    reporter.finish({"phases": [RESULT]}, "a sample")
    reporter.close()


def command(main, *argv: str) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int)
    add_common(parser)
    return run_command(main, parser, list(argv))


def raising(error: BaseException):
    def main(args):
        raise error

    return main


# A run outlives its output.


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("whole", [0, 1, 5])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EIO, "Input/output error"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        UnicodeEncodeError("ascii", "\xb7", 0, 1, "ordinal not in range"),
        ValueError("I/O operation on closed file"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_reporter_is_silent_once_its_stream_fails(error, whole, terminal):
    stream = Broken(error, whole, terminal)
    before = sys.stdout, sys.stderr, threading.active_count()
    tell(reporter := ConsoleReporter(Console(file=stream, force_terminal=terminal, width=100), interval=0.0))
    left = stream.left
    tell(reporter)
    assert reporter.lost and stream.left == left < 0
    assert (sys.stdout, sys.stderr, threading.active_count()) == before


def test_a_run_whose_stream_fails_is_trained_to_its_end(tmp_path):
    stream = Broken(OSError(errno.ENOSPC, "No space left on device"), whole=2)
    run = train(tiny("curriculum.plan=rackwise"), tmp_path / "run", reporter=ConsoleReporter(Console(file=stream)))
    last = run.recorder.store.latest()
    assert last is not None and last.finished and stream.left < 0


def test_a_slow_reader_loses_no_later_line():
    stream = Broken(BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"))
    reporter = ConsoleReporter(Console(file=stream))
    reporter.note("lost or late")
    stream.left = 10
    reporter.note("a later line")
    assert not reporter.lost and "a later line" in stream.getvalue()


def test_a_stream_that_cannot_encode_gets_escapes():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    tell(reporter := ConsoleReporter(Console(file=stream, width=100), interval=0.0))
    stream.flush()
    said = stream.buffer.getvalue().decode()  # pyright: ignore[reportAttributeAccessIssue]
    assert not reporter.lost and "loss 2.100 \\xb7 5.000 bits/byte" in said and "a sample" in said


@pytest.mark.parametrize("what", ["file in the way", "link", "full"])
def test_curves_that_cannot_be_written_are_one_warning(tmp_path, what, caplog, monkeypatch):
    directory, outside = tmp_path / "tensorboard", tmp_path / "outside"
    outside.mkdir()
    if what == "file in the way":
        directory.write_text("")
    elif what == "link":
        directory.symlink_to(outside)
    else:
        from tensorboardX.event_file_writer import EventsWriter

        def full(self, event):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(EventsWriter, "write_event", full)
    with caplog.at_level(logging.WARNING):
        tell(Reporters([TensorBoardReporter(directory)]))
    assert len(caplog.messages) == 1 and f"curves cannot be written to {directory} (" in caplog.text
    assert "the run goes on without them" in caplog.text and not list(outside.iterdir())


@pytest.mark.slow
def test_a_run_into_ascii_and_into_a_full_disk(tmp_path):
    argv = arguments(SHORT | {"run.sample_tokens": 16, "model.architecture.n_stacks": 1, "curriculum.plan": "rackwise"})
    env = environment(compiled=tmp_path / "compiled") | {"PYTHONIOENCODING": "ascii"}
    out, _ = finish(start("train", *argv, f"--run.dir={tmp_path / 'ascii'}", env=env))
    assert "sample" in out and "\\xb7" in out and out.isascii()
    line = [sys.executable, "-m", "stackwise_jax.train", *argv, "--json", f"--run.dir={tmp_path / 'full'}"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, env=env, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("ascii", "full"):
        last = progress(tmp_path / name)
        assert last is not None and last.finished


@pytest.mark.slow
def test_a_closed_terminal_saves_and_stops(tmp_path):
    """SIGHUP comes twice, and then nothing can be written to the terminal."""
    master, slave = pty.openpty()
    argv = arguments({"curriculum.steps": 10**6, "run.save_every": 10**5}, dir=tmp_path / "run")
    line = [sys.executable, "-m", "stackwise_jax.train", *argv]
    process = subprocess.Popen(line, env=environment(), stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    try:
        metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end:
            os.set_blocking(master, False)
            try:
                os.read(master, 65536)
            except BlockingIOError:
                time.sleep(0.05)
        os.close(master)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 130
    finally:
        process.kill()
    last = progress(tmp_path / "run")
    assert last is not None and not last.finished and last.global_step > 0


def test_hangup_stops_unless_it_was_ignored():
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with stop_on_signal() as stop:
            assert not stop.is_set()
            for _ in range(2):  # from the terminal and from the shell
                signal.raise_signal(signal.SIGHUP)
            assert stop.is_set()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stop_on_signal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_stopping_outlives_a_stderr_that_is_gone():
    saved, (reading, writing) = os.dup(2), os.pipe()
    os.close(reading)
    os.dup2(writing, 2)
    try:
        with stop_on_signal() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.is_set()
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(writing)


CHILD = """
import argparse, sys
from stackwise_jax.reporting.command import add_common, run_command
parser = argparse.ArgumentParser(); add_common(parser)
def main(args):
    {body}
sys.argv[1:] = []
sys.exit(run_command(main, parser))
"""


def child(body: str, **how) -> subprocess.CompletedProcess:
    line = [sys.executable, "-c", CHILD.format(body=body)]
    return subprocess.run(line, stderr=subprocess.PIPE, text=True, timeout=100, **how)


def test_a_product_that_cannot_be_printed_is_a_failure():
    with open("/dev/full", "w") as full:
        done = child("print('the product')", stdout=full)
    assert done.returncode == 1 and done.stderr.startswith("error: the disk is full") and done.stderr.count("\n") == 1


def test_errors_of_threads_and_of_the_end_show_no_traceback():
    body = (
        "import threading, atexit, weakref\n"
        "    class Late:\n        def __del__(self): raise ValueError('late')\n"
        "    threading.Thread(target=lambda: 1 / 0).start(); main.late = Late(); atexit.register(lambda: [][0])"
    )
    done = child(body, stdout=subprocess.PIPE)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert done.stderr.splitlines()[0].startswith("error: ZeroDivisionError")


def test_warnings_are_a_line_each():
    done = child("import warnings; warnings.warn('a\\n\x1b[31mb')", stdout=subprocess.PIPE)
    assert done.returncode == 0 and done.stderr.startswith("warning: ") and "UserWarning: a" in done.stderr
    assert done.stderr.count("\n") == 1 and "\x1b" not in done.stderr


def test_descriptors_that_the_shell_closed_are_not_taken_by_files(tmp_path):
    code = CHILD.format(body=f"print(open({str(tmp_path / 'file')!r}, 'w').fileno() > 2, file=open(3, 'w'))")
    reading, writing = os.pipe()
    script = f'exec 3>&{writing}; exec "{sys.executable}" -c "$CODE" >&- 2>&-'
    done = subprocess.run(["bash", "-c", script], env=os.environ | {"CODE": code}, pass_fds=[writing], timeout=100)
    os.close(writing)
    assert done.returncode == 0 and os.read(reading, 100) == b"True\n"
    os.close(reading)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc for when the import has begun")
def test_ctrl_c_while_a_command_is_imported_shows_no_traceback():
    process = start("plan", "--help")
    while process.poll() is None and "jaxlib" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err and process.returncode in (-signal.SIGINT, 130)


# Nothing steers a terminal.


def test_printable():
    assert printable(HOSTILE) == ESCAPED
    assert printable("a\tb\ncé\u200d\U0001f600\x1b", keep="\n\t") == "a\tb\ncé\u200d\U0001f600\\x1b"
    assert printable("\ud800 \u2028 \u2066 \x7f") == "\\ud800 \\u2028 \\u2066 \\x7f"


def shown(draw) -> str:
    """What a terminal gets, without the escape sequences of rich itself."""
    console = Console(file=io.StringIO(), width=200, no_color=True)
    draw(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def draw_run(console: Console) -> None:
    import dataclasses

    reporter = ConsoleReporter(console, interval=0.0)
    reporter.note(HOSTILE)
    reporter.phase_start(0, 1, dataclasses.replace(PHASE, name=HOSTILE), INFO | {"cache": HOSTILE})
    reporter.step(step_row(0))
    reporter.phase_end(RESULT)
    reporter.finish({"phases": [RESULT | {"name": HOSTILE}]}, HOSTILE)
    assert not reporter.lost


def draw_inspection(console: Console) -> None:
    leaf = {"name": f"a/{HOSTILE.replace('/', '')}/b", "shape": [1], "dtype": HOSTILE, "bytes": 4}
    item = {"name": HOSTILE, "version": 1, "leaves": [leaf], "format": HOSTILE, "phase": HOSTILE, "spec": HOSTILE}
    item |= {"loss_history": [{"step": 1, "loss": 2.0}]}
    phase = {"name": HOSTILE, "path": [0], "learns": [HOSTILE], "state": HOSTILE, "held_out_loss": HOSTILE}
    report = {"kind": "run", "path": HOSTILE, "state": HOSTILE, "config": {"data": {"path": HOSTILE}}}
    print_inspection(report | {"phases": [phase], "records": [], "items": [item], "damage": [HOSTILE]}, console)


@pytest.mark.parametrize(
    ("draw", "times"),
    [
        (draw_run, 7),
        (draw_inspection, 12),
        (lambda console: print_plan([plan_row(HOSTILE, cache=HOSTILE, frozen=HOSTILE, learns=[HOSTILE])], console), 6),
        (lambda console: print_summary([RESULT | {"name": HOSTILE}], console), 1),
    ],
    ids=["run", "inspection", "plan", "summary"],
)
def test_names_from_files_are_printed_as_they_are(draw, times):
    text = shown(draw)
    assert not set("\x1b\x9b\u202e\r\x07") & set(text)
    assert text.replace("\\r\n", "\\r\\n").count("\\x1b[31m\\x9b2J\\u202eb") >= times and "[red]a[/" in text


@pytest.mark.parametrize("error", [ValueError(HOSTILE), FileNotFoundError(errno.ENOENT, "No such file", HOSTILE)])
def test_errors_are_printed_without_what_steers(error, capsys):
    assert command(raising(error), "--json") == 1
    out, err = capsys.readouterr()
    assert "\\x1b[31m" in err and err.count("\n") == 1 and not set("\x1b\x9b\u202e\r\x07") & set(out + err)
    assert "\x1b[31m" in json.loads(out)["error"]
    assert command(lambda args: {}, "--n", HOSTILE) == 2
    assert "\\x1b[31m" in (err := capsys.readouterr().err) and "\x1b" not in err


def test_log_lines_are_printed_without_what_steers(capsys, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])
    open_streams()
    logging.getLogger("elsewhere").warning("%s is odd", HOSTILE)
    logging.getLogger("elsewhere").warning("a record that %s does not %s", "fit")
    assert capsys.readouterr().err.startswith("warning: " + " ".join(HOSTILE.split())[:5])
    logging.getLogger("elsewhere").warning(HOSTILE)
    assert not set("\x1b\x9b\u202e\x07") & set(capsys.readouterr().err)


# Failures of the machine are sentences.


def too_large() -> MemoryError:
    with pytest.raises(MemoryError) as failure:
        np.empty(2**60, np.uint8)
    return failure.value


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: permission denied; change its rights"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/a"), "/a: is a directory; write the path of a file"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), "x: file name too long; write a shorter path"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", b"/l"), "/l: too many levels of symbolic links"),
        (OSError(errno.EROFS, "Read-only file system", Path("/r")), "/r: read-only file system; write a path on"),
        (OSError(errno.EIO, "Input/output error", "/a"), "/a: input/output error; look at the disk"),
        (OSError(errno.EMFILE, "Too many open files", "/a"), "/a: too many open files; raise the limit"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", ""), "an empty path: no such file"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full; free some space"),
        (OSError(errno.EIO, "Input/output error"), "error: input/output error; look at the disk"),
        (MemoryError(), "host memory ran out; python3 -m stackwise_jax.plan"),
        (too_large(), "host memory ran out (Unable to"),
        (RuntimeError("std::bad_alloc"), "host memory ran out (std::bad_alloc)"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), "memory ran out (RES"),
        (RecursionError("maximum recursion depth exceeded"), "an argument or a file is nested too deeply"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_failures_of_the_machine_are_sentences(error, said, capsys):
    assert command(raising(error)) == 1
    err = capsys.readouterr().err
    assert said in err and err.startswith("error: ") and err.count("\n") == 1 and "--debug" not in err
