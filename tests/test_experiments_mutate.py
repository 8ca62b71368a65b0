"""The changes that experiments/trust/mutate.py makes: of one token, of code only, each of them valid Python."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

TRUST = Path(__file__).parent.parent / "experiments" / "trust"
SOURCE = b'''"""Docstring with a < b and 1."""
def f(a: int = 3, *, b=True) -> "1 < 2":
    if a < 2 and not (b or a in (4,)):
        raise ValueError(f"a is {a + 1}, more than {9}")
    \xc3\xa4 = "\xc3\xa4 == 1"; c = min(a, b) + max(1, a) // 2.5
    return g(a, c)[a:] if b else None
'''


@pytest.fixture
def found(monkeypatch):
    monkeypatch.syspath_prepend(str(TRUST))
    return importlib.import_module("mutations").mutations(SOURCE)


def test_each_change_is_valid_code_and_changes_something(found):
    for change in found:
        changed = change.apply(SOURCE)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(SOURCE)), change
        assert SOURCE.splitlines()[change.line - 1] != changed.splitlines()[change.line - 1]


def test_code_is_changed_and_text_is_not(found):
    seen = {(change.kind, change.old, change.new) for change in found}
    assert seen >= {
        ("constant", "3", "4"), ("bool", "True", "False"), ("comparison", "<", "<="), ("comparison", "<", ">"),
        ("and/or", "and", "or"), ("not", "not ", ""), ("comparison", "in", "not in"), ("call", "min", "max"),
        ("arithmetic", "+", "-"), ("arithmetic", "//", "*"), ("constant", "2.5", "1.5"), ("slice", "a", "a + 1"),
        ("swapped arguments", "a, c", "c, a"), ("return", "g(a, c)[a:] if b else None", "None"),
    }  # fmt: skip
    assert not [change for change in found if change.line in (1, 4) or change.old in ("9", "1 < 2")]


@pytest.mark.slow
def test_a_change_that_no_test_sees_survives_and_the_run_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "mutants.jsonl"
    for n in (1, 2, 2):
        command = [sys.executable, str(TRUST / "mutate.py"), "--out", str(out), "--n", str(n)]
        subprocess.run([*command, "--module", "model/rope.py", "--tests", "tests/test_files.py"], check=True)
        results = [json.loads(line)["result"] for line in out.read_text().splitlines()]
        assert results == ["survived"] * n  # the tests of files know nothing of angles
