"""Commands answer with one sentence, an exit code and one JSON line; reporters and tables show what happened."""

from __future__ import annotations

import argparse
import errno
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny import tiny, train

from stackwise_jax.curriculum.phase import Phase
from stackwise_jax.engine import NullReporter
from stackwise_jax.errors import RunError, UsageError
from stackwise_jax.reporting import (
    ConsoleReporter,
    Reporters,
    TensorBoardReporter,
    add_common,
    print_plan,
    print_summary,
    run_command,
)
from stackwise_jax.reporting.tables import clock, count, stack_ids

PHASE = Phase(name="stack_1", path=(0, 1), train=frozenset({1}), train_head=True)
INFO = {"steps": 20, "start_step": 0, "trainable_params": 1234, "frozen_params": 5_600_000, "cache": "host: [it] fits"}
RESULT = {
    "name": "stack_1",
    "held_out_loss": 2.25,
    "bits_per_byte": 3.125,
    "trainable_params": 1234,
    "frozen_params": 5_600_000,
    "tokens": 204_800,
    "flops": 1.5e15,
    "seconds": 65.0,
    "peak_device_bytes": None,
    "peak_host_bytes": 2**31,
}


def step_row(step: int, **changes) -> dict:
    row = {"phase": "stack_1", "step": step, "global_step": 100 + step + 1, "steps": 20, "loss": 4.0 - step / 10}
    row |= {"bits_per_byte": 5.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 12_345.0, "seconds_left": 90.0}
    return row | {"device_bytes": None, "host_bytes": 3 * 2**20} | changes


def evaluation_row(step: int) -> dict:
    row = {"phase": "stack_1", "step": step, "global_step": 100 + step, "depth": 2}
    return row | {"held_out_loss": 2.5, "bits_per_byte": 3.5}


def command(main, *argv: str) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=0)
    add_common(parser)
    return run_command(main, parser, list(argv))


def raising(error: BaseException):
    def main(args):
        print("work has begun")
        raise error

    return main


def console(terminal: bool = False, width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, markup=False, emoji=False, highlight=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# Commands.


def test_the_answer_is_one_json_line_after_everything_else(capsys):
    def main(args):
        print("for people")
        return {"n": args.n, "loss": math.nan, "array": np.arange(2), "scalar": np.float32(0.5), "path": Path("a/b")}

    assert command(main, "--json", "--n", "3") == 0
    out, err = capsys.readouterr()
    *before, last = out.splitlines()
    assert before == ["for people"] and err == ""
    assert json.loads(last) == {"n": 3, "loss": None, "array": [0, 1], "scalar": 0.5, "path": "a/b"}


def test_no_json_unless_asked(capsys):
    assert command(lambda args: {"n": 1}) == 0
    assert capsys.readouterr().out == ""
    assert command(lambda args: None, "--json") == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("model.n_heads is 0;\n write at least 1"), 2, "model.n_heads is 0; write at least 1"),
        (RunError("x.json is damaged; restore it"), 1, "x.json is damaged; restore it"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/run"), 1, "the disk is full at /data/run; free"),
        (KeyboardInterrupt(), 130, "interrupted before the end"),
        (KeyboardInterrupt("stopped at step 3"), 130, "stopped at step 3"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero; run again with --debug"),
        (KeyError(), 1, "KeyError; run again with --debug for the traceback"),
    ],
)
def test_failures_are_one_sentence_and_a_code(capsys, error, code, said):
    assert command(raising(error), "--json") == code
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith(said if code == 130 else f"error: {said}")
    answer = json.loads(out.splitlines()[-1])
    assert answer["exit_code"] == code and answer["error"].startswith(said)
    assert command(raising(error)) == code
    assert capsys.readouterr().out == "work has begun\n"


@pytest.mark.parametrize("argv", [["--n", "many"], ["--unknown", "1"], ["stray"]])
def test_what_the_parser_refuses_is_one_sentence_too(capsys, argv):
    assert command(lambda args: {}, *argv, "--json") == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and argv[0].lstrip("-") in err and "usage:" not in err
    assert json.loads(out)["exit_code"] == 2


def test_a_parser_with_its_own_way_to_refuse_keeps_it(capsys):
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UsageError("in its own words")

    assert run_command(lambda args: {}, Parser(), ["--unknown"]) == 2
    assert capsys.readouterr().err == "error: in its own words\n"


@pytest.mark.parametrize("error", [UsageError("wrong"), RunError("broken"), ValueError("odd"), KeyboardInterrupt()])
def test_debug_raises(capsys, error):
    with pytest.raises(type(error)):
        command(raising(error), "--debug", "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["exit_code"] == 1


def test_a_reader_that_goes_away_is_no_error():
    code = (
        "import argparse, sys\n"
        "from stackwise_jax.reporting.command import add_common, run_command\n"
        "parser = argparse.ArgumentParser(); add_common(parser)\n"
        "def main(args):\n"
        "    for _ in range(100_000): print('a line')\n"
        "sys.exit(run_command(main, parser, []))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


# The console.


def test_without_a_terminal_lines_come_at_intervals():
    shown = console()
    reporter = ConsoleReporter(shown, interval=1000.0)
    reporter.phase_start(1, 3, PHASE, INFO)
    for step in range(20):
        reporter.step(step_row(step))
    reporter.evaluation(evaluation_row(10))
    reporter.evaluation(evaluation_row(20))
    reporter.phase_end(RESULT)
    lines = text_of(shown).splitlines()
    assert lines[0] == "[2/3] stack_1: path 0-1; learning: stack 1, head (1.23K parameters, 5.6M frozen); 20 steps"
    assert lines[1] == "  cache: host: [it] fits"
    steps = [line for line in lines if " step " in line and "bits/byte" in line]
    assert len(steps) == 1  # the last one always shows
    for said in ("20/20", "loss 2.100", "5.000 bits/byte", "12.3K tokens/s", "3.0 MiB", "01:30 left"):
        assert said in steps[0]
    assert [line for line in lines if line.startswith("  held out after step 10, depth 2: loss 2.5")]
    assert lines[-1].startswith("[2/3] stack_1: 3.1250 bits per byte held out at depth 2 (loss 2.2500)")
    assert len(lines) == 5  # the evaluation at the end of the phase is not said twice
    assert "\x1b" not in text_of(shown)


def test_each_interval_shows_a_step():
    shown = console()
    reporter = ConsoleReporter(shown, interval=0.0)
    reporter.phase_start(0, 1, PHASE, INFO)
    for step in range(5):
        reporter.step(step_row(step, loss=math.nan, bits_per_byte=None, seconds_left=math.inf))
    assert text_of(shown).count("bits/byte") == 5


def test_on_a_terminal_there_is_a_bar_that_goes_away():
    shown = console(terminal=True)
    reporter = ConsoleReporter(shown)
    reporter.phase_start(0, 1, PHASE, INFO | {"start_step": 5})
    for step in range(5, 20):
        reporter.step(step_row(step, device_bytes=2**30))
    reporter.note("[said] between")
    reporter.phase_end(RESULT)
    text = text_of(shown)
    assert "going on at step 5" in text and "20/20" in text and "device 1.0 GiB" in text and "[said] between" in text
    assert text.rstrip().endswith("01:05")
    assert reporter._progress is None
    reporter.close()


def test_the_end_is_a_table_and_a_printable_sample():
    shown = console(width=80)
    reporter = ConsoleReporter(shown)
    reporter.finish({"phases": [RESULT, RESULT | {"name": "stack_2"}]}, "The [b]cat\x1b[31m\nsat")
    text = text_of(shown)
    for said in ("stack_1", "stack_2", "3.1250", "205K", "1.50e+15", "01:05", "2.0 GiB", "The [b]cat\\x1b[31m\nsat"):
        assert said in text
    assert "device" not in text  # nobody measured it
    assert max(map(len, text.splitlines())) <= 80


# Tables.


def plan_row(name: str, **changes) -> dict:
    row = {"name": name, "path": (0, 1, 2), "learns": ["head", 2], "objective": "mlm", "noise": "0.15"}
    row |= {"corruption": "fixed", "attention": "bidirectional", "frozen": "bf16", "steps": 200}
    row |= {"trainable_params": 1_500_000, "frozen_params": 20_000_000, "weights_bytes": 2**20}
    row |= {"gradients_bytes": 2**21, "optimizer_bytes": 2**22, "activations_bytes": 2**23, "total_bytes": 15 * 2**20}
    return row | {"cache_bytes": 2**30, "cache": "host: 400 visits of 100 batches"} | changes


def test_the_plan_names_everything_a_phase_needs():
    shown = console(width=80)
    print_plan([plan_row("stack_0"), plan_row("stack_1", steps=300, cache_bytes=None)], shown)
    text = text_of(shown)
    for said in ("0-2", "head, 2", "1.5M", "20M", "1.0 MiB", "2.0 MiB", "4.0 MiB", "8.0 MiB", "15.0 MiB", "1.0 GiB"):
        assert said in text
    assert "all phases: objective mlm, noise 0.15, corruption fixed, attention bidirectional, frozen as bf16" in (
        " ".join(text.split())
    )
    assert "200" in text and "300" in text and "steps 200" not in text  # it differs, so it is a column
    assert text.count("host: 400 visits of 100 batches") == 2
    assert max(map(len, text.splitlines())) <= 80


def test_a_summary_leaves_out_what_nobody_measured():
    without, with_device = console(), console()
    print_summary([RESULT], without)
    print_summary([RESULT | {"peak_device_bytes": 2**20}], with_device)
    assert "device" not in text_of(without)
    assert "device" in text_of(with_device) and "1.0 MiB" in text_of(with_device)


def test_numbers_are_short():
    assert [count(n) for n in (0, 999, 1234, 4.56e6, 7e9, 1.23e15, None)] == [
        "0", "999", "1.23K", "4.56M", "7B", "1.23e+15", "-",
    ]  # fmt: skip
    assert [clock(s) for s in (7.25, 59.99, 185, 3723, None, math.inf)] == [
        "7.2s", "01:00", "03:05", "1:02:03", "-", "-",
    ]  # fmt: skip
    assert stack_ids((0, 1, 2, 5, 4)) == "0-2, 5, 4"


# TensorBoard.


def events(directory: Path) -> list:
    """What the event files hold, file by file."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(directory.glob("events.*")):
        data = path.read_bytes()
        at = 0
        while at < len(data):  # a record: length (8 bytes), its checksum (4), the event, its checksum (4)
            length = int.from_bytes(data[at : at + 8], "little")
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += length + 16
    return found


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves by tag."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events(directory):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_tensorboard_curves_go_over_the_steps_of_the_run(tmp_path):
    reporter = TensorBoardReporter(tmp_path, every=5)
    assert not list(tmp_path.iterdir())
    reporter.phase_start(0, 1, PHASE, INFO)
    for step in range(20):
        reporter.step(step_row(step))
    reporter.evaluation(evaluation_row(20))
    reporter.phase_end(RESULT)
    reporter.finish({"phases": [RESULT]}, "a sample")
    curves = scalars(tmp_path)
    assert [step for step, _ in curves["train/loss"]] == [101, 106, 111, 116, 120]
    assert curves["train/loss"][0][1] == pytest.approx(4.0)
    assert curves["held_out/bits_per_byte"] == [(120, 3.5)]
    assert {"train/lr", "speed/tokens_per_second", "memory/host_bytes", "held_out/loss"} <= curves.keys()
    assert "memory/device_bytes" not in curves


def test_a_run_that_goes_on_purges_what_was_written_beyond(tmp_path):
    reporter = TensorBoardReporter(tmp_path)
    reporter.step(step_row(7))
    reporter.close()
    starts = [event.step for event in events(tmp_path) if event.session_log.status == event.session_log.START]
    assert starts == [108]


def test_several_reporters_hear_everything(tmp_path):
    shown = [console(), console()]
    reporters = Reporters([*(ConsoleReporter(c, interval=0.0) for c in shown), TensorBoardReporter(tmp_path)])
    reporters.note("a note")
    reporters.phase_start(0, 1, PHASE, INFO)
    reporters.step(step_row(0))
    reporters.evaluation(evaluation_row(10))
    reporters.phase_end(RESULT)
    reporters.finish({"phases": [RESULT]}, None)
    reporters.close()
    assert text_of(shown[0]) == text_of(shown[1])
    for said in ("a note", "bits/byte", "held out after step 10", "depth 2 (loss", "Summary"):
        assert said in text_of(shown[0])
    assert scalars(tmp_path)["train/loss"]


def test_the_time_that_is_left_is_that_of_the_steps_to_come(tmp_path):
    rows = []

    class Listener(NullReporter):
        def step(self, row):
            rows.append(dict(row))

    train(tiny("curriculum.steps=2", "run.eval_batches=1"), tmp_path / "run", reporter=Listener())
    assert [row["global_step"] for row in rows] == [1, 2, 3, 4]
    for phase in (rows[:2], rows[2:]):
        spent = 0.0
        for done, row in enumerate(phase, 1):
            spent += 4 * 16 / row["tokens_per_second"]
            assert row["seconds_left"] == pytest.approx((4 - row["global_step"]) * spent / done)
