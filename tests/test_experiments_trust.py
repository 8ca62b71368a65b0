"""A dozen of the bad inputs of experiments/trust, and that the script sees what is wrong with an answer."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path

import pytest

TRUST = Path(__file__).parent.parent / "experiments" / "trust"
DOZEN = (
    "train model.d_model=abc",
    "train --learning_rate",
    "train YAML: open bracket",
    "plan --device nope",
    "train data.path @files/utf16.txt",
    "train data.path @files/pipe.txt",
    "train tokenizer.path @files/random.model",
    "train run.dir @canary/precious.txt",
    "evaluate RUN @canary",
    "evaluate --data.path /dev/zero",
    "generate run tokenizer-list",
    "generate --top_p 2",
    "inspect RUN @files/good.txt",
    "convert @out --sizes 3",
)


@pytest.fixture(scope="module")
def parts():
    """The modules of the script."""
    sys.path.insert(0, str(TRUST))
    try:
        yield {name: importlib.import_module(name) for name in ("bad_inputs", "bad_cases", "bad_files", "bad_worker")}
    finally:
        sys.path.remove(str(TRUST))


@pytest.fixture(scope="module")
def workshop(parts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trust") / "workshop"
    parts["bad_files"].build(folder, runs=["tokenizer-list"])
    return folder


def test_there_are_hundreds_of_cases_for_all_commands(parts):
    cases = parts["bad_cases"].all_cases()
    names = [(case.command, case.name) for case in cases]
    assert len(cases) >= 300 and {command for command, _ in names} == {
        "train", "plan", "evaluate", "generate", "inspect", "convert",
    }  # fmt: skip


@pytest.mark.parametrize("name", DOZEN)
def test_a_dozen_of_them_in_this_process(parts, workshop, name, monkeypatch):
    inputs, worker = parts["bad_inputs"], parts["bad_worker"]
    case = next(case for case in parts["bad_cases"].all_cases() if f"{case.command} {case.name}" == name)
    monkeypatch.chdir(workshop / "cwd")
    main = importlib.import_module(f"stackwise_jax.{case.command}").main
    before = inputs.snapshot(workshop)
    result = worker.run(main, inputs.arguments_of(case, workshop), seconds=0)  # 0: no alarm
    assert inputs.faults(case, result, before, inputs.snapshot(workshop), 20) == [], result


def test_what_is_wrong_is_seen(parts, tmp_path):
    inputs, worker = parts["bad_inputs"], parts["bad_worker"]
    case = parts["bad_cases"].Case("x", "train", ())

    def faults(main, seconds: float = 20) -> list[str]:
        before = inputs.snapshot(tmp_path)
        signal.signal(signal.SIGALRM, worker.stop)
        result = worker.run(main, [], 1)
        return inputs.faults(case, result, before, inputs.snapshot(tmp_path), seconds)

    def sentence(argv) -> int:
        os.write(2, b"note: a note\nerror: a sentence\n")
        return 2

    def unforeseen(argv) -> int:
        os.write(2, b"error: KeyError; run again with --debug for the traceback\n")
        return 1

    def writes(argv) -> int:
        (tmp_path / "left").write_text("x")
        return sentence(argv)

    def steers(argv) -> int:
        os.write(1, b"\x1b[31m")
        return sentence(argv)

    def hangs(argv) -> int:
        while True:
            pass

    assert faults(sentence) == []
    assert faults(unforeseen) == ["an unforeseen error"]
    assert faults(writes) == [f"changed {tmp_path / 'left'}"]
    assert faults(steers) == ["a control character"]
    assert faults(lambda argv: [][0])[:2] == ["a traceback", "exit code None"]
    assert faults(lambda argv: 0)[0] == "exit code 0"
    assert "1 seconds" in faults(hangs, seconds=0.5) and "exit code None" in faults(hangs)
